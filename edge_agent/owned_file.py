"""The buffer's file in the hands of its one owner: opened, written in transactions, and opened again after a fault.

- After an I/O error nothing is trusted: the file is opened again, brought to the disk once more and read afresh. A damaged file is
  salvaged (edge_agent.salvage). What either has lost is named in the ledger, and no name is given out twice.
- A fault is noted where it happens and repaired by the next caller (`recover`), whoever that is: until then nothing is read or written.
- A file that was cut off or lost is noticed by the marks beside it (edge_agent.marks): what is missing is named.
- `lock` is held while something is written or opened. Reading goes on beside a writer, and looks up `store` and `catalogue` each time:
  both are others after a fault.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from threading import RLock

import msgspec

from edge_agent.catalogue import Catalogue
from edge_agent.clock import Moment
from edge_agent.contract.errors import UNREADABLE, Reason, UnavailableError
from edge_agent.core.ledger import Loss
from edge_agent.draft import Sealed
from edge_agent.loss_ledger import LossLedger
from edge_agent.marks import Marked, Marks
from edge_agent.opening import check_keys, load
from edge_agent.salvage import OWED, SKIP, UNKNOWN_STREAM, resume, salvage, skipped
from edge_agent.sealed import Keys
from edge_agent.slots import PUT, fill, slots_limit
from edge_agent.store import DamagedError, DiskError, Store, log_limit, open_store

log = logging.getLogger(__name__)


class OwnedFile:
    """The file at `path`; see the module's rules. Opened when made.

    Attributes:
        fault: what failed; set until `recover` has opened the file again.
    """

    store: Store
    catalogue: Catalogue

    def __init__(
        self,
        path: Path,
        device: str,
        boot: str,
        *,
        bytes_max: int,
        history_rows: Mapping[str, int],
        keys: Keys | None,
        ledger: LossLedger,
        clock: Callable[[], Moment],
        vfs: str | None,
    ) -> None:
        self.path, self._device, self._boot, self._vfs = path, device, boot, vfs
        self._history_rows, self._keys, self._ledger, self._clock = history_rows, keys, ledger, clock
        self.log_bytes_max = log_limit(bytes_max)
        self._slots_bytes_max = slots_limit(bytes_max)
        self.lock = RLock()
        self.fault: BaseException | None = None
        self._marks = Marks(path)
        resume(path)
        try:
            self._open(suspect=False)
        except BaseException:  # whoever tries again is to be the only one who has it open
            self._close_store()
            raise

    def close(self) -> None:
        """Write down what is only in memory, and close the file. A disk error then is logged: there is nothing left to lose."""
        with self.lock:
            try:
                if self.fault is None:
                    with self.writing():
                        self.catalogue.write_tail()
                        self.catalogue.trim(self.floors())
                self.store.close(checkpoint=self.fault is None)
            except UnavailableError as e:
                log.warning("buffer not closed cleanly error=%s", e)
            self._marks.close()

    # Writing.

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction. If it fails, what memory knows is not trusted either."""
        with self.lock:
            try:
                with self.store.transaction():
                    yield
                    if self.catalogue.lanes_changed:
                        self.catalogue.write_lanes()
            except BaseException as e:
                self.fault = self.fault or e
                self._ledger.forget()
                raise
            self._note_commit()
            self._ledger.count()
            self._write_marks()

    @contextlib.contextmanager
    def noting_faults(self) -> Iterator[None]:
        """Whatever else touches the disk: an error of the disk or of the file is a fault."""
        try:
            yield
        except (DiskError, DamagedError) as e:
            if self.fault is None:
                self.fault = e
            raise

    def insert(self, sealed: list[Sealed]) -> list[Sealed]:
        """Put blocks into the file, in the running transaction; returns them with their slots."""
        slots, shelves = self.catalogue.slots, self.catalogue.shelves
        taken = [slots.take(len(s.on_disk), shelves[s.place.shelf].waiting) for s in sealed]
        sealed = [replace(s, place=s.place._replace(slot=slot)) for s, slot in zip(sealed, taken, strict=True)]
        self.catalogue.give_back_slots()
        self.store.execute_many(PUT, [(s.place.slot, fill(s.place.id, s.on_disk)) for s in sealed if s.place.slot])
        self.store.execute_many("INSERT INTO blocks VALUES (?, ?)", [(s.place.id, s.on_disk) for s in sealed if not s.place.slot])
        if self.catalogue.put([s.place for s in sealed]):
            self.catalogue.trim(self.floors())
        return sealed

    def used_bytes(self) -> int:
        """Bytes in use in the file: free pages and free slots left out."""
        return self.store.used_bytes() - self.catalogue.slots.free_bytes

    def floors(self) -> dict[str, int]:
        """Per stream, the ordinal from which readings are kept as history."""
        return self.catalogue.floors(self._history_rows)

    def skip_names(self, lane: str, used: int) -> None:
        """The lake holds blocks that this file does not know: it has gone back in time. Their names are taken."""
        now = self._clock()
        log.error("buffer has gone back, names skipped lane=%s known=%s used=%s", lane, self.catalogue.sequences.get(lane, 0), used)
        with self.writing():
            self.catalogue.write_tail()
            loss = skipped(self.catalogue.epoch, lane, used, now.wall_us, "the file had gone back in time")
            self.catalogue.skip(lane, used + SKIP)
            self._name([loss], now)

    def _name(self, losses: list[Loss], now: Moment) -> None:
        self.insert(self._ledger.seal(self.catalogue, losses, self.catalogue.next_id, now))

    def _note_commit(self) -> None:
        self._committed = dict(self.catalogue.sequences)
        self.catalogue.note_commit()

    def _write_marks(self) -> None:
        first: dict[str, int] = {}
        for shelf in self.catalogue.shelves.values():
            if shelf.waiting:
                first[shelf.lane] = min(max(1, shelf.first_waiting), first.get(shelf.lane, shelf.first_waiting))
        self._marks.write(self.catalogue.epoch, first, self._committed)

    # Faults.

    def recover(self) -> None:
        """After a fault: open the file again before anything else is done with it.

        Raises:
            UnavailableError: it cannot be opened yet.
        """
        if self.fault is not None:
            with self.lock:
                self._recover_from(self.fault)

    def _recover_from(self, fault: BaseException | None) -> None:
        if fault is None:  # another thread was faster
            return
        if not isinstance(fault, (DiskError, DamagedError)):  # the file is well: only what memory knows is in doubt
            try:
                self._load(self._clock())
            except (DiskError, DamagedError) as e:  # it is not
                self.fault = e
                raise
            self.fault = None
            return
        if isinstance(fault, DamagedError):
            self._salvage(fault)
            self.fault, self._committed = DiskError(f"not opened yet after its salvage: {fault}"), {}  # it is salvaged once
        self._close_store()
        resume(self.path)
        known = Marked(0, self.catalogue.epoch, {lane: (1, last) for lane, last in self._committed.items()})
        self._open(suspect=True)
        if known.epoch == self.catalogue.epoch:  # of another one the marks know more
            self._name_cut_off(known, self._clock())
        log.warning("buffer opened again after=%s", fault)

    def _salvage(self, cause: Exception) -> None:
        self._close_store()
        salvage(self.path, self._device, self._keys, log_bytes_max=self.log_bytes_max, vfs=self._vfs, cause=str(cause))

    def _close_store(self) -> None:
        with contextlib.suppress(AttributeError, UnavailableError):  # it may not have been opened, or be closed already
            self.store.close(checkpoint=False)

    # Opening.

    def _open(self, *, suspect: bool) -> None:
        """Open the file, salvage it if it is damaged, and settle what a salvage owes to the ledger."""
        now = self._clock()
        try:
            owed = self._open_and_load(suspect, now)
        except DamagedError as e:
            self._salvage(e)
            owed = self._open_and_load(suspect, now)
        self.fault = None
        if owed:
            with self.writing():
                self._name(owed, now)
                self.store.execute("DELETE FROM meta WHERE key = ?", (OWED,))
        mark = self._marks.read()
        if mark is not None:
            self._name_cut_off(mark, now)

    def _open_and_load(self, suspect: bool, now: Moment) -> list[Loss]:
        """What is owed to the ledger."""
        mark = self._marks.read()
        known = mark is not None  # a commit that was under way at the end looks like damage to the log; the mark knows
        self.store = open_store(self.path, log_bytes_max=self.log_bytes_max, vfs=self._vfs, suspect=suspect, check_log=not known)
        self._load(now)
        check_keys(self.catalogue, self._keys)
        if mark is not None and mark.epoch == self.catalogue.epoch and not suspect:
            for lane, (_, last) in mark.lanes.items():
                if last > self.catalogue.sequences.get(lane, 0):
                    raise DamagedError(f"the file ends at {self.catalogue.sequences.get(lane, 0)} of lane {lane!r}; {last} were stored")
        owed = self._owed()
        if not self.store.begin_log():
            log.warning("buffer log not begun anew for want of room, written once more path=%s", self.path)
        return owed

    def _owed(self) -> list[Loss]:
        found = self.store.execute("SELECT value FROM meta WHERE key = ?", (OWED,))
        try:
            return msgspec.msgpack.decode(found[0][0], type=list[Loss]) if found else []
        except (*UNREADABLE, TypeError) as e:
            raise DamagedError(f"what is owed to the ledger cannot be read: {e}") from e

    def _load(self, now: Moment) -> None:
        self.catalogue = load(self.store, self._keys, self._boot, now.monotonic_us, self._slots_bytes_max)
        self._note_commit()

    def _name_cut_off(self, mark: Marked, now: Moment) -> None:
        """Name what the file has given out and does not know any more: it was cut off, or another one lies in its place."""
        losses = _cut_off(mark, self.catalogue, now.wall_us)
        if not losses:
            return
        lost = {x.of_lane: (x.first_sequence, x.last_sequence) for x in losses}
        log.error("buffer file lacks what was stored epoch=%s lost=%s", mark.epoch, lost)
        with self.writing():
            self.catalogue.write_tail()
            for loss in losses if mark.epoch == self.catalogue.epoch else ():
                self.catalogue.skip(loss.of_lane, loss.last_sequence)
            self._name(losses, now)


def _cut_off(mark: Marked, catalogue: Catalogue, now_us: int) -> list[Loss]:
    """The rows for names that a mark has and the file has not: of another file's epoch only those that waited."""
    same = mark.epoch == catalogue.epoch
    losses = []
    for lane, (waited, last) in mark.lanes.items():
        first = max(1 if same else waited, (catalogue.sequences.get(lane, 0) if same else 0) + 1)
        if first <= last:
            span, unknown = (first, last, last - first + 1), (math.nan, math.nan, math.nan)
            why = "the file was cut off or lost"
            losses.append(Loss(now_us, UNKNOWN_STREAM, mark.epoch, lane, *span, *unknown, Reason.DAMAGED, why))
    return losses
