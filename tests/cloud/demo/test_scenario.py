"""Scenarios: every engine flies once, and a seed names the whole of it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cloud.demo.scenario import Scenario, simulated
from edge_agent.contract.block import NOWHERE
from edge_agent.core.zones import Zones, parse_zones

ZONES = Path(__file__).parents[3] / "contracts" / "zones.geojson"


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(ZONES.read_bytes())


@pytest.fixture(scope="module")
def scenario(zones: Zones) -> Scenario:
    return simulated(seed=7, devices=5, engines=11, zones=zones)


def test_every_engine_flies_once_and_readings_are_counted(scenario: Scenario) -> None:
    collected = [m.reading.key for g in scenario.gateways for m in g.collect if m.reading is not None]
    scored = [m.reading.key for g in scenario.gateways for m in g.score if m.reading is not None]
    assert len({*collected, *scored}) == scenario.readings("collect") + scenario.readings("score")
    assert len(collected) == sum(e.life for e in scenario.train)
    assert {key[1] for key in collected} == {e.name for e in scenario.train}
    assert {key[1] for key in scored} == {e.name for e in scenario.test}


def test_a_seed_names_the_whole_scenario(scenario: Scenario, zones: Zones) -> None:
    again = simulated(seed=7, devices=5, engines=11, zones=zones)
    assert [[m.payload for m in g.collect + g.score] for g in again.gateways] == [
        [m.payload for m in g.collect + g.score] for g in scenario.gateways
    ]


def test_the_clock_of_a_gateway_never_goes_back(scenario: Scenario) -> None:
    for gateway in scenario.gateways:
        times = [m.reading.key[2] for m in [*gateway.collect, *gateway.score] if m.reading is not None]
        assert times == sorted(set(times))


@pytest.mark.parametrize("seed", [1, 2])
def test_no_fix_of_a_big_fleet_leads_nowhere(zones: Zones, seed: int) -> None:
    for gateway in simulated(seed, devices=8, engines=8, zones=zones).gateways:
        for message in [*gateway.collect, *gateway.score]:
            if message.reading is None:
                fix = msgspec.json.decode(message.payload)
                lane = zones.locate(fix["lat"], fix["lon"], fix["accuracy_m"])
                assert lane != NOWHERE and zones.endpoints(lane), fix
