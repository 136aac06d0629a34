"""Tracks and journeys: every zone is visited, every reading has one true zone, and no fix leads nowhere."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from cloud.demo.journey import Aircraft, true_zone
from cloud.demo.simulator import FIELDS, build_engine
from cloud.demo.track import EARTH_M, SPEED_M_S, TOURS, ZURICH, Place, Track, _angle
from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ContractError
from edge_agent.core.zones import Zones, parse_zones

ZONES = Path(__file__).parents[3] / "contracts" / "zones.geojson"


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(ZONES.read_bytes())


@pytest.mark.parametrize("tour", TOURS)
def test_an_aircraft_never_jumps_and_comes_home(tour: tuple[Place, ...]) -> None:
    track = Track(tour)
    assert track.position(0) == (tour[0].lat, tour[0].lon)
    step_s = 600.0
    for i in range(400):
        here, there = Place(*track.position(i * step_s)), Place(*track.position((i + 1) * step_s))
        assert _angle(here, there) * EARTH_M <= SPEED_M_S * step_s * 1.001


@pytest.mark.parametrize("tour", TOURS)
def test_a_journey_crosses_every_zone_and_uncertain_fixes_leave_an_endpoint(tour: tuple[Place, ...], zones: Zones) -> None:
    aircraft = Aircraft("plane-01", Track(tour), zones)
    lanes: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for i in range(6):
        for message in aircraft.fly(build_engine(f"sim-{i}", 1)):
            if message.reading is None:
                fix = msgspec.json.decode(message.payload)
                lanes[zones.locate(fix["lat"], fix["lon"], fix["accuracy_m"])] += 1
            else:
                true[message.reading.zone] += 1
    assert set(true) == {z.name for z in zones.zones}
    assert NOWHERE not in lanes
    assert all(zones.endpoints(lane) for lane in lanes)
    assert any("_" in lane for lane in lanes)


def test_a_position_goes_before_its_reading_at_the_same_time(zones: Zones) -> None:
    aircraft = Aircraft("plane-01", Track(TOURS[0]), zones)
    first = aircraft.fly(build_engine("sim-1", 1))
    second = aircraft.fly(build_engine("sim-2", 1))
    times = []
    for fix, message in zip(first[::2] + second[::2], first[1::2] + second[1::2], strict=True):
        position, reading = msgspec.json.decode(fix.payload), msgspec.json.decode(message.payload)
        assert fix.reading is None and message.reading is not None
        assert position["ts"] == reading["ts"] == message.reading.key[2] / 1e6
        assert tuple(reading[name] for name in FIELDS) == message.reading.values
        times.append(reading["ts"])
    assert times == sorted(set(times)), "the clock of a gateway goes on from engine to engine"


def test_a_true_position_on_a_border_or_outside_is_refused(zones: Zones) -> None:
    assert true_zone(zones, ZURICH.lat, ZURICH.lon) == "switzerland"
    with pytest.raises(ContractError, match="must lie inside one zone"):
        true_zone(zones, 47.17, 6.86)  # a corner of the Swiss hole
    with pytest.raises(ContractError, match="must lie inside one zone"):
        true_zone(zones, -40.0, 0.0)
