"""A damaged buffer file: what can be read goes into a new file, what cannot is named, and the old file is moved aside.

- Blocks keep epoch, lane and sequence: one that the lake has already is a copy there. Whether a block was settled is taken from
  the old tables where they can still be read; else it is sent again.
- Sequences and ordinals go on SKIP higher, so that no name is ever given to two blocks. The names in between are a row
  of the loss ledger like the blocks that are missing.
- The rows of the ledger lie in the new file (`meta`, key `owed`) until the buffer has sealed them: a crash in between loses none.
- The new file takes the old one's place in one rename. The newest ASIDE_MAX old files stay, for `fenceline import-buffer`.
- If the disk has no room for the copy, the new buffer starts empty, and the ledger says which file holds the rest.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import apsw
import msgspec

from edge_agent.contract.block import BLOCK_BYTES_MAX, BlockHeader
from edge_agent.contract.errors import UNREADABLE, ConfigError, ContractError, Reason
from edge_agent.contract.topics import check_lane, check_name
from edge_agent.core.carve import carve, page_bytes_of
from edge_agent.core.fix import from_text
from edge_agent.core.ledger import Loss, coalesce
from edge_agent.marks import Marked, Marks
from edge_agent.opening import GAPS, read_whole
from edge_agent.sealed import KEY_ID_BYTES, SEALED_MAGIC, Keys, stored_header
from edge_agent.slots import blocks_in_slots, carved_block
from edge_agent.store import PAGE_BYTES, SETTLED, BufferFullError, Store, log_path, open_store, translated
from edge_agent.whole_file import keep_owner, mapped, sync

log = logging.getLogger(__name__)

SKIP = 2**20
ASIDE_MAX = 2
UNKNOWN_STREAM = "unknown"
UNUSED = "unused"
"""Stands for a stream in ledger rows of names that are not given out: nothing known had them."""
OWED = "owed"
_BATCH = 256
_PUT = "INSERT OR IGNORE INTO blocks VALUES (?, ?) RETURNING id"
_KEYS = (  # a row for each change of key, as `opening.check_keys` wants them
    "INSERT INTO meta SELECT 'key ' || id, lower(hex(key)) FROM (SELECT id, key, lag(key, 1, x'') OVER (ORDER BY id) AS before FROM"
    " (SELECT id, CASE WHEN substr(block, 1, 4) = ?2 THEN substr(block, 5, ?1) ELSE x'' END AS key FROM blocks)) WHERE key <> before"
)
_NAN = float("nan")


@dataclass
class _Old:
    """What the old tables still say: epoch, numbers, and of each block whether it was settled; and the mark beside the file."""

    epoch: str | None = None
    lanes: dict[str, int] = field(default_factory=dict)
    streams: dict[str, int] = field(default_factory=dict)
    fixes: list[tuple[int, str]] = field(default_factory=list)
    places: dict[tuple[str, int], tuple[str, int, int, int, bool]] | None = None  # stream, rows, first and last time, settled
    gone: dict[str, tuple[int, int]] = field(default_factory=dict)  # by lane: the last name when it was counted, and the count
    owed: list[Loss] = field(default_factory=list)
    mark: Marked | None = None

    def given(self, epoch: str, lane: str) -> tuple[int, int] | None:
        """The first name that waited and the last one given out, as the mark has it."""
        return self.mark.lanes.get(lane) if self.mark is not None and self.mark.epoch == epoch else None


@dataclass
class _New:
    """The numbers of the new file, as it fills."""

    epoch: str | None = None
    shelves: dict[tuple[str, str], int] = field(default_factory=dict)
    found: set[tuple[str, int]] = field(default_factory=set)
    next_id: int = 1
    lanes: dict[str, int] = field(default_factory=dict)
    ordinals: dict[str, int] = field(default_factory=dict)
    held: Counter[str] = field(default_factory=Counter)


def salvage(path: Path, device: str, keys: Keys | None, *, log_bytes_max: int, vfs: str | None, cause: str) -> None:
    """Put a new file in the place of the damaged one at `path`; nobody may have it open.

    Raises:
        ConfigError: blocks are sealed under a key that is not here. Nothing was changed.
        DiskError, BufferFullError: the disk takes no new file. Nothing was changed.
    """
    new_path = path.with_name(f"{path.name}.new")
    aside = _new_aside(path)
    log.error("buffer damaged path=%s error=%s moved_to=%s", path, cause, aside)
    with translated("salvaged"):
        old = _read_old(path, vfs)
        old.mark = Marks(path).read()
        try:
            new = _build(path, new_path, device, keys, old, aside, log_bytes_max, vfs, copy=True)
        except BufferFullError as e:
            log.error("buffer not copied, no room error=%s left_in=%s", e, aside)
            new = _build(path, new_path, device, keys, old, aside, log_bytes_max, vfs, copy=False)
        keep_owner(new_path, path)
        path.rename(aside)
        _take_place(path, new_path, aside)
        _forget_old_files(path)
    log.warning("buffer salvaged blocks=%s lanes=%s epoch=%s", len(new.found), len(new.lanes), new.epoch)


def resume(path: Path) -> None:
    """Finish a salvage that was cut off when the old file was aside already; else throw its new file away."""
    new_path = path.with_name(f"{path.name}.new")
    with translated("salvaged"):
        if new_path.exists() and not path.exists() and (aside := _old_files(path)):
            _take_place(path, new_path, aside[-1])
        _remove(new_path)  # of a salvage that never came so far


def _take_place(path: Path, new_path: Path, aside: Path) -> None:
    """The old file is aside: its log must follow before the new file comes, or SQLite would take it for the new one's."""
    for suffix in ("-wal", "-shm"):
        part = path.with_name(path.name + suffix)
        if part.exists():
            part.rename(aside.with_name(aside.name + suffix))
    new_path.rename(path)
    sync(path.parent)


def _build(
    path: Path,
    new_path: Path,
    device: str,
    keys: Keys | None,
    old: _Old,
    aside: Path,
    log_bytes_max: int,
    vfs: str | None,
    *,
    copy: bool,
) -> _New:
    _remove(new_path)
    store = open_store(new_path, log_bytes_max=log_bytes_max, vfs=vfs, building=True)
    try:
        new = _New()
        if copy:
            for batch in _batches(_blocks(path, device, keys, old)):
                with store.transaction():
                    for number, stored, header, ordinal in batch:
                        _insert(store, new, old, number, stored, header, ordinal)
        store.built()
        now_us = time.time_ns() // 1_000
        with store.transaction():
            _finish(store, new, old, now_us, f"in {aside.name}" if copy else f"all that was waiting is in {aside.name}")
        store.close()
    except BaseException:
        with contextlib.suppress(Exception):  # the error under way says why
            store.close(checkpoint=False)
        _remove(new_path)
        raise
    return new


def _blocks(path: Path, device: str, keys: Keys | None, old: _Old) -> Iterator[tuple[int, bytes, BlockHeader, int]]:
    """Every whole block of this device in a file and its log: number, stored bytes, header, last ordinal."""
    log_file = log_path(path)
    with mapped(path) as file, mapped(log_file) as write_ahead:
        page_bytes = page_bytes_of(file, PAGE_BYTES)
        for row, blob in carve(file, write_ahead, page_bytes, 2 * BLOCK_BYTES_MAX):
            if (found := carved_block(row, blob)) is None:
                continue
            number, stored = found
            try:
                header, ordinal = read_whole(stored, keys)
            except ContractError:  # damaged: it is counted as missing
                continue
            except ConfigError:
                if _has_left(old, stored):
                    continue
                raise
            if header.device == device:
                yield number, stored, header, ordinal


def _has_left(old: _Old, stored: bytes) -> bool:
    """Whether the old tables know that a block is not in the file any more: then nobody wants the key that sealed it."""
    try:
        header = stored_header(stored)
    except ContractError:
        return True
    return old.places is not None and (header.lane, header.sequence) not in old.places


def _insert(store: Store, new: _New, old: _Old, number: int, stored: bytes, header: BlockHeader, ordinal: int) -> None:
    new.epoch = new.epoch or header.epoch
    name = (header.lane, header.sequence)
    if header.epoch != new.epoch or name in new.found:
        return
    new.found.add(name)
    shelf = new.shelves.setdefault((header.lane, header.stream), len(new.shelves) + 1)
    known = (old.places or {}).get(name)
    settled = SETTLED if known is not None and known[4] else 0
    block_id = number if 1 <= number <= 2**40 else new.next_id
    if not store.execute(_PUT, (block_id, stored)):  # another block was found under that number
        block_id = new.next_id
        store.execute(_PUT, (block_id, stored))
    new.next_id = max(new.next_id, block_id + 1)
    place = (shelf, header.sequence, block_id, header.rows, len(stored), ordinal, header.first_us, header.last_us, 0, settled, 0)
    store.execute("INSERT INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", place)
    new.held[header.lane] += 1
    new.lanes[header.lane] = max(new.lanes.get(header.lane, 0), header.sequence)
    new.ordinals[header.stream] = max(new.ordinals.get(header.stream, 0), ordinal + 1)


def _finish(store: Store, new: _New, old: _Old, now_us: int, detail: str) -> None:
    """Numbers, names and the ledger's rows."""
    new.epoch = new.epoch or old.epoch  # the blocks' own word counts for more
    if new.epoch is None:
        return  # nothing to go on from: a new epoch begins, and no name can be used twice
    losses = list(old.owed)
    marked = old.mark.lanes if old.mark is not None and old.mark.epoch == new.epoch else {}
    for lane, (_, given) in marked.items():
        old.lanes[lane] = max(given, old.lanes.get(lane, 0))
    for lane in sorted(new.lanes.keys() | old.lanes.keys()):
        last = max(new.lanes.get(lane, 0), old.lanes.get(lane, 0))
        losses += _missing(new, old, lane, last, now_us, detail)
        losses.append(skipped(new.epoch, lane, last, now_us, detail))
        store.execute("INSERT INTO lanes VALUES (?, ?, ?)", (lane, last + SKIP, last + SKIP - new.held[lane]))
    gaps = {}
    for stream in sorted(new.ordinals.keys() | old.streams.keys()):
        following = max(new.ordinals.get(stream, 0), old.streams.get(stream, 0)) + SKIP
        gaps[stream] = (following, SKIP)
        store.execute("INSERT INTO streams VALUES (?, ?)", (stream, following))
    store.execute("INSERT INTO meta VALUES (?, ?)", (GAPS, msgspec.msgpack.encode(gaps)))
    store.execute_many("INSERT INTO shelves VALUES (?, ?, ?)", [(n, lane, stream) for (lane, stream), n in new.shelves.items()])
    store.execute_many("INSERT OR REPLACE INTO fixes VALUES (?, ?)", list(old.fixes))
    store.execute("INSERT INTO meta VALUES ('epoch', ?)", (new.epoch,))
    store.execute(_KEYS, (KEY_ID_BYTES, SEALED_MAGIC))
    store.execute("INSERT INTO meta VALUES (?, ?)", (OWED, msgspec.msgpack.encode(coalesce(losses))))


def skipped(epoch: str, lane: str, last: int, now_us: int, detail: str) -> Loss:
    """The row for names that are not given out, because they may be in use already."""
    return Loss(now_us, UNUSED, epoch, lane, last + 1, last + SKIP, SKIP, _NAN, _NAN, _NAN, Reason.DAMAGED, f"names skipped; {detail}")


def _missing(new: _New, old: _Old, lane: str, last: int, now_us: int, detail: str) -> list[Loss]:
    """The blocks of a lane that should be there: by the old places, and every other name that nothing explains."""
    epoch, losses, names = str(new.epoch), [], {n for name, n in new.found if name == lane}
    for (name, n), (stream, rows, first_us, last_us, settled) in (old.places or {}).items():
        if name == lane and n <= last:
            if not settled and n not in names:
                losses.append(Loss(now_us, stream, epoch, lane, n, n, 1, rows, first_us, last_us, Reason.DAMAGED, detail))
            names.add(n)
    for a, b in _unexplained(new, old, lane, last, names):
        losses.append(Loss(now_us, UNKNOWN_STREAM, epoch, lane, a, b, b - a + 1, _NAN, _NAN, _NAN, Reason.DAMAGED, detail))
    return losses


def _unexplained(new: _New, old: _Old, lane: str, last: int, names: set[int]) -> list[tuple[int, int]]:
    """Ranges of names up to `last` that are neither in `names` nor counted as gone. Where the count does not fit, what was settled long
    ago is among them, unless the mark says that it waits no more: the lake knows better."""
    table_last, gone = old.gone.get(lane, (0, None))
    holes = _holes(names, 0, last)
    if gone is not None and sum(b - a + 1 for a, b in _holes(names, 0, table_last)) == gone:
        return [(max(a, table_last + 1), b) for a, b in holes if b > table_last]
    given = old.given(str(new.epoch), lane)
    first = given[0] if given is not None else 1
    return [(max(a, first), b) for a, b in holes if b >= first]


def _holes(names: set[int], start: int, last: int) -> list[tuple[int, int]]:
    inside = sorted(n for n in names if start < n <= last)
    return [(a + 1, b - 1) for a, b in pairwise([start, *inside, last + 1]) if b > a + 1]


def _read_old(path: Path, vfs: str | None) -> _Old:
    """What SQLite itself can still read; the file is not changed by it, except for its log."""
    old = _Old()
    try:
        db = apsw.Connection(str(path), vfs=vfs)
    except apsw.Error:
        return old
    try:
        db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
        db.pragma("wal_autocheckpoint", 0)
        for read in (_read_epoch, _read_numbers, _read_fixes, _read_places, _read_owed):
            with contextlib.suppress(apsw.Error, *UNREADABLE, ContractError, TypeError, ValueError):  # as far as it goes
                read(db, old)
    finally:
        db.close()
    return old


def _read_epoch(db: apsw.Connection, old: _Old) -> None:
    epoch = db.execute("SELECT value FROM meta WHERE key = 'epoch'").get
    if isinstance(epoch, str) and len(epoch) == 16 and int(epoch, 16) >= 0:
        old.epoch = epoch


def _read_numbers(db: apsw.Connection, old: _Old) -> None:
    for lane, last, gone in db.execute("SELECT lane, last_sequence, gone FROM lanes").fetchall():
        old.lanes[check_lane(str(lane))] = number = min(max(0, int(str(last))), 2**52)
        old.gone[str(lane)] = (number, int(str(gone)))
    for stream, ordinal in db.execute("SELECT stream, next_ordinal FROM streams").fetchall():
        old.streams[check_name(str(stream), "stream")] = min(max(0, int(str(ordinal))), 2**52)


def _read_owed(db: apsw.Connection, old: _Old) -> None:
    owed = db.execute("SELECT value FROM meta WHERE key = ?", (OWED,)).get
    if isinstance(owed, bytes):
        old.owed = msgspec.msgpack.decode(owed, type=list[Loss])


def _read_fixes(db: apsw.Connection, old: _Old) -> None:
    found = db.execute("SELECT time_us, CAST(lane AS BLOB) FROM fixes").fetchall()
    rows = [(t, text.decode(errors="replace")) for t, text in found if isinstance(t, int) and isinstance(text, bytes)]
    old.fixes = [row for row in rows if from_text(*row) is not None]


def _read_places(db: apsw.Connection, old: _Old) -> None:
    query = "SELECT s.lane, s.stream, p.sequence, p.rows, p.first_us, p.last_us, p.settled = ? FROM places p JOIN shelves s USING (shelf)"
    places = {}
    for lane, stream, sequence, rows, first_us, last_us, settled in db.execute(query, (SETTLED,)):
        places[check_lane(str(lane)), int(sequence)] = (
            check_name(str(stream), "stream"),
            int(rows),
            int(first_us),
            int(last_us),
            bool(settled),
        )
    old.places = places
    tail = db.execute("SELECT substr(block, 1, ?) FROM blocks WHERE id > (SELECT coalesce(max(id), 0) FROM places)", (2**15,))
    for start in chain((start for (start,) in tail), (stored for _, stored in blocks_in_slots(db.execute))):
        with contextlib.suppress(ContractError, TypeError):
            h = stored_header(start)
            places.setdefault((h.lane, h.sequence), (h.stream, h.rows, h.first_us, h.last_us, False))


def _batches(items: Iterator[Any]) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) >= _BATCH:
            yield batch
            batch = []
    yield batch


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _new_aside(path: Path) -> Path:
    """The name that the damaged file gets: its number is the time, and higher than that of any before, whatever the clock says now."""
    newest = max(map(_number, _old_files(path)), default=0)
    return path.with_name(f"{path.name}.damaged-{max(time.time_ns(), newest + 1)}")


def _old_files(path: Path) -> list[Path]:
    """Files moved aside before, the oldest first."""
    found = [p for p in path.parent.glob(f"{path.name}.damaged-*") if p.name.rpartition("-")[2].isdecimal()]
    return sorted(found, key=_number)


def _number(aside: Path) -> int:
    return int(aside.name.rpartition("-")[2])


def _forget_old_files(path: Path) -> None:
    for aside in _old_files(path)[:-ASIDE_MAX]:
        log.warning("damaged buffer removed path=%s", aside)
        _remove(aside)
