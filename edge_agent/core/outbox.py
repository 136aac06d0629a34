"""The outbox: which block goes next, which are under way, and which must go again or elsewhere too.

A state machine without clock or network: times are arguments (seconds, monotonic), timers are results.

- Order: blocks that were under way on a lost link, then live ones (the newest first), then those whose receipt is
  overdue, then the backlog. Of several lanes, the one that had the fewest bytes of late goes first.
- The last two leave part of every limit to the live blocks, have under way what the link carries in `backlog_queue_s` and what the
  lake commits at a time or two (`unreceipted_backlog_max`), so that a live block never waits long behind them on the link or in the
  lake's queue. They may be throttled to `replay_bytes_per_s`.
- A block is under way until a receipt settles it. The endpoint's PUBACK only makes room for the next.
- A block without a receipt `receipt_timeout_s` after its PUBACK goes again, then with doubled times up to `receipt_timeout_max_s`: so often
  goes what may be unreceipted while the lake is away, and so long does a block wait at most when it is back.
- A block without a PUBACK after its deadline also goes to the lane's standby (a hedge), if that one answers and the allowance is not
  used up (core.allowance).
- Lanes that leave a suspect (core.pipes) take along what it has not acknowledged.
- Memory holds the bytes of blocks that wait for a PUBACK and of short queues; everything else stays in the buffer.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

from edge_agent.contract.receipt import SequenceSet
from edge_agent.core.allowance import HedgeAllowance, ReplayAllowance
from edge_agent.core.deadline import DeadlineLimits
from edge_agent.core.lane import BACKLOG, OVERDUE, QUEUES, B, Flight, Lane
from edge_agent.core.pipe import INFINITY, Message
from edge_agent.core.pipes import Pipes

MIB = 1024 * 1024
RECHECK_S = 0.025  # a late block that cannot be hedged now
HEDGES_STEP_MAX = 64
READ_AHEAD_BLOCKS = 32
OVERDUE_BLOCKS_MAX = 64  # of a lane, in memory
POSTPONED_S = 1.0
DOUBLINGS_MAX = 30


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
    receipt_timeout_max_s: float = 120.0
    heartbeat_s: float = 1.0
    hedge_share_max: float = 0.05
    hedge_burst_bytes: int = MIB
    deadline: DeadlineLimits = field(default_factory=DeadlineLimits)

    def receipt_wait_s(self, attempts: int) -> float:
        """How long after the PUBACK of its `attempts`-th sending a block waits for its receipt; never less than the first time."""
        doubled_s = self.receipt_timeout_s * 2.0 ** min(attempts - 1, DOUBLINGS_MAX)
        return min(doubled_s, max(self.receipt_timeout_s, self.receipt_timeout_max_s))


class Hedge(NamedTuple, Generic[B]):
    """Send `block` to `endpoint` too: `late_endpoint` has not answered in time."""

    block: B
    endpoint: str
    late_endpoint: str


class Outbox(Generic[B]):
    """See the module's rules. `discover`, `offer` and `load` put blocks in, `take` hands out the next one.

    Attributes:
        pipes: what waits for an answer at each endpoint.
        hedging: the bytes that may go twice, and those that did.
        sent_again: blocks sent more than once, hedges left out.
        duplicate_bytes: bytes that went twice because an endpoint was late or lost.
    """

    def __init__(self, limits: OutboxLimits) -> None:
        self._limits = limits
        self._lanes: dict[str, Lane[B]] = {}
        self._due: list[tuple[float, str, int]] = []
        self._replay = ReplayAllowance(limits.replay_bytes_per_s)
        self.pipes = Pipes(limits.deadline, limits.heartbeat_s)
        self.hedging = HedgeAllowance(limits.hedge_share_max, limits.hedge_burst_bytes)
        self.sent_again = self.duplicate_bytes = 0

    # What waits: from the buffer, and just stored.

    def discover(self, waiting: Mapping[str, int]) -> None:
        """Take notice of the buffer's unsettled blocks: their number by lane."""
        for lane, blocks in waiting.items():
            self._lane(lane).discover(blocks)

    def offer(self, block: B) -> None:
        """Take a block that was stored just now."""
        self._lane(block.lane).offer(block, self._limits.live_blocks_max, self._limits.live_bytes_max)

    def wants(self, routes: Mapping[str, str]) -> list[tuple[str, int]]:
        """Lanes whose backlog is to be read now, each with the sequence after which to read. Answer each with `load`."""
        found = []
        for name in routes:
            lane = self._lanes.get(name)
            if lane is not None and lane.behind and not lane.reading and len(lane.queues[BACKLOG]) < READ_AHEAD_BLOCKS:
                lane.reading = True
                found.append((name, lane.cursor))
        return found

    def load(self, lane: str, after: int, blocks: Iterable[B], complete: bool) -> None:
        """Take what the buffer gave after sequence `after`; `complete`: there is nothing more."""
        self._lane(lane).load(after, blocks, complete)

    # Sending.

    def take(self, routes: Mapping[str, str], now: float) -> tuple[B, str] | None:
        """The next block to send and its endpoint; `routes` are the endpoints of the lanes that have one."""
        lanes = [(self._lanes[lane], endpoint) for lane, endpoint in routes.items() if lane in self._lanes]
        lanes.sort(key=lambda entry: entry[0].served)
        for queue in QUEUES:
            for lane, endpoint in lanes:
                if not lane.queues[queue] or not self._room(lane, endpoint, queue, now):
                    continue
                block = lane.pop(queue)
                if block is not None:
                    self._serve(lane, queue, len(block.block), lanes)
                    return block, endpoint
        return None

    def sent(self, block: B, endpoint: str, mid: int, now: float) -> None:
        """`block` was handed to the link of `endpoint` as message `mid`."""
        self.sent_again += self._lane(block.lane).sent(block, endpoint) > 1
        self.pipes.at(endpoint, now).sent(mid, (block.lane, block.sequence), len(block.block), now)
        self.hedging.earn(len(block.block))

    def hedged(self, hedge: Hedge[B], mid: int, now: float) -> None:
        """A late block was handed to the standby's link as message `mid`."""
        block, endpoint, late_endpoint = hedge
        flight = self._lane(block.lane).flights.get(block.sequence)
        if flight is not None:
            flight.at.append(endpoint)
        self.pipes.at(endpoint, now).sent(mid, (block.lane, block.sequence), len(block.block), now)
        self.hedging.spend(late_endpoint, len(block.block))
        self.duplicate_bytes += len(block.block)

    def put_back(self, block: B) -> None:
        """`block` could not be handed to a link after all."""
        self._lane(block.lane).put_back(block)

    # Answers.

    def acked(self, endpoint: str, mid: int, now: float) -> bool:
        """The endpoint acknowledged message `mid`; False if that is neither a block nor a heartbeat."""
        pipe = self.pipes.get(endpoint)
        message = pipe.answered(mid, now) if pipe is not None else None
        if message is None:
            return False
        self.hedging.answered(endpoint)
        if message.key is not None:
            self._acked_block(*message.key, endpoint, now)
        return True

    def lost(self, endpoint: str) -> None:
        """The link is gone: what it had not acknowledged goes elsewhere, first of all."""
        self.hedging.failed(endpoint)
        self._requeue(endpoint, self.pipes.closed(endpoint))

    def suspected(self, endpoint: str) -> None:
        """The endpoint is a suspect now."""
        pipe = self.pipes.get(endpoint)
        if pipe is not None:
            pipe.void()
            self.hedging.failed(endpoint)

    def leave(self, endpoint: str, lane: str) -> None:
        """A lane leaves a suspect: the same for its blocks, but an answer that still comes counts."""
        pipe = self.pipes.get(endpoint)
        if pipe is not None:
            self._requeue(endpoint, [m for m in pipe.messages.values() if m.key is not None and m.key[0] == lane])

    def settle(self, lane: str, settled: SequenceSet) -> int:
        """Forget what the lake holds; returns how many blocks under way it was."""
        state = self._lanes.get(lane)
        return 0 if state is None else state.settle(settled)

    # Time.

    def due(self, now: float, limit: int) -> list[tuple[str, int]]:
        """Up to `limit` blocks whose receipt is overdue, as lane and sequence. Answer each with `again` or `forget`.

        A lane that cannot send those it has queued is not asked about more.
        """
        found: list[tuple[str, int]] = []
        while self._due and self._due[0][0] <= now and len(found) < limit:
            due_at, name, sequence = heapq.heappop(self._due)
            lane = self._lanes[name]
            if not lane.overdue(sequence, due_at):
                continue
            if len(lane.asked) + len(lane.queues[OVERDUE]) < OVERDUE_BLOCKS_MAX:
                lane.asked.add(sequence)
                found.append((name, sequence))
            else:
                self._due_again(name, lane.flights[sequence], sequence, now + POSTPONED_S)
        return found

    def again(self, block: B) -> None:
        """An overdue block, read from the buffer: it goes again."""
        self._lane(block.lane).again(block)

    def forget(self, lane: str, sequence: int) -> None:
        """The buffer does not hold this block any more."""
        self._lanes[lane].forget(sequence)

    def late(self, standbys: Mapping[str, str], now: float) -> list[Hedge[B]]:
        """Blocks past their deadline, each with the standby to send it to as well. Answer each with `hedged`, or not at all."""
        hedges: list[Hedge[B]] = []
        left = self.hedging.left
        for endpoint, pipe in self.pipes.items():
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
                    self.hedging.denied += left < len(block.block)
                    continue
                message.late_at = INFINITY
                left -= len(block.block)
                hedges.append(Hedge(block, standby, endpoint))
        return hedges

    def wake_at(self, now: float) -> float:
        """When something is to be done next; later than `now`. Overdue receipts do not need that precision."""
        return min(self.pipes.wake_at(now), self._replay.wake_at(now))

    # What others may know.

    def busy(self) -> list[str]:
        """Lanes that have anything queued, under way or still to be read."""
        return [name for name, lane in self._lanes.items() if lane.busy]

    def unreceipted(self, lane: str) -> int:
        """Blocks of a lane that were sent and have no receipt."""
        state = self._lanes.get(lane)
        return 0 if state is None else len(state.flights)

    def _lane(self, name: str) -> Lane[B]:
        if name not in self._lanes:
            self._lanes[name] = Lane(min((lane.served for lane in self._lanes.values()), default=0.0))
        return self._lanes[name]

    def _waiting(self, message: Message) -> B | None:
        """The block of a message, if no endpoint has acknowledged it and no receipt has come."""
        if message.key is None:
            return None
        lane, sequence = message.key
        flight = self._lanes[lane].flights.get(sequence)
        return None if flight is None else flight.block

    def _may_hedge(self, block: B, standby: str, now: float) -> bool:
        pipe, flight = self.pipes.get(standby), self._lanes[block.lane].flights[block.sequence]
        if pipe is None or standby in flight.at or pipe.is_late(now):
            return False
        return pipe.blocks < self._limits.inflight_blocks_max and pipe.bytes + len(block.block) <= self._limits.inflight_bytes_max

    def _acked_block(self, lane: str, sequence: int, endpoint: str, now: float) -> None:
        flight = self._lanes[lane].acked(sequence, endpoint)
        if flight is not None and flight.due_at is None:
            flight.block = None
            self._due_again(lane, flight, sequence, now + self._limits.receipt_wait_s(flight.attempts))

    def _due_again(self, lane: str, flight: Flight[B], sequence: int, at: float) -> None:
        flight.due_at = at
        heapq.heappush(self._due, (at, lane, sequence))

    def _requeue(self, endpoint: str, messages: Iterable[Message]) -> None:
        for message in messages:
            if message.key is None:
                continue
            lane, sequence = message.key
            message.late_at = INFINITY
            if self._lanes[lane].returned(sequence, endpoint):
                self.sent_again += 1
                self.duplicate_bytes += message.size

    def _room(self, lane: Lane[B], endpoint: str, queue: str, now: float) -> bool:
        limits, pipe = self._limits, self.pipes.at(endpoint, now)
        blocks_max, bytes_max, flights_max = limits.inflight_blocks_max, float(limits.inflight_bytes_max), limits.unreceipted_blocks_max
        if queue in (OVERDUE, BACKLOG):
            if not self._replay.any(now):
                return False
            share = limits.backlog_share
            blocks_max = max(1, int(share * blocks_max))
            flights_max = max(1, min(limits.unreceipted_backlog_max, int(share * flights_max)))
            window = max(limits.backlog_bytes_min, pipe.trips.window_bytes(limits.backlog_queue_s, now))
            bytes_max = min(share * bytes_max, window)
        if pipe.blocks >= blocks_max or pipe.bytes >= bytes_max:
            return False
        # An overdue block is counted already; it must go even when the window is full of its like.
        return queue == OVERDUE or len(lane.flights) < flights_max

    def _serve(self, lane: Lane[B], queue: str, size: int, lanes: list[tuple[Lane[B], str]]) -> None:
        """Count what a lane was given. One that had nothing to send for a while may not make up for it later."""
        if queue in (OVERDUE, BACKLOG):
            self._replay.spend(size)
        least = min(other.served for other, _ in lanes if other.waits or other is lane)
        lane.served = max(lane.served, least) + size
        for other, _ in lanes:
            if not other.waits and other is not lane:
                other.served = max(other.served, least)
