"""The rows of a stream in the order in which each device saw them, in memory that does not grow with their number.

- Rows, order, columns and types are those of `Lake.read`; they come some at a time. Equal rows give equal parts, however they lie in files.
- DuckDB sorts. Each data file is read once, in batches; what has no room in memory lies in a directory until its turn has come.
- A read for each device would need no such room, but a file has rows of all devices that sent meanwhile, and a device has rows in files of
  all dates: every file would be read once for each device. The sorts of Polars and Arrow hold all rows in memory.

    for rows in sorted_rows(lake, "turbofan", lake.versions("turbofan"), ["engine", "ts"], 65_536, Path("build/.sort")): ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cloud.lake import Lake
from cloud.query import UTC
from cloud.reading import narrowed, schema_with
from cloud.rows import ORDER
from edge_agent.contract.errors import ConfigError, UnavailableError

THREADS = 2
"""Each holds some 120,000 rows while it merges: more of them need more memory."""
SCAN_ROWS = 16_384


def sorted_rows(
    lake: Lake, stream: str, versions: Mapping[str, int], columns: Sequence[str], rows: int, memory_mb: int, scratch: Path
) -> Iterator[pa.Table]:
    """The rows of a stream, sorted by ORDER, in tables of `rows` rows each; the last one has what is left. None: there is no row.

    Args:
        versions: table version by lane.
        memory_mb: how much of the rows DuckDB holds; 256 do for rows of some hundred bytes, however many.
        scratch: a directory on a disk that has room for the rows; what lies there meanwhile is gone afterwards.

    Raises:
        ConfigError: the rows are too long for so little memory.
        UnavailableError: files cannot be read, or the disk is full.
    """
    wanted = list(dict.fromkeys([*columns, *ORDER]))
    tables = [lake.table(stream, lane, version) for lane, version in sorted(versions.items())]
    whole = pa.unify_schemas([schema_with(table, wanted) for table in tables])
    schema = pa.schema([whole.field(name) for name in wanted])
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_mb}MB",
        "threads": THREADS,
        "temp_directory": str(scratch),
        "arrow_large_buffer_size": True,
    }
    try:
        with duckdb.connect(":memory:", config=settings) as db:
            db.execute(f"{UTC}; SET enable_progress_bar = false")
            db.register("lake", pa.RecordBatchReader.from_batches(schema, _read(tables, schema)))
            found = db.sql(f"SELECT {', '.join(map(_quoted, columns))} FROM lake ORDER BY {', '.join(ORDER)}")
            with found.to_arrow_reader(rows) as batches:
                for part in _cut(batches, rows):
                    yield pa.concat_tables(narrowed(part, pa.schema([schema.field(name) for name in columns])))
    except (duckdb.Error, DeltaError, OSError) as e:
        what = f"the lake's stream {stream!r} ({', '.join(versions)}) does not sort: {str(e).splitlines()[0]}"
        if "Out of Memory" in what and "max_temp_directory_size" not in str(e):
            raise ConfigError(f"{what}; its rows are long, raise snapshot.memory_mb (now {memory_mb})") from e
        raise UnavailableError(what) from e


def _read(tables: Sequence[DeltaTable], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of all files, one file after the other, a few at a time: Arrow's datasets decode whole row groups, of a million rows."""
    for table in tables:
        for fragment in table.to_pyarrow_dataset().get_fragments():
            file = pq.ParquetFile(fragment.open())
            there = [name for name in schema.names if name in file.schema_arrow.names]
            for batch in file.iter_batches(SCAN_ROWS, columns=there):
                columns = [batch[f.name].cast(f.type) if f.name in there else pa.nulls(len(batch), f.type) for f in schema]
                yield pa.record_batch(columns, schema=schema)


def _cut(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of so many; DuckDB's batches have about as many."""
    held = pa.table({})
    for batch in batches:
        held = pa.concat_tables([held, pa.Table.from_batches([batch])], promote_options="default")
        while held.num_rows >= rows:
            yield held.slice(0, rows).combine_chunks()
            held = held.slice(rows)
    if held.num_rows:
        yield held.combine_chunks()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
