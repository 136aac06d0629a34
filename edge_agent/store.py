"""The buffer's file: SQLite in WAL mode with synchronous=FULL, one connection that writes and one that reads.

- Pages are PAGE_BYTES small. A commit writes whole pages to the log and a checkpoint writes them again, so small pages are what
  keeps the bytes written per byte stored near two (flash wears by the byte; see docs/decisions/0011-small-pages.md).
- The log is brought into the file (`checkpoint`) when it has passed `log_bytes_max`; the pages of what was deleted are used again,
  so the file never grows beyond what it held at its fullest.
- Errors are sorted: BufferFullError (no room on the disk), DiskError (I/O failed: what was written is not to be trusted; `close`, then
  open again with `suspect=True`), DamagedError (the file holds something else than was written: salvage it). After a DiskError or a
  DamagedError this object is used for nothing but `close`.
- Opening a suspect file checkpoints it: every page goes to the disk once more, and frames that never arrived fail their checksum. Then a
  new log begins on the disk.

Tables, for those who read the file (edge-agent fsck, export, import):

- `blocks(id, block)`: blocks in the order stored, sealed or not (edge_agent.sealed). They say themselves what they are.
- `slots(slot, block)`: small blocks, in rows that are used again (edge_agent.slots); the ids go through both tables.
- `places`: where blocks are, by shelf (lane and stream) and sequence. It lags behind: the newest up to TAIL_BLOCKS_MAX blocks
  have no place yet, their headers are read instead. `settled` is 0, or SETTLED for a block that the lake holds (kept as history);
  `slot` is the slot that holds the block, 0 for a row in `blocks`.
- `lanes`: the last sequence given out, and how many sequences of the lane are `gone` from the file (settled, evicted, damaged,
  skipped): last_sequence - gone = blocks of the lane in the file. `streams`: the next ordinal. Both lag behind like `places`.
- `damaged`: the newest blocks that were found damaged, as far as they could be read. `meta`: the epoch, counters. `fixes`: positions.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw

from edge_agent.contract.errors import UnavailableError
from edge_agent.whole_file import sync

PAGE_BYTES = 512
PAGE_PAYLOAD_BYTES = PAGE_BYTES - 4  # of an overflow page
BLOCK_PAGES_MORE = 3  # of a block, beside its full overflow pages
TAIL_BLOCKS_MAX = 64
SETTLED = 23_159  # not 1: one flipped bit must not turn a waiting block into a settled one
CACHE_PAGES = 256
"""Of each connection. Twelve times as many save nothing that can be measured, and fill up within hours, as if memory leaked."""
LOG_BYTES_MAX = 8 * 1024 * 1024
LOG_BYTES_MIN = 16 * 1024
BUSY_MS = 5_000
COPY_BYTES = 1024 * 1024
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24

SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE lanes (lane TEXT PRIMARY KEY, last_sequence INTEGER NOT NULL, gone INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE streams (stream TEXT PRIMARY KEY, next_ordinal INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE shelves (shelf INTEGER PRIMARY KEY, lane TEXT NOT NULL, stream TEXT NOT NULL)",
    "CREATE TABLE fixes (time_us INTEGER PRIMARY KEY, lane TEXT NOT NULL)",
    "CREATE TABLE places (shelf INTEGER, sequence INTEGER, id INTEGER NOT NULL, rows INTEGER NOT NULL, bytes INTEGER NOT NULL,"
    " last_ordinal INTEGER NOT NULL, first_us INTEGER NOT NULL, last_us INTEGER NOT NULL, stored_us INTEGER NOT NULL,"
    " settled INTEGER NOT NULL, slot INTEGER NOT NULL, PRIMARY KEY (shelf, sequence)) WITHOUT ROWID",
    "CREATE TABLE damaged (id INTEGER PRIMARY KEY, lane TEXT, stream TEXT, sequence INTEGER, rows INTEGER, found_us INTEGER, block BLOB)",
    "CREATE TABLE slots (slot INTEGER PRIMARY KEY, block BLOB NOT NULL)",
    "CREATE TABLE blocks (id INTEGER PRIMARY KEY, block BLOB NOT NULL)",
)


class BufferFullError(UnavailableError):
    """No room: acknowledge nothing, and try again when receipts have freed some."""


class DiskError(UnavailableError):
    """The disk failed: nothing of this call may be acknowledged, and the file must be opened again before it is used."""


class DamagedError(UnavailableError):
    """The file holds something else than was written: what can be read must be salvaged."""


class Store:
    """An open buffer file; see the module's rules. Made by `open_store`."""

    def __init__(self, path: Path, writer: apsw.Connection, reader: apsw.Connection, log_bytes_max: int, vfs: str | None) -> None:
        self.path, self._writer, self._reader, self._vfs = path, writer, reader, vfs
        self._log_bytes_max = log_bytes_max
        self._read_lock = threading.Lock()
        self.page_bytes = int(writer.pragma("page_size"))  # PAGE_BYTES, but for files that others have prepared
        self._log_pages = 0
        writer.set_wal_hook(self._note_log)

    def close(self, *, checkpoint: bool = True) -> None:
        """Close both connections. `checkpoint=False` leaves the file and its log as they are."""
        with self._read_lock, translated("closed"):
            self._writer.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, not checkpoint)
            self._reader.close()
            self._writer.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """One transaction, on disk when this returns: all of them are, so that only the last in the log can be torn by a power cut."""
        writer = self._writer
        with translated("written"):
            writer.execute("BEGIN IMMEDIATE")
            try:
                yield
                writer.execute("COMMIT")
            finally:
                if writer.in_transaction:
                    writer.execute("ROLLBACK")

    def built(self) -> None:
        """The next transaction is the last one that builds the file: with it, all of the file goes to the disk."""
        with translated("written"):
            self._writer.pragma("synchronous", "full")

    def execute(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Read on the writing connection: what the running transaction has done is seen."""
        with translated("read"):
            return self._writer.execute(query, values).fetchall()

    def execute_many(self, query: str, rows: list[tuple[Any, ...]]) -> None:
        """Write several rows in the running transaction."""
        with translated("written"):
            self._writer.executemany(query, rows)

    def read(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Read on the other connection; goes on while something is written."""
        with self._read_lock, translated("read"):
            return self._reader.execute(query, values).fetchall()

    def log_due(self, factor: float = 1.0) -> bool:
        """Whether the log has passed its limit `factor` times."""
        return self._log_pages * (self.page_bytes + _FRAME_HEADER_BYTES) >= factor * self._log_bytes_max

    def checkpoint(self, *, truncate: bool = False) -> None:
        """Bring the log into the file; it starts again from its beginning, or as an empty file."""
        mode = apsw.SQLITE_CHECKPOINT_TRUNCATE if truncate else apsw.SQLITE_CHECKPOINT_PASSIVE
        with self._read_lock, translated("checkpointed"):  # nobody of ours reads: all of the log can be taken
            log_pages, done = self._writer.wal_checkpoint(mode=mode)
            self._log_pages = log_pages - done

    def begin_log(self) -> bool:
        """Bring the log into the file, and begin a new one on the disk, before anything that was found in it is relied on.

        After a sync that failed, here or in a process before this one, the disk may hold an older log than the one we read. That it is
        cut off is not on the disk before the next sync: after a power cut the older log would undo what the file has got from ours.

        Returns:
            False if the disk has no room for a new one: then ours has been written once more, over itself, and is on the disk.
        """
        try:
            self.checkpoint(truncate=True)
            with translated("written"):
                self._writer.pragma("user_version", (int(self._writer.pragma("user_version")) + 1) % 2**31)  # any commit: it is synced
        except BufferFullError:
            self._write_log_again()
            return False
        return True

    def _write_log_again(self) -> None:
        with translated("synced"):
            flags = [apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_READWRITE, 0]
            file = apsw.VFSFile(self._vfs or "", str(log_path(self.path)), flags)
            try:
                size = file.xFileSize()
                for start in range(0, size, COPY_BYTES):
                    file.xWrite(file.xRead(min(COPY_BYTES, size - start), start), start)
                file.xSync(apsw.SQLITE_SYNC_FULL)  # that it was cut off goes to the disk with it
            finally:
                file.xClose()

    def used_bytes(self) -> int:
        """Bytes of pages in use, free pages left out."""
        with translated("read"):
            return int(self._writer.pragma("page_count") - self._writer.pragma("freelist_count")) * self.page_bytes

    def spare_bytes(self) -> int:
        """Bytes of free pages in the file."""
        with translated("read"):
            return int(self._writer.pragma("freelist_count")) * self.page_bytes

    def log_bytes(self) -> int:
        """Size of the log on disk."""
        with translated("read"):
            return log_path(self.path).stat().st_size if log_path(self.path).exists() else 0

    def free_bytes(self) -> int:
        """Bytes that the disk has left for us."""
        with translated("read"):
            disk = os.statvfs(self.path.parent)
        return disk.f_bavail * disk.f_frsize

    def _note_log(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK


def bytes_on_disk(size: int) -> int:
    """Bytes that a block of `size` takes in the file, at most: whole overflow pages, its leaf, its place."""
    return (size // PAGE_PAYLOAD_BYTES + BLOCK_PAGES_MORE) * PAGE_BYTES


def log_limit(bytes_max: int) -> int:
    """How large the log of a buffer of `bytes_max` may become."""
    return max(LOG_BYTES_MIN, min(LOG_BYTES_MAX, bytes_max // 32))


def log_path(path: Path) -> Path:
    """The write-ahead log beside a file."""
    return path.with_name(f"{path.name}-wal")


def open_store(
    path: Path, *, log_bytes_max: int, vfs: str | None = None, suspect: bool = False, check_log: bool = True, building: bool = False
) -> Store:
    """Open or create a buffer file. `check_log=False`: the caller knows better which commits there must be.

    `building`: it is new, and of no use before it is complete; so it has no log and nothing waits for the disk, until `Store.built`.

    Raises:
        DamagedError: it is not a buffer file of this version: salvage it.
        DiskError: the disk failed.
        BufferFullError: the disk has no room for an empty one.
    """
    with translated("opened"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)  # SQLite gives the files beside it the same mode
            sync(path.parent)
        with path.open("rb") as file:
            head = file.read(20)
        if len(head) == 20 and head[18:20] not in (b"\1\1", b"\2\2"):  # SQLite would call the file read-only
            raise DamagedError(f"its header is damaged: format {head[18]}, {head[19]}")
        log = log_path(path).read_bytes() if log_path(path).exists() else b""
        writer = apsw.Connection(str(path), vfs=vfs)
        try:
            writer.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
            writer.set_busy_timeout(BUSY_MS)
            if check_log and not suspect and _lost_commits(log, writer):
                raise DamagedError("its log is damaged: there are commits behind a frame that is not whole")
            _set_up(writer, log_bytes_max, building)
            if suspect:
                writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
            reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY, vfs=vfs)
            reader.set_busy_timeout(BUSY_MS)
            reader.pragma("cache_size", CACHE_PAGES)
        except BaseException:
            writer.close()
            raise
    return Store(path, writer, reader, log_bytes_max, vfs)


def _set_up(writer: apsw.Connection, log_bytes_max: int, building: bool) -> None:
    writer.pragma("page_size", PAGE_BYTES)  # of a new file
    writer.pragma("journal_mode", "off" if building else "wal")
    writer.pragma("synchronous", "off" if building else "full")
    writer.pragma("cell_size_check", True)
    writer.pragma("wal_autocheckpoint", 0)  # its errors would go unseen
    writer.pragma("journal_size_limit", log_bytes_max)
    writer.pragma("cache_size", CACHE_PAGES)
    found = [str(sql) for (sql,) in writer.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")]
    pages = writer.pragma("page_count")
    if not found and pages <= 1:
        writer.execute("BEGIN IMMEDIATE")
        for statement in SCHEMA:
            writer.execute(statement)
        writer.execute("COMMIT")
    elif found != list(SCHEMA):
        raise DamagedError(f"its {len(found)} tables are not those of this version")
    free = writer.pragma("freelist_count")  # of the header as it is: SQLite does not look at it before it takes a page, we count with it
    if not 0 <= free < max(1, pages):
        raise DamagedError(f"its header says that {free} of its {pages} pages are free")


def _lost_commits(log: bytes, writer: apsw.Connection) -> bool:
    """Whether the log holds commits that SQLite does not take because a frame in front of them, or the log's head, is damaged.

    They may have been acknowledged, and sent: their names must not be given to other blocks. A commit that was under way when the
    power failed looks much like it, but only the last one can be such, and what never arrived shows: as zeros, or as frames of
    an earlier round of the log, which share neither half of its salt.
    """
    if len(log) <= _LOG_HEADER_BYTES:
        return False
    writer.execute("SELECT count(*) FROM sqlite_schema").fetchall()  # it takes the log in when it reads
    taken = max(0, int(writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_NOOP)[0]))
    sizes = {PAGE_BYTES, int(writer.pragma("page_size")), int.from_bytes(log[8:12], "big")}
    return any(_commits_behind(log, taken, size) for size in sizes if 512 <= size <= 65_536)


def _commits_behind(log: bytes, taken: int, page_bytes: int) -> bool:
    step = page_bytes + _FRAME_HEADER_BYTES
    commits, whole = 0, True
    for start in range(_LOG_HEADER_BYTES + taken * step, len(log) - _FRAME_HEADER_BYTES + 1, step):
        head, page = log[start : start + _FRAME_HEADER_BYTES], log[start + _FRAME_HEADER_BYTES : start + step]
        ours = head[8:12] == log[16:20] or head[12:16] == log[20:24]
        arrived = ours and len(page) == page_bytes and any(page)
        whole &= arrived or commits > 0
        commits += ours and any(head[4:8])
    return commits > 1 or (commits == 1 and whole)


@contextlib.contextmanager
def translated(done: str) -> Iterator[None]:
    """Sort SQLite's errors and the system's by what has to be done; `done` is what could not be done, for the message."""
    try:
        yield
    except apsw.FullError as e:
        raise BufferFullError(f"no room on the disk: {e}") from e
    except (apsw.BusyError, apsw.LockedError, apsw.ConnectionClosedError) as e:
        raise UnavailableError(f"buffer cannot be {done} now: {e}") from e
    except (apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.PermissionsError, apsw.ProtocolError, apsw.NoMemError, OSError) as e:
        raise DiskError(f"buffer cannot be {done}: {e}") from e
    except (apsw.Error, UnicodeDecodeError) as e:
        raise DamagedError(f"buffer cannot be {done}, it is damaged: {e}") from e
