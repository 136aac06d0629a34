"""Readings sorted by entity, and the states of the entities seen last.

- Sorting is stable: an entity's readings stay in the order seen.
- At most `limit` entities are remembered. A new one beyond that makes the one longest unseen be forgotten, at the same reading however
  the readings are cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import Strings

Mask = npt.NDArray[np.bool_]
Places = npt.NDArray[np.intp]
State = TypeVar("State")
Number = TypeVar("Number", np.float64, np.int64)

_SHORT_CODES = 65_536
_ROWS_PER_PIECE = 64  # from there on, copying piece by piece is faster than place by place


@dataclass(frozen=True)
class Groups:
    """The readings of a batch by entity: group g is `names[g]`, its readings are `order[starts[g] : stops[g]]`."""

    names: list[str]
    order: Places
    starts: Places
    stops: Places
    in_order: bool  # `order` leaves all readings where they are

    @classmethod
    def of(cls, entity: Strings) -> Groups:
        codes = entity.codes
        in_order = bool((codes[1:] >= codes[:-1]).all())
        if in_order:
            order = np.arange(len(codes))
        else:  # short codes are sorted by radix
            order = np.argsort(codes.astype(np.uint16) if len(entity.values) <= _SHORT_CODES else codes, kind="stable")
            codes = codes[order]
        cuts = np.flatnonzero(codes[1:] != codes[:-1]) + 1
        starts = np.concatenate([[0], cuts]) if len(codes) else np.zeros(0, np.intp)
        stops = np.concatenate([cuts, [len(codes)]]) if len(codes) else np.zeros(0, np.intp)
        return cls([entity.values[c] for c in codes[starts].tolist()], order, starts, stops, in_order)

    @property
    def group(self) -> Places:
        """The group of each reading in `order`."""
        return np.repeat(np.arange(len(self.names)), self.stops - self.starts)


class Recent(Generic[State]):
    """The states of at most `limit` entities, the one longest unseen first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._states: dict[str, State] = {}

    def __len__(self) -> int:
        return len(self._states)

    def parts(self, entity: Strings, first: int = 0, stop: int | None = None) -> Iterator[slice]:
        """The batch in parts, each to be taken before the next is asked for: no part forgets an entity that it holds."""
        stop = len(entity) if stop is None else stop
        if stop - first > 1 and self._crowded(entity, first, stop):
            middle = (first + stop) // 2
            yield from self.parts(entity, first, middle)
            yield from self.parts(entity, middle, stop)
        else:
            yield slice(first, stop)

    def take(self, groups: Groups) -> list[State | None]:
        """The states of the groups, which are to be kept again."""
        return [self._states.pop(name, None) for name in groups.names]

    def keep(self, groups: Groups, states: list[State]) -> list[State]:
        """Keep the states, the entity seen last last; those forgotten for them."""
        last_seen = groups.order[groups.stops - 1]
        for g in np.argsort(last_seen).tolist():
            self._states[groups.names[g]] = states[g]
        return [self._states.pop(name) for name in list(islice(self._states, max(0, len(self._states) - self.limit)))]

    def _crowded(self, entity: Strings, first: int, stop: int) -> bool:
        """Whether the entities that must be forgotten for these readings are among them."""
        if len(self._states) + min(len(entity.values), stop - first) <= self.limit:
            return False
        names = {entity.values[code] for code in np.unique(entity.codes[first:stop]).tolist()}
        excess = len(self._states) + sum(name not in self._states for name in names) - self.limit
        return excess > len(self._states) or any(old in names for old in islice(self._states, max(0, excess)))


@dataclass(frozen=True)
class Layout:
    """Old and new readings in one array, entity by entity, the old ones of an entity first.

    `rows` are the places of the new readings (sorted by entity); group g lies at `starts[g] : stops[g]`, its new ones from `fresh[g]`.
    """

    rows: Places
    starts: Places
    fresh: Places
    stops: Places

    @classmethod
    def of(cls, old: list[int], new: Places) -> Layout:
        """`old[g]` and `new[g]` readings of each group."""
        kept = np.array(old, np.intp)
        stops = np.cumsum(kept + new)
        starts, fresh = stops - new - kept, stops - new
        rows = np.arange(int(new.sum())) + np.repeat(np.cumsum(kept), new)
        return cls(rows, starts, fresh, stops)

    def falls(self, numbers: npt.NDArray[Number]) -> Mask:
        """Where a number (readings,) is less than the one before it of the same group; one place less than there are readings."""
        falls: Mask = numbers[1:] < numbers[:-1]
        falls[self.starts[1:] - 1] = False  # there another group begins
        return falls

    def joined(self, new: npt.NDArray[Number], old: list[npt.NDArray[Number]]) -> npt.NDArray[Number]:
        """One array (readings, …) of new values (new readings, …), and the old ones of each group."""
        if not any(len(o) for o in old):
            return new
        if len(old) * _ROWS_PER_PIECE < len(new):
            ends = np.cumsum(self.stops - self.fresh)
            starts = ends - (self.stops - self.fresh)
            pieces = zip(old, starts.tolist(), ends.tolist(), strict=True)
            return np.concatenate([piece for o, start, end in pieces for piece in (o, new[start:end])])
        out = np.empty((int(self.stops[-1]), *new.shape[1:]), new.dtype)
        out[self.rows] = new
        for start, piece in zip(self.starts.tolist(), old, strict=True):
            out[start : start + len(piece)] = piece
        return out
