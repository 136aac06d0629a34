"""Trailing windows: one per reading, in the order seen.

- The window of a reading: it and the readings of the same entity seen before it, at most `window_rows`, with an event time in
  (t - window_s, t].

How: windows are looked at as one array (fields, steps, readings). Where most readings have a full window (long runs of an entity), such an
array is the readings themselves, each step moved by one: no value is copied. The other windows are gathered from where they lie. Both
are worked on in pieces that fit the processor's cache, and give the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.core.aggregates import Made, Outputs, RunTile, Tile, outside
from edge_agent.core.entities import Groups, Layout, Mask, Places, Recent

CELLS_MAX = 65_536  # window rows × fields × readings gathered at once: what the processor's cache holds
RUN_CELLS_MAX = 16_384  # fields × readings worked on at once where they lie
RUN_SHARE_MIN = 0.5  # of the places in all runs that must be new readings with a full window, or gathering is faster
PIECE_ROWS_MIN, PIECE_CELLS_MAX = 4_096, 131_072  # readings taken at once, by features × readings: more would be fresh memory each time
_NONE = np.zeros(0, np.intp)


@dataclass(frozen=True)
class _History:
    """The last readings of one entity, oldest first: event times (rows,) and values (rows, fields)."""

    event_us: Ints
    values: Floats


class TrailingWindows:
    """The windows of one stream on one device; at most `entities_max` entities."""

    def __init__(self, spec: FeatureSpec, outputs: Outputs, entities_max: int) -> None:
        self._rows, self._window_s, self._outputs = spec.window_rows, spec.window_s, outputs
        self._piece = max(PIECE_ROWS_MIN, PIECE_CELLS_MAX // outputs.count)
        self.recent: Recent[_History] = Recent(entities_max)
        self.forgotten = 0  # a trailing window is done with its reading: nothing waits

    def push(self, entity: Strings, event_us: Ints, values: Floats) -> Made:
        """Take readings in the order seen; a window for each."""
        out = np.empty((self._outputs.count, len(event_us)))
        for first in range(0, len(event_us), self._piece):
            part = slice(first, first + self._piece)
            self._take(entity[part], event_us[part], values[part], out[:, part])
        start_us = event_us - np.int64(min(self._window_s * 1e6, 2.0**62))
        return Made(out.T, np.arange(len(event_us)), start_us, event_us, _NONE, _NONE)

    def _take(self, entity: Strings, event_us: Ints, values: Floats, out: Floats) -> None:
        """Put the features of readings into `out`, (features, readings)."""
        joined = self._join(Groups.of(entity), event_us, values)
        enough = RUN_SHARE_MIN * len(joined.event_us)
        if len(event_us) >= enough and np.count_nonzero(full := joined.full(self._rows, self._window_s)) >= enough:
            self._from_runs(joined, out)
            self._gather(joined, np.flatnonzero(~full), out)
        else:
            self._gather(joined, np.arange(len(event_us)), out)

    def warm(self, entity: Strings, event_us: Ints, values: Floats) -> None:
        """Take readings as history only."""
        self._join(Groups.of(entity), event_us, values)

    def _join(self, groups: Groups, event_us: Ints, values: Floats) -> _Joined:
        """Put the new readings behind the histories of their entities, and keep the new histories."""
        nothing = _History(np.zeros(0, np.int64), np.empty((0, values.shape[1])))
        past = [old or nothing for old in self.recent.take(groups)]
        counts = groups.stops - groups.starts
        layout = Layout.of([len(h.event_us) for h in past], counts)
        new_us, new = (event_us, values) if groups.in_order else (event_us.take(groups.order), values.take(groups.order, axis=0))
        times = layout.joined(new_us, [h.event_us for h in past])
        stack = layout.joined(new, [h.values for h in past])
        firsts = np.maximum(layout.starts, layout.stops - (self._rows - 1))
        kept = [_History(times[a:b].copy(), stack[a:b].copy()) for a, b in zip(firsts.tolist(), layout.stops.tolist(), strict=True)]
        self.recent.keep(groups, kept)
        return _Joined(groups.order, groups.in_order, layout, np.repeat(layout.starts, counts), times, stack)

    def _from_runs(self, joined: _Joined, out: Floats) -> None:
        """Features of all new readings as if each had a full window; of those that have not, they mean nothing."""
        steps, (size, width) = self._rows, joined.values.shape
        spread = np.empty((self._outputs.count, size))
        windows = size - steps + 1
        readings = max(2, min(windows, RUN_CELLS_MAX))
        fields = max(1, RUN_CELLS_MAX // readings)
        with np.errstate(all="ignore"):  # windows that reach over into another entity
            for first in range(0, windows, readings):
                first = max(0, min(first, windows - 2))  # never a single window, see `aggregates`
                part = slice(first, min(first + readings, windows) + steps - 1)
                for field in range(0, width, fields):
                    run = np.ascontiguousarray(joined.values[part, field : field + fields].T)
                    tile = RunTile(run, joined.event_us[part], steps)
                    self._outputs.of(tile, spread[:, part.start + steps - 1 : part.stop], field)
        places = joined.layout.rows
        if not joined.in_order:
            places = np.empty_like(joined.order)
            places[joined.order] = joined.layout.rows
        for row, features in zip(out, spread, strict=True):
            features.take(places, out=row, mode="clip")  # the places are there; asking costs as much as taking

    def _gather(self, joined: _Joined, which: Places, out: Floats) -> None:
        """Features of some of the new readings (places in `joined.order`); a single reading comes twice, see `aggregates`."""
        readings = max(2, CELLS_MAX // (self._rows * joined.values.shape[1]))
        for first in range(0, len(which), readings):
            part = which[first : first + readings]
            tile = self._tile(joined, np.repeat(part, 2) if len(part) == 1 else part)
            out[:, joined.order[part]] = self._outputs.of(tile)[:, : len(part)]

    def _tile(self, joined: _Joined, part: Places) -> Tile:
        """The windows of any readings."""
        rows, starts = joined.layout.rows[part], joined.starts[part]
        places = rows - np.arange(self._rows - 1, -1, -1)[:, None]
        known = places >= starts
        np.maximum(places, starts, out=places)
        known &= self._young(joined.event_us, places)
        used = int(np.argmax(known.any(axis=1)))  # the first step that counts anywhere
        places, known = places[used:], known[used:]
        values = joined.values.take(places, axis=0).transpose(2, 0, 1)
        return Tile(values, joined.event_us, places, outside(values, known))

    def _young(self, event_us: Ints, places: Places) -> Mask:
        """Which of the readings at `places` (steps, readings) are in the window of the newest by their event time."""
        age_us = event_us[places[-1]] - event_us[places]
        young: Mask = (age_us >= 0) & (age_us < self._window_s * 1e6)
        return young


@dataclass(frozen=True)
class _Joined:
    """Histories and new readings in one array: event times (rows,) and values (rows, fields).

    `layout.rows` are the places of the new readings, `starts` the first place of their entity, `order` sorts the new readings by entity.
    """

    order: Places
    in_order: bool
    layout: Layout
    starts: Places
    event_us: Ints
    values: Floats

    def full(self, window_rows: int, window_s: float) -> Mask:
        """Which new readings (in `order`) have `window_rows` readings in their window, in the order of time, with no value missing."""
        oldest = self.layout.rows - (window_rows - 1)
        full: Mask = oldest >= self.starts
        oldest = np.maximum(oldest, 0)
        full &= self.event_us[self.layout.rows] - self.event_us[oldest] < window_s * 1e6
        missing = np.isnan(self.values)
        if missing.any():
            before = np.concatenate([[0], np.cumsum(missing.any(axis=1))])
            full &= before[self.layout.rows + 1] == before[oldest]
        back = self.layout.falls(self.event_us)
        if back.any():
            steps = np.concatenate([[0], np.cumsum(back)])
            full &= steps[self.layout.rows] == steps[oldest]
        return full
