"""The durable buffer: blocks on the device's disk, in SQLite (WAL, synchronous=FULL), until the lake holds them.

- `append` seals drafts into blocks and returns once they are on disk. Only then may sensor messages be acknowledged.
- A block leaves when the lake's receipt names it, and no earlier. The newest `history_rows` readings of a stream stay
  even then: after a restart they rebuild the open windows and the filter of redelivered messages.
- At `bytes_max`, or when the disk has no room, history gives way, the oldest first. When there is none left,
  `append` refuses with BufferFullError. The caller stops acknowledging and tries again.
- `append` leaves RESERVE_BYTES of the disk free: with no room at all, SQLite could not even note a receipt.
- A file that is no database is moved aside, never deleted, and a new buffer (a new epoch) takes its place. A damaged
  block is left where it is and left out of history.

One process owns the file. Threads may share the buffer: one connection writes, another reads (WAL lets both go on).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from edge_agent.clock import Moment
from edge_agent.contract.block import ORDINAL, BlockHeader, FixQuality, decode_block, encode_block
from edge_agent.contract.columns import Ints, Table, concat, take
from edge_agent.contract.errors import ContractError, UnavailableError
from edge_agent.contract.receipt import Receipt
from edge_agent.core.track import FIXES_MAX, Fix, from_text, to_text

log = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS lanes (lane TEXT PRIMARY KEY, last_sequence INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS streams (stream TEXT PRIMARY KEY, next_ordinal INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fixes (time_us INTEGER PRIMARY KEY, lane TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS blocks (
  id INTEGER PRIMARY KEY, lane TEXT NOT NULL, sequence INTEGER NOT NULL, stream TEXT NOT NULL,
  last_ordinal INTEGER NOT NULL, rows INTEGER NOT NULL, sealed_us INTEGER NOT NULL,
  settled INTEGER NOT NULL DEFAULT 0, block BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS blocks_identity ON blocks (lane, sequence);
CREATE INDEX IF NOT EXISTS blocks_waiting ON blocks (lane, sequence) WHERE settled = 0;
CREATE INDEX IF NOT EXISTS blocks_history ON blocks (stream, last_ordinal);
CREATE INDEX IF NOT EXISTS blocks_settled ON blocks (id) WHERE settled = 1;
"""
_DISK_ERRORS = (apsw.IOError, apsw.ReadOnlyError, apsw.CantOpenError, apsw.CorruptError, apsw.BusyError)
RESERVE_BYTES = 256 * 1024
SHED_BLOCKS = 64  # history given up at a time
SETTLE_BLOCKS = 32  # settled in one transaction: what it writes must fit the reserve
_STORED = "lane, sequence, stream, rows, block"


class BufferFullError(UnavailableError):
    """No room: acknowledge nothing, and try again when receipts have freed some."""


@dataclass(frozen=True)
class Draft:
    """Readings of one stream and lane, ready to be sealed into a block.

    `order` is the place of each reading among those of its stream in the same `append`; None means: as they come.
    """

    lane: str
    stream: str
    contract_version: str
    fix: FixQuality
    policy: str
    table: Table
    rows: int
    first_us: int
    last_us: int
    order: Ints | None = None
    model: str | None = None


@dataclass(frozen=True)
class StoredBlock:
    """A block that is on disk."""

    lane: str
    sequence: int
    stream: str
    rows: int
    block: bytes


@dataclass(frozen=True)
class LaneState:
    """What of one lane waits for a receipt; `oldest_us` is the wall time at which its oldest block was sealed."""

    lane: str
    blocks: int
    bytes: int
    rows: int
    oldest_us: int


class Buffer:
    """Store-and-forward on disk; see the module's rules. `epoch` names this buffer for ever."""

    def __init__(self, path: Path, device: str, boot: str, *, bytes_max: int, history_rows: dict[str, int]) -> None:
        """Open or create the buffer at `path`; `history_rows` is what to keep per stream after receipts."""
        self._device, self._boot = device, boot
        self._path, self._bytes_max, self._history_rows = path, bytes_max, history_rows
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()
        self._writer, self._reader = _open_or_move_aside(path)
        self.epoch = self._epoch()
        self._sequences = dict(self._writer.execute("SELECT lane, last_sequence FROM lanes"))
        self._ordinals = dict(self._writer.execute("SELECT stream, next_ordinal FROM streams"))

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._reader.close()
            self._writer.close()

    def append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        """Seal and store drafts and position fixes in one transaction; on return they are on disk.

        Raises:
            BufferFullError: the file has reached its limit, or the disk has no room. Nothing was stored.
            UnavailableError: the disk failed. Nothing of this call may be acknowledged.
        """
        if not drafts and not fixes:
            return []
        with self._write_lock:
            sequences, ordinals = dict(self._sequences), dict(self._ordinals)
            sealed = []
            for draft in drafts:
                sequences[draft.lane] = sequences.get(draft.lane, 0) + 1
                ordinals.setdefault(draft.stream, 0)
                header = self._header(draft, sequences[draft.lane], now)
                sealed.append(_seal(header, draft, self._ordinals.get(draft.stream, 0), ordinals[draft.stream]))
                ordinals[draft.stream] += draft.rows
            self._make_room(sum(len(s.stored.block) for s in sealed))
            with self._transaction():
                for block in sealed:
                    self._insert(block)
                self._write_counters(sequences, ordinals)
                self._write_fixes(fixes)
            self._sequences, self._ordinals = sequences, ordinals
        return [s.stored for s in sealed]

    def pending(self, lane: str, after_sequence: int, limit: int) -> list[StoredBlock]:
        """The next unsettled blocks of a lane, by rising sequence."""
        rows = self._read(
            f"SELECT {_STORED} FROM blocks WHERE settled = 0 AND lane = ? AND sequence > ? ORDER BY sequence LIMIT ?",
            (lane, after_sequence, limit),
        )
        return [StoredBlock(*row) for row in rows]

    def lanes(self) -> list[LaneState]:
        """Every lane that has blocks waiting for a receipt."""
        rows = self._read(
            "SELECT lane, count(*), sum(length(block)), sum(rows), min(sealed_us) FROM blocks WHERE settled = 0 GROUP BY lane",
            (),
        )
        return [LaneState(*row) for row in rows]

    def settle(self, receipt: Receipt) -> int:
        """Forget what the lake holds; returns how many blocks it settled. A receipt for another epoch settles none."""
        if receipt.device != self._device or receipt.epoch != self.epoch:
            return 0
        settled = 0
        for lane in receipt.lanes:
            for first, last in [(0, lane.cumulative), *lane.ranges]:
                while count := self._settle_some(lane.lane, first, last):
                    settled += count
        return settled

    def history(self, stream: str, contract_version: str) -> Table | None:
        """The newest readings of a stream, `history_rows` or somewhat more, in the order seen; None if there are none.

        Only those of this contract version: others may have other fields.
        """
        first = self._ordinals.get(stream, 0) - self._history_rows.get(stream, 0)
        blocks = self._read("SELECT block FROM blocks WHERE stream = ? AND last_ordinal >= ? ORDER BY last_ordinal", (stream, first))
        tables = [table for (block,) in blocks if (table := _past(block, contract_version)) is not None]
        if not tables:
            return None
        shared = set(tables[0]).intersection(*tables)  # blocks without a model have no scores
        rows = concat([{name: column for name, column in table.items() if name in shared} for table in tables])
        ordinals = rows[ORDINAL]
        assert isinstance(ordinals, np.ndarray)
        return take(rows, np.argsort(ordinals, kind="stable"))

    def fixes(self) -> list[Fix]:
        """The newest stored position fixes, oldest first."""
        return [from_text(*row) for row in self._read("SELECT time_us, lane FROM fixes ORDER BY time_us", ())]

    def readings_stored(self) -> int:
        """How many readings this buffer has ever stored."""
        return sum(self._ordinals.values())

    def used_bytes(self) -> int:
        """Bytes in use in the database, free pages left out."""
        with self._write_lock:
            return self._used_bytes()

    def _header(self, draft: Draft, sequence: int, now: Moment) -> BlockHeader:
        return BlockHeader(
            device=self._device,
            epoch=self.epoch,
            lane=draft.lane,
            sequence=sequence,
            stream=draft.stream,
            contract_version=draft.contract_version,
            rows=draft.rows,
            first_us=draft.first_us,
            last_us=draft.last_us,
            fix=draft.fix,
            policy=draft.policy,
            boot=self._boot,
            monotonic_us=now.monotonic_us,
            sealed_us=now.wall_us,
            clock_synced=now.synced,
            model=draft.model,
        )

    def _insert(self, sealed: _Sealed) -> None:
        stored = sealed.stored
        self._writer.execute(
            "INSERT INTO blocks (lane, sequence, stream, last_ordinal, rows, sealed_us, block) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (stored.lane, stored.sequence, stored.stream, sealed.last_ordinal, stored.rows, sealed.sealed_us, stored.block),
        )

    def _write_counters(self, sequences: dict[str, int], ordinals: dict[str, int]) -> None:
        for lane, sequence in sequences.items() - self._sequences.items():
            self._writer.execute("INSERT OR REPLACE INTO lanes VALUES (?, ?)", (lane, sequence))
        for stream, ordinal in ordinals.items() - self._ordinals.items():
            self._writer.execute("INSERT OR REPLACE INTO streams VALUES (?, ?)", (stream, ordinal))

    def _write_fixes(self, fixes: list[Fix]) -> None:
        if fixes:
            self._writer.executemany("INSERT OR REPLACE INTO fixes VALUES (?, ?)", [(f.time_us, to_text(f)) for f in fixes])
            self._writer.execute(
                "DELETE FROM fixes WHERE time_us <= (SELECT time_us FROM fixes ORDER BY time_us DESC LIMIT 1 OFFSET ?)", (FIXES_MAX,)
            )

    def _settle_some(self, lane: str, first: int, last: int) -> int:
        """Settle up to SETTLE_BLOCKS blocks of a range; returns how many it were."""
        with self._write_lock:
            self._shrink_log(RESERVE_BYTES)
            with self._transaction():
                self._writer.execute(
                    "UPDATE blocks SET settled = 1 WHERE id IN"
                    " (SELECT id FROM blocks WHERE settled = 0 AND lane = ? AND sequence BETWEEN ? AND ? LIMIT ?)",
                    (lane, first, last, SETTLE_BLOCKS),
                )
                settled = self._writer.changes()
                for stream, ordinal in self._ordinals.items() if settled else ():
                    keep = self._history_rows.get(stream, 0)
                    self._writer.execute(
                        "DELETE FROM blocks WHERE stream = ? AND settled = 1 AND last_ordinal < ?", (stream, ordinal - keep)
                    )
        return settled

    def _make_room(self, size: int) -> None:
        """See to it that blocks of `size` bytes fit, and the reserve beside them.

        Raises:
            BufferFullError: they do not, and there is no history left to give up.
        """
        self._shrink_log(2 * size + RESERVE_BYTES)
        while (lack := self._lack(size)) and self._shed_history():
            self._shrink_log(2 * size + RESERVE_BYTES)
        if lack:
            raise BufferFullError(lack)

    def _lack(self, size: int) -> str:
        """Why blocks of `size` bytes do not fit; empty if they do. They go to the log first, then to free or new pages."""
        used = self._used_bytes()
        if used + size > self._bytes_max:
            return f"buffer holds {used} bytes, {size} more would pass the limit of {self._bytes_max}"
        free = self._free_bytes()
        wanted = size + RESERVE_BYTES
        if size > self._spare_bytes():  # the file grows and never shrinks: leave room for the log of blocks to come
            wanted *= 2
        return f"disk of {self._path.parent} has {free} bytes free; {wanted} wanted" if free < wanted else ""

    def _shed_history(self) -> int:
        """Give up the oldest settled blocks; returns how many."""
        with self._transaction():
            query = "DELETE FROM blocks WHERE id IN (SELECT id FROM blocks WHERE settled = 1 ORDER BY id LIMIT ?)"
            self._writer.execute(query, (SHED_BLOCKS,))
            return self._writer.changes()

    def _shrink_log(self, wanted: int) -> None:
        """Bring the write-ahead log into the file, unless the disk has room for it once more and for `wanted` bytes."""
        log_bytes = self._path.with_name(f"{self._path.name}-wal").stat().st_size
        if log_bytes and self._free_bytes() < log_bytes + wanted:
            with _translated():
                self._writer.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def _free_bytes(self) -> int:
        disk = os.statvfs(self._path.parent)
        return disk.f_bavail * disk.f_frsize

    def _spare_bytes(self) -> int:
        return int(self._writer.pragma("freelist_count") * self._writer.pragma("page_size"))

    def _used_bytes(self) -> int:
        pages = self._writer.pragma("page_count") - self._writer.pragma("freelist_count")
        return int(pages * self._writer.pragma("page_size"))

    def _epoch(self) -> str:
        with self._transaction():
            self._writer.execute("INSERT OR IGNORE INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
        return str(self._writer.execute("SELECT value FROM meta WHERE key = 'epoch'").get)

    def _read(self, query: str, values: tuple[str | int, ...]) -> list[tuple[Any, ...]]:
        with self._read_lock:
            try:
                return self._reader.execute(query, values).fetchall()
            except _DISK_ERRORS as e:
                raise UnavailableError(f"buffer cannot be read: {e}") from e

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with _translated(), self._writer:
            yield


@dataclass(frozen=True)
class _Sealed:
    """A block on its way to the disk."""

    stored: StoredBlock
    last_ordinal: int
    sealed_us: int


def _seal(header: BlockHeader, draft: Draft, base: int, following: int) -> _Sealed:
    """`base` is the stream's ordinal before this append, `following` after the drafts before this one."""
    ordinals = np.arange(following, following + draft.rows) if draft.order is None else base + draft.order
    block = encode_block(header, {**draft.table, ORDINAL: ordinals})
    stored = StoredBlock(header.lane, header.sequence, header.stream, header.rows, block)
    return _Sealed(stored, int(ordinals.max()), header.sealed_us)


def _past(block: bytes, contract_version: str) -> Table | None:
    """The readings of a stored block, if it is whole and of this contract version."""
    try:
        header, table = decode_block(block)
    except ContractError as e:
        log.error("stored block damaged error=%s", e)
        return None
    return table if header.contract_version == contract_version else None


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except apsw.FullError as e:
        raise BufferFullError(f"no room on the disk: {e}") from e
    except _DISK_ERRORS as e:
        raise UnavailableError(f"buffer cannot be written: {e}") from e


def _open_or_move_aside(path: Path) -> tuple[apsw.Connection, apsw.Connection]:
    try:
        return _open(path)
    except (apsw.CorruptError, apsw.NotADBError) as e:
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        log.error("buffer damaged path=%s error=%s moved_to=%s", path, e, aside)
        for suffix in ("", "-wal", "-shm"):
            part = path.with_name(path.name + suffix)
            if part.exists():
                part.rename(aside.with_name(aside.name + suffix))
        return _open(path)


def _open(path: Path) -> tuple[apsw.Connection, apsw.Connection]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)  # SQLite gives the files beside it the same mode
    writer = apsw.Connection(str(path))
    writer.set_busy_timeout(5_000)
    writer.pragma("journal_mode", "wal")
    writer.pragma("synchronous", "full")
    with writer:
        writer.execute(_SCHEMA)
    reader = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    reader.set_busy_timeout(5_000)
    return writer, reader
