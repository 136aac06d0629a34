"""The watch over the lake: service levels that are not kept and blocks that nobody accounted for are told, once."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud import cli, config
from cloud import watch as watch_module
from cloud.audit import Audit
from cloud.block_index import BlockIndex
from cloud.completeness import examine
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.lake import Lake
from cloud.levels import breaches
from cloud.stacks import Block
from cloud.status import collect, exposition
from cloud.watch import Watch, open_lake, read_quality
from edge_agent.contract.errors import UnavailableError
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block
from tests.cloud.test_quarantine import bad

LEVELS = """
slaProperties:
  - {property: freshness, value: 10, unit: min}
  - {property: latency, value: 5, unit: min}
  - {property: frequency, value: 30, unit: min}
  - {property: completeness, value: 99, unit: percent}
"""
NULLS = "logicalTypeOptions: {minimum: 0, maximum: 100}, quality: [{metric: nullValues, mustBeLessThan: 50, unit: percent}]}"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    text = CONTRACT_YAML.replace("logicalTypeOptions: {minimum: 0, maximum: 100}}", NULLS) + LEVELS
    (tmp_path / "pump.yaml").write_text(text)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    (tmp_path / "fenceline.toml").write_text("contracts = ['pump.yaml']\nzones = 'zones.geojson'\n[quality]\ngrace_s = 1\n")
    found = config.load(tmp_path)
    Fleet(found.fleet_db).add("d1")
    return found


def now_us() -> int:
    return time.time_ns() // 1_000


def fresh(sequence: int, ago_s: float = 0.0, missing: bool = False, **kw: Any) -> Block:
    header, table = block(sequence, rows=2, **kw)
    times = np.full(2, now_us() - int(ago_s * 1e6), np.int64)
    return header, {**table, "ts": times, "pressure": np.full(2, np.nan if missing else 1.0)}


def test_kept_promises_are_quiet_and_broken_ones_are_told_once(settings: Settings) -> None:
    lake, now = open_lake(settings), now_us()
    lake.append("eu", [fresh(1), fresh(2)])
    watch = Watch(settings)
    assert watch.look(now + 1_000_000).levels == [] and Audit(settings.audit_db).entries() == []
    lake.append("eu", [fresh(9, ago_s=1_000, missing=True), fresh(10, missing=True), fresh(11, missing=True)])
    found = watch.look(now + 3_600_000_000)
    assert [line.split(" is ")[0].removeprefix("stream pump: ") for line in found.levels] == [
        "freshness of d1",
        "latency of d1",
        "missing values of pressure",
        "frequency of p1",
        "completeness",
    ]
    assert found.unaccounted_blocks == 6 and "sequences 3 to 8, 6 blocks" in found.gaps[0]
    assert watch.look(now + 3_601_000_000) == read_quality(settings)
    kinds = [entry.kind for entry in Audit(settings.audit_db).entries()]
    assert sorted(set(kinds)) == ["level_broken", "unaccounted"] and len(kinds) == 6
    later = watch.look(now + 30 * 86_400_000_000).levels
    assert later == ["stream pump: completeness is 45.455 percent of 11 blocks; promised is 99 percent"]


def test_a_restart_tells_no_alarm_again(settings: Settings) -> None:
    open_lake(settings).append("eu", [fresh(1), fresh(3)])
    for _ in range(2):
        assert Watch(settings).look(now_us() + 60_000_000).unaccounted_blocks == 1
    assert sorted(e.kind for e in Audit(settings.audit_db).entries()) == ["level_broken", "unaccounted"]


def test_a_level_leaves_out_what_may_still_come(settings: Settings) -> None:
    open_lake(settings).append("eu", [fresh(1), fresh(3)])
    lake, index = open_lake(settings), BlockIndex()
    assert breaches(lake, index, now_us()) == [] and examine(lake, index, now_us()).share == 2 / 3
    late = now_us() + 400_000_000
    assert breaches(lake, index, late, waiting={("d1", "e1"): 1}) == []
    (breach,) = breaches(lake, index, late)
    assert str(breach) == "stream pump: completeness is 66.667 percent of 3 blocks; promised is 99 percent"


def test_a_removed_device_is_neither_silent_nor_missed_until_it_is_added_again(settings: Settings) -> None:
    lake, fleet = open_lake(settings), Fleet(settings.fleet_db)
    lake.append("eu", [fresh(1), fresh(3)])
    assert len(Watch(settings).look(now_us() + 3_600_000_000).alarms) == 4
    assert fleet.remove("d1")
    found = Watch(settings).look(now_us() + 3_600_000_000)
    assert (found.alarms, found.unaccounted_blocks, found.stored_blocks, found.share) == ([], 0, 2, 2 / 3)
    fleet.add("d1")
    assert Watch(settings).look(now_us() + 3_600_000_000).alarms == []
    lake.append("eu", [fresh(1, epoch="e2")])
    levels = Watch(settings).look(now_us() + 3_600_000_000).levels
    assert [line.split(" is ")[0] for line in levels] == ["stream pump: freshness of d1", "stream pump: frequency of p1"]


def test_an_entity_is_judged_by_the_device_that_it_was_heard_from_last(settings: Settings) -> None:
    lake = open_lake(settings)
    lake.append("eu", [fresh(1, ago_s=3_000), fresh(1, ago_s=2_400, device="d2")])
    for removed, silent in ({}, True), ({"d1": now_us()}, True), ({"d2": now_us()}, False):
        levels = [b.level for b in breaches(lake, BlockIndex(), now_us(), removed=removed)]
        assert ("frequency" in levels) == silent


def test_completeness_is_looked_at_where_no_row_is_good(settings: Settings) -> None:
    lake = open_lake(settings)
    lake.append("eu", [bad(1, [0, 1, 2, 3]), bad(3, [0, 1, 2, 3])])
    assert [b.level for b in breaches(lake, BlockIndex(), now_us() + 400_000_000)] == ["completeness"]


def test_a_limit_on_a_field_that_no_row_has_yet_is_looked_at(settings: Settings) -> None:
    open_lake(settings).append("eu", [fresh(1)])
    path = settings.contracts[0]
    added = (
        "\n      - {name: flow, logicalType: number, required: false, quality: [{metric: nullValues, mustBeLessThan: 50, unit: percent}]}"
    )
    path.write_text(path.read_text().replace("version: 1.0.0", "version: 1.1.0").replace("unit: percent}]}", "unit: percent}]}" + added, 1))
    lake, index = open_lake(settings), BlockIndex()
    assert [b.level for b in breaches(lake, index, now_us())] == ["missing values of flow"]
    header, table = fresh(2, contract_version="1.1.0")
    lake.append("eu", [(header, {**table, "flow": np.array([1.0, np.nan])})])
    (breach,) = breaches(lake, index, now_us())
    assert str(breach).endswith("missing values of flow is 3 of 4 rows; promised is less than 50 percent")


@pytest.mark.parametrize("error", [UnavailableError("the lake is away"), ValueError("a fault of ours")])
def test_a_look_that_fails_is_said_and_tried_again(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    open_lake(settings).append("eu", [fresh(1)])
    watch = Watch(settings)

    def fails(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "examine", fails)
        tick(watch)
    assert str(error) in caplog.text and ("Traceback" in caplog.text) == isinstance(error, ValueError)
    found = read_quality(settings)
    assert found is not None and (found.failure, found.at_us) == (str(error), 0)
    assert f"ALARM    the last look at the lake failed: {error}" in run(settings, capsys, "status")[1]
    text = exposition(settings).decode()
    assert "fenceline_quality_look_failed 1.0" in text and "fenceline_complete_share" not in text
    tick(watch)
    found = read_quality(settings)
    assert found is not None and (found.failure, found.stored_blocks) == ("", 1)
    with monkeypatch.context() as patch:
        patch.setattr(watch_module, "examine", fails)
        tick(watch)
    assert read_quality(settings) == msgspec.structs.replace(found, failure=str(error)), "what was known stays"


def tick(watch: Watch) -> None:
    """One look, to its end."""
    watch.tick(math.inf)
    watch._due = 0.0
    assert watch._thread is not None
    watch._thread.join(20)


def test_status_and_metrics_show_what_the_watch_found(settings: Settings) -> None:
    assert collect(settings)["quality"] is None
    lake = open_lake(settings)
    lake.append("eu", [fresh(1), fresh(3), bad(4, [1])])
    watch = Watch(settings)
    watch.tick(time.monotonic())
    deadline = time.monotonic() + 20
    while (found := read_quality(settings)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert found.stored_blocks == 3 and found.quarantined_readings == 1
    text = exposition(settings).decode()
    assert "fenceline_quarantined_readings 1.0" in text and "fenceline_complete_share 0.75" in text


def run(settings: Settings, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(["--project", str(settings.project), *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands(settings: Settings, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    open_lake(settings).append("eu", [block(1), bad(2, [1, 2])])
    code, out, _ = run(settings, capsys, "quarantine", "list", "--json")
    assert code == 0 and json.loads(out)[0]["rows"] == 2
    assert "out_of_range" in run(settings, capsys, "quarantine", "list")[1]
    code, out, _ = run(settings, capsys, "quarantine", "show", "--stream", "pump")
    assert code == 0 and "d1/e1/europe/2/1" in out and "pressure = 1001.0   <- 0 to 100 allowed" in out
    assert run(settings, capsys, "quarantine", "show")[0] == 2 and run(settings, capsys, "quarantine", "show", "d1/e1")[0] == 2
    code, out, _ = run(settings, capsys, "quarantine", "release", "--stream", "pump")
    assert code == 1 and "2 rows stay: out_of_range" in out
    assert run(settings, capsys, "quarantine", "release", "--stream", "pump", "--as-is")[0] == 2
    code, out, _ = run(settings, capsys, "quarantine", "release", "d1/e1/europe/2/2", "--as-is", "--by", "anna", "--json")
    assert code == 0 and json.loads(out)["released"] == 1
    code, out, _ = run(settings, capsys, "completeness", "pump", "--json")
    assert code == 0 and json.loads(out)["blocks"]["stored"] == 2
    open_lake(settings).append("eu", [block(7)])
    code, out, err = run(settings, capsys, "completeness", "d1", "--grace", "0", "--since", "1h")
    assert code == 1 and "unaccounted" in out and "nobody accounted for" in err
    assert run(settings, capsys, "completeness", "d11")[0] == 2
    for grace in ("nan", "inf", "-1", "soon"):
        with pytest.raises(SystemExit, match="2"):
            run(settings, capsys, "completeness", "--grace", grace)
        assert "is not a number of seconds from 0" in capsys.readouterr().err
    for odd in ("d1/e1/europe/²/0", "d1/e1/europe/99999999999999999999/0", "d1/e1/europe/9223372036854775808/0", "d1/e1/europe/1/٣"):
        code, _, err = run(settings, capsys, "quarantine", "show", odd)
        assert code == 2 and "names no row" in err
    with pytest.raises(SystemExit, match="2"):
        run(settings, capsys, "quarantine", "show", "--stream", "pump", "--limit", "-1")
    code, out, _ = run(settings, capsys, "query", "SELECT count(*) AS n FROM pump", "--json")
    assert code == 0 and json.loads(out) == [{"n": 9}]
    assert run(settings, capsys, "query", "SELECT 1 AS one", "--csv")[1] == '"one"\n1\n'
    assert run(settings, capsys, "query", "SELECT * FROM pump", "--parquet", str(tmp_path / "x.parquet"))[0] == 0
    assert (tmp_path / "x.parquet").stat().st_size and run(settings, capsys, "query", "SELECT * FROM pumb")[0] == 2
    assert run(settings, capsys, "query", "SELECT lane FROM pump LIMIT 1", "--zones", "canada")[0] == 2


def test_a_lake_that_is_empty_is_whole(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    assert Lake(settings.lake).streams() == []
    assert run(settings, capsys, "completeness")[0] == 0
    assert run(settings, capsys, "quarantine", "list")[1] == "nothing lies in quarantine\n"
    assert run(settings, capsys, "query", "SELECT * FROM pump")[0] == 2


@pytest.mark.parametrize("torn", [b"", b'{"at_us": 1, "sha', b"\xff"])
def test_a_torn_file_of_the_last_look_stops_nothing(settings: Settings, torn: bytes) -> None:
    """A power cut may leave it empty; the control loop starts with reading it."""
    open_lake(settings).append("eu", [fresh(1)])
    settings.run_dir.mkdir(parents=True)
    watch_module.quality_path(settings).write_bytes(torn)
    assert read_quality(settings) is None and collect(settings)["quality"] is None
    assert Watch(settings).look(now_us()) == read_quality(settings)


def test_an_alarm_is_told_once_though_the_next_one_was_not_written(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    open_lake(settings).append("eu", [fresh(1), fresh(3)])
    watch, told = Watch(settings), list[str]()

    def add(kind: str, **entry: Any) -> None:
        if kind == "level_broken" and told.count(kind) == 0 and len(told) == 1:
            told.append("away")
            raise UnavailableError("the metadata database is away")
        told.append(kind)

    monkeypatch.setattr(watch._audit, "add", add)
    with pytest.raises(UnavailableError):
        watch.look(now_us() + 60_000_000)
    watch.look(now_us() + 60_000_000)
    assert told == ["unaccounted", "away", "level_broken"]
