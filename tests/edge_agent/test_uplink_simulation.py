"""The real uplink in a simulated world: seeded faults, and rules that are checked at every turn."""

from __future__ import annotations

import os
import random

import pytest

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
    world.run(400.0)
    assert {lane for lane, blocks in world.store.blocks.items() if blocks} <= {"nowhere"}
    routes = world.uplink._plan.routes
    assert all(routes[lane].endpoint == LANES[lane][0] for lane in routes if LANES[lane])
