"""The durable buffer: blocks on the device's disk, until the lake holds them.

- `append` seals drafts into blocks and returns once they are on disk. Only then may sensor messages be acknowledged.
- A block leaves when the lake's receipt names it, and no earlier. The newest `history_rows` readings of a stream stay
  even then: after a restart they rebuild the open windows and the filter of redelivered messages.
- At `bytes_max` (file and log together) history gives way first, but for a quarter of what the file holds (edge_agent.room). Then, with
  `drop_oldest`, waiting blocks: the lowest priority first, then the oldest, each named in the loss ledger in the same transaction.
  With `block`, `append` raises BufferFullError.
- What is older than `age_s_max` goes the same way. Age counts only time that the device saw pass (core.retention.Age).
- The ledger is a stream of blocks like others, in the lane of what was lost. It is never given up.
- When the disk has no room, `append` refuses and nothing is dropped; a reserve stays free, so that receipts can be noted.
- After an I/O error nothing is trusted: the file is opened again, brought to the disk once more and read afresh; then the same
  blocks are stored again from memory. A damaged file is salvaged (edge_agent.salvage), a damaged block taken out and named.
- A file that was cut off or lost is noticed by the marks beside it (edge_agent.marks): what is missing is named.

One process owns the file. Threads may share the buffer: one connection writes, another reads (WAL lets both go on).

Where to look: `appending` (one append), `room` and `eviction` (what gives way), `loss_ledger` (how it is named), `settling` (receipts),
`reading` (blocks and their damage), `owned_file` (transactions, faults, opening), `sealing` (drafts become blocks),
`slots` (rows that are used again).
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from edge_agent.appending import Appender
from edge_agent.clock import Moment
from edge_agent.contract.columns import Table
from edge_agent.contract.receipt import Receipt
from edge_agent.core.fix import Fix
from edge_agent.core.retention import FillForecast
from edge_agent.draft import BufferState, Draft, LaneState, Retention, StoredBlock
from edge_agent.eviction import Eviction
from edge_agent.loss_ledger import LossLedger
from edge_agent.owned_file import OwnedFile
from edge_agent.reading import Reader
from edge_agent.room import Room
from edge_agent.sealed import Keys
from edge_agent.sealing import Sealer
from edge_agent.settling import settle
from edge_agent.store import BufferFullError, DamagedError, DiskError
from edge_agent.waiting import lanes

__all__ = ["Buffer", "BufferFullError", "BufferState", "Draft", "LaneState", "Retention", "StoredBlock"]

log = logging.getLogger(__name__)


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
        clock = clock or _clock
        self._device = device
        self._limits = Retention(bytes_max, age_s_max, when_full, priorities or {})
        self._forecast = FillForecast()
        sealer = Sealer(device, boot, keys)
        self._ledger = LossLedger(sealer, keys, bytes_max)
        self._file = OwnedFile(
            path, device, boot, bytes_max=bytes_max, history_rows=history_rows, keys=keys, ledger=self._ledger, clock=clock, vfs=vfs
        )
        self._room = Room(self._file, bytes_max)
        self._eviction = Eviction(self._file, self._room, self._limits, self._ledger)
        self._appender = Appender(self._file, sealer, self._room, self._eviction, self._ledger)
        self._reader = Reader(self._file, self._ledger, keys, clock)

    @property
    def epoch(self) -> str:
        """The name of this buffer; another one after a file that could not be salvaged."""
        return self._file.catalogue.epoch

    @property
    def lost_blocks(self) -> Counter[str]:
        """Blocks given up or found damaged since the start, by reason."""
        return self._ledger.lost_blocks

    @property
    def lost_readings(self) -> dict[str, float]:
        """Readings in such blocks, where known."""
        return self._ledger.lost_readings

    def close(self) -> None:
        """Write down what is only in memory, and close the file. A disk error then is logged: there is nothing left to lose."""
        self._file.close()

    def append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        """Seal and store drafts and position fixes in one transaction; on return they are on disk.

        Returns the blocks stored: those of the drafts, less those given up at once (a full buffer, a low priority), and the
        blocks of the loss ledger that this call made.

        Raises:
            BufferFullError: the buffer has reached its limit, or the disk has no room. Nothing was stored.
            UnavailableError: the disk failed. Nothing of this call may be acknowledged; call again, with the same drafts.
        """
        with self._file.lock:
            if not drafts and not fixes:  # all of it was stored before, as the file says: it must be one that is trusted
                self._file.recover()
                return []
            try:
                return self._appender.append(drafts, fixes, now)
            except (DiskError, DamagedError) as e:
                log.error("buffer failed, opened again error=%s", e)
                return self._appender.append(drafts, fixes, now)

    def pending(self, lane: str, after_sequence: int, limit: int) -> list[StoredBlock]:
        """The next unsettled blocks of a lane, by rising sequence. Damaged ones are taken out on the way."""
        return self._reader.waiting(lane, after_sequence, limit)

    def lanes(self) -> list[LaneState]:
        """Every lane that has blocks waiting for a receipt."""
        return lanes(self._file)

    def settle(self, receipt: Receipt) -> int:
        """Forget what the lake holds; returns how many blocks it settled. A receipt for another epoch settles none."""
        if receipt.device != self._device or receipt.epoch != self.epoch:
            return 0
        return settle(self._file, self._room, receipt)

    def history(self, stream: str, contract_version: str) -> Table | None:
        """The newest readings of a stream, `history_rows` or somewhat more, in the order seen; None if there are none.

        Only those of this contract version: others may have other fields.
        """
        return self._reader.newest(stream, contract_version)

    def fixes(self) -> list[Fix]:
        """The newest stored position fixes, oldest first; damaged ones are left out."""
        return self._reader.fixes()

    def tidy(self, now: Moment) -> list[StoredBlock]:
        """Housekeeping between two batches: give up what is too old, bring the log into the file; returns new ledger blocks."""
        with self._file.lock:
            self._file.recover()
            with self._file.noting_faults():
                self._forecast.observe(self._file.used_bytes(), now.monotonic_us / 1e6)
                ledger = self._eviction.give_up_old(now)
                if self._file.store.log_due(0.5):
                    self._file.store.checkpoint()
        return ledger

    def readings_stored(self) -> int:
        """How many readings this buffer has ever stored."""
        unused = sum(count for _, count in self._file.catalogue.gaps.values())
        return sum(self._file.catalogue.ordinals.values()) - unused

    def used_bytes(self) -> int:
        """Bytes in use in the file: free pages and free slots left out."""
        with self._file.lock:
            self._file.recover()
            return self._file.used_bytes()

    def state(self, now: Moment) -> BufferState:
        """Counts for status and metrics."""
        with self._file.lock:
            self._file.recover()
            store, catalogue = self._file.store, self._file.catalogue
            waiting, used = lanes(self._file), self._file.used_bytes()
            held = sum(catalogue.sequences.values()) - sum(catalogue.gone.values())
            waiting_blocks = sum(s.blocks for s in waiting)
            return BufferState(
                used_bytes=used,
                bytes_max=self._limits.bytes_max,
                file_bytes=store.used_bytes() + store.spare_bytes(),
                log_bytes=store.log_bytes(),
                waiting_blocks=waiting_blocks,
                waiting_bytes=sum(s.bytes for s in waiting),
                history_blocks=held - waiting_blocks,
                oldest_s=max((round((now.monotonic_us - s.oldest_us) / 1e6, 1) for s in waiting), default=0.0),
                time_to_full_s=self._forecast.time_to_full_s(self._limits.bytes_max),
                lost_blocks=dict(self.lost_blocks),
                lost_readings=dict(self.lost_readings),
            )


def _clock() -> Moment:
    return Moment(time.time_ns() // 1_000, time.monotonic_ns() // 1_000, False)
