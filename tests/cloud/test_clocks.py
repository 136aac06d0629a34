"""Rows of a gateway whose clock was set late, in real Delta tables."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cloud.lake import Lake
from cloud.rows import Contracts
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.columns import Strings, Table
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
    assert lake.correct_clocks() == {"europe/pump": 0}


def test_the_quarantine_s_times_are_the_device_s_and_are_corrected_too(tmp_path: Path) -> None:
    header, _ = sealed(1, synced=False, stream="quarantine", contract_version="1")
    texts = {name: Strings.of(["x"]) for name in ("topic", "reason", "detail", "payload")}
    table: Table = {"captured_at": np.array([UP_US]), ORDINAL: np.array([0]), **texts}
    lake = open_lake(tmp_path)
    lake.append("eu", [(header, table)])
    lake.append("eu", [sealed(5, synced=True)])
    assert lake.correct_clocks() == {"europe/quarantine": 1}
    row = lake.read("quarantine")
    assert row["captured_at"].to_pylist() == [BOOTED + timedelta(microseconds=UP_US)]
    assert row["event_date"].to_pylist() == [BOOTED.date()]  # it was in 1970
