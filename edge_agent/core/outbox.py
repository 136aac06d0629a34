"""The outbox: which block goes next, which are under way, and which must go again.

A state machine without clock or network: times are arguments (seconds, monotonic).

- Order: blocks that were under way on a lost link, then live ones (the newest first), then those whose receipt is
  overdue, then the backlog; lane by lane in turn. The last two leave part of every limit to the live blocks.
- A block is under way until a receipt settles it. The endpoint's PUBACK only makes room for the next.
- A block without a receipt `receipt_timeout_s` after its PUBACK goes again, then with doubled times.
- Memory holds the bytes of blocks that wait for a PUBACK and of short queues; everything else stays in the buffer.

The buffer is the truth: a block that falls out of a queue is found again by reading the buffer from `cursor`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, Protocol, TypeVar

from edge_agent.contract.receipt import SequenceSet

MIB = 1024 * 1024


class Sendable(Protocol):
    """A stored block."""

    @property
    def lane(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def block(self) -> bytes: ...


B = TypeVar("B", bound=Sendable)


@dataclass(frozen=True)
class OutboxLimits:
    """Per endpoint: blocks and bytes without PUBACK. Per lane: blocks without receipt, and live blocks kept in memory."""

    inflight_blocks_max: int = 64
    inflight_bytes_max: int = 8 * MIB
    unreceipted_blocks_max: int = 1_024
    live_blocks_max: int = 64
    live_bytes_max: int = 8 * MIB
    backlog_share: float = 0.75
    receipt_timeout_s: float = 30.0
    receipt_timeout_max_s: float = 600.0
    puback_timeout_s: float = 10.0


@dataclass
class _Flight(Generic[B]):
    """A block under way. `block` until its PUBACK; `due_at` is when it goes again."""

    attempts: int
    block: B | None
    due_at: float = float("inf")


@dataclass
class _Lane(Generic[B]):
    """`queued` names the sequences in the four queues; what is in a queue but not in it was settled meanwhile.

    All sequences up to `cursor` are queued, under way or settled. `behind`: the buffer may hold more above it.
    """

    lost: deque[B] = field(default_factory=deque)
    live: deque[B] = field(default_factory=deque)
    overdue: deque[B] = field(default_factory=deque)
    backlog: deque[B] = field(default_factory=deque)
    live_bytes: int = 0
    queued: set[int] = field(default_factory=set)
    flights: dict[int, _Flight[B]] = field(default_factory=dict)
    cursor: int = 0
    behind: bool = True
    missing: bool = False


@dataclass
class _Pipe:
    """What waits for a PUBACK at one endpoint, by message id: lane, sequence, bytes."""

    unacked: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    bytes: int = 0
    progress_at: float = 0.0


class Outbox(Generic[B]):
    """See the module's rules. `discover`, `offer` and `load` put blocks in, `take` hands out the next one."""

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._lanes: dict[str, _Lane[B]] = {}
        self._pipes: dict[str, _Pipe] = {}
        self._turn: deque[str] = deque()
        self.sent_again = 0

    def discover(self, waiting: Mapping[str, int]) -> None:
        """Take notice of the buffer's unsettled blocks: their number by lane."""
        for lane, blocks in waiting.items():
            state = self._lane(lane)
            missing = blocks > len(state.flights.keys() | state.queued)
            if missing and state.missing and not state.behind:
                state.cursor = 0  # read to the end and still not found: look from the start
            state.behind |= missing
            state.missing = missing

    def offer(self, block: B) -> None:
        """Take a block that was stored just now."""
        state = self._lane(block.lane)
        if block.sequence in state.queued or block.sequence in state.flights:
            return
        state.live.append(block)
        state.live_bytes += len(block.block)
        state.queued.add(block.sequence)
        while len(state.live) > self._limits.live_blocks_max or state.live_bytes > self._limits.live_bytes_max:
            self._leave_to_backlog(state, state.live.popleft())

    def wants(self, routes: Mapping[str, str]) -> list[tuple[str, int]]:
        """Lanes whose backlog should be read now, each with the sequence after which to read."""
        return [
            (lane, state.cursor)
            for lane, state in self._lanes.items()
            if state.behind and lane in routes and not state.backlog and self._room(state, routes[lane], "backlog")
        ]

    def load(self, lane: str, blocks: Iterable[B], complete: bool) -> None:
        """Take what the buffer gave after the cursor; `complete`: there is nothing more."""
        state = self._lanes[lane]
        for block in blocks:
            state.cursor = max(state.cursor, block.sequence)
            if block.sequence not in state.queued and block.sequence not in state.flights:
                state.backlog.append(block)
                state.queued.add(block.sequence)
        state.behind = not complete

    def take(self, routes: Mapping[str, str]) -> tuple[B, str] | None:
        """The next block to send and its endpoint; `routes` are the endpoints of the lanes that have one."""
        lanes = [(lane, self._lanes[lane], routes[lane]) for lane in self._turn if lane in routes]
        for queue in ("lost", "live", "overdue", "backlog"):
            for lane, state, endpoint in lanes:
                if not self._room(state, endpoint, queue):
                    continue
                block = self._pop(state, queue)
                if block is not None:
                    self._turn.remove(lane)
                    self._turn.append(lane)
                    return block, endpoint
        return None

    def sent(self, block: B, endpoint: str, mid: int, now: float) -> None:
        """`block` was handed to the link of `endpoint` as message `mid`."""
        state, pipe = self._lane(block.lane), self._pipes.setdefault(endpoint, _Pipe())
        before = state.flights.get(block.sequence)
        attempts = 1 if before is None else before.attempts + 1
        self.sent_again += attempts > 1
        state.flights[block.sequence] = _Flight(attempts, block)
        if not pipe.unacked:
            pipe.progress_at = now
        pipe.unacked[mid] = (block.lane, block.sequence, len(block.block))
        pipe.bytes += len(block.block)

    def put_back(self, block: B) -> None:
        """`block` could not be handed to a link after all."""
        state = self._lane(block.lane)
        state.lost.appendleft(block)
        state.queued.add(block.sequence)

    def acked(self, endpoint: str, mid: int, now: float) -> None:
        """The endpoint acknowledged message `mid`; other messages than blocks are ignored."""
        pipe = self._pipes.get(endpoint)
        entry = pipe.unacked.pop(mid, None) if pipe is not None else None
        if pipe is None or entry is None:
            return
        lane, sequence, size = entry
        pipe.bytes -= size
        pipe.progress_at = now
        flight = self._lanes[lane].flights.get(sequence)
        if flight is not None:
            flight.block = None
            wait_s = self._limits.receipt_timeout_s * 2 ** min(flight.attempts - 1, 30)
            flight.due_at = now + min(wait_s, self._limits.receipt_timeout_max_s)

    def lost(self, endpoint: str) -> None:
        """The link is gone: what it had not acknowledged goes elsewhere, first of all."""
        pipe = self._pipes.pop(endpoint, _Pipe())
        for lane, sequence, _ in pipe.unacked.values():
            state = self._lanes[lane]
            flight = state.flights.get(sequence)
            if flight is not None and flight.block is not None:
                del state.flights[sequence]
                state.lost.append(flight.block)
                state.queued.add(sequence)
                self.sent_again += 1

    def settle(self, lane: str, settled: SequenceSet) -> int:
        """Forget what the lake holds; returns how many blocks under way it was."""
        state = self._lanes.get(lane)
        if state is None:
            return 0
        done = [n for n in state.flights if n in settled]
        for n in done:
            del state.flights[n]
        state.queued = {n for n in state.queued if n not in settled}
        return len(done)

    def due(self, now: float, limit: int) -> list[tuple[str, int]]:
        """Up to `limit` blocks whose receipt is overdue, as lane and sequence. Answer each with `again` or `forget`."""
        found = (
            (lane, n) for lane, state in self._lanes.items() for n, f in state.flights.items() if f.due_at <= now and n not in state.queued
        )
        return list(islice(found, limit))

    def again(self, block: B) -> None:
        """An overdue block, read from the buffer: it goes again."""
        state = self._lane(block.lane)
        state.overdue.append(block)
        state.queued.add(block.sequence)

    def forget(self, lane: str, sequence: int) -> None:
        """The buffer does not hold this block any more."""
        self._lanes[lane].flights.pop(sequence, None)

    def stuck(self, now: float) -> list[str]:
        """Endpoints that have acknowledged nothing for `puback_timeout_s` though something waits there."""
        return [e for e, pipe in self._pipes.items() if pipe.unacked and now - pipe.progress_at >= self._limits.puback_timeout_s]

    def busy(self) -> list[str]:
        """Lanes that have anything queued, under way or still to be read."""
        return [lane for lane, state in self._lanes.items() if state.queued or state.flights or state.behind]

    def in_flight(self, endpoint: str) -> tuple[int, int]:
        """Blocks and bytes that wait for a PUBACK at `endpoint`."""
        pipe = self._pipes.get(endpoint, _Pipe())
        return len(pipe.unacked), pipe.bytes

    def unreceipted(self, lane: str) -> int:
        """Blocks of a lane that were sent and have no receipt."""
        state = self._lanes.get(lane)
        return 0 if state is None else len(state.flights)

    def _lane(self, lane: str) -> _Lane[B]:
        if lane not in self._lanes:
            self._lanes[lane] = _Lane()
            self._turn.append(lane)
        return self._lanes[lane]

    def _room(self, state: _Lane[B], endpoint: str, queue: str) -> bool:
        limits, pipe = self._limits, self._pipes.get(endpoint, _Pipe())
        share = limits.backlog_share if queue in ("overdue", "backlog") else 1.0
        if len(pipe.unacked) >= max(1.0, share * limits.inflight_blocks_max) or pipe.bytes >= share * limits.inflight_bytes_max:
            return False
        # An overdue block is counted already; it must go even when the window is full of its like.
        return queue == "overdue" or len(state.flights) < max(1.0, share * limits.unreceipted_blocks_max)

    def _pop(self, state: _Lane[B], queue: str) -> B | None:
        """The next block of a queue that nobody has settled meanwhile."""
        blocks: deque[B] = getattr(state, queue)
        while blocks:
            block = blocks.pop() if queue == "live" else blocks.popleft()
            if queue == "live":
                state.live_bytes -= len(block.block)
            if block.sequence in state.queued:
                state.queued.remove(block.sequence)
                return block
        return None

    def _leave_to_backlog(self, state: _Lane[B], block: B) -> None:
        state.live_bytes -= len(block.block)
        if block.sequence in state.queued:
            state.queued.remove(block.sequence)
            state.cursor = min(state.cursor, block.sequence - 1)
            state.behind = True
