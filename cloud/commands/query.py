"""`fenceline query`: a look at the lake in SQL, as a table, JSON, CSV or Parquet."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, print_json, print_records, say, short
from cloud.files import write_atomically
from edge_agent.contract.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN_ROWS_MAX = 1_000


def declare(commands: Any) -> None:
    """Declare the command."""
    query = add_command(commands, "query", _query, "SQL over the lake: one SELECT, a view per stream")
    query.add_argument("sql", metavar="SELECT")
    query.add_argument("--zones", type=_zones, default=[], metavar="A,B", help="only these zones (default: all you may see)")
    form = query.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--parquet", type=Path, metavar="FILE", help="write Parquet")


def _query(args: argparse.Namespace) -> int:
    from cloud.query import Query
    from cloud.viewers import rights
    from cloud.watch import open_lake

    if args.csv and args.json:
        raise ConfigError("--csv and --json exclude each other: the answer is one document")
    settings = config.load(args.project, args.state)
    zones = rights(settings, args.zones)
    with Query(open_lake(settings), zones, settings.query) as query:
        found = query.run(args.sql)
    if args.parquet is not None:
        _write_parquet(found, args.parquet)
        if args.json:
            print_json({"file": args.parquet, "rows": found.num_rows})
        else:
            say(f"{found.num_rows} rows in {args.parquet}")
    elif args.csv:
        _print_csv(found)
    elif args.json:
        print_json([dict(zip(found.column_names, row, strict=True)) for row in _rows(found)])
    else:
        print_records(tuple(found.column_names), [tuple(map(short, row)) for row in _rows(found.slice(0, SHOWN_ROWS_MAX))])
        more = f" (the first {SHOWN_ROWS_MAX} are shown; --csv prints all)" if found.num_rows > SHOWN_ROWS_MAX else ""
        say(f"{found.num_rows} rows{more}")
    return 0


def _zones(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _write_parquet(found: pa.Table, file: Path) -> None:
    """Write the answer; a file that is there is not touched before that can be done."""
    import pyarrow as pa
    import pyarrow.parquet

    sink = pa.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(found, sink)
    except pa.ArrowException as e:
        raise ConfigError(f"{e}: cast that column to text, x::VARCHAR") from e
    try:
        _put(file, sink.getvalue())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as e:
        raise ConfigError(f"{file} cannot be written: {e.strerror}") from e
    except OSError as e:  # the disk is full, for instance
        raise UnavailableError(f"{file} cannot be written: {e.strerror}") from e


def _put(file: Path, data: bytes) -> None:
    """Replace a file whole; write to what is none, or what was opened for us, be it a file: `/dev/stdout`, `/dev/fd/3`."""
    handed = file.is_symlink() and file.parent.resolve().parts[1:2] in (("dev",), ("proc",))
    if handed or (file.exists() and not file.is_file()):
        file.write_bytes(data)
        return
    target = Path(os.path.realpath(file))  # a link goes on to lead where it leads
    if target.exists():
        target.open("r+b").close()  # who may not write a file may not replace it
    write_atomically(target, data)


def _print_csv(found: pa.Table) -> None:
    import pyarrow as pa
    import pyarrow.csv

    try:
        pyarrow.csv.write_csv(found, sys.stdout.buffer)
    except pa.ArrowException as e:
        raise ConfigError(f"{e}: cast that column to text, x::VARCHAR, or ask for --json") from e


def _rows(found: pa.Table) -> list[tuple[Any, ...]]:
    return list(zip(*map(_values, found.columns), strict=True))


def _values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column; all as text, if one is a time that Python has no object for: before year 1, after 9999, infinite."""
    try:
        return column.to_pylist()
    except (OverflowError, ValueError):
        import duckdb
        import pyarrow as pa

        from cloud.query import UTC

        with duckdb.connect() as db:
            db.execute(UTC)
            return [text for (text,) in db.from_arrow(pa.table({"x": column})).project("x::VARCHAR").fetchall()]
