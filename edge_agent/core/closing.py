"""Tumbling and hopping windows in event time: each closes once, and is final.

- Windows are [k · every, k · every + window), counted from 1970 UTC, for each entity. The watermark of an entity is the newest event time
  seen of it, less the lateness. A window closes at the reading that brings the watermark to its end or beyond; one without readings is not
  made.
- A reading belongs to those of its windows that are still open when it is seen. If one of them is closed it is late; if all are, it is
  left out.
- A hop (the time from k · every to the next) holds at most `hop_rows` readings; those seen after that are left out.
- In a window, readings are in the order of their event times, equal ones in the order seen. So within the lateness, the order of arrival
  changes nothing.
- The watermark is the entity's own: how readings of several entities are mixed changes nothing, and an entity that falls silent keeps its
  last windows open. A time from the far future closes what is open, and makes what follows late.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_agent.contract.columns import Floats, Ints, Strings
from edge_agent.contract.feature_spec import FeatureSpec
from edge_agent.core.aggregates import Made, Outputs, Tile, outside
from edge_agent.core.entities import Groups, Layout, Mask, Places, Recent

CELLS_MAX = 65_536  # steps × fields × windows worked on at once: what the processor's cache holds
_TIME_MAX_US = 2**61  # so that no sum of times leaves 64 bits
_NEVER_US = -(2**62)


@dataclass(frozen=True)
class _Open:
    """What one entity has in open windows: readings by event time, the first window that each counts in; and the newest time seen."""

    event_us: Ints
    values: Floats
    since: Ints
    newest_us: int


class ClosingWindows:
    """The windows of one stream on one device; at most `entities_max` entities.

    Window k begins at k · every; a reading of hop h belongs to the windows h - overlap + 1 to h.
    """

    def __init__(self, spec: FeatureSpec, outputs: Outputs, entities_max: int) -> None:
        self._every_us, self._window_us, self._lateness_us = spec.every_us, spec.window_us, spec.lateness_us
        self._overlap, self._hop_rows, self._outputs = spec.overlap, spec.hop_rows, outputs
        self.recent: Recent[_Open] = Recent(entities_max)
        self.forgotten = 0
        """Readings in open windows of entities that were forgotten."""

    def push(self, entity: Strings, event_us: Ints, values: Floats) -> Made:
        """Take readings in the order seen; the windows that they close."""
        seen, held, overfull, windows = self._take(entity, event_us, values)
        closing = seen.groups.order[seen.closing(windows)]
        sequence = np.lexsort((windows.number, closing))
        start_us = windows.number[sequence] * self._every_us
        return Made(
            features=self._features(held, windows)[:, sequence].T,
            rows=closing[sequence],
            start_us=start_us,
            end_us=start_us + self._window_us,
            late=np.sort(seen.groups.order[seen.late]),
            overfull=np.sort(overfull),
        )

    def warm(self, entity: Strings, event_us: Ints, values: Floats) -> None:
        """Take readings as history only: windows close, and nothing is made of them."""
        self._take(entity, event_us, values)

    def _take(self, entity: Strings, event_us: Ints, values: Floats) -> tuple[_Seen, _Held, Places, _Windows]:
        """Take readings: what was seen, what is held of it, the places of those whose hop was full, and the windows that they close."""
        groups = Groups.of(entity)
        nothing = _Open(np.zeros(0, np.int64), np.empty((0, values.shape[1])), np.zeros(0, np.int64), _NEVER_US)
        past = [old or nothing for old in self.recent.take(groups)]
        seen = self._see(groups, event_us, past)
        held, overfull = self._hold(seen, values, past)
        closed_us = np.array([old.newest_us for old in past], np.int64)
        windows = held.closed(self._closed(closed_us), seen.closed_now, self._overlap)
        self._keep(seen, held)
        return seen, held, overfull, windows

    def _see(self, groups: Groups, event_us: Ints, past: list[_Open]) -> _Seen:
        """Each reading's hop, and what is closed before and after it."""
        times = np.clip(event_us if groups.in_order else event_us[groups.order], -_TIME_MAX_US, _TIME_MAX_US)
        newest = _running_max(groups, times, past)
        after = self._closed(newest)
        before = np.empty_like(after)
        before[1:] = after[:-1]
        before[groups.starts] = self._closed(np.array([old.newest_us for old in past], np.int64))
        hop = times // self._every_us
        first = hop - (self._overlap - 1)
        return _Seen(groups, times, hop, np.maximum(first, before), before > first, before, after, newest)

    def _closed(self, newest_us: Ints) -> Ints:
        """The first window that is still open when this is the newest time seen."""
        return (newest_us - (self._lateness_us + self._window_us)) // self._every_us + 1

    def _hold(self, seen: _Seen, values: Floats, past: list[_Open]) -> tuple[_Held, Places]:
        """Old and new readings in windows that were open for them, by entity and event time; and the places of those whose hop was full."""
        groups, taken = seen.groups, seen.since <= seen.hop
        every = bool(taken.all())
        new = np.bincount(groups.group[taken], minlength=len(past))
        layout = Layout.of([len(old.event_us) for old in past], new)
        places = groups.order if every else groups.order[taken]
        held = _Held(
            group=np.repeat(np.arange(len(past)), layout.stops - layout.starts),
            event_us=layout.joined(seen.times[taken], [old.event_us for old in past]),
            values=layout.joined(values if every and groups.in_order else values.take(places, axis=0), [old.values for old in past]),
            since=layout.joined(seen.since[taken], [old.since for old in past]),
            every_us=self._every_us,
        )
        order = held.by_time()
        held = held if order is None else held.take(order)
        full = held.beyond(self._hop_rows, order)
        if full is None:
            return held, np.zeros(0, np.intp)
        gone = full
        if order is not None:
            gone = np.empty_like(full)
            gone[order] = full
        return held.take(np.flatnonzero(~full)), places[gone[layout.rows]]

    def _keep(self, seen: _Seen, held: _Held) -> None:
        """Keep what is in open windows."""
        groups = seen.groups
        stops = np.searchsorted(held.group, np.arange(len(groups.names)), side="right")
        still = np.bincount(held.group[held.hop >= seen.closed_now[held.group]], minlength=len(groups.names))
        newest = seen.newest_us[groups.stops - 1]
        states = [
            _Open(held.event_us[a:b].copy(), held.values[a:b].copy(), held.since[a:b].copy(), us)
            for a, b, us in zip((stops - still).tolist(), stops.tolist(), newest.tolist(), strict=True)
        ]
        self.forgotten += sum(len(gone.event_us) for gone in self.recent.keep(groups, states))

    def _features(self, held: _Held, windows: _Windows) -> Floats:
        """The features of windows, (features, windows): those of equal length are worked on together."""
        out = np.empty((self._outputs.count, len(windows.number)))
        lengths = windows.stop - windows.start
        longest = np.argsort(-lengths, kind="stable")
        done = 0
        while done < len(longest):
            count = max(2, CELLS_MAX // (int(lengths[longest[done]]) * held.values.shape[1]))
            picked = longest[done : done + count]
            out[:, picked] = self._outputs.of(held.tile(windows, picked))[:, : len(picked)]
            done += count
        return out


@dataclass(frozen=True)
class _Seen:
    """New readings sorted by entity: times, hops, the first window each counts in, whether it is late, the first window open before and
    after it, the newest time up to it."""

    groups: Groups
    times: Ints
    hop: Ints
    since: Ints
    late: Mask
    before: Ints
    after: Ints
    newest_us: Ints

    @property
    def closed_now(self) -> Ints:
        """The first window of each entity that is open after all of them."""
        return self.after[self.groups.stops - 1]

    def closing(self, windows: _Windows) -> Places:
        """The place in `groups.order` of the reading that closed each window."""
        closing = np.flatnonzero(self.after > self.before)
        levels = np.unique(self.after[closing])
        keys = self.groups.group[closing] * (len(levels) + 1) + np.searchsorted(levels, self.after[closing])
        wanted = windows.group * (len(levels) + 1) + np.searchsorted(levels, windows.number, side="right")
        return closing[np.searchsorted(keys, wanted)]


@dataclass(frozen=True)
class _Windows:
    """Windows: their entity's group and number, and which readings they hold: `members[start:stop]`; None: start to stop."""

    group: Places
    number: Ints
    start: Places
    stop: Places
    members: Places | None


@dataclass(frozen=True)
class _Held:
    """Readings sorted by entity, then event time, then the order seen."""

    group: Places
    event_us: Ints
    values: Floats
    since: Ints
    every_us: int

    @cached_property
    def hop(self) -> Ints:
        return self.event_us // self.every_us

    @cached_property
    def hop_starts(self) -> Places:
        """Where another hop begins."""
        changed = (self.hop[1:] != self.hop[:-1]) | (self.group[1:] != self.group[:-1])
        return np.concatenate([np.zeros(min(1, len(self.hop)), np.intp), np.flatnonzero(changed) + 1])

    def by_time(self) -> Places | None:
        """What sorts the readings, None if they are sorted."""
        back = (self.event_us[1:] < self.event_us[:-1]) & (self.group[1:] == self.group[:-1])
        return np.lexsort((self.event_us, self.group)) if back.any() else None

    def take(self, places: Places) -> _Held:
        return _Held(self.group[places], self.event_us[places], self.values.take(places, axis=0), self.since[places], self.every_us)

    def beyond(self, rows_max: int, seen: Places | None) -> Mask | None:
        """Which readings are more than their hop can hold, the last in the order `seen`; None if there are none."""
        counts = np.diff(np.append(self.hop_starts, len(self.hop)))
        if not (counts > rows_max).any():
            return None
        segment = np.repeat(np.arange(len(counts)), counts)
        order = np.lexsort((np.arange(len(segment)) if seen is None else seen, segment))
        full = np.zeros(len(segment), bool)
        full[order] = np.arange(len(segment)) - np.repeat(self.hop_starts, counts) >= rows_max
        return full

    def closed(self, before: Ints, now: Ints, overlap: int) -> _Windows:
        """The windows of each group from `before` to `now` that hold readings."""
        first = self.hop_starts
        group, number = np.repeat(self.group[first], overlap), (self.hop[first, None] - np.arange(overlap)).ravel()
        due = (before[group] <= number) & (number < now[group])
        group, number = group[due], number[due]
        if overlap > 1:
            order = np.lexsort((number, group))
            group, number = group[order], number[order]
            again = np.zeros(len(group), bool)
            again[1:] = (group[1:] == group[:-1]) & (number[1:] == number[:-1])
            group, number = group[~again], number[~again]
        hops = np.unique(self.hop[first])
        keys = self.group[first] * (len(hops) + 1) + np.searchsorted(hops, self.hop[first])
        bounds = np.append(first, len(self.hop))
        start, stop = (
            bounds[np.searchsorted(keys, group * (len(hops) + 1) + np.searchsorted(hops, k))] for k in (number, number + overlap)
        )
        return self._counting(_Windows(group, number, start, stop, None))

    def _counting(self, windows: _Windows) -> _Windows:
        """The windows without the readings that came too late for them."""
        lengths = windows.stop - windows.start
        ends = np.cumsum(lengths)
        members = np.arange(int(lengths.sum())) + np.repeat(windows.start - (ends - lengths), lengths)
        counts = self.since[members] <= np.repeat(windows.number, lengths)
        if counts.all():
            return windows
        lengths = np.bincount(np.repeat(np.arange(len(lengths)), lengths)[counts], minlength=len(lengths))
        some, ends = lengths > 0, np.cumsum(lengths)
        return _Windows(windows.group[some], windows.number[some], (ends - lengths)[some], ends[some], members[counts])

    def tile(self, windows: _Windows, picked: Places) -> Tile:
        """Some of the windows, the longest first; a single one comes twice, see `aggregates`."""
        if len(picked) == 1:
            picked = np.repeat(picked, 2)
        start, stop = windows.start[picked], windows.stop[picked]
        steps = int(stop[0] - start[0])
        places = stop + np.arange(-steps, 0)[:, None]
        known = places >= start
        np.maximum(places, start, out=places)
        places = places if windows.members is None else windows.members[places]
        values = self.values.take(places, axis=0).transpose(2, 0, 1)
        return Tile(values, self.event_us, places, outside(values, known))


def _running_max(groups: Groups, times: Ints, past: list[_Open]) -> Ints:
    """The newest time of each reading's entity seen up to it."""
    before = np.empty_like(times)
    before[1:] = times[:-1]
    before[groups.starts] = [old.newest_us for old in past]
    if (times >= before).all():
        return times
    newest = times.copy()
    for start, stop, old in zip(groups.starts.tolist(), groups.stops.tolist(), past, strict=True):
        newest[start] = max(newest[start], old.newest_us)
        np.maximum.accumulate(newest[start:stop], out=newest[start:stop])
    return newest
