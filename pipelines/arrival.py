"""When the features of a reading were known: at the latest arrival among the readings that its window may hold.

A reading that arrives late changes the windows behind it. These are news then, though their own readings are not: a training set must not
know them before, and who takes only what is new must not miss them.
"""

from __future__ import annotations

import numpy as np

from edge_agent.contract.columns import Ints, Strings
from edge_agent.core.entities import Groups, Layout, Recent

ARRIVED = "arrived_at"
_NONE = np.zeros(0, np.int64)


class Known:
    """Follows the readings of one device, in the order seen, and keeps the last arrivals of at most `entities_max` entities."""

    def __init__(self, window_rows: int, entities_max: int) -> None:
        self._window_rows = window_rows
        self._recent: Recent[Ints] = Recent(entities_max)

    def push(self, entity: Strings, arrived_us: Ints) -> Ints:
        """The time at which the features of each reading were known."""
        return np.concatenate([_NONE, *(self._take(entity[part], arrived_us[part]) for part in self._recent.parts(entity))])

    def _take(self, entity: Strings, arrived_us: Ints) -> Ints:
        groups = Groups.of(entity)
        past = [_NONE if old is None else old for old in self._recent.take(groups)]
        layout = Layout.of([len(old) for old in past], groups.stops - groups.starts)
        arrived = layout.joined(arrived_us.take(groups.order), past)
        firsts = np.maximum(layout.starts, layout.stops - (self._window_rows - 1))
        kept = [arrived[first:stop].copy() for first, stop in zip(firsts.tolist(), layout.stops.tolist(), strict=True)]
        self._recent.keep(groups, kept)
        if not layout.falls(arrived).any():
            return arrived_us
        known = np.empty_like(arrived_us)
        known[groups.order] = self._newest(arrived, layout)[layout.rows]
        return known

    def _newest(self, arrived: Ints, layout: Layout) -> Ints:
        """The newest of each arrival and those before it in its window: of twice as many each time."""
        place = np.arange(len(arrived)) - np.repeat(layout.starts, layout.stops - layout.starts)
        newest, reach = arrived.copy(), 1
        while reach < self._window_rows:
            step = min(reach, self._window_rows - reach)
            np.maximum(newest[step:], newest[:-step].copy(), out=newest[step:], where=place[step:] >= step)
            reach += step
        return newest
