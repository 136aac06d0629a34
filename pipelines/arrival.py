"""When the features of a window were known: at the latest arrival among the readings that it may hold.

A reading that arrives late changes the windows behind it. These are news then, though their own readings are not: a training set must not
know them before, and who takes only what is new must not miss them. `Known` is for trailing windows, which hold the last so many readings,
`KnownHops` for windows that close: however many readings lie between theirs and the one that closes them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_agent.contract.columns import Ints, Strings
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.core.aggregates import Made
from edge_agent.core.entities import Groups, Layout, Places, Recent

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


@dataclass(frozen=True)
class _Hops:
    """The hops of an entity that open windows may hold, with the latest arrival in each; the newest event time seen."""

    numbers: Ints
    latest_us: Ints
    newest_us: int


class KnownHops:
    """Follows the readings of one device, in the order seen: for at most `entities_max` entities the latest arrival in each open hop."""

    def __init__(self, spec: FeatureSpec, entities_max: int) -> None:
        self._spec = spec
        self._recent: Recent[_Hops] = Recent(entities_max)

    def push(self, entity: Strings, event_us: Ints, arrived_us: Ints, made: Made) -> Ints:
        """The time at which each of the windows was known that these readings were done with."""
        known = [_NONE]
        for part in self._recent.parts(entity):
            first, stop = np.searchsorted(made.rows, [part.start, part.stop]).tolist()
            rows, start_us = made.rows[first:stop] - part.start, made.start_us[first:stop]
            if part.start < part.stop:
                known.append(self._take(entity[part], event_us[part], arrived_us[part], rows, start_us))
        return np.concatenate(known)

    def _take(self, entity: Strings, event_us: Ints, arrived_us: Ints, rows: Places, start_us: Ints) -> Ints:
        groups, every_us = Groups.of(entity), self._spec.every_us
        past = self._recent.take(groups)
        old = [_Hops(_NONE, _NONE, int(event_us.min())) if p is None else p for p in past]
        group = np.concatenate([np.repeat(np.arange(len(old)), [len(o.numbers) for o in old]), groups.group])
        hop = np.concatenate([*(o.numbers for o in old), event_us[groups.order] // every_us])
        arrived = np.concatenate([*(o.latest_us for o in old), arrived_us[groups.order]])
        seen = np.concatenate([np.zeros(len(group) - len(entity), np.intp), groups.order + 1])  # what is remembered was seen before

        # A cell is a hop of an entity. Sorted by cell and order seen, a running maximum says what had arrived of a cell at any reading.
        numbers, place = np.unique(hop, return_inverse=True)
        cell, span = group * len(numbers) + place, len(entity) + 1
        order = np.argsort(cell * span + seen)
        cell, seen, group, hop = cell[order], seen[order], group[order], hop[order]
        ends = np.append(cell[1:] != cell[:-1], True)
        values, rank = np.unique(arrived[order], return_inverse=True)
        base = (np.cumsum(ends) - ends) * len(values)
        latest = values[np.maximum.accumulate(base + rank) - base]

        of_row = np.empty(len(entity), np.intp)
        of_row[groups.order] = groups.group
        known = arrived_us[rows]
        for step in range(self._spec.overlap):
            asked = start_us // every_us + step
            place = np.minimum(np.searchsorted(numbers, asked), len(numbers) - 1)
            wanted = of_row[rows] * len(numbers) + place
            at = np.searchsorted(cell * span + seen, wanted * span + rows + 1, side="right") - 1
            np.maximum(known, latest[at], out=known, where=(at >= 0) & (cell[at] == wanted) & (numbers[place] == asked))

        newest = np.maximum(np.maximum.reduceat(event_us[groups.order], groups.starts), [o.newest_us for o in old])
        closed_us = newest - self._spec.lateness_us - self._spec.window_us  # windows that begin here or before are done
        kept = ends & (hop * every_us > closed_us[group])
        cuts = np.searchsorted(group[kept], np.arange(len(old) + 1)).tolist()
        hop, latest = hop[kept], latest[kept]
        held = [_Hops(hop[a:b], latest[a:b], n) for a, b, n in zip(cuts, cuts[1:], newest.tolist(), strict=False)]
        self._recent.keep(groups, held)
        return known
