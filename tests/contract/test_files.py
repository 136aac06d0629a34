"""The files in contracts/: valid by the standards they follow, and saying what we mean."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from shapely import STRtree
from shapely.geometry import LinearRing, Point, shape

from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import Encoding, FieldType, StreamContract
from edge_agent.core.zones import Zones, parse_zones

CONTRACTS = Path(__file__).parents[2] / "contracts"
ZONES_FILE = CONTRACTS / "zones.geojson"

# The least and greatest value of each column, over all rows of train_FD001 and test_FD001.
CMAPSS_FD001: dict[str, tuple[float, float]] = {
    "cycle": (1, 362),
    "setting_1": (-0.0087, 0.0087),
    "setting_2": (-0.0006, 0.0007),
    "setting_3": (100, 100),
    "sensor_1": (518.67, 518.67),
    "sensor_2": (641.13, 644.53),
    "sensor_3": (1569.04, 1616.91),
    "sensor_4": (1382.25, 1441.49),
    "sensor_5": (14.62, 14.62),
    "sensor_6": (21.6, 21.61),
    "sensor_7": (549.85, 556.06),
    "sensor_8": (2387.89, 2388.56),
    "sensor_9": (9021.73, 9244.59),
    "sensor_10": (1.3, 1.3),
    "sensor_11": (46.8, 48.53),
    "sensor_12": (518.69, 523.76),
    "sensor_13": (2387.88, 2388.56),
    "sensor_14": (8099.94, 8293.72),
    "sensor_15": (8.3249, 8.5848),
    "sensor_16": (0.03, 0.03),
    "sensor_17": (388, 400),
    "sensor_18": (2388, 2388),
    "sensor_19": (100, 100),
    "sensor_20": (38.14, 39.43),
    "sensor_21": (22.8942, 23.6419),
}
SYMBOLS = "T2 T24 T30 T50 P2 P15 P30 Nf Nc epr Ps30 phi NRf NRc BPR farB htBleed Nf_dmd PCNfR_dmd W31 W32".split()  # noqa: SIM905
PLACES = [
    ("Frankfurt", 50.03, 8.57, "europe"),
    ("London", 51.47, -0.45, "europe"),
    ("Lisbon", 38.77, -9.13, "europe"),
    ("Reykjavik", 63.98, -22.6, "europe"),
    ("Athens", 37.94, 23.94, "europe"),
    ("Zurich", 47.46, 8.55, "switzerland"),
    ("Geneva", 46.2, 6.14, "switzerland"),
    ("Milan", 45.63, 8.72, "europe"),
    ("New York", 40.64, -73.78, "united-states"),
    ("Los Angeles", 33.94, -118.4, "united-states"),
    ("Seattle", 47.45, -122.3, "united-states"),
    ("Toronto", 43.68, -79.63, "canada"),
    ("Halifax", 44.88, -63.5, "canada"),
    ("Vancouver", 49.19, -123.18, "canada"),
    ("the Azores", 37.7, -25.7, "atlantic"),
    ("the middle of the ocean", 50.0, -35.0, "atlantic"),
    ("Tokyo", 35.5, 139.8, NOWHERE),
    ("Nuuk", 64.2, -51.7, NOWHERE),
]


@pytest.fixture(scope="module")
def turbofan() -> StreamContract:
    return parse_contract((CONTRACTS / "turbofan.odcs.yaml").read_bytes(), "turbofan.odcs.yaml")


@pytest.fixture(scope="module")
def features() -> dict[str, Any]:
    return {f["properties"]["zone"]: f for f in json.loads(ZONES_FILE.read_bytes())["features"]}


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(ZONES_FILE.read_bytes())


# --- turbofan.odcs.yaml ---


def test_turbofan_says_what_sensors_send(turbofan: StreamContract) -> None:
    assert (turbofan.stream, turbofan.version, turbofan.encoding) == ("turbofan", "1.0.0", Encoding.JSON)
    assert (turbofan.key, turbofan.event_time, turbofan.entity) == (("engine", "ts"), "ts", "engine")
    assert turbofan.topic == "sensors/{device}/turbofan"
    assert [f.name for f in turbofan.fields] == ["ts", "engine", *CMAPSS_FD001]
    types = [f.type for f in turbofan.fields]
    assert types == [FieldType.TIMESTAMP, FieldType.STRING, FieldType.INTEGER] + [FieldType.NUMBER] * 24
    assert all(f.required and f.description for f in turbofan.fields)


def test_sensors_carry_their_real_names_and_units(turbofan: StreamContract) -> None:
    sensors = [f for f in turbofan.fields if f.name.startswith("sensor_")]
    assert [f.description.split(":")[0] for f in sensors] == SYMBOLS
    assert {f.unit for f in sensors} == {"degR", "psia", "rpm", "1", "pps/psi", "percent", "lbm/s"}


@pytest.mark.parametrize("name", CMAPSS_FD001)
def test_range_holds_every_cmapss_row_with_room_and_stops_nonsense(turbofan: StreamContract, name: str) -> None:
    field, (low, high) = turbofan.field(name), CMAPSS_FD001[name]
    assert field.minimum <= low <= high <= field.maximum
    assert high * 1.3 <= field.maximum or name == "setting_3", "a worn or another engine is not nonsense"
    for nonsense in (-999.0, 1e7, -1e300):
        assert not field.minimum <= nonsense <= field.maximum


# --- zones.geojson ---


def test_policy_is_the_one_we_mean(features: dict[str, Any]) -> None:
    assert {name: f["properties"]["endpoints"] for name, f in features.items()} == {
        "europe": ["eu"],
        "switzerland": ["eu"],
        "united-states": ["us"],
        "canada": ["us", "eu"],
        "atlantic": ["eu", "us"],
    }


def test_geometry_follows_rfc_7946(features: dict[str, Any]) -> None:
    for name, feature in features.items():
        geometry = feature["geometry"]
        assert geometry["type"] == "Polygon"
        for i, ring in enumerate(geometry["coordinates"]):
            assert ring[0] == ring[-1] and len(ring) >= 4, f"ring {i} of {name} is not closed"
            assert all(-180 <= lon <= 180 and -90 <= lat <= 90 for lon, lat in ring)
            assert LinearRing(ring).is_ccw is (i == 0), f"right-hand rule: outer rings counterclockwise, holes clockwise ({name})"
        assert shape(geometry).is_valid


def test_zones_touch_along_borders_and_never_overlap(features: dict[str, Any]) -> None:
    areas = {name: shape(f["geometry"]) for name, f in features.items()}
    touching = set()
    for (one, a), (other, b) in itertools.combinations(areas.items(), 2):
        assert a.intersection(b).area == 0, f"{one} and {other} overlap"
        if a.intersection(b).length > 0:
            touching.add(frozenset((one, other)))
    ocean = {frozenset(("atlantic", coast)) for coast in ("europe", "united-states", "canada")}
    assert touching == ocean | {frozenset(("europe", "switzerland")), frozenset(("united-states", "canada"))}


def test_shared_borders_share_their_corners(features: dict[str, Any]) -> None:
    """Otherwise a hair of no zone could lie between two that seem to touch."""
    areas = [shape(f["geometry"]) for f in features.values()]
    tree = STRtree(areas)
    for area in areas:
        corners = {c for a in areas if a is not area for ring in (a.exterior, *a.interiors) for c in ring.coords}
        for x, y in (c for ring in (area.exterior, *area.interiors) for c in ring.coords):
            neighbours = [areas[i] for i in tree.query(Point(x, y)) if areas[i] is not area and areas[i].distance(Point(x, y)) < 1e-6]
            assert not neighbours or (x, y) in corners, f"corner {x} {y} lies on a neighbour's edge but not on its corner"


def test_switzerland_fills_its_hole_in_europe(features: dict[str, Any]) -> None:
    (hole,) = features["europe"]["geometry"]["coordinates"][1:]
    (outer,) = features["switzerland"]["geometry"]["coordinates"]
    assert shape({"type": "Polygon", "coordinates": [hole]}).equals(shape({"type": "Polygon", "coordinates": [outer]}))


@pytest.mark.parametrize(("place", "lat", "lon", "zone"), PLACES, ids=[p[0] for p in PLACES])
def test_places_lie_where_they_should(zones: Zones, place: str, lat: float, lon: float, zone: str) -> None:
    assert zones.locate(lat, lon) == zone


def test_on_a_border_both_zones_count(zones: Zones) -> None:
    assert zones.locate(49.0, -110.0) == "canada_united-states"
    assert zones.endpoints("canada_united-states") == ("us",)
    assert zones.locate(40.0, -10.5) == "atlantic_europe"
    assert zones.endpoints("atlantic_europe") == ("eu",)


def test_open_ring_is_refused_with_its_place(features: dict[str, Any]) -> None:
    document = json.loads(ZONES_FILE.read_bytes())
    document["features"][1]["geometry"]["coordinates"][0].pop()
    with pytest.raises(ContractError, match=r"feature.*ring|switzerland"):
        parse_zones(json.dumps(document).encode(), "zones.geojson")
