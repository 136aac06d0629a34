"""The faults of the failover benchmark, by name. Each is made in well under a millisecond and undone again.

- `kill`: SIGKILL to the broker. `stop`: SIGSTOP, connections stay half open. `blackhole`: packets dropped in silence both ways.
- `one_way`: dropped one way only; the way changes from run to run. `reset`: every packet is answered with a TCP reset.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from bench.failover_site import PORT, PlacedBroker

Fault = Callable[[PlacedBroker, int], None]


def _kill(broker: PlacedBroker, _run: int) -> None:
    broker.kill()


def _stop(broker: PlacedBroker, _run: int) -> None:
    broker.stop_signal()


def _blackhole(broker: PlacedBroker, _run: int) -> None:
    broker.place.drop(PORT)


def _one_way(broker: PlacedBroker, run: int) -> None:
    broker.place.drop(PORT, incoming=run % 2 == 0, outgoing=run % 2 == 1)


def _reset(broker: PlacedBroker, _run: int) -> None:
    broker.place.reset(PORT)


FAULTS: dict[str, Fault] = {"kill": _kill, "stop": _stop, "blackhole": _blackhole, "one_way": _one_way, "reset": _reset}
"""Faults that take one endpoint away."""


def strike(name: str, broker: PlacedBroker, run: int) -> float:
    """Make the fault; returns the time just before it (seconds, monotonic)."""
    before = time.monotonic()
    FAULTS[name](broker, run)
    return before


def heal(name: str, broker: PlacedBroker) -> None:
    """Undo it."""
    if name == "kill":
        broker.start()
    elif name == "stop":
        broker.continue_signal()
    else:
        broker.place.heal()
