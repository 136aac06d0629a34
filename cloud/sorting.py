"""The rows of a stream in the order in which each device saw them, however many: they need not fit into memory.

- Rows, order, columns and types are those of `Lake.read`; they come some at a time. Equal rows give equal parts, however they lie in files.
- DuckDB sorts. Each data file is read once, a few rows at a time; what has no room in memory lies in a directory until its turn has come.
- What it must hold while it merges grows with the square root of the number of rows, slowly: see `memory_mb`.
- A read for each device would need no such directory, but a file has rows of all devices that sent meanwhile, and a device has rows in
  files of all dates: every file would be read once for each device. The sorts of Polars and Arrow hold all rows in memory.

    for rows in sorted_rows(lake, "turbofan", lake.versions("turbofan"), ["engine", "ts"], 65_536, 1_024, Path("build/.sort")): ...
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
        memory_mb: what DuckDB may hold; reading and writing take some 700 MB beside it. With rows of 400 bytes, 256 do for 20 million of
            them, twice as much for four times as many. Rows twice as long need twice as much.
        scratch: a directory, made if need be, on a disk that has room for the rows; what lies there meanwhile is gone afterwards.

    Raises:
        ConfigError: the rows are too long for so little memory.
        UnavailableError: files cannot be read, or the disk is full.
    """
    tables = [lake.table(stream, lane, version) for lane, version in sorted(versions.items())]
    wanted = list(dict.fromkeys([*columns, *ORDER]))
    whole = pa.unify_schemas([schema_with(table, wanted) for table in tables])
    schema, asked = (pa.schema([whole.field(name) for name in names]) for names in (wanted, columns))
    numbered = pa.schema([field.with_name(f"c{i}") for i, field in enumerate(schema)])  # to SQL, names that differ in case are one
    picked, keys = (", ".join(f"c{wanted.index(name)}" for name in names) for names in (columns, ORDER))
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": f"{memory_mb}MB",
        "threads": THREADS,
        "temp_directory": str(scratch),
        "arrow_large_buffer_size": True,
    }
    try:
        with duckdb.connect(":memory:", config=settings) as db:
            db.execute(f"{UTC}; SET enable_progress_bar = false")
            batches = (batch.rename_columns(numbered.names) for batch in _read(tables, schema))
            db.register("lake", pa.RecordBatchReader.from_batches(numbered, batches))
            with db.sql(f"SELECT {picked} FROM lake ORDER BY {keys}").to_arrow_reader(rows) as found:
                for part in _cut(found, rows):
                    yield pa.concat_tables(narrowed(part.rename_columns(columns), asked))
    except (duckdb.Error, DeltaError, OSError) as e:
        what, reason = f"the lake's stream {stream!r} ({', '.join(versions)}) does not sort", str(e).partition("\n")[0]
        if "max_temp_directory_size" in str(e):
            raise UnavailableError(f"{what}: the disk of {scratch} has no room for it ({reason})") from e
        if "Out of Memory" in reason:
            raise ConfigError(f"{what}: {reason}; raise snapshot.memory_mb (now {memory_mb})") from e
        raise UnavailableError(f"{what}: {reason}") from e


def _read(tables: Sequence[DeltaTable], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of all files, one file after the other, a few at a time: Arrow's datasets decode whole row groups, of a million rows."""
    for table in tables:
        for fragment in table.to_pyarrow_dataset().get_fragments():
            file = pq.ParquetFile(fragment.open(), pre_buffer=True)
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
