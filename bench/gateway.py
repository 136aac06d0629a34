"""A gateway in a folder: the agent's files for the pumps of bench.peers.sensors, and how the running agent stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.peers.sensors import CONTRACT
from bench.peers.window_model import lay_down
from bench.running import Peer, wait_for
from edge_agent.contract.errors import UnavailableError
from edge_agent.status import ask
from tests.servers import HOST

START_S_MAX = 30.0
SETTLED_S_MAX = 120.0
ZONES = Path(__file__).parents[1] / "contracts" / "zones.geojson"
AGENT = """
device = "gateway-01"
state_dir = "state"
zones = "zones.geojson"
{releases}
[sensors]
{sensors}

[[streams]]
contract = "vibration.odcs.yaml"

[position]
source = "static"
lat = 50.0
lon = 9.0

[[endpoints]]
name = "eu"
url = "mqtt://127.0.0.1:{upstream}"
"""
RELEASES = '[releases]\nurl = "http://127.0.0.1:9"\nroot = "root.json"\n'


def write(home: Path, port: int, upstream: int, *, model: bool, listener: bool) -> None:
    """agent.toml and what it names; with `model` a released one is there already."""
    (home / "zones.geojson").write_bytes(ZONES.read_bytes())
    (home / "vibration.odcs.yaml").write_text(CONTRACT)
    (home / "root.json").write_text('{"signed": {"_type": "root"}}')
    sensors = f'listen = "mqtt://{HOST}:{port}"' if listener else f'url = "mqtt://{HOST}:{port}"\nsubscribe = "sensors/#"'
    text = AGENT.format(releases=RELEASES if model else "", sensors=sensors, upstream=upstream)
    (home / "agent.toml").write_text(text)
    if model:
        lay_down(home / "state")


def status(home: Path) -> dict[str, Any]:
    """What the agent says; empty if it does not answer."""
    try:
        return ask(home / "state")
    except UnavailableError:
        return {}


def wait_until_ready(home: Path, agent: Peer, *, model: bool) -> None:
    """Until it is connected on both sides and, if it has one, its model is active."""

    def ready() -> bool:
        if agent.ended:
            raise RuntimeError(f"the agent has ended: {agent.log()}")
        found = status(home)
        working = found.get("endpoints", {}).get("eu", {}).get("connected") and found["sensors"]["connected"]
        return bool(working) and (not model or found["model"]["active"] is not None)

    wait_for(ready, START_S_MAX, lambda: f"the agent is not ready: {status(home)}\n{agent.log()}")


def wait_until_settled(home: Path) -> None:
    """Until the cloud has receipted every block."""

    def settled() -> bool:
        return bool(status(home).get("buffer", {}).get("waiting_blocks") == 0)

    wait_for(settled, SETTLED_S_MAX, lambda: f"blocks are left: {status(home)}")
