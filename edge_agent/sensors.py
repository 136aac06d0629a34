"""All sides of the sensors behind one inlet: what agent.toml names, started and stopped together, each with its own status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from edge_agent.addresses import Listen, Subscription
from edge_agent.config import AgentConfig
from edge_agent.mqtt.inlet import Batch, BatchLimits, Inlet
from edge_agent.mqtt.listener import Listener, ListenerConfig
from edge_agent.mqtt.source import Source, SourceConfig
from edge_agent.subscriptions import Subscriptions


class Sensors:
    """The sides of one agent. `get` gives batches of all of them, in the order in which they were handed over."""

    def __init__(self, config: AgentConfig) -> None:
        """Make the sides, without network; ConfigError for TLS files that do not load."""
        settings, flush = config.settings.sensors, config.settings.flush
        each = settings if isinstance(settings, list) else [settings]
        self._inlet = Inlet(BatchLimits(flush.rows_max, flush.bytes_max, flush.ms_max), max(s.queue_batches_max for s in each))
        subscriptions = Subscriptions(config.state_dir / "subscriptions.json")
        self._sides = {_name(i, side.name): _side(side, self._inlet, subscriptions) for i, side in enumerate(config.sensors)}

    def start(self) -> None:
        """Start every side."""
        for side in self._sides.values():
            side.start()

    def stop(self) -> None:
        """Stop every side; what was not released comes again."""
        for side in self._sides.values():
            side.stop()

    def get(self, timeout_s: float) -> Batch | None:
        """The next batch, or None if there is none in time.

        Raises:
            RuntimeError: the thread of a side has died of a defect.
        """
        return self._inlet.get(timeout_s)

    def describe(self) -> dict[str, Any]:
        """All of them in one word each, then side by side. `error` is the first side's that has one."""
        sides = {name: asdict(side.status) for name, side in self._sides.items()}
        return {
            "connected": all(s["connected"] for s in sides.values()),
            "messages": sum(s["messages"] for s in sides.values()),
            "error": next((f"{name}: {s['error']}" if len(sides) > 1 else s["error"] for name, s in sides.items() if s["error"]), ""),
            "sides": sides,
        }


def _name(i: int, name: str) -> str:
    return name if i == 0 else f"{name} [{i}]"


def _side(side: Subscription | Listen, inlet: Inlet, subscriptions: Subscriptions) -> Source | Listener:
    if isinstance(side, Listen):
        return Listener(ListenerConfig(side.host, side.port, side.tls, side.users_file, side.connections_max), inlet)
    broker = side.broker
    return Source(
        SourceConfig(
            host=broker.host,
            port=broker.port,
            client_id=side.client_id,
            subscribe=side.subscribe,
            version=side.version,
            username=broker.username,
            password=broker.password,
            tls=broker.tls,
            keepalive_s=broker.keepalive_s,
        ),
        inlet,
        subscriptions,
    )
