"""The zone policy: positions, borders, uncertainty."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ContractError
from edge_agent.core.fix import EARTH_M
from edge_agent.core.zones import LANE_CHARACTERS_MAX, Zones, join, parse_zones


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


GRID = parse_zones(  # names so short that a lane can hold all of them
    policy(**{f"{i:x}{j}": ([square(i * 30 - 180, j * 30 - 90, i * 30 - 150, j * 30 - 60)], ["eu"]) for i in range(12) for j in range(6)})
)
places = st.tuples(st.one_of(st.floats(-90, 90), st.floats(85, 90), st.floats(-90, -85)), st.one_of(st.floats(-180, 180), st.just(180.0)))


def reached(lat: float, lon: float, metres: float, bearing: float) -> tuple[float, float]:
    """The place so far from another one on a sphere."""
    turn, north = metres / EARTH_M, math.radians(lat)
    there = math.asin(min(1.0, max(-1.0, math.sin(north) * math.cos(turn) + math.cos(north) * math.sin(turn) * math.cos(bearing))))
    east = math.atan2(math.sin(bearing) * math.sin(turn) * math.cos(north), math.cos(turn) - math.sin(north) * math.sin(there))
    return math.degrees(there), (lon + math.degrees(east) + 180) % 360 - 180


@given(places, st.floats(0.02, 5_000_000), st.floats(0, 6.3))
@example((-88.48882128617134, 180.0), 162_890.0, 3.0718915056629617)  # almost at the pole
@example((90.0, -90.0), 0.02, 1.0)
@example((38.0, 180.0), 4_352_966.0, 0.0)
def test_a_circle_has_the_zone_of_every_place_in_it(place: tuple[float, float], accuracy_m: float, bearing: float) -> None:
    lane, there = GRID.locate(*place, accuracy_m), GRID.locate(*reached(*place, 0.99 * accuracy_m, bearing))
    assert NOWHERE not in (lane, there) and set(there.split("_")) <= set(lane.split("_"))


def test_the_pole_lies_on_every_meridian() -> None:
    halves = parse_zones(policy(a=([square(-180, 60, 0, 90)], ["eu"]), b=([square(0, 60, 180, 90)], ["us"])))
    assert halves.locate(90, -90) == halves.locate(90, 90) == "a_b"


@given(st.floats(-3e-5, 3e-5), st.floats(0, 4), st.floats(0, 400_000))
@example(0.005, 0.0, 400_000.0)  # from the middle of the hole
def test_more_uncertainty_never_allows_more_beside_a_small_hole(east: float, small_m: float, more_m: float) -> None:
    holed = parse_zones(policy(a=([square(0, 0, 20, 20), square(10, 10, 10.01, 10.01)[::-1]], ["eu"])))
    for lon in (10 + east, 10.01 + east):
        lanes = [holed.locate(10.005, lon, radius_m) for radius_m in (small_m, small_m + more_m)]
        assert lanes[0] == "a" or lanes[1] == NOWHERE


def test_borders_drawn_twice_leave_no_gap_between_zones() -> None:
    twice = parse_zones(policy(a=([square(0, 0, 10, 10)], ["eu"]), b=([square(10 + 4e-7, 0, 20, 10)], ["eu"])))
    assert {twice.locate(5, 10, radius_m) for radius_m in (1, 100, 300_000)} == {"a_b"}


def test_a_circle_over_more_zones_than_a_lane_can_name_belongs_to_none() -> None:
    names = [f"zone-{n:02}-with-a-name-of-forty-four-characters" for n in range(6)]
    assert len(join(names[:5])) <= LANE_CHARACTERS_MAX < len("_".join(names)) and join(names) == NOWHERE
    squares = {name: ([square(n, 0, n + 1, 6)], ["eu"]) for n, name in enumerate(names)}
    assert parse_zones(policy(**squares)).locate(3, 3, 300_000) == NOWHERE


def test_altitudes_in_a_zone_file_do_not_matter() -> None:
    high: list[Any] = [[0, 0], [10, 0, 5], [10, 10, 10**400], [0, 10, 1, 2], [0, 0]]
    assert parse_zones(policy(a=([high], ["eu"]))).locate(5, 5) == "a"


def test_an_endpoint_that_is_no_text_is_refused() -> None:
    with pytest.raises(ContractError, match="endpoint 5 is no name"):
        parse_zones(policy(a=([square(0, 0, 1, 1)], [5])))  # type: ignore[list-item]


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
