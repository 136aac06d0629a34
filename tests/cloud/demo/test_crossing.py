"""The crossing of a border during an outage, as the demonstration shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud.demo.crossing import Outage
from cloud.demo.journey import Reading
from edge_agent.core.zones import Zones, parse_zones

PROJECT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones((PROJECT / "contracts/zones.geojson").read_bytes())


def reading(hour: int, zone: str, device: str = "plane-01") -> Reading:
    return Reading((device, "e", hour), hour, zone, ())


FLIGHT = [reading(h, zone) for h, zone in enumerate(["europe"] * 3 + ["switzerland", "atlantic", "atlantic", "united-states"], 1)]


def test_what_only_the_lost_region_may_hold_waits_and_what_came_after_flows(zones: Zones) -> None:
    outage = Outage("eu", FLIGHT, zones)
    stored = {FLIGHT[0].key: "eu", FLIGHT[4].key: "us", FLIGHT[6].key: "us"}
    (crossing,) = outage.look(stored)
    assert (crossing.waiting, crossing.flowed) == ({"europe": 2, "switzerland": 1}, {"atlantic": 1, "united-states": 1})
    assert "plane-01 crossed a border while 'eu' was down: 2 of europe, 1 of switzerland wait" in crossing.sentence()
    outage.finish({**stored, FLIGHT[1].key: "eu", FLIGHT[2].key: "eu", FLIGHT[3].key: "us"})
    assert not crossing.complete and crossing.delivered == {"europe": 2}
    outage.finish({**stored, **{r.key: "eu" for r in FLIGHT[1:4]}})
    assert crossing.complete


def test_an_aircraft_that_stays_or_has_nothing_waiting_has_not_crossed(zones: Zones) -> None:
    at_home = [reading(h, "europe", "plane-02") for h in range(1, 5)]
    abroad = [reading(h, "united-states", "plane-03") for h in range(1, 5)]
    outage = Outage("eu", at_home + abroad, zones)
    assert outage.look({at_home[0].key: "eu", **{r.key: "us" for r in abroad}}) == []


def test_what_is_newer_than_all_that_is_stored_is_not_said_to_wait(zones: Zones) -> None:
    outage = Outage("eu", [*FLIGHT, reading(8, "europe")], zones)
    (crossing,) = outage.look({r.key: "us" for r in FLIGHT[4:]})
    assert crossing.waiting == {"europe": 3, "switzerland": 1}  # hour 8 may not have been taken yet
