from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edge_agent.contract.receipt import SequenceSet
from edge_agent.core.outbox import OVERDUE_BLOCKS_MAX, Outbox, OutboxLimits


@dataclass(frozen=True)
class Block:
    lane: str
    sequence: int
    block: bytes = b"x" * 10


LIMITS = OutboxLimits(inflight_blocks_max=8, inflight_bytes_max=1_000, unreceipted_blocks_max=40, live_blocks_max=4, receipt_timeout_s=10)
EU = {"europe": "eu"}


def stored(lane: str, first: int, last: int) -> list[Block]:
    return [Block(lane, n) for n in range(first, last + 1)]


def drain(outbox: Outbox[Block], routes: dict[str, str], now: float = 0.0) -> list[tuple[str, int]]:
    """Send all there is room for, as the uplink does; message ids are the sequences."""
    out = []
    while (choice := outbox.take(routes, now)) is not None:
        block, endpoint = choice
        outbox.sent(block, endpoint, block.sequence, now)
        out.append((block.lane, block.sequence))
    return out


def test_live_blocks_go_before_the_backlog_newest_first() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.discover({"europe": 5})
    outbox.load("europe", 0, stored("europe", 1, 3), complete=True)
    for block in stored("europe", 4, 5):
        outbox.offer(block)
    assert drain(outbox, EU) == [("europe", 5), ("europe", 4), ("europe", 1), ("europe", 2), ("europe", 3)]


def test_backlog_leaves_room_for_live_blocks() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.discover({"europe": 30})
    outbox.load("europe", 0, stored("europe", 1, 30), complete=True)
    assert len(drain(outbox, EU)) == 6
    outbox.offer(Block("europe", 31))
    assert drain(outbox, EU) == [("europe", 31)]


def test_overdue_blocks_stay_in_the_buffer_while_they_cannot_be_sent() -> None:
    outbox: Outbox[Block] = Outbox(replace(LIMITS, inflight_blocks_max=1_000, inflight_bytes_max=100_000, unreceipted_blocks_max=1_000))
    for block in stored("europe", 1, 500):
        outbox.offer(block)
        drain(outbox, EU)
        outbox.acked("eu", block.sequence, 0.0)
    outbox.lost("eu")
    asked = [key for tick in range(100) for key in outbox.due(20 + tick / 2, 64)]
    assert len(asked) == OVERDUE_BLOCKS_MAX, "and no more while the buffer does not answer"
    for lane, sequence in asked:
        outbox.again(Block(lane, sequence))
    assert [key for tick in range(100) for key in outbox.due(80 + tick / 2, 64)] == []
    sent = set(drain(outbox, EU, 200.0))
    for tick in range(100):
        for lane, sequence in outbox.due(200 + tick / 2, 64):
            outbox.again(Block(lane, sequence))
        sent.update(drain(outbox, EU, 200 + tick / 2))
    assert sent == {("europe", n) for n in range(1, 501)}


def test_backlogs_of_two_lanes_progress_in_turn() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.discover({"canada": 10, "europe": 10})
    outbox.load("canada", 0, stored("canada", 1, 10), complete=True)
    outbox.load("europe", 0, stored("europe", 11, 20), complete=True)
    assert [lane for lane, _ in drain(outbox, {"canada": "eu", "europe": "eu"})] == ["canada", "europe"] * 3


def test_blocks_of_a_lane_without_endpoint_wait_and_do_not_hold_up_others() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.offer(Block("canada", 1))
    outbox.offer(Block("europe", 1))
    assert drain(outbox, EU) == [("europe", 1)]
    assert drain(outbox, {"canada": "us"}) == [("canada", 1)]


def test_unacknowledged_blocks_of_a_lost_endpoint_go_first_elsewhere_and_acknowledged_ones_do_not() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    for block in stored("europe", 1, 3):
        outbox.offer(block)
    drain(outbox, EU)
    outbox.acked("eu", 2, 1.0)
    outbox.lost("eu")
    outbox.offer(Block("europe", 9))
    assert drain(outbox, {"europe": "us"}) == [("europe", 3), ("europe", 1), ("europe", 9)]


def test_block_without_receipt_goes_again_with_doubled_waits_until_settled() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.offer(Block("europe", 1))
    drain(outbox, EU)
    outbox.acked("eu", 1, 0.0)
    assert outbox.due(9.9, 10) == []
    assert outbox.due(10.0, 10) == [("europe", 1)]
    outbox.again(Block("europe", 1))
    assert outbox.due(10.0, 10) == []
    assert drain(outbox, EU, 10.0) == [("europe", 1)]
    outbox.acked("eu", 1, 10.0)
    assert outbox.due(29.9, 10) == []
    assert outbox.due(30.0, 10) == [("europe", 1)]
    assert outbox.settle("europe", SequenceSet(1)) == 1
    assert outbox.due(99.0, 10) == []


def test_wait_for_a_receipt_doubles_up_to_two_minutes_and_is_never_below_what_was_set() -> None:
    assert [OutboxLimits().receipt_wait_s(n) for n in (1, 2, 3, 4, 1_000_000)] == [30.0, 60.0, 120.0, 120.0, 120.0]
    assert [OutboxLimits(receipt_timeout_s=300.0).receipt_wait_s(n) for n in (1, 2, 9)] == [300.0, 300.0, 300.0]


def test_overdue_blocks_go_even_when_the_window_is_full_of_them() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.discover({"europe": 60})
    outbox.load("europe", 0, stored("europe", 1, 60), complete=True)
    while sent := drain(outbox, EU):
        for _, sequence in sent:
            outbox.acked("eu", sequence, 0.0)
    assert outbox.unreceipted("europe") == 30
    for lane, sequence in outbox.due(10.0, 100):
        outbox.again(Block(lane, sequence))
    assert len(drain(outbox, EU, 10.0)) == 6


def test_silent_endpoint_is_suspected_only_while_another_answers_and_given_up_later() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    for name in ("eu", "us"):
        outbox.pipes.opened(name, 0.0)
        outbox.pipes.beat(name, 1, 0.0)
        outbox.acked(name, 1, 0.002)
    outbox.offer(Block("europe", 1))
    drain(outbox, EU, 1.0)
    assert outbox.pipes.suspects(2.0) == []
    assert outbox.pipes.beats(1.0) == ["us"]
    outbox.pipes.beat("us", 2, 1.5)
    outbox.acked("us", 2, 1.51)
    assert outbox.pipes.suspects(1.7) == []
    assert outbox.pipes.suspects(1.75) == ["eu"]
    assert outbox.pipes.dead(3.9) == []
    assert outbox.pipes.dead(4.0) == ["eu"]
    outbox.acked("eu", 1, 4.5)
    assert outbox.pipes.suspects(4.5) == outbox.pipes.dead(4.5) == []


def hedge_round(outbox: Outbox[Block], now: float, first: int) -> tuple[int, int]:
    """Five blocks go to eu, which owes all answers; what goes to us too is answered. Returns hedges, and how many were denied."""
    routes = EU
    denied = outbox.hedging.denied
    for block in stored("europe", first, first + 4):
        outbox.offer(block)
        drain(outbox, routes, now)
    hedges = outbox.late({"europe": "us"}, now + 9.0)
    for hedge in hedges:
        outbox.hedged(hedge, 1_000 + hedge.block.sequence, now + 9.0)
        outbox.acked("us", 1_000 + hedge.block.sequence, now + 9.01)
    return len(hedges), outbox.hedging.denied - denied


def test_hedges_for_an_endpoint_that_has_failed_do_not_count_and_those_for_a_slow_one_do() -> None:
    limits = replace(LIMITS, hedge_burst_bytes=60, hedge_share_max=0.0)
    failed: Outbox[Block] = Outbox(limits)
    for attempt in range(10):
        failed.pipes.opened("eu", 10.0 * attempt)
        failed.pipes.opened("us", 10.0 * attempt)
        assert hedge_round(failed, 10.0 * attempt, 1 + 10 * attempt) == (5, 0)
        failed.lost("eu")
        failed.settle("europe", SequenceSet(10 * (attempt + 1)))
    slow: Outbox[Block] = Outbox(limits)
    slow.pipes.opened("eu", 0.0)
    slow.pipes.opened("us", 0.0)
    assert hedge_round(slow, 0.0, 1) == (5, 0)
    for mid in range(1, 6):
        slow.acked("eu", mid, 2.5)
    slow.lost("eu")  # later: it had answered
    slow.pipes.opened("eu", 10.0)
    slow.settle("europe", SequenceSet(10))
    assert hedge_round(slow, 10.0, 11)[0] == 1


BOTH = {"europe": "us"}


def warm(outbox: Outbox[Block], now: float = 0.0) -> None:
    """Two endpoints that have answered."""
    for name in ("eu", "us"):
        outbox.pipes.opened(name, now)
        outbox.pipes.beat(name, 0, now)
        outbox.acked(name, 0, now + 0.002)


def test_late_block_goes_to_the_standby_too_and_the_first_answer_counts() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    warm(outbox)
    outbox.offer(Block("europe", 1))
    drain(outbox, EU, 1.0)
    assert 1.0 < outbox.wake_at(1.0) <= 1.04
    assert outbox.late(BOTH, 1.039) == []
    (hedge,) = outbox.late(BOTH, 1.04)
    assert (hedge.block.sequence, hedge.endpoint, hedge.late_endpoint) == (1, "us", "eu")
    outbox.hedged(hedge, 77, 1.04)
    assert outbox.late(BOTH, 2.0) == []
    outbox.acked("us", 77, 1.05)
    outbox.lost("eu")
    assert drain(outbox, BOTH, 1.1) == []
    assert (outbox.hedging.hedges, outbox.duplicate_bytes, outbox.sent_again) == (1, 10, 0)
    assert outbox.due(11.05, 10) == [("europe", 1)]


def test_block_lost_at_both_its_endpoints_goes_again() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    warm(outbox)
    outbox.offer(Block("europe", 1))
    drain(outbox, EU, 1.0)
    (hedge,) = outbox.late(BOTH, 1.1)
    outbox.hedged(hedge, 77, 1.1)
    outbox.lost("eu")
    assert drain(outbox, BOTH, 1.2) == []
    outbox.lost("us")
    assert drain(outbox, EU, 1.3) == [("europe", 1)]


def test_copies_stay_within_their_share_and_refusals_are_counted() -> None:
    outbox: Outbox[Block] = Outbox(replace(LIMITS, hedge_burst_bytes=25, hedge_share_max=0.1, inflight_blocks_max=100))
    warm(outbox)
    for block in stored("europe", 1, 4):
        outbox.offer(block)
    drain(outbox, EU, 1.0)
    hedges = outbox.late(BOTH, 1.1)
    assert len(hedges) == 2
    for mid, hedge in enumerate(hedges, 70):
        outbox.hedged(hedge, mid, 1.1)
    assert outbox.late(BOTH, 1.2) == []
    assert outbox.hedging.denied >= 2
    assert outbox.wake_at(1.2) < 1.3


def test_nothing_is_hedged_to_a_standby_that_is_late_itself_or_absent() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    warm(outbox)
    outbox.offer(Block("europe", 1))
    drain(outbox, EU, 1.0)
    outbox.pipes.beat("us", 5, 1.0)
    assert outbox.late(BOTH, 1.1) == outbox.late({}, 1.2) == []
    outbox.acked("us", 5, 1.21)
    assert len(outbox.late(BOTH, 1.3)) == 1


def test_lane_that_leaves_a_suspect_takes_its_blocks_along_and_a_late_answer_still_counts() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    warm(outbox)
    for block in (*stored("europe", 1, 2), Block("canada", 9)):
        outbox.offer(block)
    drain(outbox, {"europe": "eu", "canada": "eu"}, 1.0)
    outbox.suspected("eu")
    outbox.leave("eu", "europe")
    outbox.acked("eu", 2, 2.0)
    assert drain(outbox, {"europe": "us", "canada": "eu"}, 2.0) == [("europe", 1)]
    assert outbox.pipes.in_flight("eu")[0] == 2


def test_settled_ranges_are_forgotten_whatever_their_order() -> None:
    outbox: Outbox[Block] = Outbox(replace(LIMITS, inflight_blocks_max=100, live_blocks_max=100))
    for block in stored("europe", 1, 30):
        outbox.offer(block)
    drain(outbox, EU)
    assert outbox.settle("europe", SequenceSet(2, [(5, 6), (20, 25)])) == 10
    assert outbox.settle("europe", SequenceSet(2, [(5, 6), (20, 25)])) == 0
    assert outbox.settle("europe", SequenceSet(6, [(20, 26)])) == 3
    assert outbox.settle("europe", SequenceSet(30)) == 17
    assert outbox.unreceipted("europe") == 0


def test_cursor_set_back_while_the_buffer_was_read_is_not_jumped_over() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    outbox.discover({"europe": 20})
    outbox.load("europe", 0, stored("europe", 1, 10), complete=False)
    for block in stored("europe", 11, 20):
        outbox.offer(block)  # only four fit: 11 to 16 are left to the backlog
    outbox.load("europe", 16, stored("europe", 17, 20), complete=True)
    assert outbox.wants(EU) == [("europe", 10)]


def test_throttle_that_nothing_waits_for_wakes_nobody() -> None:
    outbox: Outbox[Block] = Outbox(replace(LIMITS, replay_bytes_per_s=15.0))
    outbox.discover({"europe": 3})
    outbox.load("europe", 0, stored("europe", 1, 3), complete=True)
    assert drain(outbox, EU, 1.0) == [("europe", 1), ("europe", 2)]
    for sequence in (1, 2):
        outbox.acked("eu", sequence, 1.0)
    assert 1.0 < outbox.wake_at(1.0) < 1.5  # the third one may go then
    assert outbox.wake_at(5.0) == float("inf")  # its lane was held meanwhile


def test_a_gap_that_is_never_filled_costs_no_memory_for_all_that_follows() -> None:
    outbox: Outbox[Block] = Outbox(LIMITS)
    for sequence in range(2, 5_000):  # the first was given up by a full buffer
        outbox.offer(Block("europe", sequence))
        drain(outbox, EU)
        outbox.acked("eu", sequence, 0.0)
        assert outbox.settle("europe", SequenceSet(0, [(2, sequence)])) == 1
    assert outbox.unreceipted("europe") == 0
    assert len(outbox._lane("europe")._rising) < 2_000


class OutboxAgainstABuffer(RuleBasedStateMachine):
    """Any order of events: memory stays bounded, and in the end every stored block has been sent and settled."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox: Outbox[Block] = Outbox(LIMITS)
        self.buffer: dict[str, dict[int, Block]] = {"canada": {}, "europe": {}}
        self.next = {"canada": 1, "europe": 1}
        self.routes = {"canada": "us", "europe": "eu"}
        self.unacked: dict[tuple[str, int], Block] = {}
        self.arrived: dict[str, set[int]] = {"canada": set(), "europe": set()}
        self.mid = 0
        self.now = 0.0

    @rule(lane=st.sampled_from(["canada", "europe"]), count=st.integers(1, 12), told=st.booleans())
    def store(self, lane: str, count: int, told: bool) -> None:
        for _ in range(count):
            block = Block(lane, self.next[lane])
            self.next[lane] += 1
            self.buffer[lane][block.sequence] = block
            if told:
                self.outbox.offer(block)

    @rule(canada=st.sampled_from(["", "us", "eu"]), europe=st.sampled_from(["", "eu"]))
    def reroute(self, canada: str, europe: str) -> None:
        self.routes = {lane: e for lane, e in (("canada", canada), ("europe", europe)) if e}

    @rule(count=st.integers(1, 20))
    def send(self, count: int) -> None:
        for _ in range(count):
            for lane, cursor in self.outbox.wants(self.routes):
                blocks = [self.buffer[lane][n] for n in sorted(self.buffer[lane]) if n > cursor][:5]
                self.outbox.load(lane, cursor, blocks, complete=len(blocks) < 5)
            choice = self.outbox.take(self.routes, self.now)
            if choice is None:
                return
            block, endpoint = choice
            assert endpoint == self.routes[block.lane]
            self.mid += 1
            self.outbox.sent(block, endpoint, self.mid, self.now)
            self.unacked[(endpoint, self.mid)] = block

    @rule(drop=st.booleans(), count=st.integers(1, 20))
    def acknowledge(self, drop: bool, count: int) -> None:
        for endpoint, mid in list(self.unacked)[:count]:
            block = self.unacked.pop((endpoint, mid))
            self.outbox.acked(endpoint, mid, self.now)
            if not drop:  # otherwise the broker acknowledged and then lost it
                self.arrived[block.lane].add(block.sequence)

    @rule(endpoint=st.sampled_from(["eu", "us"]))
    def lose(self, endpoint: str) -> None:
        self.outbox.lost(endpoint)
        self.unacked = {key: block for key, block in self.unacked.items() if key[0] != endpoint}

    @rule(wait_s=st.floats(0.01, 3.0))
    def hedge(self, wait_s: float) -> None:
        self.now += wait_s
        for hedge in self.outbox.late({"canada": "eu" if self.routes.get("canada") == "us" else "us"}, self.now):
            assert hedge.block.lane == "canada"
            self.mid += 1
            self.outbox.hedged(hedge, self.mid, self.now)
            self.unacked[(hedge.endpoint, self.mid)] = hedge.block

    @rule(lane=st.sampled_from(["canada", "europe"]), endpoint=st.sampled_from(["eu", "us"]))
    def leave(self, lane: str, endpoint: str) -> None:
        self.outbox.suspected(endpoint)
        self.outbox.leave(endpoint, lane)

    @rule()
    def receipts(self) -> None:
        for lane, sequences in self.arrived.items():
            settled = SequenceSet()
            for n in sequences:
                settled.add(n)
                self.buffer[lane].pop(n, None)
            self.outbox.settle(lane, settled)

    @rule(wait_s=st.floats(0.1, 40.0))
    def wait(self, wait_s: float) -> None:
        self.now += wait_s
        for lane, sequence in self.outbox.due(self.now, 5):
            if sequence in self.buffer[lane]:
                self.outbox.again(self.buffer[lane][sequence])
            else:
                self.outbox.forget(lane, sequence)

    @invariant()
    def limits_hold(self) -> None:
        for endpoint in ("eu", "us"):
            assert self.outbox.pipes.in_flight(endpoint)[0] <= LIMITS.inflight_blocks_max + self.outbox.hedging.hedges
        assert self.outbox.hedging.bytes <= LIMITS.hedge_burst_bytes + LIMITS.hedge_share_max * 10 * self.mid
        assert self.outbox.wake_at(self.now) > self.now
        for lane in ("canada", "europe"):
            assert self.outbox.unreceipted(lane) <= LIMITS.unreceipted_blocks_max

    def teardown(self) -> None:
        self.routes = {"canada": "us", "europe": "eu"}
        for _ in range(400):
            if not any(self.buffer.values()):
                break
            self.outbox.discover({lane: len(blocks) for lane, blocks in self.buffer.items() if blocks})
            self.send(20)
            self.acknowledge(False, 20)
            self.receipts()
            self.wait(30.0)
        assert not any(self.buffer.values())
        self.send(20)  # reads the end of the buffer
        assert not self.outbox.busy()


TestOutboxAgainstABuffer = OutboxAgainstABuffer.TestCase
TestOutboxAgainstABuffer.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
