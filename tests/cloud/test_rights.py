"""Rights on a region's broker: exactly the lanes that the region may hold."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cloud.cli import main
from cloud.rights import device_writes, lanes_of
from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import ConfigError
from edge_agent.core.zones import Zones, parse_zones

ROOT = Path(__file__).parents[2]
ZONES = parse_zones((ROOT / "contracts" / "zones.geojson").read_bytes())


def square(name: str, west: float, endpoints: list[str], width: float = 10.0) -> dict[str, object]:
    ring = [[west, 0], [west + width, 0], [west + width, 10], [west, 10], [west, 0]]
    properties = {"zone": name, "endpoints": endpoints}
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [ring]}}


def policy(*features: dict[str, object]) -> Zones:
    return parse_zones(json.dumps({"type": "FeatureCollection", "features": features}).encode())


def test_lanes_are_the_regions_zones_and_the_joins_of_neighbours() -> None:
    zones = policy(square("a", 0, ["eu"]), square("b", 10, ["eu", "us"]), square("c", 20, ["us"]), square("d", 60, ["eu"]))
    assert lanes_of(zones, "eu") == ("a", "b", "d", "a_b")
    assert lanes_of(zones, "us") == ("b", "c", "b_c")


def test_zones_on_both_sides_of_the_antimeridian_are_neighbours() -> None:
    assert "e_w" in lanes_of(policy(square("e", 170, ["eu"]), square("w", -180, ["eu"])), "eu")


def test_every_lane_a_fix_can_give_is_among_them_if_and_only_if_the_region_may_hold_it(seed: int) -> None:
    chance, joined = random.Random(seed), 0
    lanes = {region: set(lanes_of(ZONES, region)) for region in ("eu", "us")}
    for _ in range(3_000):
        lane = ZONES.locate(chance.uniform(20, 80), chance.uniform(-140, 40), chance.choice([0.0, 1_000.0, 50_000.0, 150_000.0]))
        joined += "_" in lane
        for region in ("eu", "us"):
            assert (lane in lanes[region]) == (lane != NOWHERE and region in ZONES.endpoints(lane))
    assert joined > 20


def test_a_region_that_no_zone_allows_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"no zone allows the region 'moon'; zones.geojson names eu, us"):
        lanes_of(ZONES, "moon")


def test_a_policy_with_too_many_lanes_is_refused() -> None:
    with pytest.raises(ConfigError, match="more than 4096 lanes; draw fewer zones"):
        lanes_of(policy(*(square(f"z{i}", 0.1 * i, ["eu"], 5) for i in range(40))), "eu")


def test_a_device_may_not_write_to_a_lane_with_a_foreign_zone_in_it() -> None:
    writes = device_writes("plane-01", lanes_of(ZONES, "eu"))
    assert "fenceline/v1/plane-01/up/atlantic_europe/+" in writes
    assert not any("united-states" in topic or "/up/+" in topic for topic in writes)


def test_the_acl_shipped_for_europe_is_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--project", str(ROOT), "--state", str(tmp_path), "broker", "acl", "--region", "eu"]) == 0
    assert capsys.readouterr().out == (ROOT / "deploy" / "mosquitto" / "region.acl").read_text()
