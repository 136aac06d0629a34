"""The durable buffer: blocks on the device's disk, until the lake holds them.

- `append` seals drafts into blocks and returns once they are on disk. Only then may sensor messages be acknowledged.
- A block leaves when the lake's receipt names it, and no earlier. The newest `history_rows` readings of a stream stay
  even then: after a restart they rebuild the open windows and the filter of redelivered messages.
- At `bytes_max` (file and log together) history gives way first. Then, with `drop_oldest`, waiting blocks: the lowest priority
  first, then the oldest, each named in the loss ledger in the same transaction. With `block`, `append` raises BufferFullError.
- What is older than `age_s_max` goes the same way. Age counts only time that the device saw pass (core.retention.Age).
- The ledger is a stream of blocks like others, in the lane of what was lost. It is never given up.
- When the disk has no room, `append` refuses and nothing is dropped; RESERVE_BYTES stay free, so that receipts can be noted.
- After an I/O error nothing is trusted: the file is opened again, brought to the disk once more and read afresh; then the same
  blocks are stored again from memory. A damaged file is salvaged (edge_agent.salvage), a damaged block taken out and named.
- A file that was cut off or lost is noticed by the marks beside it (edge_agent.marks): what is missing is named.

One process owns the file. Threads may share the buffer: one connection writes, another reads (WAL lets both go on).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edge_agent.catalogue import Catalogue
from edge_agent.clock import Moment
from edge_agent.contract.block import ORDINAL, BlockHeader, FixQuality, decode_block, read_header
from edge_agent.contract.columns import Table, concat, take
from edge_agent.contract.errors import ContractError, Reason, UnavailableError
from edge_agent.contract.receipt import Receipt
from edge_agent.contract.stream import LOSSES
from edge_agent.core.fix import Fix, from_text, to_text
from edge_agent.core.ledger import Loss, coalesce, loss_table, read_losses
from edge_agent.core.retention import FillForecast, Place, choose, portion
from edge_agent.core.track import FIXES_MAX
from edge_agent.draft import BufferState, Draft, LaneState, Retention, Sealed, StoredBlock, seal_block
from edge_agent.marks import Marks
from edge_agent.opening import check_keys, load
from edge_agent.salvage import OWED, SKIP, UNKNOWN_STREAM, UNUSED, resume, salvage, skipped
from edge_agent.sealed import Keys, open_stored
from edge_agent.store import PAGE_BYTES, BufferFullError, DamagedError, DiskError, log_limit, open_store

__all__ = ["Buffer", "BufferFullError", "BufferState", "Draft", "LaneState", "Retention", "StoredBlock"]

log = logging.getLogger(__name__)

Read = Callable[[str], list[tuple[int, bytes]]]

RESERVE_BYTES = 256 * 1024
SHED_BLOCKS = 64  # history given up at a time
LEDGER_SHARE = 16  # beyond this part of the limit, a lane's ledger blocks become one
LEDGER_BLOCKS_MAX = 256
DAMAGED_BLOCKS_MAX = 64  # kept for study
EVICT_BLOCKS_MAX = 16_384
READ_ATTEMPTS = 3
AGE_CHECK_S = 10.0
_DETAIL = {Reason.EVICTED_FULL: "the buffer was full", Reason.EVICTED_AGE: "older than the buffer keeps", Reason.DAMAGED: "CRC"}


class Buffer:
    """Store-and-forward on disk; see the module's rules. `epoch` names this buffer for ever."""

    def __init__(
        self,
        path: Path,
        device: str,
        boot: str,
        *,
        bytes_max: int,
        history_rows: Mapping[str, int],
        age_s_max: float | None = None,
        when_full: Literal["drop_oldest", "block"] = "drop_oldest",
        priorities: Mapping[str, int] | None = None,
        keys: Keys | None = None,
        clock: Callable[[], Moment] | None = None,
        vfs: str | None = None,
    ) -> None:
        """Open or create the buffer at `path`; `history_rows` is what to keep per stream after receipts.

        Raises:
            ConfigError: it holds blocks sealed under a key that is not in `keys`.
            UnavailableError: the disk failed, or has no room for an empty buffer.
        """
        self._path, self._device, self._boot, self._vfs = path, device, boot, vfs
        self._history_rows, self._keys = history_rows, keys
        self._limits = Retention(bytes_max, age_s_max, when_full, priorities or {})
        self._clock = clock or _clock
        self._write_lock = threading.RLock()
        self._fault: BaseException | None = None
        self._doubt: tuple[list[Draft], list[Sealed]] | None = None  # of an append that failed: its commit may be on the disk
        self._marks = Marks(path)
        self._policies: dict[str, str] = {}
        self._forecast = FillForecast()
        self._age_due_us = 0
        self._settled: dict[str, set[tuple[int, int]]] = {}  # by the last receipt
        self.lost_blocks: Counter[str] = Counter()
        self.lost_readings: dict[str, float] = {}
        resume(path)
        self._open(suspect=False)

    @property
    def epoch(self) -> str:
        """The name of this buffer; another one after a file that could not be salvaged."""
        return self._catalogue.epoch

    def close(self) -> None:
        """Write down what is only in memory, and close the file. A disk error then is logged: there is nothing left to lose."""
        with self._write_lock:
            try:
                if self._fault is None:
                    with self._writing():
                        self._catalogue.write_tail()
                        self._catalogue.trim(self._floors())
                self._store.close(checkpoint=self._fault is None)
            except UnavailableError as e:
                log.warning("buffer not closed cleanly error=%s", e)
            self._marks.close()

    def append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        """Seal and store drafts and position fixes in one transaction; on return they are on disk.

        Returns the blocks stored: those of the drafts, less those given up at once (a full buffer, a low priority), and the
        blocks of the loss ledger that this call made.

        Raises:
            BufferFullError: the buffer has reached its limit, or the disk has no room. Nothing was stored.
            UnavailableError: the disk failed. Nothing of this call may be acknowledged; call again, with the same drafts.
        """
        if not drafts and not fixes:
            return []
        with self._write_lock:
            try:
                return self._append(drafts, fixes, now)
            except (DiskError, DamagedError) as e:
                log.error("buffer failed, opened again error=%s", e)
                return self._append(drafts, fixes, now)

    def _append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        self._recover()
        landed = self._landed(drafts)
        if landed:
            return landed
        stored = self._store_sealed(drafts, self._seal(drafts, now), fixes, now)
        self._doubt = None
        return stored

    def _landed(self, drafts: list[Draft]) -> list[StoredBlock]:
        """The blocks of these drafts, if they are on the disk from a call that failed: its commit did reach it."""
        if self._doubt is None:
            return []
        before, sealed = self._doubt
        with self._noting_faults():
            found = [self._store.execute("SELECT block FROM blocks WHERE id = ?", (s.place.id,)) for s in sealed]
        self._doubt = None
        if len(before) != len(drafts) or not all(a is b for a, b in zip(before, drafts, strict=True)):
            return []
        return [s.stored for s in sealed] if [f[0][0] if f else None for f in found] == [s.on_disk for s in sealed] else []

    def pending(self, lane: str, after_sequence: int, limit: int) -> list[StoredBlock]:
        """The next unsettled blocks of a lane, by rising sequence. Damaged ones are taken out on the way."""
        for _ in range(READ_ATTEMPTS):
            blocks, damaged = self._look(lambda: self._catalogue.waiting(lane, after_sequence, limit))
            if not damaged:
                break
            self._bury(damaged)  # a block of the ledger has come instead: look again
        return [StoredBlock(lane, p.sequence, self._catalogue.shelves[p.shelf].stream, p.rows, block) for p, block in blocks]

    def lanes(self) -> list[LaneState]:
        """Every lane that has blocks waiting for a receipt."""
        catalogue = self._catalogue
        states = []
        for lane in sorted({s.lane for s in list(catalogue.shelves.values()) if s.waiting}):
            shelves = catalogue.of_lane(lane)
            blocks, size, rows = (sum(getattr(s, n) for s in shelves) for n in ("waiting", "waiting_bytes", "waiting_rows"))
            states.append(LaneState(lane, blocks, size, rows, self._oldest_us(catalogue, lane)))
        return states

    def settle(self, receipt: Receipt) -> int:
        """Forget what the lake holds; returns how many blocks it settled. A receipt for another epoch settles none."""
        if receipt.device != self._device or receipt.epoch != self.epoch:
            return 0
        settled = 0
        for lane in receipt.lanes:
            top = max((lane.cumulative, *(last for _, last in lane.ranges)))
            if top > self._catalogue.sequences.get(lane.lane, 0):
                self._skip_names(lane.lane, top)
            done = self._settled.get(lane.lane, set())
            ranges = {(1, lane.cumulative), *lane.ranges}
            for first, last in sorted(ranges - done):
                settled += self._settle(lane.lane, first, last)
            self._settled[lane.lane] = ranges
        return settled

    def history(self, stream: str, contract_version: str) -> Table | None:
        """The newest readings of a stream, `history_rows` or somewhat more, in the order seen; None if there are none.

        Only those of this contract version: others may have other fields.
        """
        blocks, damaged = self._look(lambda: self._catalogue.newest(stream, self._floors().get(stream, 0)))
        if damaged:
            self._bury(damaged)
        tables = [table for header, table in (decode_block(b) for _, b in blocks) if header.contract_version == contract_version]
        if not tables:
            return None
        shared = set(tables[0]).intersection(*tables)  # blocks without a model have no scores
        rows = concat([{name: column for name, column in table.items() if name in shared} for table in tables])
        ordinals = rows[ORDINAL]
        assert isinstance(ordinals, np.ndarray)
        return take(rows, np.argsort(ordinals, kind="stable"))

    def fixes(self) -> list[Fix]:
        """The newest stored position fixes, oldest first."""
        self._recover()
        with self._noting_faults():
            return [from_text(*row) for row in self._store.read("SELECT time_us, lane FROM fixes ORDER BY time_us")]

    def tidy(self, now: Moment) -> list[StoredBlock]:
        """Housekeeping between two batches: give up what is too old, bring the log into the file; returns new ledger blocks."""
        with self._write_lock:
            self._recover()
            with self._noting_faults():
                self._forecast.observe(self._store.used_bytes(), now.monotonic_us / 1e6)
                ledger = self._give_up_old(now)
                if self._store.log_due(0.5):
                    self._store.checkpoint()
        return ledger

    def readings_stored(self) -> int:
        """How many readings this buffer has ever stored."""
        unused = sum(count for _, count in self._catalogue.gaps.values())
        return sum(self._catalogue.ordinals.values()) - unused

    def used_bytes(self) -> int:
        """Bytes in use in the file, free pages left out."""
        with self._write_lock:
            self._recover()
            return self._store.used_bytes()

    def state(self, now: Moment) -> BufferState:
        """Counts for status and metrics."""
        with self._write_lock:
            self._recover()
            lanes, used = self.lanes(), self._store.used_bytes()
            held = sum(self._catalogue.sequences.values()) - sum(self._catalogue.gone.values())
            waiting = sum(s.blocks for s in lanes)
            return BufferState(
                used_bytes=used,
                bytes_max=self._limits.bytes_max,
                file_bytes=used + self._store.spare_bytes(),
                log_bytes=self._store.log_bytes(),
                waiting_blocks=waiting,
                waiting_bytes=sum(s.bytes for s in lanes),
                history_blocks=held - waiting,
                oldest_s=max((round((now.monotonic_us - s.oldest_us) / 1e6, 1) for s in lanes), default=0.0),
                time_to_full_s=self._forecast.time_to_full_s(self._limits.bytes_max),
                lost_blocks=dict(self.lost_blocks),
                lost_readings=dict(self.lost_readings),
            )

    # Storing.

    def _seal(self, drafts: list[Draft], now: Moment) -> list[Sealed]:
        """Blocks of drafts, named and numbered from what is stored now."""
        catalogue = self._catalogue
        sequences, ordinals = dict(catalogue.sequences), dict(catalogue.ordinals)
        sealed: list[Sealed] = []
        for draft in drafts:
            sequences[draft.lane] = sequence = sequences.get(draft.lane, 0) + 1
            following = ordinals.get(draft.stream, 0)
            header = self._header(draft, sequence, now)
            block, last_ordinal = seal_block(header, draft, catalogue.ordinals.get(draft.stream, 0), following)
            ordinals[draft.stream] = following + draft.rows
            sealed.append(self._placed(header, block, last_ordinal, catalogue.next_id + len(sealed), now))
            self._policies[draft.lane] = draft.policy
        return sealed

    def _placed(self, header: BlockHeader, block: bytes, last_ordinal: int, number: int, now: Moment) -> Sealed:
        on_disk = block if self._keys is None else self._keys.seal(block)
        shelf = self._catalogue.shelf(header.lane, header.stream)
        age_us = self._age.at(now.monotonic_us)
        span = (header.first_us, header.last_us)
        place = Place(shelf.number, header.sequence, number, header.rows, len(on_disk), last_ordinal, *span, age_us)
        return Sealed(StoredBlock(header.lane, header.sequence, header.stream, header.rows, block), on_disk, place)

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

    def _store_sealed(self, drafts: list[Draft], sealed: list[Sealed], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        size = sum(_bytes_on_disk(len(s.on_disk)) for s in sealed)
        with self._noting_faults():
            self._make_room(size)
            victims = self._victims(sealed, size)
        given_up = {p.id for p in victims}
        kept = [s for s in sealed if s.place.id not in given_up]
        ledger: list[Sealed] = []
        with self._writing():
            ledger = self._give_up(victims, sealed, Reason.EVICTED_FULL, now) if victims else []
            self._doubt = (drafts, [*kept, *ledger])
            self._insert([*kept, *ledger])
            self._write_fixes(fixes)
        self._checkpoint()
        return [s.stored for s in (*kept, *ledger)]

    def _insert(self, sealed: list[Sealed]) -> None:
        self._store.execute_many("INSERT INTO blocks VALUES (?, ?)", [(s.place.id, s.on_disk) for s in sealed])
        if self._catalogue.put([s.place for s in sealed]):
            self._catalogue.trim(self._floors())

    def _write_fixes(self, fixes: list[Fix]) -> None:
        if fixes:
            self._store.execute_many("INSERT OR REPLACE INTO fixes VALUES (?, ?)", [(f.time_us, to_text(f)) for f in fixes])
            self._store.execute(
                "DELETE FROM fixes WHERE time_us <= (SELECT time_us FROM fixes ORDER BY time_us DESC LIMIT 1 OFFSET ?)", (FIXES_MAX,)
            )

    # Room.

    def _make_room(self, size: int) -> None:
        """See to it that `size` bytes fit on the disk, and in the buffer as far as history can give way.

        Raises:
            BufferFullError: the disk has no room.
        """
        while True:
            self._shrink_log(2 * size + RESERVE_BYTES)
            disk = self._disk_lack(size)
            if not disk and self._lack_bytes(size) <= 0:
                return
            if not self._shed_history():
                break
        if disk:
            raise BufferFullError(disk)

    def _lack_bytes(self, size: int) -> int:
        """How many bytes are too many if `size` come, the log at its largest; not above zero: they fit."""
        return self._store.used_bytes() + size + self._log_bytes_max - self._limits.bytes_max

    def _disk_lack(self, size: int) -> str:
        """Why the disk has no room for `size` bytes; empty if it has. They go to the log first, then to free or new pages."""
        free, wanted = self._store.free_bytes(), 2 * size + RESERVE_BYTES
        if size > self._store.spare_bytes():  # the file grows and never shrinks: leave room for the log of blocks to come
            wanted *= 2
        return f"disk of {self._path.parent} has {free} bytes free; {wanted} wanted" if free < wanted else ""

    def _shed_history(self) -> int:
        """Give up the oldest settled blocks; returns how many."""
        with self._writing():
            self._catalogue.write_tail()
            settled = self._catalogue.settled(SHED_BLOCKS)
            self._catalogue.remove(settled)
        return len(settled)

    def _shrink_log(self, wanted: int) -> None:
        """Bring the log into the file, unless the disk has room for it once more and for `wanted` bytes."""
        log_bytes = self._store.log_bytes()
        if log_bytes and self._store.free_bytes() < log_bytes + wanted:
            self._store.checkpoint(truncate=True)

    def _checkpoint(self) -> None:
        """Bring the log into the file if it has become long. What was committed is safe in it: a failure is noted for the next call."""
        try:
            with self._noting_faults():
                if self._store.log_due():
                    self._store.checkpoint()
        except UnavailableError as e:
            log.error("buffer log not brought into the file error=%s", e)

    # Giving up.

    def _victims(self, sealed: list[Sealed], size: int) -> list[Place]:
        """What to give up so that sealed blocks fit: stored ones, or some of these themselves.

        Raises:
            BufferFullError: nothing may be given up, or not enough.
        """
        lack = self._lack_bytes(size)
        if lack <= 0:
            return []
        used, limit = self._store.used_bytes(), self._limits.bytes_max
        full = f"buffer holds {used} bytes and its log up to {self._log_bytes_max}, {size} more would pass the limit of {limit}"
        if self._limits.when_full == "block":
            raise BufferFullError(full)
        with self._writing():
            self._catalogue.write_tail()
        incoming = [s.place for s in sealed]
        needed = choose(self._classes(incoming), lack)
        worth = max((self._priority(p) for p in needed), default=0)  # what is worth more is not given up to have some room in hand
        spare = {priority: shelves for priority, shelves in self._classes(incoming).items() if priority <= worth}
        victims = choose(spare, portion(lack, limit))[:EVICT_BLOCKS_MAX]
        if sum(p.bytes for p in victims) < lack:
            raise BufferFullError(f"{full}, and only {len(victims)} blocks may be given up")
        return victims

    def _priority(self, place: Place) -> int:
        return self._limits.priority(self._catalogue.shelves[place.shelf].stream)

    def _classes(self, incoming: Iterable[Place] = ()) -> dict[int, list[Iterable[Place]]]:
        """Blocks that may be given up: by priority, one series per shelf."""
        classes: dict[int, list[Iterable[Place]]] = {}
        for shelf in self._catalogue.shelves.values():
            if shelf.stream != LOSSES.stream:
                mine = [p for p in incoming if p.shelf == shelf.number]
                classes.setdefault(self._limits.priority(shelf.stream), []).extend([self._catalogue.evictable(shelf), mine])
        return classes

    def _give_up(self, victims: list[Place], incoming: list[Sealed], reason: Reason, now: Moment) -> list[Sealed]:
        """Take victims out, and seal the ledger that names them: inside the transaction, with the tail written."""
        catalogue = self._catalogue
        never = {s.place.id for s in incoming}
        catalogue.remove([p for p in victims if p.id not in never])
        losses = []
        for place in victims:
            shelf = catalogue.shelves[place.shelf]
            if place.id in never:
                catalogue.leave(shelf.lane)
            times = (float(place.first_us), float(place.last_us))
            names = (self.epoch, shelf.lane, place.sequence, place.sequence)
            losses.append(Loss(now.wall_us, shelf.stream, *names, 1, float(place.rows), *times, reason.value, _DETAIL[reason]))
        following = max((s.place.id for s in incoming), default=catalogue.next_id - 1) + 1
        for s in incoming:
            catalogue.sequences[s.stored.lane] = max(catalogue.sequences.get(s.stored.lane, 0), s.stored.sequence)
        return self._seal_ledger(losses, following, now)

    def _seal_ledger(self, losses: list[Loss], number: int, now: Moment) -> list[Sealed]:
        """Blocks of the ledger, one per lane; a lane whose ledger has become long gets it all in one new block."""
        self._count_losses(losses)
        sealed: list[Sealed] = []
        for lane in sorted({loss.of_lane for loss in losses}):
            rows = coalesce([*self._old_ledger(lane, now), *(loss for loss in losses if loss.of_lane == lane)])
            sequence = self._catalogue.sequences.get(lane, 0) + 1
            ordinal = self._catalogue.ordinals.get(LOSSES.stream, 0) + sum(s.stored.rows for s in sealed)
            policy, times = self._policies.get(lane, ""), (min(r.lost_at for r in rows), max(r.lost_at for r in rows))
            draft = Draft(lane, LOSSES.stream, LOSSES.version, FixQuality.NONE, policy, loss_table(rows), len(rows), *times)
            header = self._header(draft, sequence, now)
            block, last_ordinal = seal_block(header, draft, ordinal, ordinal)
            sealed.append(self._placed(header, block, last_ordinal, number + len(sealed), now))
        return sealed

    def _old_ledger(self, lane: str, now: Moment) -> list[Loss]:
        """The rows of a lane's waiting ledger, taken out, if it has become long; and rows that name its blocks."""
        shelf = self._catalogue.shelf(lane, LOSSES.stream)
        if shelf.waiting < LEDGER_BLOCKS_MAX and shelf.waiting_bytes <= self._limits.bytes_max // LEDGER_SHARE:
            return []
        places = list(self._catalogue.evictable(shelf))
        rows: list[Loss] = []
        for place in places:
            stored = self._store.execute("SELECT block FROM blocks WHERE id = ?", (place.id,))
            name = (self.epoch, lane, place.sequence, place.sequence, 1)
            try:
                rows += read_losses(decode_block(open_stored(stored[0][0], self._keys))[1])
                readings, why = 0.0, "its rows are in a later block of the ledger"
            except (ContractError, IndexError) as e:
                readings, why = float("nan"), f"damaged: {e}"
            times = (float(place.first_us), float(place.last_us))
            rows.append(Loss(now.wall_us, LOSSES.stream, *name, readings, *times, Reason.EVICTED_FULL.value, why))
        self._catalogue.remove(places)
        return rows

    def _give_up_old(self, now: Moment) -> list[StoredBlock]:
        if self._limits.age_s_max is None or now.monotonic_us < self._age_due_us:
            return []
        self._age_due_us = now.monotonic_us + int(AGE_CHECK_S * 1e6)
        oldest = self._age.at(now.monotonic_us) - int(self._limits.age_s_max * 1e6)
        ledger: list[Sealed] = []
        if any(self._age.base_us + s.oldest_us - self._age.monotonic_us < oldest for s in self.lanes()):
            with self._writing():
                self._catalogue.write_tail()
                series = [s for priority in self._classes().values() for s in priority]
                old = [p for shelf in series for p in _older(shelf, oldest)]
                if old:
                    ledger = self._give_up(old, [], Reason.EVICTED_AGE, now)
                    self._insert(ledger)
        return [s.stored for s in ledger]

    def _count_losses(self, losses: list[Loss]) -> None:
        for loss in losses:
            if loss.of_stream == UNUSED:
                continue
            self.lost_blocks[loss.reason] += loss.blocks
            if not math.isnan(loss.readings):
                self.lost_readings[loss.reason] = self.lost_readings.get(loss.reason, 0.0) + loss.readings

    # Receipts.

    def _settle(self, lane: str, first: int, last: int) -> int:
        with self._write_lock:
            self._recover()
            settled = more = self._catalogue.settle_tail(lane, first, last)
            while True:
                with self._noting_faults():
                    self._shrink_log(RESERVE_BYTES)
                with self._writing():
                    more = self._catalogue.settle(lane, first, last, self._floors())
                settled += more
                self._checkpoint()
                if not more:
                    return settled

    def _skip_names(self, lane: str, used: int) -> None:
        """The lake holds blocks that this file does not know: it has gone back in time. Their names are taken."""
        now = self._clock()
        log.error("buffer has gone back, names skipped lane=%s known=%s used=%s", lane, self._catalogue.sequences.get(lane, 0), used)
        with self._writing():
            self._catalogue.write_tail()
            loss = skipped(self.epoch, lane, used, now.wall_us, "the file had gone back in time")
            self._catalogue.skip(lane, used + SKIP)
            self._insert(self._seal_ledger([loss], self._catalogue.next_id, now))

    def _floors(self) -> dict[str, int]:
        """Per stream, the ordinal from which readings are kept as history."""
        catalogue = self._catalogue
        return {s.stream: catalogue.floor(s.stream, self._history_rows.get(s.stream, 0)) for s in list(catalogue.shelves.values())}

    # Damage and faults.

    def _look(self, find: Callable[[], list[Place]]) -> tuple[list[tuple[Place, bytes]], list[Place]]:
        """What `find` finds, read; after a fault of the file once more, when it is open again."""
        try:
            self._recover()
            with self._noting_faults():
                return self._read_blocks(find())
        except (DiskError, DamagedError) as e:
            log.error("buffer cannot be read, opened again error=%s", e)
            self._recover()
            with self._noting_faults():
                return self._read_blocks(find())

    def _read_blocks(self, places: list[Place], read: Read | None = None) -> tuple[list[tuple[Place, bytes]], list[Place]]:
        """The blocks of places, and the places whose blocks are damaged, or gone meanwhile. `read` is for who holds the lock.

        Raises:
            DamagedError: a block is whole, but another one than its place says; or (with `read`) it is not there at all.
        """
        wanted = ",".join(str(p.id) for p in places)
        found = dict((read or self._store.read)(f"SELECT id, block FROM blocks WHERE id IN ({wanted})"))
        whole, damaged = [], []
        for place in places:
            shelf = self._catalogue.shelves[place.shelf]
            if read and place.id not in found:  # blocks do not vanish one by one: the tables are damaged
                raise DamagedError(f"block {place.id} of {shelf.lane} {place.sequence} is not there")
            try:
                block = open_stored(found[place.id], self._keys)
                header = read_header(block)
            except (ContractError, KeyError, TypeError):  # TypeError: no blob at all
                damaged.append(place)
                continue
            named = (header.epoch, header.lane, header.sequence, header.stream, header.rows)
            if named != (self.epoch, shelf.lane, place.sequence, shelf.stream, place.rows):
                raise DamagedError(f"block {header.identity} lies where {shelf.lane} {place.sequence} should")
            whole.append((place, block))
        return whole, damaged

    def _bury(self, damaged: list[Place]) -> None:
        """Take damaged blocks out; if the file does not even let that be done, it will be salvaged before it is read again."""
        try:
            self._take_out(damaged)
        except (DiskError, DamagedError) as e:
            log.error("damaged blocks not taken out blocks=%s error=%s", len(damaged), e)

    def _take_out(self, damaged: list[Place]) -> None:
        """Keep what can be read of damaged blocks, and name in the ledger those that the lake does not hold."""
        now = self._clock()
        with self._writing():
            self._catalogue.write_tail()
            # Memory knows of blocks a moment before they are committed: only what is not whole now is damaged.
            _, there = self._read_blocks(self._catalogue.still(damaged), self._store.execute)
            for place in there:
                shelf = self._catalogue.shelves[place.shelf]
                log.error("stored block damaged lane=%s sequence=%s stream=%s", shelf.lane, place.sequence, shelf.stream)
                self._store.execute(
                    "INSERT INTO damaged (lane, stream, sequence, rows, found_us, block)"
                    " VALUES (?, ?, ?, ?, ?, (SELECT block FROM blocks WHERE id = ?))",
                    (shelf.lane, shelf.stream, place.sequence, place.rows, now.wall_us, place.id),
                )
            self._store.execute("DELETE FROM damaged WHERE id <= (SELECT max(id) FROM damaged) - ?", (DAMAGED_BLOCKS_MAX,))
            self._catalogue.remove([p for p in there if p.settled])
            waiting = [p for p in there if not p.settled]
            if waiting:
                self._insert(self._give_up(waiting, [], Reason.DAMAGED, now))

    def _open(self, *, suspect: bool) -> None:
        """Open the file, salvage it if it is damaged, and settle what a salvage owes to the ledger."""
        now = self._clock()
        try:
            self._open_and_load(suspect, now)
        except DamagedError as e:
            self._salvage(e)
            self._open_and_load(suspect, now)
        self._fault = None
        self._settled.clear()
        owed = self._store.execute("SELECT value FROM meta WHERE key = ?", (OWED,))
        if owed:
            with self._writing():
                losses = msgspec.msgpack.decode(owed[0][0], type=list[Loss])
                self._insert(self._seal_ledger(losses, self._catalogue.next_id, now))
                self._store.execute("DELETE FROM meta WHERE key = ?", (OWED,))
        self._check_marks(now)

    def _check_marks(self, now: Moment) -> None:
        """Name what the file has given out and does not know any more: it was cut off, or another one lies in its place."""
        mark = self._marks.read()
        if mark is None:
            return
        known = self._catalogue.sequences if mark.epoch == self.epoch else {}
        spans = {
            lane: (max(first if mark.epoch != self.epoch else 1, known.get(lane, 0) + 1), last)
            for lane, (first, last) in mark.lanes.items()
        }
        losses = [
            Loss(
                now.wall_us,
                UNKNOWN_STREAM,
                mark.epoch,
                lane,
                a,
                b,
                b - a + 1,
                *3 * (math.nan,),
                Reason.DAMAGED,
                "the file was cut off or lost",
            )
            for lane, (a, b) in spans.items()
            if a <= b
        ]
        if not losses:
            return
        log.error(
            "buffer file lacks what was stored epoch=%s lost=%s",
            mark.epoch,
            {x.of_lane: (x.first_sequence, x.last_sequence) for x in losses},
        )
        with self._writing():
            self._catalogue.write_tail()
            for loss in losses if mark.epoch == self.epoch else ():
                self._catalogue.skip(loss.of_lane, loss.last_sequence)
            self._insert(self._seal_ledger(losses, self._catalogue.next_id, now))

    def _write_marks(self) -> None:
        first: dict[str, int] = {}
        for shelf in self._catalogue.shelves.values():
            if shelf.waiting:
                first[shelf.lane] = min(max(1, shelf.first_waiting), first.get(shelf.lane, shelf.first_waiting))
        self._marks.write(self.epoch, first, self._committed)

    def _open_and_load(self, suspect: bool, now: Moment) -> None:
        mark = self._marks.read()
        known = mark is not None  # a commit that was under way at the end looks like damage to the log; the mark knows
        self._store = open_store(self._path, log_bytes_max=self._log_bytes_max, vfs=self._vfs, suspect=suspect, check_log=not known)
        self._load(now)
        check_keys(self._store, self._keys, self._catalogue.next_id)
        if mark is not None and mark.epoch == self.epoch and not suspect:
            for lane, (_, last) in mark.lanes.items():
                if last > self._catalogue.sequences.get(lane, 0):
                    raise DamagedError(f"the file ends at {self._catalogue.sequences.get(lane, 0)} of lane {lane!r}; {last} were stored")
        if not suspect:
            self._bring_log_in()

    def _bring_log_in(self) -> None:
        """Bring the log that was found into the file, and both to the disk: a process before this one may have ended after a sync
        that failed, and then the log is whole in the page cache, but not on the disk."""
        try:
            if self._store.log_bytes():
                self._store.checkpoint(truncate=True)
        except BufferFullError as e:  # no reason not to start: receipts make room
            log.warning("buffer log not brought into the file error=%s", e)

    def _salvage(self, cause: Exception) -> None:
        with contextlib.suppress(AttributeError, UnavailableError):  # it may not have been opened
            self._store.close(checkpoint=False)
        mark = self._marks.read()
        salvage(self._path, self._device, self._keys, log_bytes_max=self._log_bytes_max, vfs=self._vfs, cause=str(cause), mark=mark)

    def _load(self, now: Moment) -> None:
        self._catalogue, self._age = load(self._store, self._keys, self._boot, now.monotonic_us)
        self._note_commit()

    def _note_commit(self) -> None:
        self._committed = dict(self._catalogue.sequences)
        self._catalogue.committed_id = self._catalogue.next_id - 1

    @property
    def _log_bytes_max(self) -> int:
        return log_limit(self._limits.bytes_max)

    def _recover(self) -> None:
        """After a fault: open the file again before anything else is done with it.

        Raises:
            UnavailableError: it cannot be opened yet.
        """
        if self._fault is not None:
            with self._write_lock:
                self._recover_from(self._fault)

    def _recover_from(self, fault: BaseException | None) -> None:
        if fault is None:  # another thread was faster
            return
        if not isinstance(fault, (DiskError, DamagedError)):  # the file is well: only what memory knows is in doubt
            self._load(self._clock())
            self._fault = None
            self._settled.clear()  # what receipts had settled in memory only is waiting again
            return
        if isinstance(fault, DamagedError):
            self._salvage(fault)
        with contextlib.suppress(UnavailableError):  # it may be closed already
            self._store.close(checkpoint=False)
        resume(self._path)
        known = dict(self._committed) if isinstance(fault, DiskError) else {}
        self._open(suspect=True)
        behind = {lane: last for lane, last in known.items() if last > self._catalogue.sequences.get(lane, 0)}
        for lane, last in behind.items():
            self._skip_names(lane, last)
        log.warning("buffer opened again after=%s", fault)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction. If it fails, what memory knows is not trusted either."""
        with self._write_lock:
            try:
                with self._store.transaction():
                    yield
                    if self._catalogue.lanes_changed:
                        self._catalogue.write_lanes()
            except BaseException as e:
                self._fault = self._fault or e
                raise
            self._note_commit()
            self._write_marks()

    @contextlib.contextmanager
    def _noting_faults(self) -> Iterator[None]:
        try:
            yield
        except (DiskError, DamagedError) as e:
            if self._fault is None:
                self._fault = e
            raise

    def _oldest_us(self, catalogue: Catalogue, lane: str) -> int:
        """When the oldest waiting block of a lane was stored, on this boot's monotonic clock."""
        first = None
        if self._fault is None:
            try:
                with self._noting_faults():
                    first = catalogue.first_waiting(lane)
            except UnavailableError as e:  # the counts are known all the same
                log.error("buffer cannot be read error=%s", e)
        return self._age.monotonic_us + (0 if first is None else first.stored_us - self._age.base_us)


def _older(shelf: Iterable[Place], oldest_us: int) -> Iterator[Place]:
    """The blocks at a shelf's start that were stored before `oldest_us`, at most EVICT_BLOCKS_MAX."""
    for count, place in enumerate(shelf):
        if place.stored_us >= oldest_us or count >= EVICT_BLOCKS_MAX:
            return
        yield place


def _bytes_on_disk(size: int) -> int:
    """Bytes that a block of `size` takes in the file, at most: whole overflow pages, its leaf, its place."""
    return (size // (PAGE_BYTES - 4) + 3) * PAGE_BYTES


def _clock() -> Moment:
    return Moment(time.time_ns() // 1_000, time.monotonic_ns() // 1_000, False)
