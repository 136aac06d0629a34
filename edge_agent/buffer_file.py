"""Reads a buffer's file without changing it: of a running agent, of a dead device, a copy, or a damaged one.

- The file is opened read-only, with its write-ahead log beside it (`buffer.db`, `buffer.db-wal`: copy both). Where SQLite needs to
  write for that (a read-only medium, a log without its index), a copy in the temporary directory is read instead.
- Blocks are read a few at a time, and what leaves a running agent's file meanwhile is not given out: its log cannot begin anew while
  somebody looks at one state of the file, and would grow for as long as `export | less` stands still.
- A file whose tables cannot be followed is carved (core.carve): every whole block that is still in its pages is found.
- Nothing is trusted: a block is given out when its CRC is right, or its AES-GCM tag; else it is counted as damaged.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import apsw

from edge_agent.contract.block import BLOCK_BYTES_MAX, BlockHeader, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.core.carve import carve, page_bytes_of
from edge_agent.sealed import Keys, open_stored
from edge_agent.slots import blocks_in_slots, carved_block
from edge_agent.store import PAGE_BYTES, SETTLED, log_path
from edge_agent.whole_file import mapped

log = logging.getLogger(__name__)

BUSY_MS = 5_000
ROWS_AT_ONCE = 8  # of up to BLOCK_BYTES_MAX each


@dataclass(frozen=True)
class Found:
    """A whole block of the file. `block` is as it goes on the wire; `settled`: the lake has said that it holds it."""

    header: BlockHeader
    table: Table
    block: bytes
    settled: bool


@dataclass
class BufferFile:
    """A file to read. After `blocks`, `damaged` says how many could not be read, and `carved` that its tables were beyond following."""

    path: Path
    keys: Keys | None = None
    damaged: int = 0
    carved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """ConfigError: there is no such file, or it is none."""
        try:
            with self.path.open("rb") as file:
                file.read(1)
        except OSError as e:
            raise ConfigError(f"cannot read {self.path}: {e.strerror}") from e

    def blocks(self) -> Iterator[Found]:
        """Every whole block once, in the order stored as far as that is known.

        Raises:
            ConfigError: blocks are sealed under a key that is not here.
        """
        self.damaged, self.carved = 0, False
        names: set[tuple[str, str, str, int]] = set()
        whole, damaged = set[int](), set[int]()
        for number, stored, settled in self._stored():
            found = self._open(stored, settled)
            (damaged if found is None else whole).add(number)
            if found is not None and found.header.identity not in names:
                names.add(found.header.identity)
                yield found
        self.damaged = len(damaged - whole)

    def _stored(self) -> Iterator[tuple[int, object, bool]]:
        """What is stored as a block, with its number and whether it was settled; from the pages alone if the tables end in damage."""
        try:
            with connect(self.path) as db:
                settled, slots = _settled_ids(db), sorted(blocks_in_slots(db.execute))
                newest = db.execute("SELECT max(id) FROM blocks").get
                db.execute("COMMIT")
                for number, stored in heapq.merge(_rows(db, newest), slots, key=itemgetter(0)):
                    yield number, stored, number in settled
        except (apsw.Error, ContractError, UnicodeDecodeError) as e:
            log.warning("buffer file carved path=%s error=%s", self.path, e)
            self.carved = True
            yield from self._carved()

    def _carved(self) -> Iterator[tuple[int, bytes, bool]]:
        """What is still in the pages; whether it was settled nobody can say."""
        with mapped(self.path) as file, mapped(log_path(self.path)) as write_ahead:
            for row, blob in carve(file, write_ahead, page_bytes_of(file, PAGE_BYTES), 2 * BLOCK_BYTES_MAX):
                if found := carved_block(row, blob):
                    yield *found, False

    def _open(self, stored: object, settled: bool) -> Found | None:
        if not isinstance(stored, bytes):
            return None
        try:
            block = open_stored(stored, self.keys)
            header, table = decode_block(block)
        except ContractError:
            return None
        return Found(header, table, block, settled)


def parts(path: Path) -> list[Path]:
    """The file, and its write-ahead log if there is one: what holds blocks."""
    return [part for part in (path, log_path(path)) if part.exists()]


@contextlib.contextmanager
def connect(path: Path) -> Iterator[apsw.Connection]:
    """A read-only connection to a buffer file, which sees one state of it, whatever a running agent does.

    Raises:
        apsw.Error: it is no database, or is damaged where SQLite looks first, or the disk does not give it back.
        UnavailableError: it has to be copied, and there is no room.
    """
    with contextlib.ExitStack() as stack:
        try:
            db = _read_only(path)
        except (apsw.CantOpenError, apsw.ReadOnlyError, apsw.PermissionsError):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fenceline-")))
            _copy(path, folder)
            db = apsw.Connection(str(folder / path.name))
            _look(db)
        stack.callback(db.close)
        yield db


def _copy(path: Path, folder: Path) -> None:
    try:
        for part in parts(path):
            shutil.copyfile(part, folder / part.name)
    except OSError as e:
        if e.errno == errno.EIO:
            raise apsw.IOError(f"{path}: {e.strerror}") from e
        raise UnavailableError(f"cannot copy {path} to {folder.parent}: {e.strerror}; let TMPDIR name a directory with room") from e


def _read_only(path: Path) -> apsw.Connection:
    db = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        _look(db)
    except BaseException:
        db.close()
        raise
    return db


def _look(db: apsw.Connection) -> None:
    db.set_busy_timeout(BUSY_MS)
    db.pragma("cell_size_check", True)
    db.execute("BEGIN")
    db.execute("SELECT count(*) FROM sqlite_schema").fetchall()


def _rows(db: apsw.Connection, newest: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of `blocks` up to this id, by rising id."""
    query = "SELECT id, block FROM blocks WHERE id > ? AND id <= ? ORDER BY id LIMIT ?"
    after: Any = -(2**63)
    while rows := db.execute(query, (after, newest, ROWS_AT_ONCE)).fetchall():
        yield from rows
        after = rows[-1][0]


def _settled_ids(db: apsw.Connection) -> set[int]:
    return {number for (number,) in db.execute("SELECT id FROM places WHERE settled = ?", (SETTLED,))}
