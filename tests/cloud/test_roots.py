"""Where lanes lie: one root for all, roots for zones, and lanes of several zones."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import write_deltalake

from cloud import config
from cloud.config import QueryLimits
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.query import Query
from cloud.roots import Bucket, Root, Roots
from cloud.rows import Contracts
from edge_agent.contract.errors import ConfigError, Reason
from tests.cloud.blocks import block, contract
from tests.cloud.test_quarantine import bad

JOINED = "canada_europe"


def lake_of(roots: Roots) -> Lake:
    return Lake(roots, Contracts([contract()]))


@pytest.fixture
def apart(tmp_path: Path) -> Roots:
    return Roots(Root(str(tmp_path / "all")), {"europe": Root(str(tmp_path / "eu"))})


def test_zones_lie_where_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "fenceline.toml").write_text(
        '[lake.zones]\neurope = "s3://eu-bucket/lake"\ncanada_europe = "both"\n'
        '[lake.buckets.eu-bucket]\nendpoint = "https://s3.eu"\nregion = "eu-1"\ncredentials = "EU"\n'
    )
    roots = config.load(tmp_path).lake

    assert roots.of("europe").path("europe", "pump") == "s3://eu-bucket/lake/europe/pump"
    assert roots.of("europe").bucket == Bucket("https://s3.eu", "eu-1", "EU")
    assert roots.of("canada").path("canada") == str(tmp_path / ".fenceline/lake/canada")
    assert roots.of(JOINED).uri == str(tmp_path / "both")
    assert Roots.restore(roots.describe()) == roots


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[lake]\nroot = "gs://x/y"', "neither a path nor s3://"),
        ('[lake.zones]\nEurope = "x"', "Europe"),
        ('[lake.zones]\neurope = ".fenceline/lake/eu"', "lies in"),
        ('[lake.zones]\neurope = "x/../.fenceline/lake/eu"', "lies in"),
        ('[lake.zones]\neurope = "s3://eu/x/../lake"', "empty step"),
        ('[lake.buckets.eu]\nsecret = "x"', r"unknown key lake\.buckets\.eu\.secret"),
    ],
)
def test_wrong_roots_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fenceline.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(tmp_path)


def test_secrets_are_taken_from_the_environment_and_stay_out_of_what_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Root("s3://b/x", Bucket(credentials="EU"))
    with pytest.raises(ConfigError, match="EU_AWS_ACCESS_KEY_ID and no EU_AWS_SECRET_ACCESS_KEY"):
        root.storage_options()
    monkeypatch.setenv("EU_AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("EU_AWS_SECRET_ACCESS_KEY", "hush")
    options = root.storage_options()
    assert options is not None and options["AWS_SECRET_ACCESS_KEY"] == "hush" and options["aws_conditional_put"] == "etag"
    assert "hush" not in str(root.describe()) + repr(root)


def test_settings_that_replace_the_conditional_write_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_S3_ALLOW_UNSAFE_RENAME", "true")
    with pytest.raises(ConfigError, match="two writers"):
        Root("s3://b/x").storage_options()


def test_each_zone_s_rows_lie_under_its_own_root_only(apart: Roots, tmp_path: Path) -> None:
    lake = lake_of(apart)
    lake.append("eu", [block(1), block(1, lane="canada")])

    assert [p.name for p in (tmp_path / "all").iterdir()] == ["canada"]
    assert [p.name for p in (tmp_path / "eu").iterdir()] == ["europe"]
    assert lake.lanes("pump") == ["canada", "europe"] and lake.read("pump").num_rows == 6
    assert lake.streams() == ["pump"] and set(lake.versions("pump")) == {"canada", "europe"}


def test_a_lane_of_zones_that_lie_apart_is_refused_until_somebody_says_who_holds_it(apart: Roots, tmp_path: Path) -> None:
    settled = lake_of(apart).append("eu", [block(1, lane=JOINED), block(1)])

    assert [i[2] for i in settled.committed] == ["europe"]
    assert [(r.lane, r.reason) for r in settled.refused] == [(JOINED, Reason.NO_ROOT)]
    assert "canada in" in settled.refused[0].detail and "[lake.zones] canada_europe" in settled.refused[0].detail
    assert all(receipt.lanes[0].lane == "europe" for receipt in settled.receipts)
    assert not (tmp_path / "all").exists()

    named = Roots(apart.default, {**apart.zones, JOINED: apart.zones["europe"]})
    assert lake_of(named).append("eu", [block(1, lane=JOINED)]).committed == [("d1", "e1", JOINED, 1)]
    assert sorted(p.name for p in (tmp_path / "eu").iterdir()) == [JOINED, "europe"]


def test_a_lane_of_zones_that_lie_together_lies_with_them(tmp_path: Path) -> None:
    both = Root(str(tmp_path / "both"))
    roots = Roots(Root(str(tmp_path / "all")), {"canada": both, "europe": both})
    assert roots.of(JOINED) == both and Roots.at(tmp_path).of(JOINED) == Root(str(tmp_path))


def test_a_lake_whose_zones_were_given_roots_later_is_not_half_read(apart: Roots) -> None:
    lake_of(Roots(apart.default)).append("eu", [block(1), block(1, lane="canada")])
    lake = lake_of(apart)
    for use in (lake.streams, lambda: lake.read("pump"), lambda: lake.append("eu", [block(2)])):
        with pytest.raises(ConfigError, match=r"lane 'europe' lies in .* move"):
            use()


def test_a_region_writes_and_a_reader_asks_without_keys_or_answers_of_other_zones_buckets(tmp_path: Path) -> None:
    foreign = Root("s3://us-bucket/lake", Bucket("http://127.0.0.1:9", "us-east-1", "US", allow_http=True))  # nobody there, and no keys
    joined = Root(str(tmp_path / "both"))
    roots = Roots(foreign, {"europe": Root(str(tmp_path / "eu")), "canada": Root(str(tmp_path / "ca")), JOINED: joined})
    lake = CheckedLake(lake_of(roots))
    assert len(lake.append("eu", [block(1), block(1, lane="canada"), block(1, lane=JOINED), bad(2, [1])]).committed) == 4
    again = CheckedLake(lake_of(roots))
    assert again.append("eu", [block(1), block(3), bad(2, [1])]).committed == [("d1", "e1", "europe", 3)]
    for zones, rows in ((["europe"], 9), (["europe", "canada"], 15)):
        with Query(again, zones, QueryLimits()) as query:
            assert query.run("SELECT count(*) AS n FROM pump")["n"].to_pylist() == [rows]
            assert query.run("SELECT count(*) AS n FROM pump_quarantine")["n"].to_pylist() == [1]
    with pytest.raises(ConfigError, match="US_AWS_ACCESS_KEY_ID"):
        lake_of(roots).streams()


def test_a_lake_of_the_older_layout_is_named_and_does_not_look_empty(tmp_path: Path) -> None:
    lake_of(Roots.at(tmp_path / "new")).append("eu", [block(1)])
    rows = lake_of(Roots.at(tmp_path / "new")).read("pump").drop_columns(["event_date"])
    old = tmp_path / "old/pump/europe"
    old.mkdir(parents=True)
    write_deltalake(str(old), rows)

    lake = lake_of(Roots.at(tmp_path / "old"))
    for use in (lake.streams, lambda: lake.versions("pump"), lambda: lake.append("eu", [block(2)])):
        with pytest.raises(ConfigError, match="older layout"):
            use()
