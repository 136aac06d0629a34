from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.core.routing import WOBBLE, Held, Move, Plan, Route, Router, RoutingConfig

CONFIG = RoutingConfig(endpoints=("eu", "us", "asia"), failback_s=10.0, connect_timeout_s=5.0, stable_s=5.0, linger_s=20.0)


def router(lanes: dict[str, tuple[str, ...]], **changes: Any) -> Router:
    made = Router(RoutingConfig(**{**CONFIG.__dict__, **changes}), random.Random(7).uniform)
    made.use(lanes)
    return made


def test_first_step_opens_the_preferred_endpoint_and_a_warm_standby() -> None:
    assert router({"atlantic": ("eu", "us", "asia")}).step(0.0).open == ["eu", "us"]


def test_lane_is_held_until_an_allowed_endpoint_is_connected() -> None:
    r = router({"europe": ("eu",)})
    assert r.step(0.0).routes["europe"] == Route(None, held=Held.NOT_CONNECTED)
    r.connected("us", 0.1)
    assert r.step(0.1).routes["europe"].endpoint is None
    r.connected("eu", 0.2)
    assert r.step(0.2).routes["europe"] == Route("eu")


def test_lane_that_allows_nothing_says_so() -> None:
    assert router({"nowhere": ()}).step(0.0).routes["nowhere"].held is Held.NOT_ALLOWED


def test_control_link_is_kept_while_no_lane_wants_any() -> None:
    assert router({"nowhere": ()}).step(0.0).open == ["eu"]
    assert router({}, control=("us",)).step(0.0).open == ["us"]
    assert router({}, control=()).step(0.0).open == []
    assert router({"switzerland": ("us",)}).step(0.0).open == ["us"]


def test_lost_endpoint_moves_its_lanes_to_the_standby_at_once_and_names_the_reason() -> None:
    r = router({"atlantic": ("eu", "us"), "europe": ("eu",)})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.connected("us", 0.2)
    assert r.step(0.2).routes["atlantic"] == Route("eu", "us")
    r.lost("eu", 1.0, "broker died")
    plan = r.step(1.0)
    assert plan.routes["atlantic"] == Route("us")
    assert plan.routes["europe"] == Route(None, held=Held.NOT_CONNECTED)
    assert plan.moves == [Move("atlantic", "eu", "us", "broker died"), Move("europe", "eu", None, "broker died")]


def test_preferred_endpoint_that_connects_second_is_used_at_once_if_it_never_failed() -> None:
    r = router({"atlantic": ("eu", "us")})
    r.step(0.0)
    r.connected("us", 0.1)
    assert r.step(0.1).routes["atlantic"].endpoint == "us"
    r.connected("eu", 0.2)
    assert r.step(0.2).routes["atlantic"].endpoint == "eu"


def test_failback_waits_until_the_preferred_endpoint_has_proved_itself() -> None:
    r = router({"atlantic": ("eu", "us")})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.connected("us", 0.1)
    r.step(0.1)
    r.lost("eu", 1.0, "gone")
    assert r.step(1.0).routes["atlantic"].endpoint == "us"
    assert "eu" in r.step(4.0).open
    r.connected("eu", 4.5)
    plan = r.step(4.5)
    assert plan.routes["atlantic"] == Route("us", "eu")
    assert plan.wake_at == pytest.approx(14.5)
    assert r.step(14.4).routes["atlantic"].endpoint == "us"
    assert r.step(14.5).moves == [Move("atlantic", "us", "eu", "preferred")]


def test_third_endpoint_is_opened_when_the_first_two_fail() -> None:
    r = router({"any": ("eu", "us", "asia")})
    r.step(0.0)
    r.lost("eu", 0.1, "refused")
    r.lost("us", 0.1, "refused")
    assert r.step(0.1).open == ["asia"]


def test_attempt_without_answer_is_given_up() -> None:
    r = router({"europe": ("eu",)})
    assert r.step(0.0).wake_at == 5.0
    plan = r.step(5.0)
    assert plan.close == ["eu"]
    assert r.reason("eu") == "no connection within 5 s"
    assert plan.wake_at is not None
    assert plan.wake_at > 5.0


def test_unwanted_link_lingers_then_closes() -> None:
    r = router({"europe": ("eu",)})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.step(0.1)
    r.use({"canada": ("us",)})
    assert r.step(19.0).close == []
    assert r.step(20.1).close == ["eu"]


def test_backoff_grows_to_its_limit_and_starts_again_after_a_stable_connection() -> None:
    r = router({"europe": ("eu",)}, backoff_min_s=0.1, backoff_max_s=4.0)
    now, waits = 0.0, []
    while now < 200.0:
        assert r.step(now).open == ["eu"]
        r.lost("eu", now, "refused")
        wake = r.step(now).wake_at
        assert wake is not None
        waits.append(wake - now)
        now = wake
        assert waits[-1] <= max(1.0, now / 20)
    assert max(waits) <= 4.0
    assert min(waits) >= 0.1
    assert max(waits) > 2.0
    r.step(now)
    r.connected("eu", now)
    r.lost("eu", now + 6.0, "gone")
    wake = r.step(now + 6.0).wake_at
    assert wake is not None
    assert wake - (now + 6.0) <= 0.5


def test_broker_that_accepts_and_kicks_is_not_hammered() -> None:
    r = router({"europe": ("eu",)}, backoff_max_s=10.0)
    now, opens = 0.0, 0
    while now < 600.0:
        plan = r.step(now)
        if plan.open:
            opens += 1
            r.connected("eu", now)
            r.lost("eu", now + 0.01, "kicked")
        now = max(now + 0.01, plan.wake_at or 0.0)
    assert opens < 200


def test_routes_follow_a_changed_policy_though_the_old_link_lives() -> None:
    r = router({"canada": ("us", "eu")})
    r.step(0.0)
    r.connected("us", 0.1)
    r.connected("eu", 0.1)
    r.step(0.1)
    r.use({"canada": ("eu",)})
    assert r.step(0.2).moves == [Move("canada", "us", "eu", "policy")]


def connected_pair() -> Router:
    r = router({"atlantic": ("eu", "us")})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.connected("us", 0.1)
    assert r.step(0.1).routes["atlantic"] == Route("eu", "us")
    return r


def test_suspected_endpoint_is_left_without_being_closed_and_is_no_standby() -> None:
    r = connected_pair()
    r.suspect("eu", 20.0, "silent")
    plan = r.step(20.0)
    assert plan.moves == [Move("atlantic", "eu", "us", "silent")]
    assert plan.routes["atlantic"] == Route("us")
    assert plan.close == []
    r.answered("eu", 21.0, 0.002)
    assert r.step(21.0).routes["atlantic"] == Route("us", "eu")
    assert r.step(20.9 + WOBBLE * 10.0).moves == []
    assert r.step(21.0 + WOBBLE * 10.0).moves == [Move("atlantic", "us", "eu", "preferred")]


def test_suspect_that_was_dead_and_connects_anew_proves_itself_sooner_than_a_slow_one() -> None:
    r = connected_pair()
    r.suspect("eu", 20.0, "silent")
    r.lost("eu", 23.0, "silent for 3 s")
    r.step(23.0)
    r.connected("eu", 24.0)
    assert r.step(33.9).moves == []
    assert r.step(34.0).moves == [Move("atlantic", "us", "eu", "preferred")]


def test_suspected_standby_is_dropped_and_the_next_endpoint_is_opened() -> None:
    r = router({"any": ("eu", "us", "asia")})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.connected("us", 0.1)
    r.step(0.1)
    r.suspect("us", 1.0, "silent")
    plan = r.step(1.0)
    assert (plan.routes["any"], plan.open) == (Route("eu"), ["asia"])


def test_suspected_endpoint_stays_in_use_where_there_is_no_other() -> None:
    r = router({"europe": ("eu",), "atlantic": ("eu", "us")})
    r.step(0.0)
    r.connected("eu", 0.1)
    r.step(0.1)
    r.suspect("eu", 1.0, "silent")
    plan = r.step(1.0)
    assert plan.routes["europe"] == plan.routes["atlantic"] == Route("eu")
    r.connected("us", 1.5)
    plan = r.step(1.5)
    assert (plan.routes["europe"], plan.routes["atlantic"]) == (Route("eu"), Route("us"))


def test_gap_while_it_proves_itself_begins_the_proof_anew_and_doubles_it() -> None:
    r = connected_pair()
    for proof_s, lost_at in ((10.0, 20.0), (20.0, 25.0), (40.0, 60.0), (80.0, 130.0)):
        r.lost("eu", lost_at, "reset")
        assert r.step(lost_at).routes["atlantic"].endpoint == "us"
        r.connected("eu", lost_at + 1.0)
        if lost_at != 20.0:
            assert r.step(lost_at + 0.9 + proof_s).routes["atlantic"].endpoint == "us"
            assert r.step(lost_at + 1.0 + proof_s).routes["atlantic"].endpoint == "eu"
    r.lost("eu", 1_000.0, "reset")  # long after: a new beginning
    r.step(1_000.0)
    r.connected("eu", 1_001.0)
    assert r.step(1_011.0).routes["atlantic"].endpoint == "eu"


@pytest.mark.parametrize("gap_s", [0.5, 5.0, 60.0, 125.0])
def test_slow_link_changes_endpoints_at_most_once_a_minute(gap_s: float) -> None:
    """However often the preferred one is silent for a moment: two moves need WOBBLE times `failback_s`."""
    r, moves, now = connected_pair(), 0, 20.0
    while now < 20.0 + 1_800.0:
        r.suspect("eu", now, "silent")
        moves += len(r.step(now).moves)
        r.answered("eu", now + 0.3)
        moves += len(r.step(now + 0.3).moves)
        now += gap_s
        moves += len(r.step(now).moves)
    assert 1 <= moves <= 30


def test_equal_ranks_are_chosen_by_round_trip_and_do_not_move_a_lane() -> None:
    r = router({})
    r.use({"any": [("eu", "us"), "asia"]})
    r.step(0.0)
    for name, round_trip_s in (("eu", 0.2), ("us", 0.01)):
        r.connected(name, 0.1)
        r.answered(name, 0.3, round_trip_s)
    assert r.step(0.3).routes["any"] == Route("us", "eu")
    r.answered("us", 1.0, 0.5)
    assert r.step(1.0).moves == []


def test_endpoint_whose_lanes_are_served_elsewhere_is_called_with_less_hurry() -> None:
    def waits(lanes: dict[str, tuple[str, ...]]) -> float:
        total = 0.0
        for seed in range(200):
            r = Router(CONFIG, random.Random(seed).uniform)
            r.use(lanes)
            r.step(0.0)
            for name in ("eu", "us"):
                r.connected(name, 0.1)
            r.step(0.1)
            r.lost("eu", 10.0, "kicked")
            r.step(10.0)
            total += r._endpoints["eu"].retry_at - 10.0
        return total / 200

    assert waits({"europe": ("eu",)}) < 0.5
    assert waits({"atlantic": ("eu", "us")}) > 1.0


def test_every_fourth_attempt_is_patient_and_a_known_round_trip_counts() -> None:
    r = router({"europe": ("eu",)}, connect_timeout_s=2.0)
    now, given_s = 0.0, []
    while len(given_s) < 8:
        assert r.step(now).open == ["eu"]
        wake = r.step(now).wake_at
        assert wake is not None
        given_s.append(wake - now)
        now = r.step(wake).wake_at or 0.0
    assert given_s == pytest.approx([2.0, 2.0, 2.0, 8.0, 2.0, 2.0, 2.0, 8.0])
    r.step(now)
    r.connected("eu", now)
    r.answered("eu", now, 0.7)
    r.lost("eu", now + 10.0, "gone")
    now = r.step(now + 10.0).wake_at or 0.0
    r.step(now)
    assert r.step(now).wake_at == pytest.approx(now + 5.6)


def test_fleet_that_is_kicked_at_once_comes_back_without_a_stampede(seed: int) -> None:
    """300 devices with no other endpoint, a broker that was away for a minute and then takes 30 connections a second."""
    rng, kicked_at, back_at, takes_per_s = random.Random(seed), 100.0, 160.0, 30
    devices = []
    for _ in range(300):
        r = Router(RoutingConfig(endpoints=("eu",)), rng.uniform)
        r.use({"europe": ("eu",)})
        r.step(0.0)
        r.connected("eu", 0.1)
        r.step(0.1)
        r.lost("eu", kicked_at, "kicked")
        devices.append((r.step(kicked_at).wake_at or 0.0, rng.random(), r))
    heapq.heapify(devices)
    attempts: dict[int, int] = defaultdict(int)
    taken: dict[int, int] = defaultdict(int)
    while devices and devices[0][0] < back_at + 120.0:
        now, tie, r = heapq.heappop(devices)
        if r.step(now).open:
            attempts[int(now)] += 1
            if now >= back_at and taken[int(now)] < takes_per_s:
                taken[int(now)] += 1
                r.connected("eu", now)
                continue
            r.lost("eu", now, "refused")
        heapq.heappush(devices, (r.step(now).wake_at or 0.0, tie, r))
    assert not devices, "some never came back"
    assert max(count for second, count in attempts.items() if second > kicked_at + 20) < 750
    assert max(count for second, count in attempts.items() if second >= back_at) < 330
    assert max(taken) < back_at + 30


LANES = {"europe": ("eu",), "canada": ("us", "eu"), "atlantic": ("eu", "us"), "any": ("asia", "us", "eu"), "nowhere": ()}
NAMES = st.sampled_from(["eu", "us", "asia"])
EVENTS = st.lists(
    st.tuples(st.floats(0.0, 8.0), st.sampled_from(["up", "down", "use", "none", "silent", "answer"]), NAMES, st.integers(0, 31)),
    max_size=80,
)


@settings(max_examples=200, deadline=None)
@given(events=EVENTS, seed=st.integers(0, 2**16))
def test_no_event_sequence_breaks_the_rules(events: list[tuple[float, str, str, int]], seed: int) -> None:
    r = Router(CONFIG, random.Random(seed).uniform)
    lanes = dict(LANES)
    r.use(lanes)
    now = 0.0
    state = dict.fromkeys(CONFIG.endpoints, "closed")
    up_since: dict[str, float] = {}
    failed: set[str] = set()
    silent: set[str] = set()
    opened: dict[str, list[float]] = defaultdict(list)
    before: dict[str, str | None] = {}
    for wait_s, kind, name, bits in events:
        now += wait_s
        if kind == "up" and state[name] == "connecting":
            state[name], up_since[name] = "up", now
            r.connected(name, now)
        elif kind == "down" and state[name] != "closed":
            state[name] = "closed"
            failed.add(name)
            silent.discard(name)
            r.lost(name, now, "test")
        elif kind == "silent" and state[name] == "up":
            failed.add(name)
            silent.add(name)
            r.suspect(name, now, "test")
        elif kind == "answer" and state[name] == "up":
            r.answered(name, now, bits / 1000)
            if name in silent:
                up_since[name] = now
                silent.discard(name)
        elif kind == "use":
            lanes = {lane: allowed for i, (lane, allowed) in enumerate(LANES.items()) if bits >> i & 1}
            r.use(lanes)
        plan = r.step(now)
        _apply(plan, state, opened, failed, now)
        silent.intersection_update(e for e in state if state[e] == "up")
        assert plan.wake_at is None or plan.wake_at > now
        for lane, allowed in lanes.items():
            route = plan.routes[lane]
            usable = [e for e in allowed if state[e] == "up"]
            good = [e for e in usable if e not in silent]
            assert (route.endpoint in (good or usable)) if usable else route.endpoint is None
            assert route.standby is None or (route.standby in good and route.standby != route.endpoint)
            old = before.get(lane)
            if old in good and route.endpoint != old:
                assert allowed.index(str(route.endpoint)) < allowed.index(str(old))
                assert route.endpoint not in failed or now - up_since[str(route.endpoint)] >= CONFIG.failback_s
        before = {lane: route.endpoint for lane, route in plan.routes.items()}
    for times in opened.values():
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert all(gap >= CONFIG.backoff_min_s - 1e-9 for gap in gaps)


def _apply(plan: Plan, state: dict[str, str], opened: dict[str, list[float]], failed: set[str], now: float) -> None:
    carrying = {route.endpoint for route in plan.routes.values()}
    for name in plan.close:
        assert name not in carrying
        if state[name] == "connecting":
            failed.add(name)
        state[name] = "closed"
    for name in plan.open:
        assert state[name] == "closed"
        state[name] = "connecting"
        opened[name].append(now)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**16), alive=st.sets(st.sampled_from(["eu", "us", "asia"]), min_size=1))
def test_an_allowed_endpoint_that_answers_is_found_and_used(seed: int, alive: set[str]) -> None:
    r = Router(CONFIG, random.Random(seed).uniform)
    r.use(LANES)
    now = 0.0
    for _ in range(200):
        plan = r.step(now)
        for name in plan.open:
            if name in alive:
                r.connected(name, now)
            else:
                r.lost(name, now, "dead")
        now += 0.5
    routes = r.step(now).routes
    for lane, allowed in LANES.items():
        assert routes[lane].endpoint == next((e for e in allowed if e in alive), None)
