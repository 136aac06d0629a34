"""Rows of one source by time: all of them, the newest of each entity, or who was seen when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa

from edge_agent.contract.errors import ConfigError
from pipelines.asof import newest
from pipelines.feature_query import View, epoch, schema_of, unit_of, within
from pipelines.feature_sources import Source, arrow
from pipelines.partitioned import Deadline, batch_rows

TIME = pa.timestamp("us", "UTC")


@dataclass(frozen=True)
class Pull:
    """Columns of a source, and the times (both ends included, None is open) between which rows are wanted."""

    source: Source
    keys: list[str]
    values: list[str]
    time: str
    created: str | None = None
    first: datetime | None = None
    last: datetime | None = None

    def frame(self) -> pl.LazyFrame:
        scan = self.source.scan()
        schema = scan.collect_schema()
        columns = list(dict.fromkeys([*self.keys, *self.values, self.time, *([self.created] if self.created else [])]))
        if missing := sorted(set(columns) - set(schema)):
            raise ConfigError(f"{self.source.path} has no column {', '.join(map(repr, missing))}; it has {', '.join(schema)}")
        bounds = within(self.time, schema[self.time], _us(self.first), _us(self.last))
        return (scan.filter(*bounds) if bounds else scan).select(columns)

    def all_rows(self, bytes_max: int, deadline: Deadline) -> Iterator[pa.Table]:
        """Every row, some at a time; one empty table if there is none."""
        frame = self.frame()
        yield self.table(self.source.collect(frame.head(0)))
        for batch in self.source.batches(frame, batch_rows(frame, bytes_max)):
            deadline.check()
            yield self.table(batch)

    def newest_rows(self, bytes_max: int, deadline: Deadline) -> Iterator[pa.Table]:
        """The newest row of each entity. Memory: `bytes_max` or one row per entity, whichever is more."""
        frame = self.frame()
        held, size, limit = [self.source.collect(frame.head(0))], 0.0, float(bytes_max)
        for batch in self.source.batches(frame, batch_rows(frame, bytes_max)):
            deadline.check()
            held.append(batch)
            size += batch.estimated_size()
            if size > limit:
                held = [self._newest(pl.concat(held))]
                size = held[0].estimated_size()
                limit = max(bytes_max, 2 * size)
        yield self.table(self._newest(pl.concat(held)))

    def table(self, frame: pl.DataFrame) -> pa.Table:
        """As Arrow, with times as timestamps in microseconds UTC."""
        table = arrow(frame)
        for name in dict.fromkeys(name for name in (self.time, self.created) if name):
            place = table.schema.get_field_index(name)
            table = table.set_column(place, name, table[name].cast(TIME, safe=False))
        return table

    def _newest(self, frame: pl.DataFrame) -> pl.DataFrame:
        return newest(frame, self.keys, [name for name in (self.time, self.created) if name], self.values)


def seen(views: Sequence[View], first: datetime, last: datetime, time: str) -> pa.Table:
    """Each combination of keys and event time in `first` to `last`, once, sorted: the labels when none are given.

    Raises:
        ConfigError: the views have different join keys.
    """
    keyed = [view for view in views if view.keys] or list(views)
    keys = sorted(keyed[0].keys)
    for view in keyed:
        if sorted(view.keys) != keys:
            raise ConfigError(
                f"without entity_df the views must share their join keys; {keyed[0].name!r} has {keys}, "
                f"{view.name!r} has {sorted(view.keys)}: give an entity_df, or ask for the views one by one"
            )
    schemas = [schema_of(view) for view in keyed]
    unit: Any = "ns" if any(unit_of(schema[view.time]) == "ns" for schema, view in zip(schemas, keyed, strict=True)) else "us"
    frames = []
    for schema, view in zip(schemas, keyed, strict=True):
        dtype = schema[view.time]
        bounds = within(view.time, dtype, _us(first), _us(last))
        at = epoch(view.time, dtype, unit).cast(pl.Datetime(unit, "UTC")).alias(time)
        rows = view.source.scan().filter(*bounds).select(*(pl.col(view.keys[key]).alias(key) for key in keys), at)
        frames.append(view.source.collect(rows.unique()))
    return arrow(pl.concat(frames, how="vertical_relaxed").unique().drop_nulls().sort(time, *keys))


def _us(time: datetime | None) -> int | None:
    if time is None:
        return None
    delta = (time if time.tzinfo else time.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds
