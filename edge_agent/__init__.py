"""The agent that runs on a gateway. Start reading at `edge_agent.agent`."""

__version__ = "0.1.0"
