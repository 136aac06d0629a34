"""What the uplink knows of one lane's blocks: queued, under way or settled. All others lie in the buffer.

- Four queues: `lost` was under way on a link that is gone, `live` was stored just now, `overdue` has had no receipt for too long,
  `backlog` was read from the buffer.
- A block is under way from its first sending until a receipt settles it, or until all links that carried it are gone without a PUBACK.
- All sequences up to `cursor` are queued, under way or settled. `behind`: the buffer may hold more above it.

The buffer is the truth: a block that falls out of a queue is found again by reading the buffer from `cursor`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edge_agent.contract.receipt import SequenceSet

LOST, LIVE, OVERDUE, BACKLOG = "lost", "live", "overdue", "backlog"
QUEUES = (LOST, LIVE, OVERDUE, BACKLOG)  # in this order they are served
RISING_SPARE = 1_024  # settled sequences that the heap of a lane may still hold


class Sendable(Protocol):
    """A stored block."""

    @property
    def lane(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def block(self) -> bytes: ...


B = TypeVar("B", bound=Sendable)


@dataclass(slots=True)
class Flight(Generic[B]):
    """A block under way. `block` until its first PUBACK; `at`: endpoints that owe one; `due_at` is when it goes again, None until then."""

    attempts: int
    block: B | None
    at: list[str]
    due_at: float | None = None


class Lane(Generic[B]):
    """See the module's rules. `served`: bytes that it was given, for fairness among lanes. `asked`: overdue blocks asked of the buffer."""

    def __init__(self, served: float = 0.0) -> None:
        self.queues: dict[str, deque[B]] = {name: deque() for name in QUEUES}
        self.flights: dict[int, Flight[B]] = {}
        self.cursor = 0
        self.behind = True
        self.reading = False
        self.served = served
        self.asked: set[int] = set()
        self._queued: set[int] = set()  # what is in a queue but not in here was settled meanwhile
        self._live_bytes = 0
        self._rising: list[int] = []  # heap of sequences that were under way
        self._settled = SequenceSet()
        self._missing = False

    @property
    def waits(self) -> bool:
        """Is there a block in a queue?"""
        return bool(self._queued)

    @property
    def busy(self) -> bool:
        """Is there anything queued, under way or still to be read?"""
        return bool(self._queued or self.flights or self.behind)

    def discover(self, blocks: int) -> None:
        """The buffer holds so many unsettled blocks."""
        missing = blocks > len(self.flights.keys() | self._queued)
        if missing and self._missing and not self.behind:
            self.cursor = 0  # read to the end and still not found: look from the start
            self._settled = SequenceSet()  # the buffer holds what a receipt named: after a fault it does not know of it any more
        self.behind |= missing
        self._missing = missing

    def offer(self, block: B, blocks_max: int, bytes_max: int) -> None:
        """Take a block that was stored just now; the oldest beyond these limits are left to the backlog."""
        if self._known(block):
            return
        live = self.queues[LIVE]
        self._queue(LIVE, block)
        self._live_bytes += len(block.block)
        while len(live) > blocks_max or self._live_bytes > bytes_max:
            left = live.popleft()
            self._live_bytes -= len(left.block)
            if left.sequence in self._queued:
                self._queued.remove(left.sequence)
                self.cursor = min(self.cursor, left.sequence - 1)
                self.behind = True

    def load(self, after: int, blocks: Iterable[B], complete: bool) -> None:
        """Take what the buffer gave after sequence `after`; `complete`: there is nothing more."""
        self.reading = False
        overtaken = self.cursor < after  # the cursor was set back meanwhile: what lies between is still to be read
        for block in blocks:
            if not overtaken:
                self.cursor = max(self.cursor, block.sequence)
            if not self._known(block) and block.sequence not in self._settled:
                self._queue(BACKLOG, block)
        self.behind = overtaken or not complete

    def pop(self, queue: str) -> B | None:
        """The next block of a queue that nobody has settled meanwhile: of the live ones the newest."""
        blocks = self.queues[queue]
        while blocks:
            block = blocks.pop() if queue == LIVE else blocks.popleft()
            if queue == LIVE:
                self._live_bytes -= len(block.block)
            if block.sequence in self._queued:
                self._queued.remove(block.sequence)
                return block
        return None

    def put_back(self, block: B) -> None:
        """`block` could not be sent after all: it is the next one."""
        self.queues[LOST].appendleft(block)
        self._queued.add(block.sequence)

    def sent(self, block: B, endpoint: str) -> int:
        """`block` is under way; returns for the how manieth time."""
        before = self.flights.get(block.sequence)
        attempts = 1 if before is None else before.attempts + 1
        self._fly(block.sequence, Flight(attempts, block, [endpoint]))
        return attempts

    def acked(self, sequence: int, endpoint: str) -> Flight[B] | None:
        """`endpoint` has a block; returns it as it is under way, None if it was settled meanwhile."""
        flight = self.flights.get(sequence)
        if flight is None:
            if sequence not in self._queued:
                return None
            self._queued.remove(sequence)  # taken from a suspect, which has answered after all
            flight = self._fly(sequence, Flight(1, None, []))
        if endpoint in flight.at:
            flight.at.remove(endpoint)
        return flight

    def returned(self, sequence: int, endpoint: str) -> bool:
        """`endpoint` does not answer for a block any more; True if it is queued again, because no other one carries it."""
        flight = self.flights.get(sequence)
        if flight is None or flight.block is None or endpoint not in flight.at:
            return False
        flight.at.remove(endpoint)
        if flight.at:
            return False
        del self.flights[sequence]
        self._queue(LOST, flight.block)
        return True

    def overdue(self, sequence: int, due_at: float) -> bool:
        """Is the receipt that was due then still missing, and the block not queued already?"""
        flight = self.flights.get(sequence)
        return flight is not None and flight.due_at == due_at and sequence not in self._queued

    def again(self, block: B) -> None:
        """A block whose receipt is overdue, read from the buffer."""
        self.asked.discard(block.sequence)
        if block.sequence in self.flights and block.sequence not in self._queued:
            self._queue(OVERDUE, block)

    def forget(self, sequence: int) -> None:
        """The buffer does not hold this block any more."""
        self.asked.discard(sequence)
        self.flights.pop(sequence, None)

    def settle(self, settled: SequenceSet) -> int:
        """Forget what the lake holds; returns how many blocks under way it was."""
        count = 0
        while self._rising and self._rising[0] <= settled.cumulative:
            count += self.flights.pop(heapq.heappop(self._rising), None) is not None
        for first, last in _new_ranges(settled, self._settled):
            found = range(first, last + 1) if last - first < len(self.flights) else [n for n in self.flights if first <= n <= last]
            count += sum(self.flights.pop(n, None) is not None for n in found)
        if self._queued:
            self._queued = {n for n in self._queued if n not in settled}
        if settled.cumulative >= self._settled.cumulative:
            self._settled = settled
        return count

    def _known(self, block: B) -> bool:
        return block.sequence in self._queued or block.sequence in self.flights

    def _queue(self, queue: str, block: B) -> None:
        self.queues[queue].append(block)
        self._queued.add(block.sequence)

    def _fly(self, sequence: int, flight: Flight[B]) -> Flight[B]:
        """A block is under way. What a receipt named beyond a gap that is never filled is dropped from the heap here."""
        self.flights[sequence] = flight
        heapq.heappush(self._rising, sequence)
        if len(self._rising) > 2 * len(self.flights) + RISING_SPARE:
            self._rising = sorted(self.flights)
        return flight


def _new_ranges(settled: SequenceSet, before: SequenceSet) -> list[tuple[int, int]]:
    """The ranges of `settled` that were not there before: receipts repeat them until the gap below is filled."""
    known = set(before.ranges)
    return [r for r in settled.ranges if r not in known]
