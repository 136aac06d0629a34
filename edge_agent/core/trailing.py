"""Trailing windows: one per reading, in the order seen.

- The window of a reading: it and the readings of the same entity seen before it, at most `window_rows`, with an event time in
  (t - window_s, t].

How: windows are looked at as one array (fields, steps, readings). A long run of one entity's readings whose windows are all full is such an
array already, if each step is the same run moved by one: no value is copied. The others are gathered from where they lie. Both are
worked on in pieces that fit the processor's cache, and give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.core.aggregates import Made, Outputs, Tile, outside
from edge_agent.core.entities import Groups, Layout, Mask, Places, Recent

CELLS_MAX = 65_536  # window rows × fields × readings worked on at once: what the processor's cache holds
RUN_ROWS_MIN = 256  # below that, gathering the windows of all entities together is faster
_NONE = np.zeros(0, np.intp)
Number = TypeVar("Number", np.float64, np.int64)


@dataclass(frozen=True)
class _History:
    """The last readings of one entity, oldest first: event times (rows,) and values (fields, rows)."""

    event_us: Ints
    values: Floats


class TrailingWindows:
    """The windows of one stream on one device; at most `entities_max` entities."""

    def __init__(self, spec: FeatureSpec, outputs: Outputs, entities_max: int) -> None:
        self._rows, self._window_s, self._outputs = spec.window_rows, spec.window_s, outputs
        self.recent: Recent[_History] = Recent(entities_max)
        self.forgotten = 0  # a trailing window is done with its reading: nothing waits

    def push(self, entity: Strings, event_us: Ints, values: Floats) -> Made:
        """Take readings in the order seen; a window for each."""
        joined = self._join(Groups.of(entity), event_us, values)
        out = np.empty((self._outputs.count, len(event_us)))
        for part, tile in self._tiles(joined):
            places = part if joined.in_order else joined.order[part]
            out[:, places] = self._outputs.of(tile)[:, : part.stop - part.start]
        start_us = event_us - np.int64(min(self._window_s * 1e6, 2.0**62))
        return Made(out.T, np.arange(len(event_us)), start_us, event_us, _NONE, _NONE)

    def warm(self, entity: Strings, event_us: Ints, values: Floats) -> None:
        """Take readings as history only."""
        self._join(Groups.of(entity), event_us, values)

    def _join(self, groups: Groups, event_us: Ints, values: Floats) -> _Joined:
        """Put the new readings behind the histories of their entities, and keep the new histories."""
        nothing = _History(np.zeros(0, np.int64), np.empty((len(values), 0)))
        past = [old or nothing for old in self.recent.take(groups)]
        counts = groups.stops - groups.starts
        layout = Layout.of([len(h.event_us) for h in past], counts)
        new_us, new = (event_us, values) if groups.in_order else (event_us[groups.order], values[:, groups.order])
        times = layout.joined(new_us, [h.event_us for h in past])
        stack = layout.joined(new, [h.values for h in past])
        firsts = np.maximum(layout.starts, layout.stops - (self._rows - 1))
        kept = [_History(times[a:b].copy(), stack[:, a:b].copy()) for a, b in zip(firsts.tolist(), layout.stops.tolist(), strict=True)]
        self.recent.keep(groups, kept)
        return _Joined(groups.order, groups.in_order, layout, np.repeat(layout.starts, counts), times, stack)

    def _tiles(self, joined: _Joined) -> Iterator[tuple[slice, Tile]]:
        """New readings (places in `joined.layout.rows`) with their windows; a single reading comes twice, see `aggregates`."""
        readings = max(2, CELLS_MAX // (self._rows * len(joined.values)))
        done = 0
        for first, stop in joined.runs(self._rows):
            yield from self._gathered(joined, done, first, readings)
            for start in range(first, stop, readings):
                part = slice(start, min(start + readings, stop))
                tile = self._slid(joined, part)
                yield from [(part, tile)] if tile is not None else self._gathered(joined, part.start, part.stop, readings)
            done = stop
        yield from self._gathered(joined, done, len(joined.order), readings)

    def _gathered(self, joined: _Joined, first: int, stop: int, readings: int) -> Iterator[tuple[slice, Tile]]:
        for start in range(first, stop, readings):
            part = slice(start, min(start + readings, stop))
            yield part, self._gather(joined, part)

    def _slid(self, joined: _Joined, part: slice) -> Tile | None:
        """The windows of a run, if every reading of it counts in them."""
        rows = self._rows
        first, stop = int(joined.layout.rows[part.start]) - (rows - 1), int(joined.layout.rows[part.stop - 1]) + 1
        times, values = joined.event_us[first:stop], joined.values[:, first:stop]
        old = times[rows - 1 :] - times[: len(times) - rows + 1] >= self._window_s * 1e6
        if part.stop - part.start < 2 or old.any() or (times[1:] < times[:-1]).any() or np.isnan(values).any():
            return None
        return Tile(_slide(values, rows), times, _slide(np.arange(len(times)), rows), None)

    def _gather(self, joined: _Joined, part: slice) -> Tile:
        """The windows of any readings."""
        rows, starts = joined.layout.rows[part], joined.starts[part]
        if len(rows) == 1:
            rows, starts = np.repeat(rows, 2), np.repeat(starts, 2)
        places = rows - np.arange(self._rows - 1, -1, -1)[:, None]
        known = places >= starts
        np.maximum(places, starts, out=places)
        known &= self._young(joined.event_us, places)
        used = int(np.argmax(known.any(axis=1)))  # the first step that counts anywhere
        places, known = places[used:], known[used:]
        values = joined.values.take(places, axis=1)
        return Tile(values, joined.event_us, places, outside(values, known))

    def _young(self, event_us: Ints, places: Places) -> Mask:
        """Which of the readings at `places` (steps, readings) are in the window of the newest by their event time."""
        age_us = event_us[places[-1]] - event_us[places]
        young: Mask = (age_us >= 0) & (age_us < self._window_s * 1e6)
        return young


@dataclass(frozen=True)
class _Joined:
    """Histories and new readings in one array: event times (rows,) and values (fields, rows).

    `layout.rows` are the places of the new readings, `starts` the first place of their entity, `order` sorts the new readings by entity.
    """

    order: Places
    in_order: bool
    layout: Layout
    starts: Places
    event_us: Ints
    values: Floats

    def runs(self, window_rows: int) -> list[tuple[int, int]]:
        """Stretches of new readings (places in `layout.rows`) of one entity with a full window each, long ones only."""
        layout = self.layout
        first = np.maximum(layout.fresh, layout.starts + window_rows - 1)
        ends = np.cumsum(layout.stops - layout.fresh)
        starts = ends - (layout.stops - first)
        long = ends - starts >= RUN_ROWS_MIN
        return list(zip(starts[long].tolist(), ends[long].tolist(), strict=True))


def _slide(array: npt.NDArray[Number], steps: int) -> npt.NDArray[Number]:
    """(…, steps, readings) of (…, steps - 1 + readings): step s is the array moved by s; a view."""
    return sliding_window_view(array, array.shape[-1] - steps + 1, axis=-1)
