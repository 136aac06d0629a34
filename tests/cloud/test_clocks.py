"""Rows of a gateway whose clock was set late, in real Delta tables."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest

from cloud import lake as lake_module
from cloud.cli import main
from cloud.clocks import TIMES_US
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.rows import DATED_US, DATES_MAX, DAY_US, Contracts
from cloud.stacks import Block
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.columns import Strings
from tests.cloud.blocks import block, contract

BOOTED = datetime(2026, 11, 22, 12, tzinfo=UTC)
BOOTED_US = int(BOOTED.timestamp()) * 1_000_000
UP_US = 30_000_000  # of the first block after boot


def open_lake(path: Path) -> Lake:
    return Lake(path, Contracts([contract()]))


def sealed(sequence: int, *, synced: bool, boot: str = "boot-1", **header: Any) -> Any:
    """A block sealed `sequence` seconds after the first; an unset clock counts from 1970."""
    monotonic_us = UP_US + sequence * 1_000_000
    wall_us = monotonic_us + (BOOTED_US if synced else 0)
    return block(sequence, rows=1, boot=boot, monotonic_us=monotonic_us, sealed_us=wall_us, clock_synced=synced, **header)


def rows(lake: Lake) -> dict[tuple[str, int], tuple[bool, datetime, int | None]]:
    found = lake.read("pump", columns=["lane", "sequence", "clock_synced", "sealed_at", "clock_shift_us"]).to_pylist()
    return {(r["lane"], r["sequence"]): (r["clock_synced"], r["sealed_at"], r["clock_shift_us"]) for r in found}


def true(sequence: int) -> datetime:
    return BOOTED + timedelta(microseconds=UP_US, seconds=sequence)


def test_rows_stored_before_the_clock_was_set_get_their_true_time_once_it_is_known(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(1, synced=False), sealed(2, synced=False)])
    assert lake.correct_clocks() == {}
    assert rows(lake)["europe", 1] == (False, datetime(1970, 1, 1, 0, 0, 31, tzinfo=UTC), None)

    lake.append("eu", [sealed(3, synced=True)])
    assert lake.correct_clocks() == {"europe/pump": 2}
    assert lake.correct_clocks() == {}

    assert rows(lake) == {
        ("europe", 1): (True, true(1), BOOTED_US),
        ("europe", 2): (True, true(2), BOOTED_US),
        ("europe", 3): (True, true(3), None),
    }


def test_a_late_block_of_a_boot_that_is_known_is_stored_with_its_true_time(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(3, synced=True)])
    lake.append("eu", [sealed(1, synced=False)])
    assert rows(lake)["europe", 1] == (True, true(1), BOOTED_US)
    assert lake.correct_clocks() == {}


def test_another_boot_or_another_device_tells_nothing(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(1, synced=False), sealed(2, synced=True, boot="boot-2"), sealed(3, synced=True, device="d2")])
    assert lake.correct_clocks() == {}
    lake.append("eu", [sealed(1, synced=True, epoch="e2")])  # the same boot with a new buffer
    assert lake.correct_clocks() == {"europe/pump": 1}


def test_the_block_that_knows_may_come_in_another_lane(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(1, synced=False)])
    lake.append("eu", [sealed(1, synced=True, lane="canada")])
    assert lake.correct_clocks() == {"europe/pump": 1}
    assert rows(lake)["europe", 1][:2] == (True, true(1))


def test_a_restarted_ingest_knows_it_from_the_rows(tmp_path: Path) -> None:
    open_lake(tmp_path).append("eu", [sealed(1, synced=False)])
    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(2, synced=True)])
    assert lake.correct_clocks() == {"europe/pump": 1}


def test_by_hand_all_tables_are_corrected_whoever_wrote_them(tmp_path: Path) -> None:
    open_lake(tmp_path).append("eu", [sealed(1, synced=False)])
    open_lake(tmp_path).append("us", [sealed(1, synced=True, lane="canada")])  # an ingest that never saw the other lane
    lake = Lake(tmp_path)
    assert lake.correct_clocks() == {}
    assert lake.correct_clocks(everywhere=True) == {"europe/pump": 1}


def test_quarantined_rows_get_their_true_time_too_and_may_tell_it(tmp_path: Path) -> None:
    def broken(sequence: int, synced: bool, **header: Any) -> Block:
        head, table = sealed(sequence, synced=synced, **header)
        return head, {**table, "pressure": np.array([1e6])}

    def times(lake: CheckedLake) -> set[tuple[bool, datetime]]:
        return {row[:2] for row in rows(lake.held).values()}

    lake = CheckedLake(open_lake(tmp_path / "lake"))
    lake.append("eu", [broken(1, False)])
    lake.append("eu", [sealed(2, synced=True)])
    assert lake.correct_clocks() == {"_quarantine/europe/pump": 1} and times(lake) == {(True, true(1))}
    lake.append("eu", [broken(3, False)])
    assert times(lake) == {(True, true(1)), (True, true(3))} and lake.correct_clocks() == {}

    for file in (lambda: [sealed(1, synced=False, boot="boot-2")], lambda: [broken(2, True, boot="boot-2", lane="canada")]):
        CheckedLake(open_lake(tmp_path / "other")).append("eu", file())
    assert main(["--project", str(project(tmp_path)), "clock", "fix"]) == 0
    assert rows(Lake(tmp_path / "other"))["europe", 1][:2] == (True, true(1))


def project(path: Path) -> Path:
    (path / "fenceline.toml").write_text('[lake]\nroot = "other"\n')
    return path


def test_a_writer_that_was_away_during_the_correction_goes_on_and_stores_nothing_twice(tmp_path: Path) -> None:
    lake, other = open_lake(tmp_path), open_lake(tmp_path)
    lake.append("eu", [sealed(1, synced=False)])
    other.append("eu", [sealed(1, synced=False)])
    lake.append("eu", [sealed(2, synced=True)])
    lake.correct_clocks()
    other.append("eu", [sealed(1, synced=False), sealed(2, synced=True), sealed(3, synced=True)])
    lake.append("eu", [sealed(3, synced=True), sealed(4, synced=True)])
    assert {key: row[1] for key, row in rows(lake).items()} == {("europe", n): true(n) for n in range(1, 5)}
    assert lake.read("pump").num_rows == 4


def test_a_boot_id_with_quotes_names_only_itself(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    evil = "x' OR clock_synced = false OR boot = '"
    lake.append("eu", [sealed(1, synced=False), sealed(2, synced=False, boot=evil)])
    lake.append("eu", [sealed(3, synced=True, boot=evil)])
    assert lake.correct_clocks() == {"europe/pump": 1}
    assert rows(lake)["europe", 1][0] is False and rows(lake)["europe", 2][0] is True


def test_times_at_the_edge_of_64_bits_are_left_alone(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1, boot="b", monotonic_us=2**63 - 1, sealed_us=-(2**63), clock_synced=False)])
    lake.append("eu", [block(2, boot="b", monotonic_us=-(2**63), sealed_us=2**63 - 1, clock_synced=True)])
    assert lake.correct_clocks() == {}
    lake.append("eu", [sealed(3, synced=True, boot="b")])
    assert lake.correct_clocks() == {}


def refused(sequence: int, captured_us: list[int], **header: Any) -> Block:
    """A block of payloads that a device with an unset clock refused."""
    count = len(captured_us)
    head, _ = sealed(sequence, **{"synced": False, **header}, stream="quarantine", contract_version="1")
    texts = {name: Strings.of(["x"] * count) for name in ("topic", "reason", "detail", "payload")}
    return msgspec.structs.replace(head, rows=count), {
        "captured_at": np.array(captured_us),
        ORDINAL: 1_000 * sequence + np.arange(count),
        **texts,
    }


@pytest.mark.parametrize("set_us", [10**18, TIMES_US.stop, -(10**18), 2**63 - 1])
def test_a_clock_set_to_a_year_that_no_calendar_has_tells_nothing_and_stops_nobody(tmp_path: Path, set_us: int) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [refused(1, [UP_US], device="evil")])
    lake.append("eu", [block(2, device="evil", boot="boot-1", monotonic_us=20, sealed_us=set_us)])
    assert lake.correct_clocks() == {}
    again = open_lake(tmp_path)
    assert again.append("eu", [block(1, device="innocent")]).committed == [("innocent", "e1", "europe", 1)]
    assert again.correct_clocks() == {} and again.read("quarantine")["event_date"].to_pylist() == [date(1970, 1, 1)]


EXTREMES = [2**63 - 1, -(2**63), DATED_US.stop - 1, DATED_US.stop, DATED_US.start - 1, 18_000 * 31_556_952_000_000]


@pytest.mark.parametrize("first", ["unset", "set"])
def test_event_times_that_no_calendar_has_lie_apart_and_stay_there_when_the_clock_is_corrected(tmp_path: Path, first: str) -> None:
    lake = open_lake(tmp_path)
    sent = [refused(n, [time_us, UP_US]) for n, time_us in enumerate(EXTREMES, 1)]
    known = sealed(20, synced=True)
    for blocks in [sent, [known]] if first == "unset" else [[known], sent]:
        lake.append("eu", blocks)
    assert lake.correct_clocks() == ({"europe/quarantine": 2 * len(sent)} if first == "unset" else {})
    for reader in (lake, open_lake(tmp_path)):
        found = reader.read("quarantine", columns=["row", "captured_at", "event_date", "clock_synced"])
        assert found["event_date"].to_pylist() == [None, BOOTED.date()] * len(sent) and all(found["clock_synced"].to_pylist())
        moved = [us + BOOTED_US if us in DATED_US else us for us in EXTREMES]
        assert found["captured_at"].cast(pa.int64()).to_pylist()[::2] == moved
        reader.append("eu", [block(1 if reader is lake else 2, device="innocent")])
        assert reader.compact(1) or reader is not lake, "its files are merged like others"


def test_a_block_on_too_many_dates_does_not_get_a_file_for_each_when_the_clock_is_corrected(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [refused(1, [day * DAY_US for day in range(DATES_MAX + 1)])])
    lake.append("eu", [sealed(5, synced=True)])
    assert lake.correct_clocks() == {"europe/quarantine": DATES_MAX + 1}
    assert set(lake.read("quarantine")["event_date"].to_pylist()) == {None}


def test_a_boot_that_the_lake_s_engine_cannot_correct_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> int:
        raise Exception("Cast error: what delta-rs raises")

    lake = open_lake(tmp_path)
    lake.append("eu", [sealed(1, synced=False)])
    lake.append("eu", [sealed(2, synced=True)])
    monkeypatch.setattr(lake_module, "correct", refuse)
    assert lake.correct_clocks() == {"europe/pump": 0} and "given up" in caplog.text
    assert lake.correct_clocks() == {}
    assert lake.append("eu", [sealed(3, synced=True)]).committed


def test_the_quarantine_s_times_are_the_device_s_and_are_corrected_too(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [refused(1, [UP_US])])
    lake.append("eu", [sealed(5, synced=True)])
    assert lake.correct_clocks() == {"europe/quarantine": 1}
    row = lake.read("quarantine")
    assert row["captured_at"].to_pylist() == [BOOTED + timedelta(microseconds=UP_US)]
    assert row["event_date"].to_pylist() == [BOOTED.date()]  # it was in 1970
