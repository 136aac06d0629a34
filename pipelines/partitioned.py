"""A join that is larger than memory or than one machine: in pieces, with the same result whatever the pieces.

- Here: rows are read some at a time, and whenever more than `bytes_max` have gathered, those that are nobody's answer go
  (`asof.prune`). What stays is at most one row per label, whatever the number of rows.
- On Ray: tasks each read a share of the rows and prune it; what is left is dealt out by entity (its number modulo the number of
  partitions), and one task per partition joins it with that partition's labels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import polars as pl
import pyarrow as pa

from edge_agent.contract.errors import UnavailableError
from pipelines import cluster
from pipelines.asof import KEY, Ints, candidates, join, prune
from pipelines.feature_query import Query
from pipelines.feature_sources import Source

ROWS_MIN = 65_536
_BYTES = 8


class Deadline:
    """Looked at between pieces of work; None never passes."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s = timeout_s
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    def check(self) -> None:
        """Raises UnavailableError after the deadline."""
        if self._at is not None and time.monotonic() > self._at:
            raise UnavailableError(f"the query took longer than its timeout of {self.timeout_s} s; give it more time or fewer rows")


def here(query: Query, bytes_max: int, deadline: Deadline) -> pl.DataFrame:
    """The values for each label, in the labels' order."""
    return join(gathered(query, query.view.source, bytes_max, deadline), query.labels, query.rule)


def on_ray(query: Query, partitions: int, bytes_max: int, deadline: Deadline) -> pl.DataFrame:
    """The same, by Ray tasks."""
    with cluster.at_hand():
        shared = cluster.share(query)
        shares = [(shared, source, partitions, bytes_max) for source in query.view.source.parts(partitions)]
        rows, frames = [], []
        for _, (places, table) in cluster.shuffle(split, merge, shares, partitions, shared, partitions):
            deadline.check()
            rows.append(places)
            frames.append(_frame(table))
    return pl.concat(frames)[np.argsort(np.concatenate(rows))]


def gathered(query: Query, source: Source, bytes_max: int, deadline: Deadline) -> pl.DataFrame:
    """The rows of a source that may be an answer: in `bytes_max` or one row per label, whichever is more."""
    frame = query.frame(source)
    held, size, limit = [query.nothing()], 0.0, float(bytes_max)
    for batch in source.batches(frame, batch_rows(frame, bytes_max)) if frame is not None else ():
        deadline.check()
        held.append(candidates(batch, query.labels, query.rule))
        size += held[-1].estimated_size()
        if size > limit:
            held = [prune(_concat(held), query.labels, query.rule)]
            size = held[0].estimated_size()
            limit = max(bytes_max, 2 * size)
    return _concat(held)


def split(query: Query, source: Source, partitions: int, bytes_max: int) -> list[pa.Table]:
    """A task: the rows of a share that may be an answer, by partition."""
    kept = prune(gathered(query, source, bytes_max, Deadline(None)), query.labels, query.rule)
    return [kept.filter(pl.col(KEY) % partitions == i).to_arrow() for i in range(partitions)]


def merge(part: int, query: Query, partitions: int, *pieces: pa.Table) -> tuple[Ints, pa.Table]:
    """A task: the labels' places and their values, of one partition."""
    labels = query.labels.part(part, partitions)
    values = join(_concat(map(_frame, pieces)), labels, query.rule)
    return np.sort(labels.rows), values.to_arrow()


def batch_rows(frame: pl.LazyFrame, bytes_max: int) -> int:
    """How many rows to read at a time, so that several batches fit."""
    return max(bytes_max // (4 * _BYTES * len(frame.collect_schema())), ROWS_MIN)


def _frame(table: pa.Table) -> pl.DataFrame:
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _concat(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    return pl.concat(frames, how="vertical_relaxed")
