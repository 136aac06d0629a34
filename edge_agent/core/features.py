"""Window features: one definition for training, the cloud and the device.

- The window of a reading: it and the readings of the same entity seen before it, at most `window_rows`, with an
  event time in (t - window_s, t].
- Sums run from the oldest reading to the newest, one addition at a time, so a feature has the same bits
  however the readings are cut into batches, and on every machine with IEEE 754 arithmetic.
- Missing values (NaN) are left out; a window without values gives NaN, with a count of 0.

>>> spec = FeatureSpec(features=[Feature("t", "mean")], window_rows=2, window_s=3600.0)
>>> windows = Windows(spec)
>>> windows.push(Strings.of(["a"] * 3), np.array([0, 1, 2]), {"t": np.array([1.0, 3.0, 5.0])}).tolist()
[[1.0], [2.0], [4.0]]
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edge_agent.contract.bundle import Feature, FeatureSpec
from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.errors import ContractError

ENTITIES_MAX = 10_000
CELLS_MAX = 1_000_000  # window rows × fields × readings worked on at once; bounds the memory of a large batch
_US_PER_HOUR = 3_600e6

__all__ = ["Feature", "FeatureSpec", "Windows"]


@dataclass(frozen=True)
class _History:
    """The last readings of one entity, oldest first: event times (rows,) and values (rows, fields)."""

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

    def push(self, entity: Strings, event_us: Ints, table: Table) -> Floats:
        """Take readings in the order seen and return their features, float64 (rows, features).

        Raises:
            ContractError: the table lacks a field of the spec, or it is not numeric.
        """
        joined = self._join(entity, event_us, table)
        out = np.empty((len(event_us), len(self.spec.features)))
        if len(event_us):
            rows = max(1, CELLS_MAX // (self.spec.window_rows * len(self._fields)))
            for first in range(0, len(event_us), rows):
                part = slice(first, first + rows)
                out[joined.order[part]] = self._features(joined.part(part))
        return out

    def warm(self, entity: Strings, event_us: Ints, table: Table) -> None:
        """Take readings as history only: after a restart, those that the buffer still holds."""
        self._join(entity, event_us, table)

    def _join(self, entity: Strings, event_us: Ints, table: Table) -> _Joined:
        """Put the new readings behind the histories of their entities, and keep the new histories."""
        values = self._values(table, len(event_us))
        order = np.argsort(entity.codes, kind="stable")
        cuts = np.flatnonzero(np.diff(entity.codes[order])) + 1
        times: list[Ints] = []
        tables: list[Floats] = []
        rows: list[npt.NDArray[np.intp]] = []
        starts: list[npt.NDArray[np.intp]] = []
        size = 0
        for group in np.split(order, cuts) if len(order) else []:
            name = entity.values[entity.codes[group[0]]]
            old = self._histories.pop(name, None)
            kept = 0 if old is None else len(old.event_us)
            t = event_us[group] if old is None else np.concatenate([old.event_us, event_us[group]])
            v = values[group] if old is None else np.concatenate([old.values, values[group]])
            last = max(0, len(t) - (self.spec.window_rows - 1))
            self._histories[name] = _History(t[last:], v[last:])
            times.append(t)
            tables.append(v)
            rows.append(np.arange(size + kept, size + len(t)))
            starts.append(np.full(len(group), size))
            size += len(t)
        while len(self._histories) > ENTITIES_MAX:
            del self._histories[next(iter(self._histories))]
        if not times:
            nothing = np.zeros(0, np.intp)
            return _Joined(order, nothing, nothing, event_us, values)
        return _Joined(order, np.concatenate(rows), np.concatenate(starts), np.concatenate(times), np.concatenate(tables))

    def _values(self, table: Table, rows: int) -> Floats:
        values = np.empty((rows, len(self._fields)))
        for i, name in enumerate(self._fields):
            column = table.get(name)
            if column is None or isinstance(column, Strings):
                raise ContractError(f"feature field {name!r} is not a numeric column of the stream (has {sorted(table)})")
            values[:, i] = column
        return values

    def _features(self, joined: _Joined) -> Floats:
        """Features of the new readings, in the order of `joined.rows`."""
        wanted = {f.aggregate for f in self.spec.features}
        newest = joined.values[joined.rows]
        steps = [joined.step(back, self.spec.window_s) for back in reversed(range(self.spec.window_rows))]
        steps = [s for s in steps if s.inside.any()]
        count = np.zeros(newest.shape)
        total = np.zeros(newest.shape)
        hours_total = np.zeros(newest.shape)
        low = np.full(newest.shape, np.inf)
        high = np.full(newest.shape, -np.inf)
        for s in steps:
            count += s.inside
            total += np.where(s.inside, s.values, 0.0)
            hours_total += np.where(s.inside, s.hours, 0.0)
            low = np.where(s.inside, np.minimum(low, s.values), low)
            high = np.where(s.inside, np.maximum(high, s.values), high)
        empty = count == 0
        present = np.where(empty, 1.0, count)
        mean, hours_mean = total / present, hours_total / present
        results = {"last": newest, "count": count, "mean": mean, "min": low, "max": high}
        if wanted & {"std", "slope"}:
            squares = np.zeros(newest.shape)
            products = np.zeros(newest.shape)
            hours_squares = np.zeros(newest.shape)
            for s in steps:
                off = np.where(s.inside, s.values - mean, 0.0)
                hours_off = np.where(s.inside, s.hours - hours_mean, 0.0)
                squares += off * off
                products += off * hours_off
                hours_squares += hours_off * hours_off
            flat = hours_squares == 0
            results["std"] = np.sqrt(squares / present)
            results["slope"] = np.where(flat, 0.0, products / np.where(flat, 1.0, hours_squares))
        for name in ("mean", "min", "max", "std", "slope"):
            if name in results:
                results[name] = np.where(empty, np.nan, results[name])
        columns = [results[f.aggregate][:, self._fields.index(f.field)] for f in self.spec.features]
        return np.stack(columns, axis=1)


@dataclass(frozen=True)
class _Step:
    """The readings `back` places before each new one: values, hours before it, and which count, all (rows, fields)."""

    values: Floats
    hours: Floats
    inside: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Joined:
    """Histories and new readings, entity by entity.

    `rows` are the places of the new readings, `starts` the first place of their entity, `order` sorts the new
    readings by entity.
    """

    order: npt.NDArray[np.intp]
    rows: npt.NDArray[np.intp]
    starts: npt.NDArray[np.intp]
    event_us: Ints
    values: Floats

    def part(self, rows: slice) -> _Joined:
        """The same, for some of the new readings."""
        return _Joined(self.order[rows], self.rows[rows], self.starts[rows], self.event_us, self.values)

    def step(self, back: int, window_s: float) -> _Step:
        place = self.rows - back
        known = place >= self.starts
        place = np.where(known, place, self.rows)
        age_us = self.event_us[self.rows] - self.event_us[place]
        known &= (age_us >= 0) & (age_us < window_s * 1e6)
        values = self.values[place]
        inside = known[:, None] & ~np.isnan(values)
        hours = np.broadcast_to((-age_us / _US_PER_HOUR)[:, None], values.shape)
        return _Step(values, hours, inside)
