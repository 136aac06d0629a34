"""Follow a stream of the lake: the rows that new commits added, lane by lane, in the order of the commits.

- A commit's rows are those of the files it added as new data: compaction moves rows and adds none. Corrected rows come again, so who
  follows tells rows apart by their names (device, epoch, lane, sequence, row).
- A place in a lane is the version of its table. Who follows says when rows are handled (`done`); until then they come again:
  at least once.
- Where Delta has cleaned its log or its files away since, all rows that the table holds now come instead.
- Many commits come as one piece, of PIECE_BYTES or somewhat more; commits of one instant cost one look at the log each.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.fs
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from deltalake.fs import DeltaStorageHandler

from cloud.lake import Lake
from cloud.reading import schema_with
from cloud.tables import text_field
from edge_agent.contract.errors import UnavailableError

PIECE_BYTES = 32 * 1024 * 1024
PIECE_COMMITS = 256
LANES_S = 2.0
"""How often new lanes are looked for."""


@dataclass(frozen=True)
class Piece:
    """Rows of commits to a lane; with them handled, the lane is at `version`."""

    lane: str
    version: int
    rows: pa.Table


class Follower:
    """Follows `columns` of a stream from the versions in `seen`; a lane that is not there starts with its first commit."""

    def __init__(
        self, lake: Lake, stream: str, columns: Sequence[str], seen: Mapping[str, int] | None = None, lanes_s: float = LANES_S
    ) -> None:
        self.seen, self._lanes_s = dict(seen or {}), lanes_s
        self._lake, self._stream, self._columns = lake, stream, list(columns)
        self._tables: dict[str, DeltaTable] = {}
        self._lanes_due = 0.0

    def skip(self) -> None:
        """Follow from now on: what the lake holds already counts as handled."""
        self.seen = self._lake.versions(self._stream)

    def pieces(self) -> Iterator[Piece]:
        """What has been committed since, to every lane.

        Raises:
            UnavailableError: a table does not read.
        """
        self._find_lanes()
        for lane, table in self._tables.items():
            try:
                table.update_incremental()
                if self.seen.get(lane, -1) < table.version():
                    yield from self._pieces(lane, table)
            except (DeltaError, OSError, pa.ArrowException) as e:
                raise UnavailableError(f"lake {self._stream}/{lane} does not read: {e}") from e

    def done(self, piece: Piece) -> None:
        """The rows of a piece are handled."""
        self.seen[piece.lane] = piece.version

    def of_devices(self, devices: Sequence[str]) -> Iterator[pa.Table]:
        """All handled rows of some devices, in no order. Where Delta has cleaned up since, those that are not handled yet too.

        Raises:
            UnavailableError: a table does not read.
        """
        wanted = text_field("device").isin(list(devices))
        for lane, version in self.seen.items():
            try:
                table = self._lake.table(self._stream, lane)
                yield from _rows(table, self._columns, version, wanted)
            except (DeltaError, OSError, pa.ArrowException) as e:
                raise UnavailableError(f"lake {self._stream}/{lane} does not read: {e}") from e

    def _find_lanes(self) -> None:
        if time.monotonic() < self._lanes_due:
            return
        for lane in self._lake.lanes(self._stream):
            if lane not in self._tables:
                self._tables[lane] = self._lake.table(self._stream, lane)
        self._lanes_due = time.monotonic() + self._lanes_s

    def _pieces(self, lane: str, table: DeltaTable) -> Iterator[Piece]:
        files = _files(table)
        newest, start = table.version(), self.seen.get(lane, -1) + 1
        paths: list[str] = []
        size = 0
        try:
            for version in range(start, newest + 1):
                for path, length in _added(files, version):
                    paths.append(path)
                    size += length
                if size >= PIECE_BYTES or (version - start) % PIECE_COMMITS == PIECE_COMMITS - 1 or version == newest:
                    yield Piece(lane, version, self._read(table, files, paths))
                    paths, size = [], 0
        except FileNotFoundError:
            yield from self._whole(lane, table)

    def _read(self, table: DeltaTable, files: pa.fs.FileSystem, paths: list[str]) -> pa.Table:
        """Rows of data files; a column that an old file lacks is null."""
        known = schema_with(table, self._columns)
        schema = pa.schema([known.field(name) for name in self._columns])
        if not paths:
            return schema.empty_table()
        return pyarrow.dataset.dataset(paths, schema=schema, format="parquet", filesystem=files).to_table()

    def _whole(self, lane: str, table: DeltaTable) -> Iterator[Piece]:
        """All that the table holds now."""
        rows = None
        for batch in _dataset(table, self._columns).scanner(columns=self._columns).to_batches():
            rows = pa.table(batch)
            yield Piece(lane, self.seen.get(lane, -1), rows)
        if rows is not None:
            yield Piece(lane, table.version(), rows.slice(0, 0))


def _rows(table: DeltaTable, columns: list[str], version: int, wanted: pc.Expression) -> Iterator[pa.Table]:
    """Rows at a version; where its files are gone, or none is handled whole yet (-1, see `_whole`), those of the newest."""
    newest = _dataset(table, columns)
    if version < 0:
        yield from _tables(newest, columns, wanted)
        return
    try:
        table.load_as_version(version)
        yield from _tables(_dataset(table, columns), columns, wanted)
    except (DeltaError, FileNotFoundError):
        yield from _tables(newest, columns, wanted)


def _tables(rows: pyarrow.dataset.Dataset, columns: list[str], wanted: pc.Expression) -> Iterator[pa.Table]:
    for batch in rows.scanner(columns=columns, filter=wanted).to_batches():
        if batch.num_rows:
            yield pa.table(batch)


def _dataset(table: DeltaTable, columns: Sequence[str]) -> pyarrow.dataset.Dataset:
    return table.to_pyarrow_dataset(schema=schema_with(table, columns))


def _files(table: DeltaTable) -> pa.fs.FileSystem:
    return pa.fs.PyFileSystem(DeltaStorageHandler(table.table_uri, table._storage_options))


def _added(files: pa.fs.FileSystem, version: int) -> Iterator[tuple[str, int]]:
    """The data files, with their bytes, that a commit added as new data."""
    with files.open_input_stream(f"_delta_log/{version:020d}.json") as stream:
        actions = [json.loads(line) for line in stream.read().splitlines()]
    for action in actions:
        if "add" in action and action["add"]["dataChange"]:
            yield unquote(action["add"]["path"]), int(action["add"]["size"])
