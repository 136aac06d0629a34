"""The real uplink in a simulated world: seeded faults, and rules that are checked at every turn."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from edge_agent.uplink import UplinkConfig
from tests.edge_agent.simulated_uplink import Mode, World

LANES = {"atlantic": ("eu", "us"), "europe": ("eu",), "canada": ("us", "eu"), "pacific": ("asia", "us"), "nowhere": ()}
NAMES = ("eu", "us", "asia")


def test_nothing_goes_astray_whatever_the_endpoints_do(seed: int) -> None:
    _storm(seed, turns=20_000)


@pytest.mark.long
def test_nothing_goes_astray_whatever_the_endpoints_do_long(seed: int) -> None:
    for run in range(int(os.environ.get("FENCELINE_RUNS", "100"))):
        _storm(seed + run, turns=20_000)


def _storm(seed: int, turns: int) -> None:
    """Random faults; then all is well again, and everything must be delivered."""
    print(f"world seed {seed}")
    world, rng = World(seed, dict(LANES), NAMES), random.Random(seed)
    while world.turns < turns:
        endpoint = rng.choice(NAMES)
        match rng.randrange(8):
            case 0:
                world.kill(endpoint)
            case 1 | 2 | 3:
                world.endpoints[endpoint].mode = rng.choice(list(Mode))
            case 4:
                world.endpoints[endpoint].loss = rng.choice([0.0, 0.0, 0.05, 0.3])
                world.endpoints[endpoint].round_trip_s = rng.choice([0.001, 0.05, 0.6])
            case 5:
                world.endpoints[endpoint].bytes_per_s = rng.choice([10e6, 10e6, 2e3])
            case _:
                lane = rng.choice(list(LANES))
                world.feed(lane, rng.choice([0.01, 0.05, 0.3]), rng.choice([100, 600, 20_000]), world.now + rng.uniform(0.1, 2.0))
        if rng.random() < 0.3:
            world.put(rng.choice(list(LANES)), 300, offer=False)
        world.run(rng.choice([0.05, 0.5, 3.0]))
    for site in world.endpoints.values():
        site.mode, site.loss, site.round_trip_s, site.bytes_per_s = Mode.UP, 0.0, 0.002, 10e6
    world.run(400.0 + world.on_links_s())
    assert {lane for lane, blocks in world.store.blocks.items() if blocks} <= {"nowhere"}
    routes = world.uplink._sending.plan.routes
    assert all(routes[lane].endpoint == LANES[lane][0] for lane in routes if LANES[lane])


def _pair(seed: int, **changes: Any) -> World:
    """One lane, two endpoints, both connected and measured."""
    world = World(seed, {"atlantic": ("eu", "us")}, ("eu", "us"), **changes)
    world.uplink.stay("atlantic")
    world.run(5.0)
    return world


def _delays(world: World, since: float) -> list[float]:
    """From stored to a broker, of the blocks stored since then."""
    return sorted(world.arrived_at[key] - at for key, at in world.stored_at.items() if at >= since)


@pytest.mark.parametrize("mode", [Mode.BLACK_HOLE, Mode.DEAF, Mode.DEAD])
def test_no_block_waits_longer_than_the_deadline_when_an_endpoint_fails(seed: int, mode: Mode) -> None:
    world = _pair(seed)
    for _ in range(5):
        since = world.now
        world.feed("atlantic", 0.02, 300, since + 6.0)
        world.run(world.rng.uniform(0.5, 1.0))
        fault_at = world.now
        if mode is Mode.DEAD:
            world.kill("eu")
        world.endpoints["eu"].mode = mode
        world.run(2.0)
        answered = min(at for key, at in world.arrived_at.items() if world.stored_at[key] > fault_at)
        assert answered - fault_at < 0.1
        assert world.uplink.status().lanes["atlantic"].endpoint == "us"
        world.endpoints["eu"].mode = Mode.UP
        world.run(30.0)
        assert max(_delays(world, since)) < 0.1
        assert world.uplink.status().lanes["atlantic"].endpoint == "eu"
    assert world.waiting() == 0


def test_idle_device_notices_a_black_hole_before_its_next_block(seed: int) -> None:
    world = _pair(seed)
    world.endpoints["eu"].mode = Mode.BLACK_HOLE
    world.run(2.5)
    assert world.uplink.status().lanes["atlantic"].endpoint == "us"
    world.put("atlantic", 300)
    world.run(0.1)
    assert ("atlantic", 1) in world.arrived_at
    assert world.uplink.status().hedges == 0


def test_nothing_is_hedged_to_a_standby_that_does_not_answer(seed: int) -> None:
    world = _pair(seed)
    world.endpoints["us"].mode = Mode.BLACK_HOLE
    world.run(2.5)
    status = world.uplink.status()
    assert (status.lanes["atlantic"].standby, status.endpoints["us"].suspected) == (None, True)
    world.endpoints["eu"].mode = Mode.BLACK_HOLE
    world.feed("atlantic", 0.02, 300, world.now + 2.0)
    world.run(3.0)
    assert world.uplink.status().hedges == 0
    world.endpoints["us"].mode = Mode.UP
    world.run(10.0)
    assert world.waiting() == 0


def test_a_lossy_link_is_kept(seed: int) -> None:
    """50 ms round trip and 5 % loss in both directions: late blocks are hedged, lanes hardly move, and nothing piles up."""
    world = _pair(seed, failback_s=UplinkConfig.failback_s)
    for site in world.endpoints.values():
        site.round_trip_s, site.loss = 0.05, 0.05
    minutes = 3
    world.feed("atlantic", 0.02, 300, world.now + 60 * minutes)
    for _ in range(minutes):
        world.run(60.0)
        assert world.waiting() < 100
    assert len([1 for _, event, _ in world.moves if event in ("failover", "failback")]) <= minutes
    status = world.uplink.status()
    assert status.hedges > 0
    assert status.duplicate_bytes < 0.1 * status.bytes_sent + world.limits.hedge_burst_bytes


def test_satellite_link_is_not_taken_for_a_dead_one(seed: int) -> None:
    world = World(seed, {"atlantic": ("eu",)}, ("eu",))
    world.endpoints["eu"].round_trip_s, world.endpoints["eu"].bytes_per_s = 0.7, 4_000
    world.feed("atlantic", 1.0, 600, 160.0)
    world.at(120.0, lambda: world.put("atlantic", 100_000))  # takes 25 seconds
    world.run(200.0)
    assert world.waiting() == 0
    assert len(world.endpoints["eu"].attempts) <= 8
    assert world.uplink.status().lanes.get("atlantic") is None or world.uplink.status().endpoints["eu"].connected


@pytest.mark.parametrize("mode", [Mode.BLACK_HOLE, Mode.DEAD])
def test_only_endpoint_is_in_use_again_soon_after_an_outage(seed: int, mode: Mode) -> None:
    waits = []
    for run in range(3):
        world = World(seed + run, {"atlantic": ("eu",)}, ("eu",))
        world.feed("atlantic", 0.1, 300, world.now + 46.0)
        world.run(6.0)
        if mode is Mode.DEAD:
            world.kill("eu")
        world.endpoints["eu"].mode = mode
        world.run(20.0)
        world.endpoints["eu"].mode, back_at = Mode.UP, world.now
        world.run(20.0)
        waits.append(min(at for at in world.arrived_at.values() if at >= back_at) - back_at)
        world.run(2.0)
        assert world.waiting() == 0
    assert max(waits) < (1.1 if mode is Mode.DEAD else 8.1)  # at worst, an attempt that began just before is waited for
    assert sorted(waits)[1] < 2.2


def test_live_blocks_are_not_held_up_behind_the_backlog_of_a_slow_link(seed: int) -> None:
    world = World(seed, {"atlantic": ("eu",)}, ("eu",))
    world.endpoints["eu"].bytes_per_s, world.endpoints["eu"].round_trip_s = 100_000, 0.05
    for _ in range(3_000):
        world.put("atlantic", 1_000, offer=False)
    world.run(5.0)
    since = world.now
    world.feed("atlantic", 0.1, 300, since + 10.0)
    world.run(40.0)
    assert world.waiting() == 0
    assert max(_delays(world, since)) < 1.5  # backlog_bytes_min, and what the link holds


def test_backlog_is_throttled_and_fair_between_zones_by_bytes(seed: int) -> None:
    world = World(seed, {"europe": ("eu",), "canada": ("eu",)}, ("eu",), replay_bytes_per_s=100_000.0)
    for _ in range(1_000):
        world.put("europe", 1_000, offer=False)
    for _ in range(100):
        world.put("canada", 10_000, offer=False)
    began = world.now
    world.run(8.0)
    sent = {lane: sum(1 for key in world.arrived_at if key[0] == lane) for lane in ("europe", "canada")}
    total = 1_000 * sent["europe"] + 10_000 * sent["canada"]
    assert total <= 100_000 * (world.now - began) + 120_000
    assert total > 500_000
    assert abs(1_000 * sent["europe"] - 10_000 * sent["canada"]) <= 50_000
