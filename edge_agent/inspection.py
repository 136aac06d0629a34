"""fsck: whether a buffer's file is whole, and its repair.

Checked are SQLite's own structures, the tables, every block (its CRC or AES-GCM tag, its header against its place), and the count
of each lane: last sequence - gone = blocks in the file. Names that are missing though nobody counts them as gone are lost, and
damage; names that the loss ledger holds are told apart. Names that the marks beside the file say were given out, and that it does not
know, are lost too: it was cut off (edge_agent.marks). A repair rebuilds the file from its whole blocks and writes the loss
ledger for the rest, as the agent does by itself when it meets the damage; the old file stays beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import apsw

from edge_agent.buffer_file import BufferFile, Found, connect
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, read_losses
from edge_agent.marks import Marked, Marks
from edge_agent.salvage import UNUSED, salvage
from edge_agent.sealed import Keys
from edge_agent.slots import HEADS, HELD, SLOTS_BYTES_MAX, Slots
from edge_agent.store import LOG_BYTES_MAX, SCHEMA, SETTLED, DamagedError
from edge_agent.whole_file import keep_owner

PROBLEMS_MAX = 100

_PLACES = (
    "SELECT p.id, s.lane, s.stream, p.sequence, p.rows, p.first_us, p.last_us, p.settled, p.slot"
    " FROM places p LEFT JOIN shelves s USING (shelf)"
)


@dataclass
class Lane:
    """What the file holds of one lane. `named` counts sequences that the ledger in this file gives as lost."""

    blocks: int = 0
    waiting: int = 0
    readings: int = 0
    bytes: int = 0
    last_sequence: int = 0
    gone: int = 0
    named: int = 0


@dataclass
class Inspection:
    """What fsck found. `problems` are damage; `set_aside` are damaged blocks that the agent has found and named before."""

    file: str
    devices: list[str] = field(default_factory=list)
    epoch: str | None = None
    blocks: int = 0
    damaged_blocks: int = 0
    set_aside: int = 0
    lanes: dict[str, Lane] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    repaired: bool = False

    @property
    def clean(self) -> bool:
        return not self.problems

    def lane(self, name: str) -> Lane:
        """What is known of a lane so far."""
        return self.lanes.setdefault(name, Lane())

    def problem(self, text: str) -> None:
        """Note damage; of PROBLEMS_MAX or more only that there are more."""
        if len(self.problems) < PROBLEMS_MAX:
            self.problems.append(text)
        elif len(self.problems) == PROBLEMS_MAX:
            self.problems.append("and more")

    def document(self) -> dict[str, Any]:
        """For people and for JSON."""
        return {**asdict(self), "clean": self.clean}


def inspect(path: Path, keys: Keys | None) -> Inspection:
    """Check a buffer file; nothing is changed.

    Raises:
        ConfigError: there is no file, or it holds blocks sealed under a key that is not here.
    """
    file, found, mark = BufferFile(path, keys), Inspection(str(path)), Marks(path).read()
    places: dict[tuple[str, int], tuple[Any, ...]] = {}
    try:
        with connect(path) as db:
            _check_structure(db, found)
            places = _read_tables(db, found)
    except (apsw.Error, UnicodeDecodeError, TypeError, ValueError) as e:  # the last three: not what its column should hold
        found.problem(f"SQLite cannot follow it: {e}")
    losses = _check_blocks(file, places, found)
    if file.carved and found.clean:
        found.problem("SQLite cannot read its blocks")
    if file.damaged:
        found.damaged_blocks = file.damaged
        found.problem(f"{file.damaged} blocks are damaged")
    if not file.carved:
        _check_counts(found)
    if mark is not None and mark.epoch == found.epoch:
        _check_end(found, mark)
    for loss in losses:
        if loss.of_epoch == found.epoch and loss.of_lane in found.lanes and loss.of_stream != UNUSED:
            found.lanes[loss.of_lane].named += loss.blocks
    return found


def repair(path: Path, keys: Keys | None) -> Inspection:
    """Check, and rebuild the file if it is damaged. What was lost is in the ledger, which the agent sends.

    Raises:
        ConfigError: an agent runs on it, a key is missing, or it holds blocks of no or several devices.
        UnavailableError: the disk takes no new file; the old one is as it was.
    """
    with alone(path.parent):
        found = inspect(path, keys)
        if found.clean:
            return found
        if len(found.devices) != 1:
            raise ConfigError(
                f"{path} has whole blocks of {len(found.devices)} devices; it cannot be rebuilt. The agent starts with an empty one"
            )
        salvage(path, found.devices[0], keys, log_bytes_max=LOG_BYTES_MAX, vfs=None, cause=found.problems[0])
        found.repaired = True
        return found


@contextlib.contextmanager
def alone(state_dir: Path) -> Iterator[None]:
    """Hold the state directory's lock, the agent's: what is checked must stand still.

    Raises:
        ConfigError: an agent runs.
        UnavailableError: the directory takes no lock file.
    """
    try:
        lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        keep_owner(state_dir / "lock", state_dir)
    except OSError as e:
        raise UnavailableError(f"cannot lock {state_dir}: {e.strerror}; check a copy of the file instead") from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as e:
        raise ConfigError(f"an agent runs on {state_dir}; stop it first, or check a copy of buffer.db and buffer.db-wal") from e
    finally:
        os.close(lock)


def _check_structure(db: apsw.Connection, found: Inspection) -> None:
    for (text,) in db.execute(f"PRAGMA integrity_check({PROBLEMS_MAX})"):
        if text != "ok":
            found.problem(f"SQLite: {text}")
    schema = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL ORDER BY rowid")]
    if schema != list(SCHEMA):
        found.problem(f"its tables are not those of this version: {len(schema)} tables")


def _read_tables(db: apsw.Connection, found: Inspection) -> dict[tuple[str, int], tuple[Any, ...]]:
    """The epoch, the lanes' numbers, and the place of each block by lane and sequence."""
    found.epoch = db.execute("SELECT value FROM meta WHERE key = 'epoch'").get
    found.set_aside = int(db.execute("SELECT count(*) FROM damaged").get or 0)
    for name, last, gone in db.execute("SELECT lane, last_sequence, gone FROM lanes"):
        lane = found.lane(str(name))
        lane.last_sequence, lane.gone = int(last), int(gone)
    places: dict[tuple[str, int], tuple[Any, ...]] = {}
    for row in db.execute(_PLACES):
        if row[1] is None or row[7] not in (0, SETTLED):
            found.problem(f"place of block {row[0]}: no shelf, or neither waiting nor settled")
        places[row[1], row[3]] = row
    rows = {number for (number,) in db.execute("SELECT id FROM blocks")}
    for name, sequence in [key for key, row in places.items() if not row[8] and row[0] not in rows]:
        found.problem(f"block {sequence} of lane {name!r} has a place, but is not there")
    try:
        free = Slots(SLOTS_BYTES_MAX).load(db.execute(HEADS), db.execute(HELD))
    except DamagedError as e:
        found.problem(str(e))
    else:
        for slot in [slot for slot, number in free if number is None]:
            found.problem(f"slot {slot}: its head is damaged")
    return places


def _check_blocks(file: BufferFile, places: dict[tuple[str, int], tuple[Any, ...]], found: Inspection) -> list[Loss]:
    """Count every whole block, and compare it with its place; returns the ledger that the file holds."""
    devices: Counter[str] = Counter()
    losses: list[Loss] = []
    for block in file.blocks():
        header = block.header
        devices[header.device] += 1
        _count(found, block)
        place = places.get((header.lane, header.sequence))
        wanted = (header.stream, header.sequence, header.rows, header.first_us, header.last_us)
        if place is not None and place[2:7] != wanted:
            found.problem(f"block {header.sequence} of lane {header.lane!r}: its place says {place[2:7]}, its header {wanted}")
        if found.epoch is not None and header.epoch != found.epoch:
            found.problem(f"block {header.sequence} of lane {header.lane!r} is of epoch {header.epoch}, the file of {found.epoch}")
        if header.stream == LOSSES.stream:
            losses += read_losses(block.table)
    found.devices = sorted(devices)
    return losses


def _count(found: Inspection, block: Found) -> None:
    lane = found.lane(block.header.lane)
    found.blocks += 1
    lane.blocks += 1
    lane.waiting += not block.settled
    lane.readings += block.header.rows
    lane.bytes += len(block.block)
    lane.last_sequence = max(lane.last_sequence, block.header.sequence)  # the table lags behind


def _check_counts(found: Inspection) -> None:
    for name, lane in sorted(found.lanes.items()):
        missing = lane.last_sequence - lane.gone - lane.blocks
        if missing:
            found.problem(
                f"lane {name!r}: {lane.last_sequence} sequences given out, {lane.gone} gone, {lane.blocks} whole blocks: {missing} amiss"
            )


def _check_end(found: Inspection, mark: Marked) -> None:
    for name, (_, last) in sorted(mark.lanes.items()):
        known = found.lane(name).last_sequence
        if last > known:
            found.problem(f"lane {name!r} ends at {known}; {last} were given out: the file was cut off, or an older one lies in its place")
