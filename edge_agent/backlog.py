"""The uplink's door to the buffer: reads what waits, settles what the lake holds.

- Once started, all of it happens in a thread of its own: the uplink never waits for a disk, and a deadline is not missed
  because of an fsync. Answers are put where the uplink takes its events. Not started (in a simulation), `work` does it.
- Receipts that come in while an earlier one is being written are merged: one transaction settles them all. Each keeps its epoch: a
  buffer that had to be made new meanwhile gives the same numbers to other blocks.
- A read has READ_BYTES at most, judged by the size of the lane's last blocks.
- While the buffer is unavailable, the work is kept and tried again. A receipt that cannot be written, as on a full disk, holds up no
  reading: what waits there can still go to the lake. Nor does what cannot be read, as on a bad sector, hold up receipts and other lanes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from edge_agent.buffer import Buffer, StoredBlock
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt

log = logging.getLogger(__name__)

PAUSE_S = 1.0
READ_BYTES = 1024 * 1024
READ_BLOCKS_FIRST, READ_BLOCKS_MAX = 16, 256
JOBS_STEP_MAX = 1_024


@dataclass(frozen=True)
class Loaded:
    """What the buffer holds of `lane` after sequence `after`; `complete`: there is nothing more."""

    lane: str
    after: int
    blocks: Sequence[StoredBlock]
    complete: bool


@dataclass(frozen=True)
class Found:
    """Overdue blocks by lane and sequence; None: the buffer does not hold it any more."""

    blocks: dict[tuple[str, int], StoredBlock | None]


@dataclass(frozen=True)
class Counted:
    """Blocks that wait, by lane."""

    waiting: dict[str, int]


@dataclass(frozen=True)
class Settled:
    """So many blocks have left the buffer."""

    blocks: int


@dataclass(frozen=True)
class Failed:
    """The thread has ended."""

    error: Exception


Answer = Loaded | Found | Counted | Settled | Failed
Job = Callable[[], Answer]


class Backlog:
    """See the module's rules. `put` takes the answers."""

    def __init__(self, buffer: Buffer, device: str, put: Callable[[Answer], None]) -> None:
        self._buffer, self._device, self._put = buffer, device, put
        self._jobs: SimpleQueue[Job | Receipt | None] = SimpleQueue()
        self._read_blocks: dict[str, int] = {}
        self._unsettled: dict[str, dict[str, list[LaneReceipt]]] = {}  # by epoch and lane
        self._held: list[Job] = []  # those that failed
        self._settle_at = self._held_until = 0.0  # not sooner again
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="backlog", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Finish what was asked for, if it takes no longer."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join(timeout_s)

    def read(self, lane: str, after: int) -> None:
        """`Loaded` follows."""
        self._ask(lambda: self._read(lane, after))

    def find(self, wanted: Sequence[tuple[str, int]]) -> None:
        """`Found` follows."""
        self._ask(lambda: Found({key: self._find(*key) for key in wanted}))

    def count(self) -> None:
        """`Counted` follows."""
        self._ask(lambda: Counted({s.lane: s.blocks for s in self._buffer.lanes()}))

    def settle(self, receipt: Receipt) -> None:
        """`Settled` follows."""
        self._ask(receipt)

    def work(self) -> None:
        """Do what was asked for, if no thread does."""
        if self._thread is None and ((jobs := self._take()) or self._unsettled or self._held):
            self._work(jobs)

    def _ask(self, job: Job | Receipt) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        try:
            jobs: list[Job | Receipt | None] = []
            while None not in jobs:
                jobs = [*self._wait(), *self._take()]
                self._work(jobs)
        except Exception as e:
            log.exception("backlog failed")
            self._put(Failed(e))

    def _wait(self) -> list[Job | Receipt | None]:
        """The next job; none if something is to be tried again before one comes."""
        try:
            return [self._jobs.get(timeout=PAUSE_S if self._unsettled or self._held else None)]
        except Empty:
            return []

    def _take(self) -> list[Job | Receipt | None]:
        jobs: list[Job | Receipt | None] = []
        try:
            while len(jobs) < JOBS_STEP_MAX:
                jobs.append(self._jobs.get_nowait())
        except Empty:
            pass
        return jobs

    def _work(self, jobs: list[Job | Receipt | None]) -> None:
        """Settle first: what is settled need not be read."""
        for job in jobs:
            if isinstance(job, Receipt):
                of_epoch = self._unsettled.setdefault(job.epoch, {})
                for lane in job.lanes:
                    of_epoch.setdefault(lane.lane, []).append(lane)
        if self._unsettled and (self._thread is None or time.monotonic() >= self._settle_at):
            self._settle()
        for job in [*self._release_held(), *jobs]:
            if job is not None and not isinstance(job, Receipt):
                self._try(job)

    def _release_held(self) -> list[Job]:
        held: list[Job] = []
        if self._thread is None or time.monotonic() >= self._held_until:
            held, self._held = self._held, []
        return held

    def _try(self, job: Job) -> None:
        try:
            self._put(job())
        except UnavailableError as e:
            log.warning("buffer unavailable error=%s retry_s=%s", e, PAUSE_S)
            self._held.append(job)
            self._held_until = time.monotonic() + PAUSE_S

    def _read(self, lane: str, after: int) -> Loaded:
        limit = self._read_blocks.get(lane, READ_BLOCKS_FIRST)
        blocks = self._buffer.pending(lane, after, limit)
        if blocks:
            usual = sum(len(b.block) for b in blocks) // len(blocks)
            self._read_blocks[lane] = max(2, min(READ_BLOCKS_MAX, READ_BYTES // max(1, usual)))
        return Loaded(lane, after, blocks, complete=len(blocks) < limit)

    def _find(self, lane: str, sequence: int) -> StoredBlock | None:
        found = self._buffer.pending(lane, sequence - 1, 1)
        return found[0] if found and found[0].sequence == sequence else None

    def _settle(self) -> None:
        """Settle what receipts named; what cannot be written down now stays for the next try."""
        settled = 0
        try:
            for epoch, receipts in list(self._unsettled.items()):
                lanes = [merged for of_lane in receipts.values() for merged in _merge(of_lane)]
                settled += self._buffer.settle(Receipt(device=self._device, epoch=epoch, lanes=lanes))
                del self._unsettled[epoch]
        except UnavailableError as e:
            log.warning("receipts not written error=%s retry_s=%s", e, PAUSE_S)
            self._settle_at = time.monotonic() + PAUSE_S
            for receipts in self._unsettled.values():  # more may come, for as long as it takes
                receipts.update({lane: _merge(of_lane) for lane, of_lane in receipts.items()})
        self._put(Settled(settled))


def _merge(receipts: list[LaneReceipt]) -> list[LaneReceipt]:
    """Receipts of one lane as one: the highest prefix, and the ranges beyond it."""
    cumulative = max(r.cumulative for r in receipts)
    ranges: list[tuple[int, int]] = []
    for first, last in sorted({(first, last) for r in receipts for first, last in r.ranges if last > cumulative}):
        if ranges and first <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], max(ranges[-1][1], last))
        else:
            ranges.append((first, last))
    return [LaneReceipt(lane=receipts[0].lane, cumulative=cumulative, ranges=ranges)]
