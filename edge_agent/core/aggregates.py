"""Aggregates of many windows at once: the arithmetic of features, and nothing else.

- Windows lie in one array (fields, steps, windows), the newest reading of each in the last step. Results are (1 or fields, 1 or windows).
  In memory the fields of a reading lie together, and steps far apart: gathering copies readings, and a step is added to all sums at once.
- Sums run from the oldest reading to the newest, one addition at a time, beginning at 0.0: steps that do not count are zeros in front and
  change no bit. NumPy reduces along an axis that is not the fastest one element after the other; pairwise summation, which would depend on
  the number of steps, is for the fastest axis only (see `numpy.sum`, Notes). So there are always at least two windows.
- Missing values (NaN) are left out; a window without values gives NaN, with a count of 0. `min`, `max` and quantiles know one zero, 0.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.feature_spec import FeatureSpec, quantile_of
from edge_agent.core.entities import Mask, Places
from edge_agent.core.functions import Function, Functions

_US_PER_HOUR = 3_600e6


@dataclass(frozen=True)
class Made:
    """What readings gave: the windows that are done with them, in the order in which they are.

    Args:
        features: float64 (windows, features).
        rows: the place in the batch of the reading that each window was done with; ascending.
        start_us, end_us: window times: (start, end] of a trailing window, [start, end) of one that closes.
        late, overfull: places in the batch of readings that came after a window of theirs had closed, or found their hop full.
    """

    features: Floats
    rows: Places
    start_us: Ints
    end_us: Ints
    late: Places
    overfull: Places

    @classmethod
    def together(cls, parts: list[tuple[int, Made]]) -> Made:
        """What parts of a batch gave, each with the place of its first reading."""
        if len(parts) == 1:
            return parts[0][1]
        return cls(
            np.concatenate([m.features for _, m in parts]),
            *(np.concatenate([getattr(m, name) + (0 if name.endswith("us") else first) for first, m in parts]) for name in _PER_WINDOW),
        )


_PER_WINDOW = ("rows", "start_us", "end_us", "late", "overfull")


class Outputs:
    """The features of a spec: which aggregates of which fields, and where their results go."""

    def __init__(self, spec: FeatureSpec, functions: Functions) -> None:
        self.fields, self.count, self.functions = spec.fields, len(spec.features), functions
        self._wanted: dict[str, list[tuple[int, int]]] = {}
        for place, feature in enumerate(spec.features):
            self._wanted.setdefault(feature.aggregate, []).append((self.fields.index(feature.field), place))
        self._parts: dict[tuple[int, int], list[tuple[str, _Picked, _Picked]]] = {}

    def values(self, table: Table, rows: int) -> Floats:
        """The fields of readings, float64 (rows, fields).

        Raises:
            ContractError: the table lacks a field of the spec, or it is not numeric.
        """
        values = np.empty((rows, len(self.fields)))
        for i, name in enumerate(self.fields):
            column = table.get(name)
            if column is None or isinstance(column, Strings):
                raise ContractError(f"feature field {name!r} is not a numeric column of the stream (has {sorted(table)})")
            values[:, i] = column
        return values

    def of(self, tile: Tile, out: Floats | None = None, first: int = 0) -> Floats:
        """The features of the windows of a tile, (features, windows); of those fields that it has, which are `first` and the next ones."""
        made = np.empty((self.count, tile.windows)) if out is None else out
        for aggregate, fields, places in self._of_fields(first, first + tile.fields):
            result = tile.function(self.functions[aggregate]) if aggregate in self.functions else tile.aggregate(aggregate)
            made[places] = result[fields] if len(result) > 1 else result
        return made

    def _of_fields(self, first: int, stop: int) -> list[tuple[str, _Picked, _Picked]]:
        """The aggregates wanted of fields `first` to `stop`: of which of them, and as which features."""
        if (first, stop) not in self._parts:
            pairs = {name: [(f - first, p) for f, p in wanted if first <= f < stop] for name, wanted in self._wanted.items()}
            self._parts[first, stop] = [(name, _picked([f for f, _ in w]), _picked([p for _, p in w])) for name, w in pairs.items() if w]
        return self._parts[first, stop]


_Picked = slice | list[int]


def _picked(places: list[int]) -> _Picked:
    """Places as a slice if they are evenly spaced, so that NumPy takes them without a search."""
    step = places[1] - places[0] if len(places) > 1 else 1
    even = range(places[0], places[-1] + 1, step) if step > 0 else ()
    return slice(places[0], places[-1] + 1, step) if list(even) == places else places


class Tile:
    """Windows as one array.

    Args:
        values: (fields, steps, windows); written to unless `outside` is None.
        event_us, places: the event time of each step is `event_us[places]`, places being (steps, windows).
        outside: what does not count, (1 or fields, steps, windows); None: nothing.
    """

    def __init__(self, values: Floats, event_us: Ints, places: Places, outside: Mask | None) -> None:
        self.fields, _, self.windows = values.shape
        self._newest = values[:, -1] if outside is None else values[:, -1].copy()
        self._gathered, self._event_us, self._gathered_places, self._outside = values, event_us, places, outside
        steps = float(len(places))
        self._count = np.full((1, 1), steps) if outside is None else steps - np.add.reduce(outside, axis=1, dtype=np.float64)
        self._empty = None if outside is None else self._count == 0
        self._present = self._count if self._empty is None else np.where(self._empty, 1.0, self._count)
        self._within(values)

    @property
    def _values(self) -> Floats:
        return self._gathered

    @property
    def _places(self) -> Places:
        return self._gathered_places

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
                result = self._extreme(np.minimum, np.inf) + 0.0
            case "max":
                result = self._extreme(np.maximum, -np.inf) + 0.0
            case "std":
                result = np.sqrt(self._squares(self._mean) / self._present)
            case "rms":
                result = np.sqrt(self._squares(None) / self._present)
            case "delta":
                result = self._delta()
            case "slope":
                result = self._slope()
            case _:
                q = quantile_of(name)
                assert q is not None  # `check_spec` and `check_functions` know the names
                result = self._quantile(q)
        return self._or_missing(result)

    def function(self, function: Function) -> Floats:
        """The user's function of every window and field."""
        fields, _, windows = self._values.shape
        counts = np.broadcast_to(self._count, (fields, windows))
        result = np.full((fields, windows), np.nan)
        for field in range(fields):
            for n in np.unique(counts[field]).tolist():
                same = np.flatnonzero(counts[field] == n)
                if n:
                    result[field, same] = function.over(self._present_values(field, same).reshape(len(same), int(n)))
        return result

    def _present_values(self, field: int, windows: Places) -> Floats:
        values: Floats = self._values[field].T[windows]
        if self._outside is not None:
            present: Floats = values[~self._outside[field if len(self._outside) > 1 else 0].T[windows]]
            return present
        return values

    def _or_missing(self, result: Floats) -> Floats:
        return result if self._empty is None else np.where(self._empty, np.nan, result)

    def _slope(self) -> Floats:
        hours = ((self._event_us[self._places] - self._event_us[self._places[-1]]) / _US_PER_HOUR)[None]
        if self._outside is not None:
            hours = np.repeat(hours, len(self._outside), axis=0)
        offsets = self._within(hours - (_sum(self._within(hours)) / self._present)[:, None])
        spread = _sum(offsets * offsets)
        flat = spread == 0
        return np.where(flat, 0.0, _sum(self._offsets * offsets) / np.where(flat, 1.0, spread))

    def _delta(self) -> Floats:
        if self._outside is None:
            return self._values[:, -1] - self._values[:, 0] + 0.0
        oldest = np.argmin(self._outside, axis=1)
        newest = self._outside.shape[1] - 1 - np.argmin(self._outside[:, ::-1], axis=1)
        return self._at(self._values, newest) - self._at(self._values, oldest) + 0.0

    def _quantile(self, q: float) -> Floats:
        position = np.broadcast_to((self._present - 1.0) * q, self._sorted[:, 0].shape)
        below = np.floor(position)
        share = position - below
        low = self._at(self._sorted, below.astype(np.intp))
        high = self._at(self._sorted, np.ceil(position).astype(np.intp))
        with np.errstate(invalid="ignore"):  # infinity less infinity, where it is not used
            return np.where(share == 0, low, low + share * (high - low)) + 0.0

    def _at(self, values: Floats, steps: Places) -> Floats:
        """The values at one step of each window."""
        steps = np.broadcast_to(steps, values[:, 0].shape)
        return np.take_along_axis(values, steps[:, None], axis=1)[:, 0]

    @cached_property
    def _sorted(self) -> Floats:
        """Values from the smallest, those that do not count last."""
        return np.sort(self._filled(np.inf), axis=1)

    @cached_property
    def _mean(self) -> Floats:
        return self._total() / self._present

    def _total(self) -> Floats:
        return _sum(self._values)

    def _squares(self, centre: Floats | None) -> Floats:
        """The sum of squares, of values less their mean if that is given."""
        array = self._values if centre is None else self._offsets
        return _sum(array * array)

    def _extreme(self, lesser: np.ufunc, nothing: float) -> Floats:
        return np.asarray(lesser.reduce(self._filled(nothing), axis=1, initial=nothing))

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


class RunTile(Tile):
    """Full windows of a run, (fields, steps - 1 + windows) without missing values: each window begins one reading after the one before.

    The same arithmetic, without a copy of the run for each step: sums go step by step over the whole run, and an extreme of 2n readings
    is that of two times n.
    """

    def __init__(self, run: Floats, event_us: Ints, steps: int) -> None:
        self.fields, self.windows = len(run), run.shape[1] - steps + 1
        self._run, self._event_us, self._steps = run, event_us, steps
        self._newest = run[:, steps - 1 :]
        self._outside = self._empty = None
        self._count = self._present = np.full((1, 1), float(steps))

    @cached_property
    def _values(self) -> Floats:
        return sliding_window_view(self._run, self.windows, axis=1)

    @cached_property
    def _places(self) -> Places:
        return sliding_window_view(np.arange(self._run.shape[1]), self.windows)

    def _step(self, step: int) -> Floats:
        """The values of one step of every window."""
        return self._run[:, step : step + self.windows]

    def _total(self) -> Floats:
        total = self._step(0) + 0.0
        for step in range(1, self._steps):
            np.add(total, self._step(step), out=total)
        return total

    def _squares(self, centre: Floats | None) -> Floats:
        total, square = np.zeros((self.fields, self.windows)), np.empty((self.fields, self.windows))
        for step in range(self._steps):
            value = self._step(step) if centre is None else np.subtract(self._step(step), centre, out=square)
            np.add(total, np.multiply(value, value, out=square), out=total)
        return total

    def _extreme(self, lesser: np.ufunc, nothing: float) -> Floats:
        reach, width = self._run, 1
        while 2 * width <= self._steps:
            reach, width = lesser(reach[:, :-width], reach[:, width:]), 2 * width
        rest = self._steps - width
        return np.asarray(lesser(reach[:, : self.windows], reach[:, rest : rest + self.windows]))


def _sum(array: Floats) -> Floats:
    """Over the steps, oldest first, starting from 0.0 (so that -0.0 and -0.0 make 0.0)."""
    return np.asarray(np.add.reduce(array, axis=1, initial=0.0))


def outside(values: Floats, known: Mask | None) -> Mask | None:
    """What does not count of values (fields, steps, windows): not known (steps, windows), or missing; None if everything does."""
    if not np.isnan(values).any():
        return None if known is None or known.all() else ~known[None]
    return np.isnan(values) if known is None else np.isnan(values) | ~known[None]
