"""Upkeep of the lake's tables: small files become large ones, files that nobody can ask for go away.

- Every commit makes a file for each event date in it. Compaction merges the small ones of a date; rows stay what they are, and versions
  that were read before can be read again.
- A date that is quiet (no file came for QUIET_S) is written again as a whole, sorted by entity and event time, if it has at most
  SORT_ROWS_MAX rows. In a date that is being written to, small files are put behind one another, each sorted by itself.
- Writers go on meanwhile. Who meets a writer loses: nothing is changed, the date is tried again another time.
- Vacuum removes files that no version of the last `hours` needs. Older versions cannot be read after it, nor can they after Delta has
  cleaned up its log (30 days): whoever must repeat a training run later keeps its snapshot.

    done = compact(table, files_max=1, dates_max=None)
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.rows import EVENT_DATE
from cloud.tables import contract_of
from edge_agent.contract.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

DATES_PER_CALL = 4
FILE_BYTES = 64 * 1024 * 1024
"""A file that is smaller is small; compaction makes files of about this size."""
QUIET_S = 3_600.0
SORT_ROWS_MAX = 1_000_000
VACUUM_HOURS_MIN = 7 * 24
"""Readers and writers that are at work now need files that were replaced a moment ago."""
PARQUET = WriterProperties(compression="ZSTD")


@dataclass(frozen=True)
class Partition:
    """The files of one event date; None: of the rows that have none."""

    day: date | None
    files: int
    small: int
    bytes: int
    rows: int
    newest_s: float


@dataclass(frozen=True)
class Compacted:
    """What a compaction did: files that it replaced, dates it wrote again in order, and small files that could be merged yet."""

    removed: int = 0
    added: int = 0
    sorted_dates: int = 0
    small_left: int = 0


def partitions(table: DeltaTable) -> list[Partition]:
    """The partitions of a table, in order of date."""
    files = pa.table(table.get_add_actions(flatten=True))
    small = pc.cast(pc.less(files["size_bytes"], FILE_BYTES), pa.int64())
    names = ["partition." + EVENT_DATE, "size_bytes", "num_records", "modification_time"]
    grouped = files.select(names).append_column("small", small).group_by(names[0])
    sums = [(names[1], "count"), ("small", "sum"), (names[1], "sum"), (names[2], "sum"), (names[3], "max")]
    found = grouped.aggregate(sums)
    columns = [found[names[0]], *(found[f"{name}_{how}"] for name, how in sums)]
    rows = zip(*(c.to_pylist() for c in columns), strict=True)
    return sorted(
        (Partition(day, count, few, size, n, newest / 1e3) for day, count, few, size, n, newest in rows),
        key=lambda p: p.day or date.min,
    )


def summary(table: DeltaTable) -> dict[str, Any]:
    """What `fenceline lake show` says of a table.

    Keys: root (its address), version, rows, files, small (below FILE_BYTES), bytes, dates, first, last (event dates as text; None if no row
    has one).
    """
    found = partitions(table)
    days = [p.day.isoformat() for p in found if p.day is not None]
    sums = {name: sum(getattr(p, name) for p in found) for name in ("rows", "files", "small", "bytes")}
    ends = {"first": days[0] if days else None, "last": days[-1] if days else None}
    return {"root": table.table_uri, "version": table.version(), **sums, "dates": len(days), **ends}


def compact(table: DeltaTable, files_max: int, dates_max: int | None) -> Compacted:
    """Merge small files of dates that have several, those with most files first, until `files_max` could be merged yet.

    Args:
        dates_max: how many dates at most; None: all of them.

    Raises:
        UnavailableError: the table does not answer. Nothing is lost; try again.
    """
    try:
        crowded = sorted((p for p in partitions(table) if p.small > 1), key=lambda p: -p.small)
        if sum(p.small - 1 for p in crowded) <= files_max:
            return Compacted(small_left=sum(p.small - 1 for p in crowded))
        metrics = [_compact_date(table, partition) for partition in crowded[:dates_max]]
        table.create_checkpoint()
        table.cleanup_metadata()
        left = sum(p.small - 1 for p in partitions(table) if p.small > 1)
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"table {table.table_uri} was not compacted: {e}") from e
    return Compacted(
        sum(m.removed for m in metrics), sum(m.added for m in metrics), sum(m.sorted_dates for m in metrics), left if dates_max else 0
    )


def _compact_date(table: DeltaTable, partition: Partition) -> Compacted:
    quiet = time.time() - partition.newest_s > QUIET_S
    if quiet and partition.rows <= SORT_ROWS_MAX and sort_date(table, partition.day):
        return Compacted(partition.files, 1, 1)
    try:
        found: dict[str, Any] = table.optimize.compact(
            partition_filters=[(EVENT_DATE, "=", _text(partition.day))],
            target_size=FILE_BYTES,
            max_concurrent_tasks=1,
            writer_properties=PARQUET,
        )
    except CommitFailedError as e:  # another process compacts the same date
        log.info("compaction skipped table=%s date=%s reason=%s", table.table_uri, partition.day, e)
        table.update_incremental()
        return Compacted()
    return Compacted(int(found["numFilesRemoved"]), int(found["numFilesAdded"]))


def sort_date(table: DeltaTable, day: date | None) -> bool:
    """Write the rows of a date again, sorted by entity and event time; False if it met a writer: then nothing is changed."""
    contract = contract_of(table)
    mine = pc.field(EVENT_DATE).is_null() if day is None else pc.field(EVENT_DATE) == day
    rows = table.to_pyarrow_dataset().to_table(filter=mine)
    rows = rows.sort_by([(contract.entity, "ascending"), (contract.event_time, "ascending")])
    predicate = f"{EVENT_DATE} IS NULL" if day is None else f"{EVENT_DATE} = '{day.isoformat()}'"
    try:
        write_deltalake(table, rows, mode="overwrite", predicate=predicate, writer_properties=PARQUET)
    except CommitFailedError as e:
        log.info("sorting skipped table=%s date=%s reason=%s", table.table_uri, day, e)
        table.update_incremental()
        return False
    return True


def vacuum(table: DeltaTable, hours: int, dry_run: bool) -> list[str]:
    """Remove files that no version of the last `hours` needs; their names.

    Raises:
        ConfigError: `hours` is less than VACUUM_HOURS_MIN.
        UnavailableError: the table does not answer.
    """
    if hours < VACUUM_HOURS_MIN:
        raise ConfigError(f"vacuum keeps at least {VACUUM_HOURS_MIN} hours, not {hours}: readers and writers at work may need those files")
    try:
        return table.vacuum(retention_hours=hours, dry_run=dry_run, full=True)
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"table {table.table_uri} was not vacuumed: {e}") from e


def _text(day: date | None) -> str:
    return "" if day is None else day.isoformat()
