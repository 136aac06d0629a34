"""The outbox: which block goes next, which are under way, and which must go again or elsewhere too.

A state machine without clock or network: times are arguments (seconds, monotonic), timers are results.

- Order: blocks that were under way on a lost link, then live ones (the newest first), then those whose receipt is
  overdue, then the backlog. Of several lanes, the one that had the fewest bytes of late goes first.
- The last two leave part of every limit to the live blocks, have under way what the link carries in `backlog_queue_s` and what the
  lake commits at a time or two (`unreceipted_backlog_max`), so that a live block never waits long behind them on the link or in the
  lake's queue. They may be throttled to `replay_bytes_per_s`.
- A block is under way until a receipt settles it. The endpoint's PUBACK only makes room for the next.
- A block without a receipt `receipt_timeout_s` after its PUBACK goes again, then with doubled times.
- A block without a PUBACK after its deadline also goes to the lane's standby (a hedge), if that one answers. Hedges may take
  `hedge_share_max` of the bytes sent, and `hedge_burst_bytes` at once. Those to make up for an endpoint that is then suspected or lost,
  without another answer, were no waste: they do not count.
- An endpoint that is silent while another one answers is a suspect: lanes that leave it take along what it has not acknowledged.
- Memory holds the bytes of blocks that wait for a PUBACK and of short queues; everything else stays in the buffer.

The buffer is the truth: a block that falls out of a queue is found again by reading the buffer from `cursor`.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

from edge_agent.contract.receipt import SequenceSet
from edge_agent.core.deadline import DeadlineLimits, RoundTrips
from edge_agent.core.pipe import BEAT_BYTES, INFINITY, Message, Pipe

MIB = 1024 * 1024
LOST, LIVE, OVERDUE, BACKLOG = "lost", "live", "overdue", "backlog"
RECHECK_S = 0.025  # a late block that cannot be hedged now
HEDGES_STEP_MAX = 64
READ_AHEAD_BLOCKS = 32
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


@dataclass(frozen=True)
class OutboxLimits:
    """Per endpoint: blocks and bytes without PUBACK. Per lane: blocks without receipt, and live blocks kept in memory."""

    inflight_blocks_max: int = 512
    inflight_bytes_max: int = 8 * MIB
    unreceipted_blocks_max: int = 2_048
    unreceipted_backlog_max: int = 512
    live_blocks_max: int = 256
    live_bytes_max: int = 8 * MIB
    backlog_share: float = 0.75
    backlog_queue_s: float = 0.1
    backlog_bytes_min: int = 64 * 1024
    replay_bytes_per_s: float | None = None
    receipt_timeout_s: float = 30.0
    receipt_timeout_max_s: float = 600.0
    heartbeat_s: float = 1.0
    hedge_share_max: float = 0.05
    hedge_burst_bytes: int = MIB
    deadline: DeadlineLimits = field(default_factory=DeadlineLimits)


@dataclass(slots=True)
class _Flight(Generic[B]):
    """A block under way. `block` until its first PUBACK; `at`: endpoints that owe one; `due_at` is when it goes again."""

    attempts: int
    block: B | None
    at: list[str]
    due_at: float = INFINITY


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
    rising: list[int] = field(default_factory=list)  # heap of sequences that were under way
    settled: SequenceSet = field(default_factory=SequenceSet)
    cursor: int = 0
    behind: bool = True
    missing: bool = False
    served: float = 0.0


class Hedge(NamedTuple, Generic[B]):
    """Send `block` to `endpoint` too: `late_endpoint` has not answered in time."""

    block: B
    endpoint: str
    late_endpoint: str


class Outbox(Generic[B]):
    """See the module's rules. `discover`, `offer` and `load` put blocks in, `take` hands out the next one."""

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._lanes: dict[str, _Lane[B]] = {}
        self._pipes: dict[str, Pipe] = {}
        self._trips: dict[str, RoundTrips] = {}
        self._due: list[tuple[float, str, int]] = []
        self._hedge_bytes_left = float(limits.hedge_burst_bytes)
        self._replay_bytes_left, self._replay_at = 0.0, 0.0
        self.sent_again = 0
        self._hedged_for: dict[str, int] = {}  # bytes, by the endpoint that was late, since its last answer
        self.hedges = self.hedges_denied = self.hedge_bytes = self.needed_bytes = self.duplicate_bytes = 0

    # What waits: from the buffer, and just stored.

    def discover(self, waiting: Mapping[str, int]) -> None:
        """Take notice of the buffer's unsettled blocks: their number by lane."""
        for lane, blocks in waiting.items():
            state = self._lane(lane)
            missing = blocks > len(state.flights.keys() | state.queued)
            if missing and state.missing and not state.behind:
                state.cursor = 0  # read to the end and still not found: look from the start
                state.settled = SequenceSet()  # the buffer holds what a receipt named: after a fault it does not know of it any more
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
        lanes = ((lane, self._lanes[lane]) for lane in routes if lane in self._lanes)
        return [(lane, state.cursor) for lane, state in lanes if state.behind and len(state.backlog) < READ_AHEAD_BLOCKS]

    def load(self, lane: str, after: int, blocks: Iterable[B], complete: bool) -> None:
        """Take what the buffer gave after sequence `after`; `complete`: there is nothing more."""
        state = self._lane(lane)
        overtaken = state.cursor < after  # the cursor was set back meanwhile: what lies between is still to be read
        for block in blocks:
            if not overtaken:
                state.cursor = max(state.cursor, block.sequence)
            if block.sequence not in state.queued and block.sequence not in state.flights and block.sequence not in state.settled:
                state.backlog.append(block)
                state.queued.add(block.sequence)
        state.behind = overtaken or not complete

    # Sending.

    def take(self, routes: Mapping[str, str], now: float) -> tuple[B, str] | None:
        """The next block to send and its endpoint; `routes` are the endpoints of the lanes that have one."""
        lanes = [(self._lanes[lane], endpoint) for lane, endpoint in routes.items() if lane in self._lanes]
        lanes.sort(key=lambda entry: entry[0].served)
        for queue in (LOST, LIVE, OVERDUE, BACKLOG):
            for state, endpoint in lanes:
                if not getattr(state, queue) or not self._room(state, endpoint, queue, now):
                    continue
                block = self._pop(state, queue)
                if block is not None:
                    self._serve(state, queue, len(block.block), lanes)
                    return block, endpoint
        return None

    def opened(self, endpoint: str, now: float) -> None:
        """The endpoint is connected: a new pipe, empty."""
        self._pipes[endpoint] = Pipe(self.trips(endpoint), now)

    def sent(self, block: B, endpoint: str, mid: int, now: float) -> None:
        """`block` was handed to the link of `endpoint` as message `mid`."""
        state = self._lane(block.lane)
        before = state.flights.get(block.sequence)
        attempts = 1 if before is None else before.attempts + 1
        self.sent_again += attempts > 1
        self._fly(state, block.sequence, _Flight(attempts, block, [endpoint]))
        self._pipe(endpoint, now).sent(mid, (block.lane, block.sequence), len(block.block), now)
        limits = self._limits
        self._hedge_bytes_left = min(limits.hedge_burst_bytes, self._hedge_bytes_left + limits.hedge_share_max * len(block.block))

    def hedged(self, hedge: Hedge[B], mid: int, now: float) -> None:
        """A late block was handed to the standby's link as message `mid`."""
        block, endpoint, late_endpoint = hedge
        flight = self._lane(block.lane).flights.get(block.sequence)
        if flight is not None:
            flight.at.append(endpoint)
        self._pipe(endpoint, now).sent(mid, (block.lane, block.sequence), len(block.block), now)
        self._hedge_bytes_left -= len(block.block)
        self._hedged_for[late_endpoint] = self._hedged_for.get(late_endpoint, 0) + len(block.block)
        self.hedges += 1
        self.hedge_bytes += len(block.block)
        self.duplicate_bytes += len(block.block)

    def beat(self, endpoint: str, mid: int, now: float) -> None:
        """A heartbeat was handed to the link of `endpoint` as message `mid`."""
        self._pipe(endpoint, now).sent(mid, None, BEAT_BYTES, now)

    def put_back(self, block: B) -> None:
        """`block` could not be handed to a link after all."""
        state = self._lane(block.lane)
        state.lost.appendleft(block)
        state.queued.add(block.sequence)

    # Answers.

    def acked(self, endpoint: str, mid: int, now: float) -> bool:
        """The endpoint acknowledged message `mid`; False if that is neither a block nor a heartbeat."""
        pipe = self._pipes.get(endpoint)
        message = pipe.answered(mid, now) if pipe is not None else None
        if message is None:
            return False
        self._hedged_for.pop(endpoint, None)
        if message.key is not None:
            self._acked_block(*message.key, endpoint, now)
        return True

    def lost(self, endpoint: str) -> None:
        """The link is gone: what it had not acknowledged goes elsewhere, first of all."""
        pipe = self._pipes.pop(endpoint, None)
        if pipe is not None:
            self._return_hedges(endpoint)
            self._requeue(endpoint, pipe.messages.values())

    def given_up(self, endpoint: str) -> None:
        """The link is cut because it is silent; `lost` follows."""
        self.trips(endpoint).given_up()

    def suspected(self, endpoint: str) -> None:
        """The endpoint is a suspect now."""
        pipe = self._pipes.get(endpoint)
        if pipe is not None:
            pipe.void()
            self._return_hedges(endpoint)

    def leave(self, endpoint: str, lane: str) -> None:
        """A lane leaves a suspect: the same for its blocks, but an answer that still comes counts."""
        pipe = self._pipes.get(endpoint)
        if pipe is not None:
            self._requeue(endpoint, [m for m in pipe.messages.values() if m.key is not None and m.key[0] == lane])

    def settle(self, lane: str, settled: SequenceSet) -> int:
        """Forget what the lake holds; returns how many blocks under way it was."""
        state = self._lanes.get(lane)
        if state is None:
            return 0
        count = 0
        while state.rising and state.rising[0] <= settled.cumulative:
            count += state.flights.pop(heapq.heappop(state.rising), None) is not None
        for first, last in _new_ranges(settled, state.settled):
            found = range(first, last + 1) if last - first < len(state.flights) else [n for n in state.flights if first <= n <= last]
            count += sum(state.flights.pop(n, None) is not None for n in found)
        if state.queued:
            state.queued = {n for n in state.queued if n not in settled}
        if settled.cumulative >= state.settled.cumulative:
            state.settled = settled
        return count

    # Time.

    def due(self, now: float, limit: int) -> list[tuple[str, int]]:
        """Up to `limit` blocks whose receipt is overdue, as lane and sequence. Answer each with `again` or `forget`."""
        found: list[tuple[str, int]] = []
        while self._due and self._due[0][0] <= now and len(found) < limit:
            due_at, lane, sequence = heapq.heappop(self._due)
            state = self._lanes[lane]
            flight = state.flights.get(sequence)
            if flight is not None and flight.due_at == due_at and sequence not in state.queued:
                found.append((lane, sequence))
        return found

    def again(self, block: B) -> None:
        """An overdue block, read from the buffer: it goes again."""
        state = self._lane(block.lane)
        if block.sequence in state.flights and block.sequence not in state.queued:
            state.overdue.append(block)
            state.queued.add(block.sequence)

    def forget(self, lane: str, sequence: int) -> None:
        """The buffer does not hold this block any more."""
        self._lanes[lane].flights.pop(sequence, None)

    def late(self, standbys: Mapping[str, str], now: float) -> list[Hedge[B]]:
        """Blocks past their deadline, each with the standby to send it to as well. Answer each with `hedged`, or not at all."""
        hedges: list[Hedge[B]] = []
        left = self._hedge_bytes_left
        for endpoint, pipe in self._pipes.items():
            for message in pipe.late(now):
                block = self._waiting(message)
                if block is None:
                    message.late_at = INFINITY
                    continue
                message.late_at = (now // RECHECK_S + 2) * RECHECK_S  # together with the others: one timer for all
                standby = standbys.get(block.lane)
                if standby is None or standby == endpoint or not self._may_hedge(block, standby, now):
                    continue
                if left < len(block.block) or len(hedges) == HEDGES_STEP_MAX:
                    self.hedges_denied += left < len(block.block)
                    continue
                message.late_at = INFINITY
                left -= len(block.block)
                hedges.append(Hedge(block, standby, endpoint))
        return hedges

    def beats(self, now: float) -> list[str]:
        """Endpoints to ask with a heartbeat: idle ones, and those that could tell whether another's silence is its own."""
        owed = [since for pipe in self._pipes.values() if pipe.is_late(now) and (since := pipe.owed_since()) is not None]
        doubt = min(owed, default=-INFINITY)
        return [
            name
            for name, pipe in self._pipes.items()
            if not pipe.messages and (pipe.beat_at(self._limits.heartbeat_s) <= now or pipe.answered_sent_at < doubt)
        ]

    def suspects(self, now: float) -> list[str]:
        """Endpoints that are silent while another one has answered something newer than what they owe."""
        newest = sorted(((pipe.answered_sent_at, name) for name, pipe in self._pipes.items()), reverse=True)[:2]
        found = []
        for name, pipe in self._pipes.items():
            since = pipe.owed_since()
            if since is not None and pipe.suspect_at(now) <= now and any(at > since and other != name for at, other in newest):
                found.append(name)
        return found

    def dead(self, now: float) -> list[str]:
        """Endpoints that are silent for so long that the connection must be dead."""
        return [name for name, pipe in self._pipes.items() if pipe.dead_at(now) <= now]

    def excuse(self, late_s: float, now: float) -> None:
        """This process did not run for `late_s`: nobody is late because of that."""
        for pipe in self._pipes.values():
            pipe.excuse(late_s, now)

    def wake_at(self, now: float) -> float:
        """When something is late, suspect, dead or due next; later than `now`. Overdue receipts do not need that precision."""
        times = [t for pipe in self._pipes.values() for t in self._times(pipe, now) if t > now]
        if self._replay_bytes_left <= 0 and self._limits.replay_bytes_per_s is not None:
            again_at = self._replay_at - self._replay_bytes_left / self._limits.replay_bytes_per_s + 0.001
            times += [again_at] if again_at > now else []  # a time that has passed was of no use: nothing waits for it
        return min(times, default=INFINITY)

    # What others may know.

    def busy(self) -> list[str]:
        """Lanes that have anything queued, under way or still to be read."""
        return [lane for lane, state in self._lanes.items() if state.queued or state.flights or state.behind]

    def in_flight(self, endpoint: str) -> tuple[int, int]:
        """Blocks and bytes that wait for a PUBACK at `endpoint`."""
        pipe = self._pipes.get(endpoint)
        return (0, 0) if pipe is None else (pipe.blocks, pipe.bytes)

    def silent_s(self, endpoint: str, now: float) -> float:
        """How long `endpoint` has owed an answer without giving any."""
        pipe = self._pipes.get(endpoint)
        return 0.0 if pipe is None else pipe.silent_s(now)

    def unreceipted(self, lane: str) -> int:
        """Blocks of a lane that were sent and have no receipt."""
        state = self._lanes.get(lane)
        return 0 if state is None else len(state.flights)

    def trips(self, endpoint: str) -> RoundTrips:
        """The round trips of an endpoint, over all its connections."""
        return self._trips.setdefault(endpoint, RoundTrips(self._limits.deadline))

    def _lane(self, lane: str) -> _Lane[B]:
        if lane not in self._lanes:
            served = [state.served for state in self._lanes.values()]
            self._lanes[lane] = _Lane(served=min(served, default=0.0))
        return self._lanes[lane]

    def _pipe(self, endpoint: str, now: float) -> Pipe:
        if endpoint not in self._pipes:
            self.opened(endpoint, now)
        return self._pipes[endpoint]

    def _times(self, pipe: Pipe, now: float) -> tuple[float, ...]:
        return pipe.late_at, pipe.suspect_at(now), pipe.dead_at(now), pipe.beat_at(self._limits.heartbeat_s)

    def _fly(self, state: _Lane[B], sequence: int, flight: _Flight[B]) -> _Flight[B]:
        """A block is under way. What a receipt named beyond a gap that is never filled is dropped from the heap here."""
        state.flights[sequence] = flight
        heapq.heappush(state.rising, sequence)
        if len(state.rising) > 2 * len(state.flights) + RISING_SPARE:
            state.rising = sorted(state.flights)
        return flight

    def _waiting(self, message: Message) -> B | None:
        """The block of a message, if no endpoint has acknowledged it and no receipt has come."""
        if message.key is None:
            return None
        lane, sequence = message.key
        flight = self._lanes[lane].flights.get(sequence)
        return None if flight is None else flight.block

    def _may_hedge(self, block: B, standby: str, now: float) -> bool:
        pipe, flight = self._pipes.get(standby), self._lanes[block.lane].flights[block.sequence]
        if pipe is None or standby in flight.at or pipe.is_late(now):
            return False
        return pipe.blocks < self._limits.inflight_blocks_max and pipe.bytes + len(block.block) <= self._limits.inflight_bytes_max

    def _return_hedges(self, late_endpoint: str) -> None:
        """The endpoint did not answer any more: what went elsewhere for it had to."""
        needed = self._hedged_for.pop(late_endpoint, 0)
        self.needed_bytes += needed
        self._hedge_bytes_left = min(self._limits.hedge_burst_bytes, self._hedge_bytes_left + needed)

    def _acked_block(self, lane: str, sequence: int, endpoint: str, now: float) -> None:
        state, limits = self._lanes[lane], self._limits
        flight = state.flights.get(sequence)
        if flight is None:
            if sequence not in state.queued:
                return  # settled meanwhile
            state.queued.remove(sequence)  # taken from a suspect, which has answered after all
            flight = self._fly(state, sequence, _Flight(1, None, []))
        if endpoint in flight.at:
            flight.at.remove(endpoint)
        if flight.due_at == INFINITY:
            flight.block = None
            wait_s = limits.receipt_timeout_s * 2 ** min(flight.attempts - 1, 30)
            flight.due_at = now + min(wait_s, limits.receipt_timeout_max_s)
            heapq.heappush(self._due, (flight.due_at, lane, sequence))

    def _requeue(self, endpoint: str, messages: Iterable[Message]) -> None:
        for message in messages:
            if message.key is None:
                continue
            lane, sequence = message.key
            state = self._lanes[lane]
            flight = state.flights.get(sequence)
            if flight is None or flight.block is None or endpoint not in flight.at:
                continue
            flight.at.remove(endpoint)
            message.late_at = INFINITY
            if not flight.at:  # no hedge carries it
                del state.flights[sequence]
                state.lost.append(flight.block)
                state.queued.add(sequence)
                self.sent_again += 1
                self.duplicate_bytes += message.size

    def _room(self, state: _Lane[B], endpoint: str, queue: str, now: float) -> bool:
        limits, pipe = self._limits, self._pipe(endpoint, now)
        blocks_max, bytes_max, flights_max = limits.inflight_blocks_max, float(limits.inflight_bytes_max), limits.unreceipted_blocks_max
        if queue in (OVERDUE, BACKLOG):
            if not self._may_replay(now):
                return False
            share = limits.backlog_share
            blocks_max = max(1, int(share * blocks_max))
            flights_max = max(1, min(limits.unreceipted_backlog_max, int(share * flights_max)))
            window = max(limits.backlog_bytes_min, pipe.trips.window_bytes(limits.backlog_queue_s, now))
            bytes_max = min(share * bytes_max, window)
        if pipe.blocks >= blocks_max or pipe.bytes >= bytes_max:
            return False
        # An overdue block is counted already; it must go even when the window is full of its like.
        return queue == OVERDUE or len(state.flights) < flights_max

    def _may_replay(self, now: float) -> bool:
        rate = self._limits.replay_bytes_per_s
        if rate is None:
            return True
        self._replay_bytes_left = min(rate, self._replay_bytes_left + rate * max(0.0, now - self._replay_at))
        self._replay_at = now
        return self._replay_bytes_left > 0

    def _serve(self, state: _Lane[B], queue: str, size: int, lanes: list[tuple[_Lane[B], str]]) -> None:
        """Count what a lane was given. One that had nothing to send for a while may not make up for it later."""
        if queue in (OVERDUE, BACKLOG) and self._limits.replay_bytes_per_s is not None:
            self._replay_bytes_left -= size
        least = min(other.served for other, _ in lanes if other.queued or other is state)
        state.served = max(state.served, least) + size
        for other, _ in lanes:
            if not other.queued and other is not state:
                other.served = max(other.served, least)

    def _pop(self, state: _Lane[B], queue: str) -> B | None:
        """The next block of a queue that nobody has settled meanwhile."""
        blocks: deque[B] = getattr(state, queue)
        while blocks:
            block = blocks.pop() if queue == LIVE else blocks.popleft()
            if queue == LIVE:
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


def _new_ranges(settled: SequenceSet, before: SequenceSet) -> list[tuple[int, int]]:
    """The ranges of `settled` that were not there before: receipts repeat them until the gap below is filled."""
    known = set(before.ranges)
    return [r for r in settled.ranges if r not in known]
