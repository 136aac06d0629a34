"""Border drives through the decisions alone: the track, the policy and the router, against the true track.

`make test` drives DRIVES of them; `make test-long` 10,000. FENCELINE_RUNS sets another count.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract.errors import Reason
from edge_agent.core.fix import Position, Rules
from edge_agent.core.routing import Router, RoutingConfig
from edge_agent.core.track import Track
from edge_agent.core.zones import Zones, parse_zones
from tests.simulators.drives import SPEED_M_S_MAX, START_S, Sample, allowed, drive

ZONES_FILE = Path(__file__).parents[2] / "contracts/zones.geojson"
DRIVES, DRIVES_LONG = 200, int(os.environ.get("FENCELINE_RUNS") or 10_000)
ENDPOINTS = ("eu", "us")
NOW_US = (START_S + 2 * 10**6) * 1_000_000  # all drives are over by then; what is later is from the future


class Device:
    """A device in a drive: batches go through a real Track, lanes through a real Router whose endpoints come and go."""

    def __init__(self, zones: Zones, chance: random.Random) -> None:
        self.zones, self.chance = zones, chance
        self.track = Track(zones, Rules(speed_m_s_max=SPEED_M_S_MAX, max_age_s=900.0, hysteresis_m=200.0, null_island_refused=True))
        self.router = Router(RoutingConfig(endpoints=ENDPOINTS), uniform=chance.uniform)
        self.up = dict.fromkeys(ENDPOINTS, False)
        self.waiting: dict[str, list[Sample]] = {}
        self.refused: Counter[Reason] = Counter()
        self.now = 0.0

    def take(self, batch: list[Sample | Position]) -> None:
        """As intake does: fixes first, then the readings by event time."""
        for event in batch:
            if isinstance(event, Position):
                reason = self.track.take(event, NOW_US).reason
                self.refused.update([reason] if reason else [])
        samples = [e for e in batch if isinstance(e, Sample)]
        lanes = self.track.stamp(np.array([s.time_us for s in samples], np.int64)).tolist()
        for sample, lane in zip(samples, lanes, strict=True):
            self.waiting.setdefault(lane, []).append(sample)

    def send(self) -> list[tuple[str, Sample]]:
        """One step of the router; what which region has acknowledged by it."""
        self.now += self.chance.uniform(0, 20)
        self.router.use({lane: self.zones.endpoints(lane) for lane in self.waiting})
        plan = self.router.step(self.now)
        for name in plan.open:
            if self.chance.random() < 0.7:
                self.router.connected(name, self.now)
                self.up[name] = True
            else:
                self.router.lost(name, self.now, "refused")
        for name in plan.close:
            self.up[name] = False
        for name in ENDPOINTS:  # outages
            if self.up[name] and self.chance.random() < 0.15:
                self.router.lost(name, self.now, "killed")
                self.up[name] = False
        acknowledged = []
        for lane, route in plan.routes.items():
            for target in {route.endpoint, route.standby}:  # a late block goes to the standby too
                if target is not None and self.up[target]:
                    acknowledged += [(target, sample) for sample in self.waiting.pop(lane, [])]
        return acknowledged


def run(zones: Zones, count: int, seed: int) -> Counter[str]:
    chance, totals = random.Random(seed), Counter[str]()
    for _ in range(count):
        drive_seed = chance.randrange(2**63)
        trip = drive(zones, drive_seed)
        device = Device(zones, random.Random(drive_seed))
        events, arrived = list(trip.events), []
        while events:
            size = device.chance.randint(1, 12)
            batch, events = events[:size], events[size:]
            device.take(batch)
            arrived += device.send()
        for _ in range(30):
            arrived += device.send()
        for region, sample in arrived:
            assert region in allowed(zones, sample), f"seed {drive_seed}: {region} acknowledged what was captured at {sample}"
        totals.update(readings=len(trip.samples), acknowledged=len(arrived), spoofed=trip.spoofed, lost=trip.lost)
        totals.update(deliverable=sum(bool(allowed(zones, s)) for s in trip.samples))
        totals.update({str(reason): number for reason, number in device.refused.items()})
        totals.update(crossings=len({zones.locate(s.lat, s.lon) for s in trip.samples}) > 1)
    print(f"{count} drives, seed {seed}: {dict(totals)}")
    return totals


def check(count: int, seed: int) -> None:
    totals = run(parse_zones(ZONES_FILE.read_bytes()), count, seed)
    assert totals["crossings"] > 0.3 * count  # the test would prove nothing otherwise
    assert totals["acknowledged"] > 0.3 * totals["deliverable"]
    assert min(totals[kind] for kind in ("spoofed", "lost", "impossible_jump", "null_island", "out_of_range", "future_fix")) > 0


def test_no_region_acknowledges_what_the_true_place_of_capture_forbids(seed: int) -> None:
    check(DRIVES, seed)


@pytest.mark.long
def test_no_region_acknowledges_what_the_true_place_of_capture_forbids_in_10000_drives(seed: int) -> None:
    check(DRIVES_LONG, seed)
