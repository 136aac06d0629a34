"""What the buffer gives up, and when it will be full. Pure: what is kept, limits and times come in, decisions go out.

- The lowest priority goes first, and within a priority the oldest: the order in which blocks were stored, never a clock.
- Age counts only time that the device itself saw pass: the monotonic clock of each boot, added up. What passed while it was
  off is not known and counts nothing, so a step of the wall clock, to 1970 or to 2038, evicts nothing.
- Blocks are given up in portions of a share of the limit: the fewer evictions, the shorter the loss ledger.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple

PORTION = 256  # at least this part of the limit is given up at a time,
PORTION_BYTES_MIN = 64 * 1024  # or this much,
PORTION_MAX = 16  # but of a small limit no more than this part
HALF_LIFE_S = 120.0
HORIZON_S = 10 * 365 * 86_400.0


class Place(NamedTuple):
    """Where a block is and what it holds. `shelf` numbers its lane and stream, `id` the order in which blocks were stored.

    `slot` is the row that holds it (edge_agent.slots); 0: one of its own.
    """

    shelf: int
    sequence: int
    id: int
    rows: int
    bytes: int
    last_ordinal: int
    first_us: int
    last_us: int
    stored_us: int
    settled: bool = False
    slot: int = 0


def choose(shelves: Mapping[int, list[Iterable[Place]]], wanted_bytes: int) -> list[Place]:
    """The blocks to give up for `wanted_bytes`, or fewer bytes if there are no more.

    Args:
        shelves: by priority, the waiting blocks of each shelf, oldest first; consumed only as far as needed.
        wanted_bytes: how many bytes of blocks to give up.
    """
    chosen: list[Place] = []
    for priority in sorted(shelves):
        for place in heapq.merge(*shelves[priority], key=attrgetter("id")):
            if wanted_bytes <= 0:
                return chosen
            chosen.append(place)
            wanted_bytes -= place.bytes
    return chosen


def portion(lack_bytes: int, bytes_max: int) -> int:
    """How many bytes to give up when `lack_bytes` are wanted."""
    return lack_bytes + max(bytes_max // PORTION, min(PORTION_BYTES_MIN, bytes_max // PORTION_MAX))


@dataclass(frozen=True)
class Age:
    """Counts the time a buffer has seen pass, in microseconds: `base_us` at `monotonic_us` of this boot."""

    base_us: int
    monotonic_us: int

    def at(self, monotonic_us: int) -> int:
        """The count at a time of this boot; it never goes back."""
        return self.base_us + max(0, monotonic_us - self.monotonic_us)

    @classmethod
    def resume(cls, count_us: int, boot: str, then_us: int, now_boot: str, now_us: int) -> Age:
        """Go on from a count taken in `boot` at its monotonic `then_us`; time between two boots is unknown and counts nothing."""
        passed = max(0, now_us - then_us) if boot == now_boot else 0
        return cls(count_us + passed, now_us)


class FillForecast:
    """When the buffer will be full, from its smoothed rate of filling (half-life HALF_LIFE_S)."""

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None
        self._rate = 0.0
        self._weight = 0.0

    def observe(self, used_bytes: int, now_s: float) -> None:
        """Note how full it is; `now_s` is monotonic."""
        if self._last is not None and now_s > self._last[0]:
            seconds = now_s - self._last[0]
            fade = 0.5 ** (seconds / HALF_LIFE_S)
            self._rate = fade * self._rate + (1 - fade) * (used_bytes - self._last[1]) / seconds
            self._weight = fade * self._weight + (1 - fade)
        if self._last is None or now_s > self._last[0]:
            self._last = (now_s, used_bytes)

    def time_to_full_s(self, bytes_max: int) -> float | None:
        """Seconds until `bytes_max`; None: it does not fill, or not within HORIZON_S."""
        if self._last is None or self._weight <= 0 or self._rate <= 0:
            return None
        seconds = max(0.0, bytes_max - self._last[1]) * self._weight / self._rate
        return seconds if math.isfinite(seconds) and seconds <= HORIZON_S else None
