"""The track: from positions over time to the lane of each reading.

- Readings are stamped by event time, so that what was queued while the agent was down is stamped with the place where it
  was captured, not where it was read.
- A fix says less the older it is: until the next one, its circle grows by `speed_m_s_max`, so a reading's lane names every
  zone that the device can have reached. After `max_age_s` the lane is `nowhere`.
- A position is refused, with a Reason, if it is not on Earth, is 0/0 where that means "no fix", is from the future, is older than
  all that is remembered, or cannot have been reached from an accepted fix at `speed_m_s_max`.
- A position with a wide circle does not make the places within it reachable: what is judged by is the last position that said most.
- Two positions that contradict each other are both doubted: from the refused one until the next one that is accepted, the
  lane is that of both (the fix before, grown, and the refused one). So an outlier or a spoofed jump can hold readings back, but
  not send them where only one of the two allows.
- A fix near a border keeps to one side, or belongs to both: see `core.fix` for hysteresis.
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
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.contract.block import NOWHERE, FixQuality
from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.errors import Reason
from edge_agent.core.fix import EARTH_M, ROUNDED_DIGITS, Fix, Position, Precision, Rules, changes, metres, place
from edge_agent.core.zones import ACCURACY_M_MAX, Zones, join

FIXES_MAX = 4_096
FUTURE_S_MAX = 300.0  # clocks of sensors and devices differ; a fix this far ahead is wrong
NULL_ISLAND_M = 1_000.0
ANYWHERE_M = math.pi * EARTH_M  # half around the Earth


class Taken(NamedTuple):
    """What became of a position: the fix to store, if any, and why the position was refused, if it was. `detail` names no place."""

    fix: Fix | None
    reason: Reason | None = None
    detail: str = ""


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
        """The last position that was believed, and that was no wider than what the one before still said."""
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
        """Something of this event time was received: this is where the device's time is, for what has no event time of its own.

        Time does not go back, unless the clock that it was received by has been set back: then what came before says nothing.
        """
        ahead_us = FUTURE_S_MAX * 1e6
        if event_us > received_us + ahead_us:
            return
        if self._heard is None or event_us > self._heard[0] or self._heard[1] > received_us + ahead_us:
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
        if self.rules.null_island_refused and metres(position, Position(0, 0.0, 0.0)) <= NULL_ISLAND_M:
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
                found.append((metres(position, other), possible_m))
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
        (_, lane), *later = changes(lanes)
        return Fix(position.time_us, lane, tuple(later), doubted=True)

    def _joined(self, claimed: Fix, before: Fix, age_us: int) -> str:
        older_us = claimed.time_us - before.time_us + age_us
        return join([claimed.at(age_us), before.at(older_us)]) if older_us <= self._max_age_us else NOWHERE

    # Lanes

    def _place(self, position: Position) -> Fix:
        place_at = bisect.bisect_left(self._fixes, position.time_us, key=lambda f: f.time_us)
        return place(self.zones, self.rules, position, self._fixes[place_at - 1].lane if place_at else None)

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
        if not fix.doubted and self._says_more(fix):
            self._anchor = fix

    def _says_more(self, fix: Fix) -> bool:
        """Whether a fix with a position is no wider than the anchor, grown until then: a wide one does not allow the next jump.

        One so far ahead that the anchor says nothing about it counts from the second on: the first may have its time wrong.
        """
        anchor = self.anchor
        if fix.position is None or anchor is None:
            return fix.position is not None
        grown_m = anchor.accuracy_m + self._reach_m(fix.time_us, anchor.time_us)
        if fix.time_us > anchor.time_us and grown_m > ANYWHERE_M:
            return self._arrived is not None and self._reach_m(fix.time_us, self._arrived.time_us) <= ANYWHERE_M
        return fix.position.accuracy_m <= grown_m

    def _reach_m(self, a_us: int, b_us: int) -> float:
        return self.rules.speed_m_s_max * abs(a_us - b_us) / 1e6

    def _fixed_lane(self) -> str | None:
        return None if self._fixed is None else self.zones.locate(self._fixed.lat, self._fixed.lon, self._fixed.accuracy_m)

    @property
    def _max_age_us(self) -> int:
        return round(self.rules.max_age_s * 1e6)
