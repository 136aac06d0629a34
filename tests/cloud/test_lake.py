"""The lake: one row per reading, whoever writes and however often."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.handle import Handle
from cloud.lake import Lake
from cloud.rows import Contracts
from cloud.tables import Tables
from edge_agent.contract.block import SCORE, BlockHeader
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt
from edge_agent.contract.stream import StreamContract
from tests.cloud.blocks import block, contract

ROOT = Path(__file__).parents[2]


def open_lake(path: Path) -> Lake:
    return Lake(path, Contracts([contract()]))


def counts(lake: Lake) -> Counter[tuple[str, str, int, int]]:
    table = lake.read("pump", columns=["device", "lane", "sequence", "row"])
    return Counter(zip(*(c.to_pylist() for c in table.columns), strict=True))


def test_a_block_that_comes_twice_is_one_block(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)

    first = lake.append("eu", [block(1), block(2), block(1)])
    second = lake.append("eu", [block(2), block(3)])

    assert [i[3] for i in first.committed] == [1, 2]
    assert [i[3] for i in second.committed] == [3] and [i[3] for i in second.duplicates] == [2]
    assert set(counts(lake).values()) == {1} and len(counts(lake)) == 9


def test_blocks_whose_rows_share_long_texts_are_stored_in_commits_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.portions.TEXT_BYTES_MAX", 1_000)
    lake = open_lake(tmp_path)
    long = {**block(1)[1], "pump": Strings(np.zeros(3, np.int32), ("x" * 200,))}
    blocks = [(block(n)[0], long) for n in range(1, 5)]

    assert len(lake.append("eu", blocks).committed) == 4
    assert lake.versions("pump") == {"europe": 4}
    assert set(counts(lake).values()) == {1} and len(counts(lake)) == 12


def test_blocks_out_of_order_give_ranges_until_the_gap_is_filled(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)

    receipt = lake.append("eu", [block(1), block(4), block(5), block(8)]).receipts[0]
    assert (receipt.device, receipt.epoch) == ("d1", "e1")
    assert receipt.lanes == [LaneReceipt(lane="europe", cumulative=1, ranges=[(4, 5), (8, 8)])]

    assert lake.append("eu", [block(2), block(3)]).receipts[0].lanes == [LaneReceipt(lane="europe", cumulative=5, ranges=[(8, 8)])]


def test_each_device_and_epoch_gets_its_own_receipt_with_the_lanes_it_sent(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    sent = [block(1), block(1, lane="canada"), block(1, epoch="e2"), block(1, device="d2")]

    receipts = {(r.device, r.epoch): [lane.lane for lane in r.lanes] for r in lake.append("eu", sent).receipts}

    assert receipts == {("d1", "e1"): ["europe", "canada"], ("d1", "e2"): ["europe"], ("d2", "e1"): ["europe"]}
    assert lake.lanes("pump") == ["canada", "europe"]
    assert (tmp_path / "canada/pump").is_dir() and (tmp_path / "europe/pump").is_dir()


def test_two_writers_that_do_not_know_of_each_other_store_a_block_once(tmp_path: Path) -> None:
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(1)])
    us.append("us", [block(1), block(2)])

    assert eu.append("eu", [block(2)]).committed == []
    assert set(counts(eu).values()) == {1} and len(counts(eu)) == 6


def test_a_commit_that_was_rebased_over_another_device_still_knows_that_devices_blocks(tmp_path: Path) -> None:
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(1)])
    us.append("us", [block(1)])
    us.append("us", [block(7, device="d2")])
    assert eu.append("eu", [block(2)]).committed  # Delta lets this pass: another device's lane

    assert eu.append("eu", [block(7, device="d2")]).committed == []
    assert set(counts(eu).values()) == {1}


def test_what_is_settled_is_known_after_reopening_and_after_compaction(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    for sequence in range(1, 13):
        lake.append("eu", [block(sequence)])
    before = lake.read("pump")

    assert lake.compact(files_max=5) == {"europe/pump": 12}
    assert lake.append("eu", [block(3), block(13)]).committed == [("d1", "e1", "europe", 13)]

    again = open_lake(tmp_path)
    settled = again.append("eu", [block(5), block(13)])
    assert settled.committed == [] and settled.receipts[0].lanes[0].cumulative == 13
    assert again.read("pump").slice(0, before.num_rows).equals(before)


def test_another_writer_goes_on_after_a_compaction(tmp_path: Path) -> None:
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    for sequence in range(1, 6):
        eu.append("eu", [block(sequence)])
    us.append("us", [block(6)])
    eu.compact(files_max=1)

    assert us.append("us", [block(7), block(2)]).committed == [("d1", "e1", "europe", 7)]
    assert set(counts(us).values()) == {1} and len(counts(us)) == 21


def test_a_version_names_the_rows_of_that_moment(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1)])
    versions = lake.versions("pump")
    lake.append("eu", [block(2), block(1, lane="canada")])

    assert lake.read("pump", versions=versions).num_rows == 3
    assert lake.read("pump", lanes=["europe"], columns=["count"]).column("count").to_pylist() == list(range(6))
    assert lake.read("pump").num_rows == 9


def test_rows_come_back_in_the_order_seen_with_missing_values_as_null(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    header, table = block(1)
    table[SCORE] = np.array([np.nan, 0.25, 1.0])
    lake.append("eu", [block(3), block(2), (header, table)])

    rows = lake.read("pump")

    assert rows.column("ordinal").to_pylist() == list(range(9))
    assert rows.column("pressure").to_pylist()[:3] == [0.0, None, 0.5]
    assert rows.column(SCORE).to_pylist()[:3] == [None, 0.25, 1.0]
    assert rows.schema.field("ts").type == pa.timestamp("us", "UTC")
    assert set(rows.column("region").to_pylist()) == {"eu"}


def test_a_reading_keeps_every_bit(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    seed = 20
    numbers = np.random.default_rng(seed).standard_normal(3) * 1e-300
    header, table = block(1)
    table["pressure"] = numbers
    lake.append("eu", [(header, table)])

    assert lake.read("pump").column("pressure").to_numpy().tobytes() == numbers.tobytes(), f"seed {seed}"


def test_an_empty_lake_has_no_streams_and_no_rows(tmp_path: Path) -> None:
    lake = open_lake(tmp_path / "none")

    assert lake.streams() == [] and lake.versions("pump") == {} and lake.read("pump").num_rows == 0
    assert lake.labels("pump") is None and lake.labels_version("pump") is None


def test_a_version_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1)])

    with pytest.raises(UnavailableError, match="europe/pump version 99"):
        lake.read("pump", versions={"europe": 99})


def test_a_lake_that_cannot_write_says_so_and_takes_the_block_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1)])

    def no_space(*args: object, **kw: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cloud.lake.write_deltalake", no_space)
        with pytest.raises(UnavailableError, match="No space left"):
            lake.append("eu", [block(2)])

    assert lake.append("eu", [block(1), block(2)]).committed == [("d1", "e1", "europe", 2)]


def test_a_commit_that_landed_although_it_failed_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cloud.lake

    lake = open_lake(tmp_path)
    lake.append("eu", [block(1)])
    write = cloud.lake.write_deltalake

    def lands_then_fails(*args: object, **kw: object) -> None:
        write(*args, **kw)  # type: ignore[arg-type]
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("cloud.lake.write_deltalake", lands_then_fails)
        with pytest.raises(UnavailableError):
            lake.append("eu", [block(2)])

    assert lake.append("eu", [block(2)]).receipts[0].lanes[0].cumulative == 2
    assert set(counts(lake).values()) == {1}


def test_a_field_that_a_later_contract_adds_is_null_in_older_rows(tmp_path: Path) -> None:
    from dataclasses import replace

    from edge_agent.contract.stream import Field, FieldType

    older = contract()
    newer = replace(older, version="1.1.0", fields=(*older.fields, Field("flow", FieldType.NUMBER, required=False)))
    lake = Lake(tmp_path, Contracts([older, newer]))
    header, table = block(2, contract_version="1.1.0")
    lake.append("eu", [block(1), (header, {**table, "flow": np.ones(3)})])

    assert lake.read("pump").column("flow").to_pylist() == [None] * 3 + [1.0] * 3
    assert Lake(tmp_path, Contracts([older])).append("eu", [block(3)]).committed


WRITER = """
import random, sys
from pathlib import Path
from cloud.lake import Lake
from cloud.rows import Contracts
from tests.cloud.blocks import block, contract

seed, path = int(sys.argv[1]), Path(sys.argv[2])
order = random.Random(seed)
lake = Lake(path, Contracts([contract()]))
left = [(d, s) for d in ("d1", "d2") for s in range(1, 21)]
order.shuffle(left)
sys.stdin.readline()
while left:
    batch, left = left[:4], left[4:]
    lake.append(f"r{seed}", [block(s, device=d) for d, s in batch])
settled = lake._settled.stored["d1", "e1", "europe"]
print(*sorted(settled.ranges), settled.cumulative)
"""


def test_two_processes_racing_with_the_same_blocks_store_each_once(tmp_path: Path) -> None:
    seeds = [random.randrange(10**6) for _ in range(2)]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(seed), str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for seed in seeds
    ]
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    answers = [writer.communicate(timeout=60)[0].strip() for writer in writers]

    assert [w.returncode for w in writers] == [0, 0] and answers == ["20", "20"], f"seeds {seeds}"
    found = counts(open_lake(tmp_path))
    assert set(found.values()) == {1} and len(found) == 2 * 20 * 3, f"seeds {seeds}"


def test_a_stream_without_a_known_contract_is_not_stored(tmp_path: Path) -> None:
    from edge_agent.contract.errors import ContractError

    unknown: tuple[BlockHeader, Table] = block(1, contract_version="9")
    with pytest.raises(ContractError, match="version '9'"):
        open_lake(tmp_path).append("eu", [unknown])
    assert open_lake(tmp_path).streams() == []


def lose_log(table: Path) -> None:
    """What Delta's log retention does in a month: all before the last checkpoint goes."""
    for log in sorted((table / "_delta_log").glob("*.json"))[:-1]:
        log.unlink()


def test_a_table_that_another_writer_made_and_whose_log_is_gone_is_read_from_its_rows(tmp_path: Path) -> None:
    eu, us, texts = open_lake(tmp_path), open_lake(tmp_path), Strings.of(["a"])
    header, _ = block(100, rows=1, stream="quarantine", contract_version="1")
    numbers = np.zeros(1, np.int64)
    table: Table = {"captured_at": numbers, "topic": texts, "reason": texts, "detail": texts, "payload": texts, "ordinal": numbers}
    eu.append("eu", [(header, table)])  # the lane is known here before the other stream is there
    for sequence in range(1, 8):
        us.append("us", [block(sequence)])
    us.compact(files_max=1)  # with a checkpoint
    lose_log(tmp_path / "europe/pump")

    again = eu.append("eu", [block(3), block(8)])

    assert [i[3] for i in again.committed] == [8] and set(counts(open_lake(tmp_path)).values()) == {1}


def test_a_writer_that_slept_longer_than_the_log_is_kept_stores_nothing_twice(tmp_path: Path) -> None:
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(1)])
    for sequence in range(2, 8):
        us.append("us", [block(sequence)])
    us.compact(files_max=1)
    lose_log(tmp_path / "europe/pump")

    with pytest.raises(UnavailableError):
        eu.append("eu", [block(3), block(8)])
    again = eu.append("eu", [block(3), block(8)])

    assert [i[3] for i in again.committed] == [8] and set(counts(open_lake(tmp_path)).values()) == {1}


def test_a_table_opened_anew_knows_what_another_writer_has_stored_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.handle.REOPEN_COMMITS", 3)
    ours, theirs = open_lake(tmp_path), open_lake(tmp_path)
    for sequence in (1, 2, 3):
        ours.append("eu", [block(sequence)])
    theirs.append("us", [block(4), block(5)])

    settled = ours.append("eu", [block(4), block(6)])

    assert [i[3] for i in settled.committed] == [6] and [i[3] for i in settled.duplicates] == [4]
    assert set(counts(ours).values()) == {1} and len(counts(ours)) == 18


def test_only_compaction_looks_for_expired_commits(tmp_path: Path) -> None:
    """Delta would list the whole log for them with every commit: each would take longer than the one before."""
    lake = open_lake(tmp_path)
    for sequence in range(1, 103):  # beyond a checkpoint
        lake.append("eu", [block(sequence)])
    table = tmp_path / "europe" / "pump"
    before = datetime.now(UTC) - timedelta(days=31)
    for file in (table / "_delta_log").glob("0*"):
        os.utime(file, (before.timestamp(), before.timestamp()))
    old = sorted((table / "_delta_log").glob("*.json"))[:50]

    lake.append("eu", [block(200)])
    assert all(commit.exists() for commit in old)
    lake.compact(files_max=10)
    assert not any(commit.exists() for commit in old)
    assert len(lake.append("eu", [block(1), block(201)]).committed) == 1


def test_a_table_that_another_made_first_and_that_does_not_read_is_not_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def faster(tables: Tables, lane: str, contract: StreamContract) -> DeltaTable:
        create(tables, lane, contract)
        raise CommitFailedError("another made it")

    def away(lake: Lake, handle: Handle) -> None:
        raise DeltaError("the storage is away")

    create, lake = Tables.create, open_lake(tmp_path)
    monkeypatch.setattr(Tables, "create", faster)
    with monkeypatch.context() as storage:
        storage.setattr(Lake, "_sync", away)
        with pytest.raises(UnavailableError, match="cannot be made: the storage is away"):
            lake.append("eu", [block(1)])
    assert len(lake.append("eu", [block(1)]).committed) == 1
