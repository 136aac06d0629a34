"""The zone policy: positions, borders, uncertainty."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ContractError
from edge_agent.core.zones import Zones, join, parse_zones


def square(west: float, south: float, east: float, north: float) -> list[list[float]]:
    return [[west, south], [east, south], [east, north], [west, north], [west, south]]


def policy(**features: tuple[list[Any], list[str]]) -> bytes:
    return json.dumps(
        {
            "type": "FeatureCollection",
            "features": [
                {"type": "Feature", "properties": {"zone": name, "endpoints": ends}, "geometry": {"type": "Polygon", "coordinates": rings}}
                for name, (rings, ends) in features.items()
            ],
        }
    ).encode()


HOLE = square(4, 4, 6, 6)[::-1]


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(
        policy(
            west=([square(0, 0, 10, 10), HOLE], ["eu", "us"]),
            inner=([square(4, 4, 6, 6)], ["ch"]),
            east=([square(10, 0, 20, 10)], ["us", "eu"]),
            date=([square(170, -10, 180, 10)], ["us"]),
            north=([square(-180, 80, 180, 90)], ["eu"]),
        )
    )


@pytest.mark.parametrize(
    ("lat", "lon", "accuracy_m", "lane"),
    [
        (1, 1, 0, "west"),
        (5, 5, 0, "inner"),  # the hole belongs to the zone that fills it
        (5, 10, 0, "east_west"),  # on the border
        (5, 9.99, 5_000, "east_west"),
        (5, 9.9, 5_000, "west"),
        (5, 3.99, 3_000, "inner_west"),
        (0.01, 1, 5_000, NOWHERE),  # the circle leaves every zone
        (50, 50, 0, NOWHERE),
        (0, 180, 0, "date"),
        (0, -180, 0, "date"),  # the same meridian
        (0, 179.99, 5_000, NOWHERE),  # the circle passes the antimeridian into no zone
        (89.99, 12, 5_000, "north"),  # the circle holds the pole
        (90, 0, 0, "north"),
    ],
)
def test_a_position_has_one_lane(zones: Zones, lat: float, lon: float, accuracy_m: float, lane: str) -> None:
    assert zones.locate(lat, lon, accuracy_m) == lane


@pytest.mark.parametrize("position", [(float("nan"), 0, 0), (91, 0, 0), (0, 181, 0), (0, 0, -1), (0, 0, float("inf"))])
def test_a_position_off_the_earth_is_refused(zones: Zones, position: tuple[float, float, float]) -> None:
    with pytest.raises(ContractError, match="out of bounds"):
        zones.locate(*position)


def test_several_zones_allow_only_what_all_of_them_allow(zones: Zones) -> None:
    assert zones.endpoints("west") == ("eu", "us")
    assert zones.endpoints("east_west") == ("us", "eu")
    assert zones.endpoints("inner_west") == ()
    assert zones.endpoints("inner_unknown") == ()
    assert zones.endpoints(NOWHERE) == ()


@given(st.floats(-89, 89), st.floats(-180, 180), st.floats(0, 500_000), st.floats(0, 500_000))
def test_more_uncertainty_never_allows_more(lat: float, lon: float, a: float, b: float) -> None:
    zones = parse_zones(policy(west=([square(-180, -90, 0, 90)], ["eu"]), east=([square(0, -90, 180, 90)], ["eu", "us"])))
    small, large = sorted((a, b))
    assert set(zones.endpoints(zones.locate(lat, lon, large))) <= set(zones.endpoints(zones.locate(lat, lon, small)))


@pytest.mark.parametrize(
    ("rings", "says"),
    [
        ([square(0, 0, 1, 1)[:-1]], "is open"),
        ([[[0, 0], [1, 1], [0, 0]]], "at least 4 positions"),
        ([[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]], "Self-intersection"),
        ([square(179, 0, 181, 1)], "cut zones at the antimeridian"),
        ([], "no rings"),
    ],
)
def test_a_bad_zone_file_says_where_and_what_to_do(rings: list[Any], says: str) -> None:
    with pytest.raises(ContractError, match=rf"feature 0 \(zone 'a'\).*{says}"):
        parse_zones(policy(a=(rings, ["eu"])))


def test_a_lane_of_several_places_names_all_zones_unless_one_is_nowhere() -> None:
    assert join(["west", "east_west"]) == "east_west"
    assert join(["west"]) == "west"
    assert join(["west", NOWHERE]) == NOWHERE


def test_policies_have_the_same_areas_though_endpoints_differ(zones: Zones) -> None:
    a, b = (parse_zones(policy(west=([square(0, 0, 10, 10)], ends))) for ends in (["eu"], ["us"]))
    assert a.same_areas(b) and a.digest != b.digest
    assert not a.same_areas(zones) and not a.same_areas(parse_zones(policy(west=([square(0, 0, 10, 11)], ["eu"]))))
    assert a.without_endpoints().endpoints("west") == () and a.without_endpoints().locate(5, 5) == "west"
