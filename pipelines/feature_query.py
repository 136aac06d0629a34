"""One feature view, asked for some labels: how its stored columns become what the join compares.

- Times are whole numbers since 1970 in UTC, times without a zone are UTC; microseconds, or nanoseconds as soon as the labels or
  the rows have them: nothing is rounded into or out of sight.
- Keys of whole numbers match whatever their width, and so do all kinds of text; a number never matches text, that is an error.
- Rows that are too late or too old for every label are not read where the file's statistics tell it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import polars as pl
import pyarrow as pa

from edge_agent.contract.errors import ConfigError
from pipelines.asof import AT, CREATED, KEY, Labels, Rule
from pipelines.feature_sources import Source

_PER_US = {"ms": 1_000, "us": 1, "ns": 1}
_TEXT = (pl.Categorical, pl.Enum)
_INT64_MAX = 2**63 - 1

T = TypeVar("T", pl.Expr, pl.Series)


@dataclass(frozen=True)
class Asked:
    """Labels as a table, and their times: Int64 in `unit` (us or ns), null where a label has none."""

    table: pl.DataFrame
    at: pl.Series
    unit: str

    @classmethod
    def of(cls, table: pa.Table, times: pa.ChunkedArray) -> Asked:
        """`table` has the join keys, `times` are timestamps."""
        frame, at = pl.from_arrow(table), pl.Series(times)
        assert isinstance(frame, pl.DataFrame) and isinstance(at.dtype, pl.Datetime)
        unit = at.dtype.time_unit
        return cls(frame, at.cast(pl.Int64) * _PER_US[unit], "ns" if unit == "ns" else "us")

    def at_in(self, unit: str) -> pl.Series:
        return self.at if unit == self.unit else _scaled(self.at, 1_000)


@dataclass(frozen=True)
class View:
    """Where a feature view's rows lie. `keys`: label column to stored column; `values`: column of the result to stored column."""

    name: str
    source: Source
    keys: dict[str, str]
    values: dict[str, str]
    time: str
    created: str | None
    ttl_us: int
    known_by: bool


@dataclass(frozen=True)
class Query:
    """A view bound to labels: what to read, and whom to give it to."""

    view: View
    labels: Labels
    rule: Rule
    unit: str

    @classmethod
    def of(cls, view: View, asked: Asked) -> Query:
        """Bind; reads no more than the view's schema.

        Raises:
            ConfigError: columns are missing, or keys or times have types that cannot be compared.
        """
        schema = schema_of(view)
        unit = "ns" if "ns" in (asked.unit, unit_of(schema[view.time])) else "us"
        keys = [_label_key(asked.table[label], schema[stored], view, label) for label, stored in view.keys.items()]
        frame = pl.DataFrame([key.alias(f"__key{i}") for i, key in enumerate(keys)])
        rule = Rule(min(view.ttl_us * (1_000 if unit == "ns" else 1), _INT64_MAX), view.known_by and view.created is not None)
        return cls(view, Labels.of(frame, asked.at_in(unit)), rule, unit)

    def frame(self, source: Source) -> pl.LazyFrame | None:
        """The rows of (a part of) the view's source that can matter, in the columns that `asof.candidates` takes; None if none can."""
        span = self.labels.span()
        if span is None:
            return None
        first, last = span
        view, scan = self.view, source.scan()
        schema = scan.collect_schema()
        bounds = _within(view.time, schema[view.time], self.unit, first - self.rule.ttl if self.rule.ttl else None, last)
        if self.rule.known_by and view.created:
            bounds += _within(view.created, schema[view.created], self.unit, None, last)
        columns = [_key(pl.col(stored), schema[stored]).alias(f"__key{i}") for i, stored in enumerate(view.keys.values())]
        columns.append(epoch(view.time, schema[view.time], self.unit).alias(AT))
        if view.created:
            columns.append(epoch(view.created, schema[view.created], self.unit).alias(CREATED))
        columns += [pl.col(stored).alias(shown) for shown, stored in view.values.items()]
        return scan.filter(*bounds).select(columns) if bounds else scan.select(columns)

    def nothing(self) -> pl.DataFrame:
        """No rows, with the columns of `candidates`."""
        schema = self.view.source.scan().collect_schema()
        values = {shown: schema[stored] for shown, stored in self.view.values.items()}
        times = {name: pl.Int64() for name in ((AT, CREATED) if self.view.created else (AT,))}
        return pl.DataFrame(schema={**times, **values, KEY: pl.Int64()})


def within(column: str, dtype: pl.DataType, first_us: int | None, last_us: int | None) -> list[pl.Expr]:
    """Conditions for first <= time <= last, in microseconds; None leaves a side open."""
    return _within(column, dtype, "us", first_us, last_us)


def _within(column: str, dtype: pl.DataType, unit: str, first: int | None, last: int | None) -> list[pl.Expr]:
    """On the stored column itself, so that a file's statistics can be used."""
    if isinstance(dtype, pl.Date):
        time = epoch(column, dtype, unit)
        return [time >= first] * (first is not None) + [time <= last] * (last is not None)
    up, down = _scale(column, dtype, unit)
    found = []
    if first is not None:
        found.append(pl.col(column) >= _bound(-(-first * down // up), dtype))
    if last is not None:
        found.append(pl.col(column) <= _bound(last * down // up, dtype))
    return found


def _bound(time: int, dtype: pl.DataType) -> pl.Expr:
    """The time, or the nearest one there is."""
    return pl.lit(min(max(time, -_INT64_MAX), _INT64_MAX), pl.Int64).cast(dtype)


def unit_of(dtype: pl.DataType) -> str:
    """In what times of a type are compared."""
    return "ns" if getattr(dtype, "time_unit", None) == "ns" else "us"


def epoch(column: str, dtype: pl.DataType, unit: str) -> pl.Expr:
    """A stored time as a whole number of `unit` (us or ns) since 1970 UTC.

    Raises:
        ConfigError: it is no time.
    """
    if isinstance(dtype, pl.Date):
        dtype, time = pl.Datetime("us"), pl.col(column).cast(pl.Datetime("us")).cast(pl.Int64)
    else:
        time = pl.col(column).cast(pl.Int64)
    up, _ = _scale(column, dtype, unit)
    return _scaled(time, up) if up > 1 else time


def _scaled(time: T, up: int) -> T:
    """Times such as the year 9999 stay later than all others."""
    return time.clip(-(_INT64_MAX // up), _INT64_MAX // up) * up


def _scale(column: str, dtype: pl.DataType, unit: str) -> tuple[int, int]:
    """By what to multiply and divide a stored time."""
    if not isinstance(dtype, pl.Datetime):
        raise ConfigError(f"time column {column!r} is {dtype}; this offline store compares timestamps and dates")
    per_second = {"ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
    stored, wanted = per_second[dtype.time_unit], per_second[unit]
    return max(wanted // stored, 1), max(stored // wanted, 1)


def _key(key: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    return key.cast(_compared(dtype))


def _compared(dtype: pl.DataType) -> pl.DataType:
    """The type in which keys of a type are compared."""
    if isinstance(dtype, _TEXT):
        return pl.String()
    return pl.Int64() if dtype.is_integer() and not isinstance(dtype, pl.UInt64 | pl.Int128) else dtype


def _label_key(labels: pl.Series, stored: pl.DataType, view: View, name: str) -> pl.Series:
    theirs, ours = _compared(labels.dtype), _compared(stored)
    if isinstance(labels.dtype, pl.Null):
        return labels.cast(ours)
    if theirs != ours:
        raise ConfigError(
            f"join key {name!r} is {labels.dtype} in the labels and {stored} in feature view {view.name!r} ({view.source.path}); "
            f"cast one of them so that both are numbers or both text"
        )
    return labels.cast(ours)


def schema_of(view: View) -> pl.Schema:
    """The stored columns.

    Raises:
        ConfigError: one that the view needs is not there.
    """
    schema = view.source.scan().collect_schema()
    wanted = [*view.keys.values(), *view.values.values(), view.time, *([view.created] if view.created else [])]
    if missing := sorted(set(wanted) - set(schema)):
        raise ConfigError(
            f"feature view {view.name!r}: {view.source.path} has no column {', '.join(map(repr, missing))}; it has {', '.join(schema)}"
        )
    return schema
