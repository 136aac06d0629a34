"""The newest row of each entity of a view's batch source, in bounded memory.

- The source is read as the offline store reads it (`feature_sources`, `feature_query`): pinned versions, keys of storage, mapped
  names, hive partitions. The newest row has the highest event time, then created time, then content (`asof.newest`): offline joins
  pick the same one.
- Rows are thinned out batch by batch, dealt out by entity to BUCKETS files beside the feature registry, and each file is thinned out by
  itself. Memory: BATCH_BYTES and the newest rows of a bucket's entities.
- Rows without a key or an event time, or with a time that Feast cannot store, are no entity's; they are counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import pyarrow as pa

from pipelines.asof import AT, CREATED, newest
from pipelines.online_writer import BATCH_ROWS, TIMES_US

if TYPE_CHECKING:
    from feast import FeatureView

    from pipelines.feature_query import View
    from pipelines.feature_store import Repo

BUCKETS = 64
BATCH_BYTES = 128_000_000
TIME = pa.timestamp("us", "UTC")
_BUCKET = "__bucket"


@dataclass(frozen=True)
class Wanted:
    """Which rows a run takes: those of a time up to `until_us`; of these the ones created later than `created_us` (or nobody knows
    when) or of a later time than `event_us`. In microseconds since 1970 UTC; None does not limit."""

    until_us: int | None = None
    created_us: int | None = None
    event_us: int | None = None

    def condition(self, at: pl.Expr, created: pl.Expr | None) -> pl.Expr:
        """`at` and `created` are microseconds. A source without created times can only be read whole."""
        found = pl.lit(True)
        if created is not None and self.created_us is not None and self.event_us is not None:
            found = (created > self.created_us) | created.is_null() | (at > self.event_us)
        # Rows without a time are let through, to be counted.
        return found if self.until_us is None else found & ((at <= self.until_us) | at.is_null())


@dataclass
class Newest:
    """The newest rows of a source, on disk; how many `entities`, and rows `without_key`. The highest created and event time among
    these and the older ones of their entities, in microseconds UTC, 0 without rows."""

    paths: list[Path] = field(default_factory=list)
    times: tuple[str, str | None] = ("", None)
    entities: int = 0
    without_key: int = 0
    created_us: int = 0
    event_us: int = 0

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows under Feast's names, at most BATCH_ROWS at a time."""
        rows = pl.DataFrame()
        for path in self.paths:
            rows = pl.concat([rows, pl.read_ipc_stream(path)]) if rows.height else pl.read_ipc_stream(path)
            whole = rows.height // BATCH_ROWS * BATCH_ROWS
            for part in rows[:whole].iter_slices(BATCH_ROWS):
                yield _as_feast(part, self.times)
            rows = rows[whole:]
        if rows.height:
            yield _as_feast(rows, self.times)


@contextmanager
def newest_of(repo: Repo, view: FeatureView, wanted: Wanted) -> Iterator[Newest]:
    """The newest row of each entity among the wanted ones; the files go with it.

    Raises:
        ConfigError: the source is not there, is of another kind, or lacks a column.
        UnavailableError: its storage does not answer.
    """
    from pipelines.offline_store import view_of

    name, source = view.projection.name_to_use(), view.batch_source
    assert source is not None
    stored = view_of(view, [f"{name}:{feature.name}" for feature in view.features], False, False, repo.store.config)
    spill_dir = repo.data / "spill"
    spill_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=spill_dir) as folder:
        found = Newest(times=(source.timestamp_field, source.created_timestamp_column or None))
        for bucket in _deal_out(stored, wanted, Path(folder), found):
            kept = _thinned(bucket, stored)
            found.entities += kept.height
            kept.write_ipc_stream(bucket)
            found.paths.append(bucket)
        yield found


def _deal_out(view: View, wanted: Wanted, folder: Path, found: Newest) -> list[Path]:
    """Read the source; the files, each with all rows of its entities that may be the newest."""
    from pipelines.partitioned import batch_rows

    frame, keys = _frame(view, wanted), list(view.keys)
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    paths = {}
    with ExitStack() as stack:
        for batch in view.source.batches(frame, batch_rows(frame, BATCH_BYTES)):
            whole = batch.drop_nulls([*keys, AT]).filter(pl.col(_us(AT)).is_between(*TIMES_US))
            _look(whole, found)
            found.without_key += batch.height - whole.height
            rows = _newest(whole, view)
            bucket = rows.select(keys).hash_rows() % BUCKETS if keys else pl.repeat(0, rows.height, eager=True)
            dealt = rows.with_columns(bucket.alias(_BUCKET)).partition_by(_BUCKET, as_dict=True, include_key=False)
            for (number,), part in dealt.items():
                table = part.to_arrow(compat_level=pl.CompatLevel.oldest())
                if number not in writers:
                    paths[number] = folder / f"{number}.arrow"
                    writers[number] = stack.enter_context(pa.ipc.new_stream(str(paths[number]), table.schema))
                writers[number].write_table(table)
    return list(paths.values())


def _frame(view: View, wanted: Wanted) -> pl.LazyFrame:
    """The wanted rows: keys and features under Feast's names, AT and CREATED in the source's own unit."""
    from pipelines.feature_query import epoch, schema_of, unit_of

    schema = schema_of(view)
    columns = [pl.col(stored).alias(name) for name, stored in (*view.keys.items(), *view.values.items())]
    microseconds, times = {}, {AT: view.time} | ({CREATED: view.created} if view.created else {})
    for name, stored in times.items():
        unit = unit_of(schema[stored])
        time = epoch(stored, schema[stored], unit)
        columns.append(time.alias(name))
        microseconds[name] = time // (1_000 if unit == "ns" else 1)
        columns.append(microseconds[name].alias(_us(name)))
    scan = view.source.pinned().scan()
    return scan.filter(wanted.condition(microseconds[AT], microseconds.get(CREATED))).select(columns)


def _look(batch: pl.DataFrame, found: Newest) -> None:
    latest: Any = batch.select(pl.col(_us(name)).max() for name in (AT, CREATED) if _us(name) in batch.columns).row(0)
    found.event_us = max(found.event_us, latest[0] or 0)
    found.created_us = max(found.created_us, latest[1] or 0) if len(latest) > 1 else 0


def _thinned(path: Path, view: View) -> pl.DataFrame:
    """The newest row of each entity of a file. Its batches are looked at one by one: it may hold many rows of an entity."""
    held: list[pl.DataFrame] = []
    size, limit = 0.0, float(BATCH_BYTES)
    with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            part = pl.from_arrow(pa.Table.from_batches([batch]))
            assert isinstance(part, pl.DataFrame)
            held.append(part)
            size += part.estimated_size()
            if size > limit:
                held = [_newest(pl.concat(held), view)]
                size = held[0].estimated_size()
                limit = max(BATCH_BYTES, 2 * size)
    return _newest(pl.concat(held), view)


def _newest(rows: pl.DataFrame, view: View) -> pl.DataFrame:
    return newest(rows, list(view.keys), [name for name in (AT, CREATED) if name in rows.columns], list(view.values))


def _as_feast(rows: pl.DataFrame, times: tuple[str, str | None]) -> pa.RecordBatch:
    """As Feast converts them: times in microseconds UTC, and its one entity for a view without any."""
    from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL

    from pipelines.feature_sources import arrow

    named = {_us(kind): name for kind, name in zip((AT, CREATED), times, strict=True) if name}
    table = arrow(rows.drop(AT, CREATED, strict=False))
    for column, name in named.items():
        table = table.append_column(name, table[column].cast(TIME)).drop_columns([column])
    table = table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * table.num_rows, pa.string()))
    (batch,) = table.combine_chunks().to_batches()
    return batch


def _us(name: str) -> str:
    return f"{name}_us"


def microseconds(moment: datetime) -> int:
    """Since 1970; a time without a zone is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
