"""Everything that runs during the demonstration: the stack, the gateways' agents, and ways to wait for them.

`close` ends all of it, in order, and leaves no process behind.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cloud.config import Settings
from cloud.demo.agents import AgentProcess, stop_all
from cloud.demo.display import Display
from cloud.demo.outcome import count_rows
from cloud.demo.track import Place
from cloud.enrol import Position, enrol
from cloud.fleet import Fleet
from cloud.lake import Lake
from cloud.stack import Stack
from edge_agent.contract.errors import UnavailableError

POLL_S = 0.25
FLUSH = """
[flush] # readings come slowly here; a block for each would be mostly header
ms_max = 500.0
"""

T = TypeVar("T")


@dataclass
class Uplinked:
    """What agents have sent, over all their lives: bytes of blocks (sent again or not), and lanes that moved from a lost endpoint."""

    bytes: int = 0
    failovers: int = 0


@dataclass
class House:
    """A running stack with its fleet."""

    settings: Settings
    stack: Stack
    display: Display
    logs: Path
    agents: list[AgentProcess] = field(default_factory=list)
    uplinked: Uplinked = field(default_factory=Uplinked)
    broker_kills: int = 0

    @property
    def lake(self) -> Lake:
        """The lake as it is now."""
        return Lake(self.settings.lake)

    @property
    def fleet(self) -> Fleet:
        return Fleet(self.settings.fleet_db)

    def add_device(self, device: str, place: Place | None) -> None:
        """Register a device and its agent, which is not started yet."""
        home = None if place is None else Position(place.lat, place.lon)
        config_path = enrol(self.settings, self.fleet, device, home=home)
        with config_path.open("a") as file:
            file.write(FLUSH)
        self.agents.append(AgentProcess(device, config_path, self.logs / f"agent-{device}.log"))

    def wait(self, what: str, timeout_s: float, poll: Callable[[], T | None]) -> T:
        """Ask `poll` until it gives something true; meanwhile watch that stack and agents live.

        Raises:
            UnavailableError: it took longer than `timeout_s`, or a part has ended by itself.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            self.check()
            answer = poll()
            if answer:
                return answer
            if time.monotonic() >= deadline:
                raise UnavailableError(f"waited {timeout_s:.0f} s in vain for {what}")
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raise UnavailableError if an agent has ended by itself."""
        for agent in self.agents:
            agent.check()

    def wait_for_sensors(self, timeout_s: float = 60.0) -> None:
        """Wait until every agent reads the sensor broker: only from then on does the broker keep messages for it."""
        self.wait("all agents to read the sensor broker", timeout_s, lambda: all(_connected(agent) for agent in self.agents))

    def wait_for_rows(self, rows: int, timeout_s: float) -> int:
        """Wait until the lake holds `rows` readings and no agent has a block waiting; the number of rows."""
        with self.display.counting("readings in the lake", rows) as advance:
            shown = 0

            def poll() -> bool:
                nonlocal shown
                found = count_rows(self.lake)
                advance(found - shown)
                shown = found
                return found >= rows

            self.wait(f"{rows:,} readings in the lake", timeout_s, poll)
        self.wait("receipts for all blocks", timeout_s, lambda: all(_waiting(a) == 0 for a in self.agents))
        return shown

    def kill_broker(self, region: str) -> None:
        """SIGKILL a region's broker; the stack leaves it down until `restart_broker`."""
        self.stack.kill_broker(region)
        self.broker_kills += 1

    def restart_broker(self, region: str) -> None:
        self.stack.restart_broker(region)

    def kill_agent(self, agent: AgentProcess) -> None:
        """kill -9, after noting what it has sent: that count dies with it."""
        self.note_uplink(agent)
        agent.kill()

    def note_uplink(self, agent: AgentProcess) -> None:
        """Add what an agent has sent so far; call it once per life, shortly before the end."""
        status = agent.status()
        if status is not None:
            self.uplinked.bytes += status["uplink"]["bytes_sent"]
            self.uplinked.failovers += sum(e["failovers"] for e in status["endpoints"].values())

    def close(self) -> None:
        """End agents, then the stack."""
        try:
            stop_all(self.agents)
        finally:
            self.stack.stop()


def _connected(agent: AgentProcess) -> bool:
    status = agent.status()
    return status is not None and bool(status["sensors"]["connected"])


def _waiting(agent: AgentProcess) -> int | None:
    status = agent.status()
    return None if status is None else int(status["buffer"]["waiting_blocks"])
