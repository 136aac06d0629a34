"""A fix: a position turned into the lanes of the readings that are captured from then on.

- The circle around a fix grows by `speed_m_s_max` with its age. The lanes by age are computed once, in steps, each wide enough for the
  whole of it: few circles, and only one where no border is in reach.
- Hysteresis: a fix keeps the zone of the fix before it while its own circle lies in it alone. Otherwise the circle is drawn
  `hysteresis_m` wider, so a fix that wanders on a border stays in the lane of both zones until it is that far inside one.
- What is stored of a fix are its lanes, and its place only as exactly as the streams may know it.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from edge_agent.contract.block import NOWHERE
from edge_agent.core.zones import ACCURACY_M_MAX, Zones

EARTH_M = 6_371_009.0
ROUNDED_DIGITS = 2
_ROUNDED_M = 800.0  # how far two decimals can move a position
_LADDER_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0)


class Precision(StrEnum):
    """How exactly a place may be stored."""

    ZONE_ONLY = "zone-only"
    ROUNDED = "rounded"
    EXACT = "exact"


class Position(msgspec.Struct, frozen=True):
    """Where a device says it was: microseconds since 1970 UTC, degrees (WGS 84), the radius of the circle that it is surely in."""

    time_us: int
    lat: float
    lon: float
    accuracy_m: float = 0.0
    source: str = ""


class Fix(msgspec.Struct, frozen=True):
    """A position turned into lanes: `lane` at its time, `later` the lanes from each age (us) on.

    `position` is kept in memory, and stored only where a stream asks for places. `doubted`: the position was refused, see the
    module's rules. `earlier`: it was read from the disk and is older than the device's boot.
    """

    time_us: int
    lane: str
    later: tuple[tuple[int, str], ...] = ()
    position: Position | None = None
    doubted: bool = False
    earlier: bool = False

    def at(self, age_us: int) -> str:
        """The lane of a reading captured `age_us` after the fix."""
        return next((lane for since, lane in reversed(self.later) if since <= age_us), self.lane)


def stored(fix: Fix, precision: Precision) -> Fix:
    """A fix as it may be stored: with no place finer than `precision`."""
    position = fix.position
    if precision is Precision.ZONE_ONLY:
        position = None
    elif position is not None and precision is Precision.ROUNDED:
        lat, lon = round(position.lat, ROUNDED_DIGITS), round(position.lon, ROUNDED_DIGITS)
        position = msgspec.structs.replace(position, lat=lat, lon=lon, accuracy_m=position.accuracy_m + _ROUNDED_M)
    return msgspec.structs.replace(fix, position=position)


def to_text(fix: Fix) -> str:
    """A fix as text, without its time; one that is only a lane is that lane. A checksum of both stands in front: a fix that a flipped
    bit has moved would put readings into another zone."""
    plain = fix.lane if fix == Fix(fix.time_us, fix.lane) else None
    text = plain or msgspec.json.encode(fix).decode()
    return f"{_checksum(fix.time_us, text)} {text}"


def from_text(time_us: int, text: str) -> Fix | None:
    """The fix of `to_text`; None if time or text are not what was written."""
    checksum, _, text = text.partition(" ")
    if checksum != _checksum(time_us, text):
        return None
    return msgspec.json.decode(text, type=Fix) if text.startswith("{") else Fix(time_us, text)


def _checksum(time_us: int, text: str) -> str:
    return f"{zlib.crc32(f'{time_us} {text}'.encode()):08x}"


@dataclass(frozen=True)
class Rules:
    """The operator's rules for fixes. No fix is taken for better than `accuracy_m_min`.

    `boot_us` is the wall time of the device's boot: older stored fixes are of an earlier one.
    """

    max_age_s: float = 600.0
    home: str | None = None
    speed_m_s_max: float = 350.0
    hysteresis_m: float = 50.0
    null_island_refused: bool = False
    accuracy_m_min: float = 0.0
    boot_us: int = 0


def place(zones: Zones, rules: Rules, position: Position, before: str | None) -> Fix:
    """The fix of a position; `before` is the lane of the fix before it, if there is one.

    Raises:
        ContractError: the position is not on Earth.
    """
    radius_m = position.accuracy_m
    lane = zones.locate(position.lat, position.lon, radius_m)
    if before is not None and lane != before and lane != NOWHERE:
        radius_m += rules.hysteresis_m
        lane = _grown(zones, position, radius_m)
    return Fix(position.time_us, lane, _later(zones, rules, position, radius_m, lane), position)


def _later(zones: Zones, rules: Rules, position: Position, radius_m: float, lane: str) -> tuple[tuple[int, str], ...]:
    """The lanes from each age on, each wide enough for the whole step."""
    ends = [s for s in _LADDER_S if s < rules.max_age_s] + [rules.max_age_s]
    radii = [radius_m, *(radius_m + rules.speed_m_s_max * end for end in ends)]
    lanes = {0: lane, len(ends): _grown(zones, position, radii[-1])}
    _fill(zones, position, radii, lanes, 0, len(ends))
    starts = [0, 1, *(round(s * 1e6) + 1 for s in ends[:-1])]
    return tuple(changes((start, lanes[i]) for i, start in enumerate(starts)))[1:]


def _fill(zones: Zones, position: Position, radii: list[float], lanes: dict[int, str], low: int, high: int) -> None:
    """Lanes between two known ones; a circle between two with the same lane has that lane too."""
    if lanes[low] == lanes[high]:
        lanes.update(dict.fromkeys(range(low + 1, high), lanes[low]))
    elif high - low > 1:
        middle = (low + high) // 2
        lanes[middle] = _grown(zones, position, radii[middle])
        _fill(zones, position, radii, lanes, low, middle)
        _fill(zones, position, radii, lanes, middle, high)


def _grown(zones: Zones, position: Position, radius_m: float) -> str:
    return NOWHERE if radius_m > ACCURACY_M_MAX else zones.locate(position.lat, position.lon, radius_m)


def changes(steps: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Only the steps at which the lane changes."""
    before: str | None = None
    for age, lane in steps:
        if lane != before:
            yield age, lane
        before = lane


def metres(a: Position, b: Position) -> float:
    """The distance on a sphere."""
    lat_a, lat_b = math.radians(a.lat), math.radians(b.lat)
    turn = math.radians(b.lon - a.lon)
    square = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(turn / 2) ** 2
    return 2 * EARTH_M * math.asin(min(1.0, math.sqrt(square)))
