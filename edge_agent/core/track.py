"""The track: from positions over time to the lane of each reading.

- Readings are stamped by event time, so that what was queued while the agent was down is stamped with the place where it
  was captured, not where it was read.
- A fix says less the older it is: until the next one, its circle grows by `speed_m_s_max`, so a reading's lane names every
  zone that the device can have reached. After `max_age_s` the lane is `nowhere`.
- A position is refused, with a Reason, if it is not on Earth, is 0/0 where that means "no fix", is from the future, is older than
  all that is remembered, or cannot have been reached from an accepted fix at `speed_m_s_max`.
- Two positions that contradict each other are both doubted: from the refused one until the next one that is accepted, the
  lane is that of both (the fix before, grown, and the refused one). So an outlier or a spoofed jump can hold readings back, but
  not send them where only one of the two allows.
- Hysteresis: a fix keeps the zone of the fix before it while its own circle lies in it alone. Otherwise the circle is drawn
  `hysteresis_m` wider, so a fix that wanders on a border stays in the lane of both zones until it is that far inside one.
- `home` is the lane of readings captured before the first fix since boot; without a home they wait (`nowhere`). Once there was
  a fix, what is stale waits: the device has shown that it moves.

>>> track = Track(zones, Rules(max_age_s=600.0))                                          # doctest: +SKIP
>>> track.take(Position(time_us=0, lat=50.0, lon=9.0, accuracy_m=10.0)).lane              # doctest: +SKIP
'europe'
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.contract.block import NOWHERE, FixQuality
from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.errors import Reason
from edge_agent.core.zones import ACCURACY_M_MAX, Zones, join

FIXES_MAX = 4_096
FUTURE_S_MAX = 300.0  # clocks of sensors and devices differ; a fix this far ahead is wrong
EARTH_M = 6_371_009.0
NULL_ISLAND_M = 1_000.0
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


class Taken(NamedTuple):
    """What became of a position: the fix to store, if any, and why the position was refused, if it was. `detail` names no place."""

    fix: Fix | None
    reason: Reason | None = None
    detail: str = ""


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
    """A fix as text, without its time; one that is only a lane is that lane."""
    plain = fix.lane if fix == Fix(fix.time_us, fix.lane) else None
    return plain or msgspec.json.encode(fix).decode()


def from_text(time_us: int, text: str) -> Fix:
    """The fix of `to_text`."""
    return msgspec.json.decode(text, type=Fix) if text.startswith("{") else Fix(time_us, text)


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


class Track:
    """The last fixes of a device, by time, and the stamp for its readings.

    With `fixed` the device does not move, and every reading gets the lane of that position, `fixed_lane`.
    """

    def __init__(
        self, zones: Zones, rules: Rules, fixed: Position | None = None, fixes: Iterable[Fix] = (), anchor: Position | None = None
    ) -> None:
        """`fixes` were stored before; `anchor` is the last position that was believed before a restart, if that is known."""
        self.zones, self.rules = zones, rules
        self._fixed = fixed
        self._fixes: list[Fix] = []
        self._anchor: Fix | None = None  # the last accepted fix with a position, though doubted ones may have crowded it out
        self._arrived: Fix | None = None  # the last one taken
        self._forgotten = False
        self._heard: tuple[int, int] | None = None  # the newest event time, and when it was received
        for fix in sorted(fixes, key=lambda f: f.time_us):
            self._insert(msgspec.structs.replace(fix, earlier=fix.time_us < rules.boot_us))
        self._forgotten |= len(self._fixes) == FIXES_MAX  # the disk keeps no more either
        if anchor is not None:
            self._anchor = Fix(anchor.time_us, zones.locate(anchor.lat, anchor.lon, anchor.accuracy_m), position=anchor)
        self.fixed_lane = self._fixed_lane()

    @property
    def anchor(self) -> Position | None:
        """The last position that was believed."""
        return None if self._anchor is None else self._anchor.position

    def adopt(self, zones: Zones) -> None:
        """A new policy: fixes with a known position are placed again; without one, they count only if no area has changed."""
        moved = not self.zones.same_areas(zones)
        self.zones = zones
        self.fixed_lane = self._fixed_lane()
        if moved:
            old, self._fixes, self._anchor, self._arrived = self._fixes, [], None, None
            for fix in old:
                known = fix.position is not None and not fix.doubted
                again = self._place(fix.position) if known and fix.position else Fix(fix.time_us, NOWHERE, doubted=fix.doubted)
                self._insert(msgspec.structs.replace(again, earlier=fix.earlier))

    def take(self, position: Position, now_us: int | None = None) -> Taken:
        """Take a position, in any order; the oldest beyond FIXES_MAX are forgotten. `now_us`: wall time, if the clock can be trusted."""
        problem = self._problem(position, now_us)
        if problem is not None:
            return Taken(None, *problem)
        if position.accuracy_m < self.rules.accuracy_m_min:
            position = msgspec.structs.replace(position, accuracy_m=self.rules.accuracy_m_min)
        apart_m, possible_m = self._distance(position)
        if apart_m > possible_m:
            fix = self._doubt(position)
            reason = Reason.IMPOSSIBLE_JUMP
            detail = f"{apart_m / 1e3:.1f} km from a fix that allows {possible_m / 1e3:.1f} km at {self.rules.speed_m_s_max:g} m/s"
        else:
            fix, reason, detail = self._place(position), None, ""
        self._insert(fix)
        self._arrived = fix
        return Taken(fix, reason, detail)

    def stamp(self, event_us: Ints) -> Strings:
        """The lane of each reading; code 0 is the lane of those without a fix, whatever other codes have the same lane."""
        rows = len(event_us)
        unknown = self.fixed_lane or self.rules.home or NOWHERE
        if self.fixed_lane is not None or not rows or not self._fixes:
            return Strings(np.zeros(rows, np.int32), (unknown,))
        steps = list(self._steps(int(event_us.min()), int(event_us.max())))
        codes = {lane: code for code, lane in enumerate(dict.fromkeys(lane for _, lane in steps if lane is not None), 1)}
        since = np.array([since for since, _ in steps], np.int64)
        code_of = np.array([0, *(0 if lane is None else codes[lane] for _, lane in steps)], np.int32)
        return Strings(code_of[np.searchsorted(since, event_us, side="right")], (unknown, *codes))

    def places(self, event_us: Ints, precision: Precision) -> tuple[Floats, Floats]:
        """Latitude and longitude of each reading, in degrees: those of the fresh fix in force, NaN without one or where it is doubted."""
        lat, lon = np.full(len(event_us), np.nan), np.full(len(event_us), np.nan)
        if self._fixed is not None:
            lat[:], lon[:] = self._fixed.lat, self._fixed.lon
        elif len(event_us) and self._fixes:
            first, last = self._range(int(event_us.min()), int(event_us.max()))
            known = self._fixes[first:last]
            times = np.array([f.time_us for f in known], np.int64)
            found = np.searchsorted(times, event_us, side="right") - 1
            fresh = (found >= 0) & (event_us - times[found] <= self._max_age_us)
            places = [(f.position.lat, f.position.lon) if f.position and not f.doubted else (math.nan, math.nan) for f in known]
            table = np.array(places)[found]
            lat, lon = np.where(fresh, table[:, 0], np.nan), np.where(fresh, table[:, 1], np.nan)
        return (lat, lon) if precision is Precision.EXACT else (np.round(lat, ROUNDED_DIGITS), np.round(lon, ROUNDED_DIGITS))

    def quality(self, lane: str, placed: bool = True) -> FixQuality:
        """How well readings were stamped with `lane`; `placed`: by a fix (not code 0 of `stamp`)."""
        if self._fixed is not None:
            return FixQuality.STATIC
        if lane == NOWHERE or not placed or not self._fixes:
            return FixQuality.NONE
        return FixQuality.UNCERTAIN if "_" in lane else FixQuality.FIX

    def hear(self, event_us: int, received_us: int) -> None:
        """Something of this event time was received: this is where the device's time is, for what has no event time of its own."""
        if event_us <= received_us + FUTURE_S_MAX * 1e6 and (self._heard is None or event_us > self._heard[0]):
            self._heard = event_us, received_us

    def lane_now(self, received_us: int | None = None) -> str:
        """Where the device is: the lane of the newest fix, and of the one that arrived last if that is another.

        With `received_us` it is grown by the time that has passed: for what has no event time of its own, such as a rejected payload.
        """
        if self.fixed_lane is not None:
            return self.fixed_lane
        if not self._fixes:
            return self.rules.home or NOWHERE
        newest = self._fixes[-1]
        lane = newest.lane if self._arrived is None else join([newest.lane, self._arrived.lane])
        if received_us is None:
            return lane
        passed_us = received_us if self._heard is None else self._heard[0] + max(0, received_us - self._heard[1])
        return join([lane, *self.stamp(np.array([max(newest.time_us, passed_us)], np.int64)).tolist()])

    # Checks

    def _problem(self, position: Position, now_us: int | None) -> tuple[Reason, str] | None:
        lat, lon, accuracy_m = position.lat, position.lon, position.accuracy_m
        if not (-90 <= lat <= 90 and -180 <= lon <= 180 and 0 <= accuracy_m <= ACCURACY_M_MAX):
            return Reason.OUT_OF_RANGE, f"position is not on Earth, or its accuracy is not between 0 and {ACCURACY_M_MAX:g} m"
        if self.rules.null_island_refused and _metres(position, Position(0, 0.0, 0.0)) <= NULL_ISLAND_M:
            return Reason.NULL_ISLAND, "latitude 0, longitude 0 is what receivers send without a fix"
        if now_us is not None and position.time_us > now_us + FUTURE_S_MAX * 1e6:
            ahead_s = (position.time_us - now_us) / 1e6
            return Reason.FUTURE_FIX, f"position is {ahead_s:.0f} s ahead of this device's clock; at most {FUTURE_S_MAX:.0f} s"
        if len(self._fixes) == FIXES_MAX and position.time_us < self._fixes[0].time_us:
            return Reason.STALE_FIX, f"position is older than the last {FIXES_MAX} fixes"
        return None

    def _distance(self, position: Position) -> tuple[float, float]:
        """The distance to an accepted neighbour in time, and what is possible; the neighbour that fits worst."""
        found = [(0.0, 0.0)]
        place = bisect.bisect_right(self._fixes, position.time_us, key=lambda f: f.time_us)
        sides = (reversed(self._fixes[:place]), iter(self._fixes[place:]))
        others = [next((f.position for f in side if f.position is not None and not f.doubted), None) for side in sides]
        for other in (*others, self.anchor):
            if other is not None:
                seconds = abs(position.time_us - other.time_us) / 1e6
                possible_m = seconds * self.rules.speed_m_s_max + position.accuracy_m + other.accuracy_m
                found.append((_metres(position, other), possible_m))
        return max(found, key=lambda pair: pair[0] - pair[1])

    def _before(self, time_us: int) -> Fix | None:
        """The last accepted fix at or before a time."""
        place = bisect.bisect_right(self._fixes, time_us, key=lambda f: f.time_us)
        listed = next((f for f in reversed(self._fixes[:place]) if not f.doubted), None)
        anchor = self._anchor if self._anchor is not None and self._anchor.time_us <= time_us else None
        return listed or anchor

    def _doubt(self, position: Position) -> Fix:
        """The fix that stands for two that contradict each other: the refused position, and the accepted one before it."""
        before, claimed = self._before(position.time_us), self._place(position)
        if before is None:
            return Fix(position.time_us, NOWHERE, doubted=True)
        passed_us = position.time_us - before.time_us
        ages = {0, self._max_age_us + 1 - passed_us, *(age for age, _ in claimed.later), *(age - passed_us for age, _ in before.later)}
        lanes = [(age, self._joined(claimed, before, age)) for age in sorted(ages) if age >= 0]
        (_, lane), *later = _changes(lanes)
        return Fix(position.time_us, lane, tuple(later), doubted=True)

    def _joined(self, claimed: Fix, before: Fix, age_us: int) -> str:
        older_us = claimed.time_us - before.time_us + age_us
        return join([claimed.at(age_us), before.at(older_us)]) if older_us <= self._max_age_us else NOWHERE

    # Lanes

    def _place(self, position: Position) -> Fix:
        """The fix of an accepted position: its lane, with hysteresis, and the lanes that it has later."""
        place = bisect.bisect_left(self._fixes, position.time_us, key=lambda f: f.time_us)
        before = self._fixes[place - 1].lane if place else None
        radius_m = position.accuracy_m
        lane = self.zones.locate(position.lat, position.lon, radius_m)
        if before is not None and lane != before and lane != NOWHERE:
            radius_m += self.rules.hysteresis_m
            lane = self._grown(position, radius_m)
        return Fix(position.time_us, lane, self._later(position, radius_m, lane), position)

    def _later(self, position: Position, radius_m: float, lane: str) -> tuple[tuple[int, str], ...]:
        """The lanes from each age on, each wide enough for the whole step."""
        ends = [s for s in _LADDER_S if s < self.rules.max_age_s] + [self.rules.max_age_s]
        lanes = [lane, *[""] * len(ends)]
        lanes[-1] = self._grown(position, radius_m + self.rules.speed_m_s_max * ends[-1])
        self._fill(position, radius_m, ends, lanes, 0, len(ends))
        starts = [0, 1, *(round(s * 1e6) + 1 for s in ends[:-1])]
        return tuple(_changes(zip(starts, lanes, strict=True)))[1:]

    def _fill(self, position: Position, radius_m: float, ends: list[float], lanes: list[str], low: int, high: int) -> None:
        """Lanes between two known ones; a circle between two with the same lane has that lane too."""
        if high - low < 2:
            return
        if lanes[low] == lanes[high]:
            lanes[low + 1 : high] = [lanes[low]] * (high - low - 1)
            return
        middle = (low + high) // 2
        lanes[middle] = self._grown(position, radius_m + self.rules.speed_m_s_max * ends[middle - 1])
        self._fill(position, radius_m, ends, lanes, low, middle)
        self._fill(position, radius_m, ends, lanes, middle, high)

    def _grown(self, position: Position, radius_m: float) -> str:
        return NOWHERE if radius_m > ACCURACY_M_MAX else self.zones.locate(position.lat, position.lon, radius_m)

    def _steps(self, first_us: int, last_us: int) -> Iterator[tuple[int, str | None]]:
        """The lanes in force from each time on, for event times in this range; None: as without a fix."""
        first, last = self._range(first_us, last_us)
        if self._forgotten and first_us < self._fixes[0].time_us:
            yield first_us, NOWHERE  # there were fixes then: it is not as without any
        for i in range(first, last):
            fix = self._fixes[i]
            until = self._fixes[i + 1].time_us if i + 1 < len(self._fixes) else fix.time_us + 2 * self._max_age_us + 2
            stale = (self._max_age_us + 1, None if fix.earlier else NOWHERE)
            for age, lane in ((0, fix.lane), *fix.later, stale):
                if age <= stale[0] and fix.time_us + age < until:
                    yield fix.time_us + age, lane

    def _range(self, first_us: int, last_us: int) -> tuple[int, int]:
        """The fixes that may be in force between two times."""
        first = bisect.bisect_right(self._fixes, first_us, key=lambda f: f.time_us) - 1
        return max(0, first), bisect.bisect_right(self._fixes, last_us, key=lambda f: f.time_us)

    def _insert(self, fix: Fix) -> None:
        place = bisect.bisect_left(self._fixes, fix.time_us, key=lambda f: f.time_us)
        if place < len(self._fixes) and self._fixes[place].time_us == fix.time_us:
            self._fixes[place] = fix
        else:
            self._fixes.insert(place, fix)
        self._forgotten |= len(self._fixes) > FIXES_MAX
        del self._fixes[:-FIXES_MAX]
        if not fix.doubted and fix.position is not None:
            self._anchor = fix

    def _fixed_lane(self) -> str | None:
        return None if self._fixed is None else self.zones.locate(self._fixed.lat, self._fixed.lon, self._fixed.accuracy_m)

    @property
    def _max_age_us(self) -> int:
        return round(self.rules.max_age_s * 1e6)


def _changes(steps: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Only the steps at which the lane changes."""
    before: str | None = None
    for age, lane in steps:
        if lane != before:
            yield age, lane
        before = lane


def _metres(a: Position, b: Position) -> float:
    """The distance on a sphere."""
    lat_a, lat_b = math.radians(a.lat), math.radians(b.lat)
    turn = math.radians(b.lon - a.lon)
    square = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(turn / 2) ** 2
    return 2 * EARTH_M * math.asin(min(1.0, math.sqrt(square)))
