"""Upkeep of the lake's tables: small files become large ones, files that nobody can ask for go away.

- Every commit makes a file for each event date in it. Compaction merges the small ones of a date; rows stay what they are, and versions
  that were read before can be read again.
- A date that is quiet (no file came for QUIET_S) is written again as a whole, sorted by entity and event time, if it has at most
  SORT_ROWS_MAX rows and they take at most SORT_BYTES_MAX. In others the rows since the oldest small file are written again as they come.
- Writers go on meanwhile. Who meets a writer loses: nothing is changed, the date is tried again another time.
- Vacuum removes files that no version of the last `hours` needs. Older versions cannot be read after it, nor can they after Delta has
  cleaned up its log (30 days): whoever must repeat a training run later keeps its snapshot.

    done = compact(table, files_max=1, dates_max=None)
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import date
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.clocks import TIME_SQL
from cloud.config import VACUUM_HOURS_MIN
from cloud.roots import Roots
from cloud.rows import EVENT_DATE
from cloud.tables import LABELS, contract_of, is_table, open_table
from edge_agent.contract.errors import ConfigError, UnavailableError

log = logging.getLogger(__name__)

DATES_PER_CALL = 4
FILE_BYTES = 64 * 1024 * 1024
"""A file that is smaller is small; compaction makes files of about this size."""
QUIET_S = 3_600.0
SORT_ROWS_MAX = 1_000_000
SORT_BYTES_MAX = 512 * 1024 * 1024
"""Of rows that are sorted in memory, which takes some five times as much: texts may be far larger than their files."""
SCAN_ROWS = 256
"""Rows in memory at once until it is known how large they are."""
MERGE_ROWS_MAX = 4_000_000
"""What one date may cost a call that must not take long."""
VACUUM_EVERY_S = 86_400.0
"""How often ingest vacuums a table."""
VACUUM_HOURS_MAX = 100 * 365 * 24
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
    since_us: int | None
    """When the oldest row of its small files arrived, if the table has statistics of that."""
    late_rows: int
    """Rows of the files that hold rows since then: what merging writes again."""


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
    dated = f"partition.{EVENT_DATE}"
    days = files[dated].to_pylist() if dated in files.column_names else [None] * files.num_rows  # labels have none
    names = ("size_bytes", "num_records", "modification_time")
    columns = [days, *(files[name].to_pylist() for name in names)] + [_arrivals(files, end) for end in ("min", "max")]
    dates: defaultdict[date | None, list[_File]] = defaultdict(list)
    for day, *rest in zip(*columns, strict=True):
        dates[day].append(_File(*rest))
    return [_partition(day, found) for day, found in sorted(dates.items(), key=lambda d: d[0] or date.min)]


class _File(NamedTuple):
    bytes: int
    rows: int
    modified_ms: int
    first_us: int | None
    last_us: int | None


def _arrivals(files: pa.Table, end: str) -> list[int | None]:
    name = f"{end}.arrived_at"
    return files[name].cast(pa.int64()).to_pylist() if name in files.column_names else [None] * files.num_rows


def _partition(day: date | None, files: list[_File]) -> Partition:
    small = [f for f in files if f.bytes < FILE_BYTES]
    firsts = [f.first_us for f in small if f.first_us is not None]
    since = min(firsts) if small and len(firsts) == len(small) else None
    late = [f for f in files if since is None or f.last_us is None or f.last_us >= since]
    newest_s = max(f.modified_ms for f in files) / 1e3
    sizes = (sum(f.bytes for f in files), sum(f.rows for f in files))
    return Partition(day, len(files), len(small), *sizes, newest_s, since, sum(f.rows for f in late))


def labels_tables(roots: Roots) -> dict[str, DeltaTable]:
    """The tables of labels by stream. They belong to no zone and have no dates; every addition leaves what was there before as a file.

    Raises:
        UnavailableError: the storage does not answer.
    """
    root = roots.default
    return {s: open_table(root.path(LABELS, s), root) for s in root.folders(LABELS) if is_table(root, LABELS, s)}


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
        dates_max: how many dates at most, and none whose merging writes more than MERGE_ROWS_MAX rows again; None: all of them.

    Raises:
        UnavailableError: the table does not answer. Nothing is lost; try again.
    """
    rows_max = MERGE_ROWS_MAX if dates_max is not None else None
    try:
        crowded, heavy = _crowded(table, rows_max)
        for partition in heavy:
            log.info("merging left to a person table=%s date=%s rows=%d", table.table_uri, partition.day, partition.late_rows)
        left = sum(p.small - 1 for p in crowded)
        if left <= files_max:
            return Compacted(small_left=left)
        metrics = [_compact_date(table, partition) for partition in crowded[:dates_max]]
        table.create_checkpoint()
        table.cleanup_metadata()
        left = sum(p.small - 1 for p in _crowded(table, rows_max)[0])
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"table {table.table_uri} was not compacted: {e}") from e
    return Compacted(
        sum(m.removed for m in metrics), sum(m.added for m in metrics), sum(m.sorted_dates for m in metrics), left if dates_max else 0
    )


def _crowded(table: DeltaTable, rows_max: int | None) -> tuple[list[Partition], list[Partition]]:
    """The dates that have several small files, those with most first; and those of them whose merging would write too many rows again."""
    found = sorted((p for p in partitions(table) if p.small > 1), key=lambda p: -p.small)
    heavy = [p for p in found if rows_max is not None and p.late_rows > rows_max]
    return [p for p in found if p not in heavy], heavy


def _compact_date(table: DeltaTable, partition: Partition) -> Compacted:
    quiet = time.time() - partition.newest_s > QUIET_S
    if quiet and partition.rows <= SORT_ROWS_MAX and sort_date(table, partition.day):
        return Compacted(partition.files, 1, 1)
    return merge_date(table, partition)


def merge_date(table: DeltaTable, partition: Partition) -> Compacted:
    """Write the files of a date again that hold rows since its oldest small file, as few files; nothing is changed if that meets a writer.

    It is an update that changes nothing. Delta's own compaction would do, but delta-rs 1.6 lets two of them replace the same files: each
    row is then there twice (`tests/cloud/test_upkeep.py`).
    """
    since = f" AND arrived_at >= {TIME_SQL.format(us=partition.since_us)}" if partition.since_us is not None else ""
    try:
        found = table.update(updates={"row": "row"}, predicate=_predicate(partition.day) + since, writer_properties=PARQUET)
    except CommitFailedError as e:
        log.info("merging skipped table=%s date=%s reason=%s", table.table_uri, partition.day, e)
        table.update_incremental()
        return Compacted()
    return Compacted(int(found["num_removed_files"]), int(found["num_added_files"]))


def sort_date(table: DeltaTable, day: date | None) -> bool:
    """Write a date again, sorted by entity and event time; False, and nothing changed, if it is too large or meets a writer."""
    contract = contract_of(table)
    rows = _rows(table, day)
    if rows is None:
        log.info("sorting skipped table=%s date=%s reason=more than %d bytes", table.table_uri, day, SORT_BYTES_MAX)
        return False
    rows = rows.sort_by([(contract.entity, "ascending"), (contract.event_time, "ascending")])
    try:
        write_deltalake(table, rows, mode="overwrite", predicate=_predicate(day), writer_properties=PARQUET)
    except CommitFailedError as e:
        log.info("sorting skipped table=%s date=%s reason=%s", table.table_uri, day, e)
        table.update_incremental()
        return False
    return True


def _rows(table: DeltaTable, day: date | None) -> pa.Table | None:
    """The rows of a date; None if they take more than SORT_BYTES_MAX."""
    mine = pc.field(EVENT_DATE).is_null() if day is None else pc.field(EVENT_DATE) == day
    scanner = table.to_pyarrow_dataset().scanner(filter=mine, batch_size=SCAN_ROWS, batch_readahead=0, fragment_readahead=1)
    batches, left = [], SORT_BYTES_MAX
    for batch in scanner.to_batches():
        batches.append(batch)
        if (left := left - batch.nbytes) < 0:
            return None
    return pa.Table.from_batches(batches, scanner.projected_schema)


def vacuum(table: DeltaTable, hours: int, dry_run: bool) -> list[str]:
    """Remove files that no version of the last `hours` needs; their names.

    Raises:
        ConfigError: `hours` is not between VACUUM_HOURS_MIN and VACUUM_HOURS_MAX.
        UnavailableError: the table does not answer.
    """
    if hours > VACUUM_HOURS_MAX:
        raise ConfigError(f"vacuum keeps at most {VACUUM_HOURS_MAX} hours, which is a hundred years, not {hours}")
    if hours < VACUUM_HOURS_MIN:
        raise ConfigError(f"vacuum keeps at least {VACUUM_HOURS_MIN} hours, not {hours}: readers and writers at work may need those files")
    try:
        return table.vacuum(retention_hours=hours, dry_run=dry_run, full=True)
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"table {table.table_uri} was not vacuumed: {e}") from e


def _predicate(day: date | None) -> str:
    return f"{EVENT_DATE} IS NULL" if day is None else f"{EVENT_DATE} = '{day.isoformat()}'"
