"""The oracle finds what was done to the lake, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloud.demo.journey import Aircraft, Reading
from cloud.demo.oracle import LakeRow, judge
from cloud.demo.simulator import build_engine
from cloud.demo.track import TOURS, Track
from edge_agent.core.zones import Zones, parse_zones

ZONES = Path(__file__).parents[3] / "contracts" / "zones.geojson"


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(ZONES.read_bytes())


@pytest.fixture(scope="module")
def readings(zones: Zones) -> list[Reading]:
    messages = Aircraft("plane-01", Track(TOURS[0]), zones).fly(build_engine("sim-1", 3))
    return [m.reading for m in messages if m.reading is not None]


@pytest.fixture
def rows(readings: list[Reading], zones: Zones) -> list[LakeRow]:
    return [LakeRow(r.key, r.cycle, r.zone, zones.endpoints(r.zone)[0], r.values) for r in readings]


def test_a_true_lake_breaks_no_promise(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    verdict = judge(readings, rows, zones)
    assert verdict.broken == []
    assert verdict.published == verdict.rows == len(readings)


def test_a_missing_row_is_lost(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    verdict = judge(readings, rows[1:], zones)
    assert verdict.lost == [readings[0].key]
    assert len(verdict.broken) == 1 and "1 acknowledged readings are not in the lake" in verdict.broken[0]


def test_a_second_row_is_a_duplicate_even_in_another_lane(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    verdict = judge(readings, [*rows, replace(rows[0], lane="europe_switzerland")], zones)
    assert verdict.duplicates == [readings[0].key]
    assert (verdict.lost, verdict.out_of_zone) == ([], [])


def test_a_row_in_a_forbidden_region_is_out_of_zone(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    assert rows[0].lane == "switzerland"
    verdict = judge(readings, [replace(rows[0], region="us"), *rows[1:]], zones)
    assert verdict.out_of_zone == [readings[0].key]


def test_a_row_in_the_lane_of_another_zone_is_out_of_zone(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    verdict = judge(readings, [replace(rows[0], lane="europe"), *rows[1:]], zones)
    assert verdict.out_of_zone == [readings[0].key], "europe is not Switzerland, though both may use the same endpoint"


def test_a_row_in_an_uncertain_lane_that_holds_its_zone_is_right(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    assert judge(readings, [replace(rows[0], lane="europe_switzerland"), *rows[1:]], zones).broken == []


def test_a_changed_digit_is_found(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    values = (*rows[3].values[:-1], rows[3].values[-1] + 1e-9)
    assert judge(readings, [*rows[:3], replace(rows[3], values=values), *rows[4:]], zones).altered == [readings[3].key]
    assert judge(readings, [*rows[:3], replace(rows[3], cycle=99), *rows[4:]], zones).altered == [readings[3].key]


def test_a_row_that_nobody_measured_is_foreign(readings: list[Reading], rows: list[LakeRow], zones: Zones) -> None:
    verdict = judge(readings, [*rows, replace(rows[0], key=("plane-02", "sim-1", 5))], zones)
    assert verdict.foreign == [("plane-02", "sim-1", 5)]
