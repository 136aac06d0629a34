from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.deadline import DeadlineLimits, RoundTrips
from edge_agent.core.pipe import Pipe

LIMITS = DeadlineLimits()


def measured(waits_s: list[float], size: int = 300) -> RoundTrips:
    trips = RoundTrips(LIMITS)
    for n, waited_s in enumerate(waits_s):
        trips.answered(waited_s, size, size, float(n))
    return trips


def test_deadline_follows_rfc_6298() -> None:
    srtt, rttvar = 0.1, 0.05
    trips = measured([0.1])
    assert trips.deadline_s(300) == pytest.approx(srtt + 4 * rttvar)
    for n, waited_s in enumerate([0.12, 0.08, 0.3, 0.1]):
        rttvar = 0.75 * rttvar + 0.25 * abs(srtt - waited_s)
        srtt = 0.875 * srtt + 0.125 * waited_s
        trips.answered(waited_s, 300, 300, 1.0 + n)
    assert trips.deadline_s(300) == pytest.approx(srtt + 4 * rttvar)


def test_deadline_has_a_floor_a_ceiling_and_a_first_value() -> None:
    assert RoundTrips(LIMITS).deadline_s(0) == LIMITS.first_s
    assert measured([0.001] * 9).deadline_s(300) == LIMITS.floor_s
    assert measured([30.0]).deadline_s(300) == LIMITS.ceiling_s


def test_large_block_on_a_slow_link_is_given_the_time_it_takes() -> None:
    trips = measured([0.1] * 20, size=600)  # 6 KB/s seen at most
    assert trips.deadline_s(600) < 0.2
    assert trips.deadline_s(60_600) > 60_000 / trips._rate
    assert trips.dead_s(60_600, 20.0) > trips.dead_s(600, 20.0) + 2 * 60_000 / trips._rate


def test_block_behind_the_usual_queue_needs_no_more_time_than_usual() -> None:
    trips = measured([0.2] * 60, size=1_000_000)
    assert trips.deadline_s(1_000_000) < 0.3


def test_worst_round_trip_of_late_makes_patient_and_is_forgotten() -> None:
    trips = measured([0.05] * 9 + [1.0])
    assert trips.suspect_s(300, 9.0) == pytest.approx(2.0)  # and not 3.0: there is a limit
    assert trips.dead_s(300, 9.0) == pytest.approx(8.0)
    assert trips.suspect_s(300, 9.0 + 600.0) == LIMITS.suspect_s


def test_connection_given_up_in_vain_gives_the_next_one_more_time_until_a_block_is_answered() -> None:
    trips = measured([0.05] * 9)
    usual = trips.dead_s(300, 9.0)
    trips.given_up()
    trips.given_up()
    assert trips.dead_s(300, 9.0) == 4 * usual
    trips.block_answered()
    trips.block_answered()
    assert trips.dead_s(300, 9.0) == usual


@given(
    samples=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**8), st.integers(1, 10**8), st.floats(0, 1e6)), max_size=50),
    ahead=st.integers(0, 10**8),
)
def test_deadlines_are_finite_and_in_order_whatever_was_measured(samples: list[tuple[float, int, int, float]], ahead: int) -> None:
    trips, now = RoundTrips(LIMITS), 0.0
    for waited_s, before, answered, pause_s in samples:
        now += pause_s
        trips.answered(waited_s, before, min(before + 1, answered), now)
        deadline, suspect, dead = trips.deadline_s(ahead), trips.suspect_s(ahead, now), trips.dead_s(ahead, now)
        assert LIMITS.floor_s <= deadline <= suspect
        assert math.isfinite(suspect)
        assert math.isfinite(dead)
        assert dead >= LIMITS.dead_s
        assert trips.window_bytes(0.1, now) > 0


def test_one_round_trip_gives_one_sample_though_a_hundred_answers_come_at_once() -> None:
    trips = measured([0.002] * 50)
    pipe = Pipe(trips, 100.0)
    for mid in range(100):
        pipe.sent(mid, ("europe", mid), 300, 100.0 + mid / 1_000)
    for mid in range(100):
        pipe.answered(mid, 100.5)
    once = measured([0.002] * 50)
    once.answered(0.5, 300, 300, 100.5)
    assert trips.deadline_s(0) == pytest.approx(once.deadline_s(0))


def test_answer_of_a_suspect_is_no_sample() -> None:
    trips = measured([0.002] * 50)
    pipe = Pipe(trips, 100.0)
    pipe.sent(1, ("europe", 1), 300, 100.0)
    pipe.void()
    pipe.answered(1, 130.0)
    assert trips.deadline_s(300) == LIMITS.floor_s


def test_time_in_which_this_process_did_not_run_counts_against_nobody() -> None:
    pipe = Pipe(measured([0.002] * 50), 100.0)
    pipe.sent(1, ("europe", 1), 300, 100.0)
    assert not pipe.is_late(100.03)
    pipe.excuse(2.0, 102.0)
    assert not pipe.is_late(102.03)
    assert list(pipe.late(102.03)) == []
    assert [m.key for m in pipe.late(102.05)] == [("europe", 1)]


def test_new_block_at_a_silent_endpoint_gets_no_time_for_the_queue_before_it() -> None:
    pipe = Pipe(measured([0.002] * 50), 100.0)
    for n in range(200):
        now = 100.0 + n * 0.01
        pipe.sent(n, ("europe", n), 300_000, now)
        assert n < 20 or pipe.messages[n].late_at <= now + LIMITS.floor_s + 1e-9 or not pipe.is_late(now)


def test_idle_endpoint_is_asked_and_a_busy_one_is_not() -> None:
    pipe, now = Pipe(measured([0.002] * 50), 100.0), 100.0
    for mid in range(8):
        assert pipe.beat_at(1.0) == pytest.approx(now + 0.1)  # a new connection is measured soon
        pipe.sent(mid, None, 40, now + 0.1)
        assert pipe.beat_at(1.0) == math.inf
        now += 0.102
        pipe.answered(mid, now)
    assert pipe.beat_at(1.0) == pytest.approx(now + 1.0)


def test_stall_of_seconds_leaves_the_next_deadline_short() -> None:
    trips = measured([0.002] * 100 + [3.0])
    assert trips.deadline_s(300) < 0.12
    for n in range(8):
        trips.answered(waited_s=0.002, ahead_bytes=300, answered_bytes=300, now=101.0 + n)
    assert trips.deadline_s(300) < 0.05


def test_link_that_becomes_slow_is_learned_within_a_few_answers() -> None:
    trips = measured([0.002] * 100 + [0.7] * 6)
    assert trips.deadline_s(300) > 0.7


def test_one_long_stall_does_not_make_silence_unsuspicious_for_a_minute() -> None:
    trips = RoundTrips(DeadlineLimits())
    for n in range(100):
        trips.answered(waited_s=0.002, ahead_bytes=600, answered_bytes=600, now=n / 50)
    trips.answered(waited_s=2.5, ahead_bytes=600, answered_bytes=600, now=4.5)
    for n in range(100):
        trips.answered(waited_s=0.002, ahead_bytes=600, answered_bytes=600, now=4.5 + n / 50)
    assert trips.suspect_s(600, 7.0) == 2.0
    satellite = RoundTrips(DeadlineLimits())
    for n in range(100):
        satellite.answered(waited_s=0.7 if n % 10 else 1.5, ahead_bytes=600, answered_bytes=600, now=float(n))
    assert satellite.suspect_s(600, 100.0) > 3.0
