"""Rights on a region's broker: exactly the lanes that the region may hold."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from cloud import config
from cloud.cli import main
from cloud.fleet import Fleet
from cloud.rights import LANES_MAX, device_writes, lanes_of
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


def test_lanes_are_the_regions_zones_and_their_joins() -> None:
    zones = policy(square("a", 0, ["eu"]), square("b", 10, ["eu", "us"]), square("c", 20, ["us"]), square("d", 60, ["eu"]))
    assert lanes_of(zones, "eu") == ("a", "b", "d", "a_b", "a_d", "b_d", "a_b_d")
    assert lanes_of(zones, "us") == ("b", "c", "b_c")


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


@pytest.mark.parametrize(("zones", "widest"), [(12, 12), (27, 3), (60, 2), (200, 1)])
def test_many_zones_have_narrower_joins(zones: int, widest: int) -> None:
    lanes = lanes_of(policy(*(square(f"z{i:03d}", 0.1 * i, ["eu"], 5) for i in range(zones))), "eu")
    assert len(lanes) <= LANES_MAX
    assert {len(lane.split("_")) for lane in lanes} == set(range(1, widest + 1))


def test_a_device_may_not_write_to_a_lane_with_a_foreign_zone_in_it() -> None:
    writes = device_writes("plane-01", lanes_of(ZONES, "eu"))
    assert "fenceline/v1/plane-01/up/atlantic_europe/+" in writes
    assert not any("united-states" in topic or "/up/+" in topic for topic in writes)


def test_a_removed_device_is_denied_everything_until_it_is_added_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet = Fleet(config.load(ROOT, tmp_path).fleet_db)
    shipped = (ROOT / "deploy" / "mosquitto" / "region.acl").read_text()
    words = ["--project", str(ROOT), "--state", str(tmp_path), "broker", "acl", "--region", "eu"]
    fleet.add("plane-01")
    fleet.remove("plane-01")
    for denied in ("\nuser plane-01\ntopic deny fenceline/v1/plane-01/#\n", ""):
        assert main(words) == 0
        assert capsys.readouterr().out == shipped + denied
        if denied:
            fleet.add("plane-01")


def test_the_acl_shipped_for_europe_is_what_the_command_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--project", str(ROOT), "--state", str(tmp_path), "broker", "acl", "--region", "eu"]) == 0
    assert capsys.readouterr().out == (ROOT / "deploy" / "mosquitto" / "region.acl").read_text()
