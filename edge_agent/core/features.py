"""Window features: one definition for training, the cloud and the device.

- The window of a reading: it and the readings of the same entity seen before it, at most `window_rows`, with an
  event time in (t - window_s, t].
- Sums run from the oldest reading to the newest, one addition at a time, so a feature has the same bits
  however the readings are cut into batches, and on every machine with IEEE 754 arithmetic.
- Missing values (NaN) are left out; a window without values gives NaN, with a count of 0.

How: the windows of many readings are laid out as one array (fields, steps, readings), oldest step first, and reduced along the
steps. NumPy reduces along an axis that is not the fastest one element after the other; pairwise summation, which would depend on
the number of steps, is for the fastest axis only (see `numpy.sum`, Notes). So there are always at least two readings.

>>> spec = FeatureSpec(features=[Feature("t", "mean")], window_rows=2, window_s=3600.0)
>>> windows = Windows(spec)
>>> windows.push(Strings.of(["a"] * 3), np.array([0, 1, 2]), {"t": np.array([1.0, 3.0, 5.0])}).tolist()
[[1.0], [2.0], [4.0]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import Feature, FeatureSpec
from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.errors import ContractError

ENTITIES_MAX = 10_000
CELLS_MAX = 65_536  # window rows × fields × readings worked on at once: what the processor's cache holds
_US_PER_HOUR = 3_600e6
_SHORT_CODES = 65_536

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]

__all__ = ["Feature", "FeatureSpec", "Windows"]


@dataclass(frozen=True)
class _History:
    """The last readings of one entity, oldest first: event times (rows,) and values (fields, rows)."""

    event_us: Ints
    values: Floats


class Windows:
    """The open windows of one stream on one device.

    Holds at most ENTITIES_MAX entities; the one longest unseen is forgotten first.
    """

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec
        self._fields = list(dict.fromkeys(f.field for f in spec.features))
        self._histories: dict[str, _History] = {}
        self._outputs = _outputs(spec, self._fields)

    def push(self, entity: Strings, event_us: Ints, table: Table) -> Floats:
        """Take readings in the order seen and return their features, float64 (rows, features).

        Raises:
            ContractError: the table lacks a field of the spec, or it is not numeric.
        """
        joined = self._join(entity, event_us, table)
        out = np.empty((len(event_us), len(self.spec.features)))
        rows = max(2, CELLS_MAX // (self.spec.window_rows * len(self._fields)))
        for first in range(0, len(event_us), rows):
            order = joined.order[first : first + rows]
            out[order] = self._features(joined, slice(first, first + rows))[: len(order)]
        return out

    def warm(self, entity: Strings, event_us: Ints, table: Table) -> None:
        """Take readings as history only: after a restart, those that the buffer still holds."""
        self._join(entity, event_us, table)

    def _join(self, entity: Strings, event_us: Ints, table: Table) -> _Joined:
        """Put the new readings behind the histories of their entities, and keep the new histories."""
        if len(set(entity.values)) != len(entity.values):
            entity = Strings.of(entity.tolist())
        values = self._values(table, len(event_us))
        order = _by_entity(entity)
        groups = list(_groups(entity, order))
        past = [self._histories.pop(name, None) for name, _, _ in groups]
        kept = np.array([0 if h is None else len(h.event_us) for h in past], np.intp)
        counts = np.array([stop - start for _, start, stop in groups], np.intp)
        shift = np.cumsum(kept)  # how far the new readings of each group move up behind the histories
        rows = np.arange(len(order)) + np.repeat(shift, counts)
        size = len(order) + int(kept.sum())
        times, stack = np.empty(size, np.int64), np.empty((len(self._fields), size))
        times[rows], stack[:, rows] = event_us[order], values[:, order]
        starts: list[int] = []
        for (name, start, stop), old, moved in zip(groups, past, shift.tolist(), strict=True):
            first, end = start + moved, stop + moved
            if old is not None:
                first -= len(old.event_us)
                times[first : start + moved], stack[:, first : start + moved] = old.event_us, old.values
            starts.append(first)
            last = max(first, end - (self.spec.window_rows - 1))
            self._histories[name] = _History(times[last:end].copy(), stack[:, last:end].copy())
        while len(self._histories) > ENTITIES_MAX:
            del self._histories[next(iter(self._histories))]
        return _Joined(order, rows, np.repeat(np.array(starts, np.intp), counts), times, stack)

    def _values(self, table: Table, rows: int) -> Floats:
        values = np.empty((len(self._fields), rows))
        for i, name in enumerate(self._fields):
            column = table.get(name)
            if column is None or isinstance(column, Strings):
                raise ContractError(f"feature field {name!r} is not a numeric column of the stream (has {sorted(table)})")
            values[i] = column
        return values

    def _features(self, joined: _Joined, part: slice) -> Floats:
        """Features of some of the new readings, in the order of `joined.rows`."""
        window = joined.window(part, self.spec.window_rows, self.spec.window_s)
        out = np.empty((window.readings, len(self.spec.features)))
        for aggregate, fields, features in self._outputs:
            result = window.aggregate(aggregate)
            out.T[features] = result if len(result) == 1 else result[fields]
        return out


@dataclass(frozen=True)
class _Joined:
    """Histories and new readings, entity by entity.

    `rows` are the places of the new readings, `starts` the first place of their entity, `order` sorts the new
    readings by entity.
    """

    order: Places
    rows: Places
    starts: Places
    event_us: Ints
    values: Floats

    @cached_property
    def missing(self) -> bool:
        """Whether any value is missing."""
        return bool(np.isnan(self.values).any())

    @cached_property
    def late(self) -> bool:
        """Whether any reading was seen after one of its entity with a later event time."""
        back = np.diff(self.event_us) < 0
        back[self.starts[self.starts > 0] - 1] = False  # there another entity begins
        return bool(back.any())

    def window(self, part: slice, window_rows: int, window_s: float) -> _Window:
        """The windows of some of the new readings; a single reading comes twice, see the module."""
        rows, starts = self.rows[part], self.starts[part]
        if len(rows) == 1:
            rows, starts = np.repeat(rows, 2), np.repeat(starts, 2)
        places = rows - np.arange(window_rows - 1, -1, -1)[:, None]
        known = None
        if self.late or (places[0] < starts).any() or not self._young(places, window_s)[0].all():
            known = places >= starts
            np.maximum(places, starts, out=places)
            known &= self._young(places, window_s)
            used = int(np.argmax(known.any(axis=1)))  # the first step that counts anywhere
            places, known = places[used:], known[used:]
        values = self.values.take(places, axis=1)
        return _Window(values, self.event_us, places, _outside(values, known, self.missing))

    def _young(self, places: Places, window_s: float) -> Mask:
        """Which of the readings at `places` (steps, readings) are in the window of the newest by their event time."""
        age_us = self.event_us[places[-1]] - self.event_us[places]
        young: Mask = (age_us >= 0) & (age_us < window_s * 1e6)
        return young


class _Window:
    """Windows as one array: `values` (fields, steps, readings), oldest step first; `places` (steps, readings) are theirs in `event_us`.

    `outside` says what does not count, (1 or fields, steps, readings), None: nothing; there `values` becomes 0. Results are of
    shape (1 or fields, 1 or readings).
    """

    def __init__(self, values: Floats, event_us: Ints, places: Places, outside: Mask | None) -> None:
        self.readings = values.shape[2]
        self._newest = values[:, -1].copy()
        self._values, self._event_us, self._places, self._outside = values, event_us, places, outside
        steps = float(len(places))
        self._count = np.full((1, 1), steps) if outside is None else steps - np.add.reduce(outside, axis=1, dtype=np.float64)
        self._empty = None if outside is None else self._count == 0
        self._present = self._count if self._empty is None else np.where(self._empty, 1.0, self._count)
        self._within(values)

    def aggregate(self, name: str) -> Floats:
        """One aggregate of every window."""
        match name:
            case "last":
                return self._newest
            case "count":
                return self._count
            case "mean":
                result = self._mean
            case "min":
                result = np.minimum.reduce(self._filled(np.inf), axis=1, initial=np.inf)
            case "max":
                result = np.maximum.reduce(self._filled(-np.inf), axis=1, initial=-np.inf)
            case "std":
                result = np.sqrt(_sum(self._offsets * self._offsets) / self._present)
            case _:
                result = self._slope()
        return result if self._empty is None else np.where(self._empty, np.nan, result)

    def _slope(self) -> Floats:
        hours = ((self._event_us[self._places] - self._event_us[self._places[-1]]) / _US_PER_HOUR)[None]
        if self._outside is not None:
            hours = np.repeat(hours, len(self._outside), axis=0)
        offsets = self._within(hours - (_sum(self._within(hours)) / self._present)[:, None])
        spread = _sum(offsets * offsets)
        flat = spread == 0
        return np.where(flat, 0.0, _sum(self._offsets * offsets) / np.where(flat, 1.0, spread))

    @cached_property
    def _mean(self) -> Floats:
        return _sum(self._values) / self._present

    @cached_property
    def _offsets(self) -> Floats:
        """Values less their mean."""
        return self._within(self._values - self._mean[:, None])

    def _within(self, array: Floats) -> Floats:
        """The same array, 0 outside."""
        if self._outside is not None:
            np.copyto(array, 0.0, where=self._outside)
        return array

    def _filled(self, value: float) -> Floats:
        return self._values if self._outside is None else np.where(self._outside, value, self._values)


def _sum(array: Floats) -> Floats:
    """Over the steps, oldest first, starting from 0.0 (so that -0.0 and -0.0 make 0.0)."""
    return np.asarray(np.add.reduce(array, axis=1, initial=0.0))


def _outside(values: Floats, known: Mask | None, missing: bool) -> Mask | None:
    """What does not count, (1 or fields, steps, readings); None if everything does."""
    if not missing:
        return None if known is None or known.all() else ~known[None]
    return np.isnan(values) if known is None else np.isnan(values) | ~known[None]


def _by_entity(entity: Strings) -> Places:
    """The places of the readings sorted by entity, each entity's in the order seen."""
    codes = entity.codes.astype(np.uint16) if len(entity.values) <= _SHORT_CODES else entity.codes  # short ones are sorted by radix
    return np.argsort(codes, kind="stable")


def _groups(entity: Strings, order: Places) -> Iterator[tuple[str, int, int]]:
    """Each entity with the range of its readings in `order`."""
    codes = entity.codes[order]
    cuts = [0, *(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist(), len(order)]
    for start, stop in pairwise(cuts):
        if start < stop:
            yield entity.values[codes[start]], start, stop


def _outputs(spec: FeatureSpec, fields: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """For each aggregate wanted: of which fields, and as which features."""
    wanted: dict[str, list[tuple[int, int]]] = {}
    for place, feature in enumerate(spec.features):
        wanted.setdefault(feature.aggregate, []).append((fields.index(feature.field), place))
    return [(aggregate, [f for f, _ in pairs], [p for _, p in pairs]) for aggregate, pairs in wanted.items()]
