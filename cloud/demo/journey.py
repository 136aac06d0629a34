"""What the fleet will measure: readings and positions per device, in order, and where each was really captured.

- A device carries one engine at a time, and its clock goes on from engine to engine.
- Before each reading comes a position of the same time. Some fixes are poor: their circle may touch several zones.
- `Reading.zone` is the zone of the true position: the oracle's yardstick, never sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from cloud.demo.simulator import FIELDS, Engine, Floats
from cloud.demo.track import Track
from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ContractError
from edge_agent.core.zones import Zones

START_S = 1_700_000_000.0
CYCLE_S = 3_600.0
ACCURACY_M = 15.0
POOR_ACCURACY_M = 40_000.0
POOR_EVERY = 16

Key = tuple[str, str, int]
"""Device, engine, event time in microseconds: a reading's name."""


@dataclass(frozen=True)
class Reading:
    """A reading as it was taken: its name, the true zone, and the values of FIELDS in the order of the contract."""

    key: Key
    cycle: int
    zone: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Message:
    """A sensor message; `reading` is None for a position."""

    topic: str
    payload: bytes
    reading: Reading | None = None


@dataclass
class Aircraft:
    """A gateway on its way: `hours` is how many readings it has taken so far."""

    device: str
    track: Track
    zones: Zones
    hours: int = 0

    def fly(self, engine: Engine) -> list[Message]:
        """The messages of an engine's life, each reading behind its position."""
        messages: list[Message] = []
        for row, values in enumerate(engine.values):
            ts = START_S + self.hours * CYCLE_S
            lat, lon = self.track.position(self.hours * CYCLE_S)
            accuracy_m = POOR_ACCURACY_M if self.hours % POOR_EVERY == POOR_EVERY - 1 else ACCURACY_M
            messages.append(position_message(self.device, ts, lat, lon, accuracy_m))
            messages.append(reading_message(self.device, engine.name, ts, row + 1, values, true_zone(self.zones, lat, lon)))
            self.hours += 1
        return messages


def true_zone(zones: Zones, lat: float, lon: float) -> str:
    """The one zone that holds a position.

    Raises:
        ContractError: none does, or the position lies on a border: its reading would prove nothing.
    """
    zone = zones.locate(lat, lon)
    if zone == NOWHERE or "_" in zone:
        raise ContractError(f"the demo's position {lat}, {lon} is in {zone!r}; it must lie inside one zone of zones.geojson")
    return zone


def position_message(device: str, ts: float, lat: float, lon: float, accuracy_m: float) -> Message:
    """A position as an aircraft's navigation sends it."""
    body = {"ts": ts, "lat": lat, "lon": lon, "accuracy_m": accuracy_m}
    return Message(f"sensors/{device}/position", msgspec.json.encode(body))


def reading_message(device: str, engine: str, ts: float, cycle: int, values: Floats, zone: str) -> Message:
    """A reading as an engine's sensors send it."""
    numbers = values.tolist()
    body = {"ts": ts, "engine": engine, "cycle": cycle, **dict(zip(FIELDS, numbers, strict=True))}
    reading = Reading((device, engine, round(ts * 1e6)), cycle, zone, tuple(numbers))
    return Message(f"sensors/{device}/turbofan", msgspec.json.encode(body), reading)
