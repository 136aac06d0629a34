"""The buffer of a dead device goes into the lake, through the same gate and as often as one likes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from cloud import cli, config
from cloud.audit import Audit
from cloud.buffer_import import IMPORTED, BufferImport
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.refusals import REFUSED
from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality
from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.sealed import Keys
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON

NOW = Moment(1_700_000_000_000_000, 5_000_000, True)
KEY = bytes(range(32))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A project with two regions, of which `us` may not hold Europe's readings."""
    project = tmp_path / "project"
    (project / "contracts").mkdir(parents=True)
    (project / "contracts" / "pump.odcs.yaml").write_text(CONTRACT_YAML)
    (project / "contracts" / "zones.geojson").write_bytes(ZONES_JSON)
    (project / "fenceline.toml").write_text('contracts = ["contracts/pump.odcs.yaml"]\n')
    found = config.load(project, tmp_path / "state")
    Fleet(found.fleet_db).add("d1")
    return found


def draft(count: int, lane: str, rows: int = 3, **changes: Any) -> Draft:
    counts = np.arange(count, count + rows, dtype=np.int64)
    table: Any = {
        "ts": counts * 1_000_000,
        "pump": Strings.of(["p1"] * rows),
        "count": counts,
        "pressure": np.full(rows, np.nan),
    }
    fields: dict[str, Any] = {"stream": "pump", "contract_version": "1.0.0", "table": table, **changes}
    return Draft(lane=lane, fix=FixQuality.STATIC, policy="p", rows=rows, first_us=1, last_us=2, **fields)


def dead(path: Path, drafts: list[Draft], device: str = "d1", keys: Keys | None = None) -> Path:
    buffer = Buffer(path, device, "boot", bytes_max=1 << 30, history_rows={}, keys=keys)
    for each in drafts:
        buffer.append([each], [], NOW)
    buffer.close()
    return path


def rows(settings: Settings) -> list[tuple[str, int, str]]:
    table = Lake(settings.lake).read("pump", columns=["lane", "count", "region"])
    return sorted(zip(*(c.to_pylist() for c in table.columns), strict=True))


def test_every_block_goes_where_its_zone_allows_and_once(settings: Settings, tmp_path: Path) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe"), draft(3, "canada"), draft(6, "europe")])
    done = BufferImport(settings).run(path)
    assert (done.blocks, done.stored_blocks, done.stored_rows, done.duplicates, done.complete) == (3, 3, 9, 0, True)
    assert rows(settings) == sorted([("canada", n, "us") for n in (3, 4, 5)] + [("europe", n, "eu") for n in (0, 1, 2, 6, 7, 8)])
    again = BufferImport(settings).run(path)
    assert (again.stored_blocks, again.duplicates) == (0, 3)
    assert len(rows(settings)) == 9


def test_the_trail_says_which_file_and_which_log_were_imported(settings: Settings, tmp_path: Path) -> None:
    running = Buffer(tmp_path / "running.db", "d1", "boot", bytes_max=1 << 30, history_rows={})
    running.append([draft(0, "europe")], [], NOW)
    digests = []
    for suffix in ("", "-wal"):  # a copy of a device that was cut off: its block is in the log only
        content = Path(f"{tmp_path}/running.db{suffix}").read_bytes()
        Path(f"{tmp_path}/dead.db{suffix}").write_bytes(content)
        digests.append(hashlib.sha256(content).hexdigest())
    running.close()
    done = BufferImport(settings).run(tmp_path / "dead.db")
    assert ([done.sha256, done.log_sha256], done.stored_rows) == (digests, 3)
    assert f"sha256 {digests[0]}, its log {digests[1]}" in Audit(settings.audit_db).entries()[0].detail


def test_what_the_uplink_brought_before_is_left_out(settings: Settings, tmp_path: Path) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe"), draft(3, "europe")])
    from cloud.gate import load_contracts
    from edge_agent.buffer_file import BufferFile

    first = next(BufferFile(path).blocks())
    Lake(settings.lake, load_contracts(settings)).append("eu", [(first.header, first.table)])
    done = BufferImport(settings).run(path)
    assert (done.stored_blocks, done.duplicates) == (1, 1)
    assert len(rows(settings)) == 6


def test_a_region_that_may_not_hold_a_zone_takes_nothing_of_it(settings: Settings, tmp_path: Path) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe"), draft(3, "canada"), draft(6, "nowhere")])
    done = BufferImport(settings, ["us"]).run(path)
    assert done.refused == {"wrong_region": 2} and done.stored_blocks == 1 and not done.complete
    assert rows(settings) == [("canada", n, "us") for n in (3, 4, 5)]
    entries = Audit(settings.audit_db).entries()
    assert {(e.kind, e.reason, e.subject, e.count) for e in entries} >= {("block_refused", "wrong_region", "d1", 1)}
    assert entries[0].kind == IMPORTED and done.sha256 in entries[0].detail
    assert Audit(settings.audit_db).verify() is None


def test_a_stranger_s_buffer_and_unknown_streams_are_refused(settings: Settings, tmp_path: Path) -> None:
    stranger = BufferImport(settings).run(dead(tmp_path / "stranger.db", [draft(0, "europe")], "d2"))
    assert stranger.refused == {"wrong_device": 1} and stranger.stored_blocks == 0
    foreign = BufferImport(settings).run(dead(tmp_path / "foreign.db", [draft(0, "europe", stream="fan")]))
    assert foreign.refused == {"unknown_stream": 1}
    wrong = BufferImport(settings).run(dead(tmp_path / "columns.db", [draft(0, "europe", table={"ts": np.arange(3)})]))
    assert wrong.refused == {"corrupt": 1}


def test_a_file_of_many_bad_blocks_fills_no_trail(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong with a block names it: each block was an entry of its own."""
    bad = [draft(n, "europe", table={"ts": np.arange(3) + n}) for n in range(6)]
    done = BufferImport(settings).run(dead(tmp_path / "buffer.db", bad))
    assert done.refused == {"corrupt": 6}
    assert [(e.kind, e.count) for e in Audit(settings.audit_db).entries()] == [(IMPORTED, 1), (REFUSED, 6)]
    monkeypatch.setattr("cloud.buffer_import.KINDS_MAX", 1)
    drafts = [draft(n, "europe", stream=f"fan{n}") for n in range(4)]
    BufferImport(settings).run(dead(tmp_path / "streams.db", drafts))
    assert [(e.subject, e.reason, e.count) for e in Audit(settings.audit_db).entries(3)][1:] == [
        ("", "unknown_stream", 3),
        ("d1", "unknown_stream", 1),
    ]


def test_a_damaged_buffer_gives_what_is_whole(settings: Settings, tmp_path: Path) -> None:
    path = dead(tmp_path / "buffer.db", [draft(3 * n, "europe") for n in range(5)])
    db = apsw.Connection(str(path))
    blob = bytearray(db.execute("SELECT block FROM slots WHERE slot = 2").get)
    blob[100] ^= 4
    db.execute("UPDATE slots SET block = ? WHERE slot = 2", (bytes(blob),))
    db.close()
    done = BufferImport(settings).run(path)
    assert (done.stored_blocks, done.damaged, done.complete) == (4, 1, False)


def test_an_import_that_ends_early_leaves_its_trail(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe"), draft(3, "nowhere"), draft(6, "europe")])
    append, calls = CheckedLake.append, list[int]()

    def once(lake: CheckedLake, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise UnavailableError("the lake is away")
        return append(lake, *arguments)

    monkeypatch.setattr("cloud.buffer_import.BATCH_BLOCKS", 1)
    monkeypatch.setattr(CheckedLake, "append", once)
    with pytest.raises(UnavailableError):
        BufferImport(settings).run(path)
    trail = {entry.kind: entry for entry in Audit(settings.audit_db).entries()}
    assert trail[IMPORTED].detail.startswith("ended early: ") and "1 blocks stored" in trail[IMPORTED].detail
    assert trail[REFUSED].reason == "wrong_region"


def test_an_encrypted_buffer_needs_the_device_s_key(settings: Settings, tmp_path: Path) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe")], keys=Keys([KEY]))
    with pytest.raises(ConfigError, match="key"):
        BufferImport(settings).run(path)
    (tmp_path / "key").write_text(KEY.hex())
    assert BufferImport(settings).run(path, tmp_path / "key").stored_blocks == 1


def test_the_command_reports_counts_and_fails_if_something_stayed_outside(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dead(tmp_path / "buffer.db", [draft(0, "europe"), draft(3, "nowhere")])
    words = ["--project", str(settings.project), "--state", str(settings.state_dir), "import-buffer"]
    assert cli.main([*words, str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["stored_blocks"], found["refused"], found["complete"]) == (1, {"wrong_region": 1}, False)
    assert cli.main([*words, str(tmp_path / "none.db")]) == 2
    (tmp_path / "text.db").write_text("not a buffer" * 1_000)
    assert cli.main([*words, str(tmp_path / "text.db")]) == 2
    assert "holds no block" in capsys.readouterr().err
