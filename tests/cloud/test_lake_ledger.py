"""The loss ledger in the lake: names that are given up are settled, and still make no copies of blocks that come after all."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cloud.lake import Lake
from cloud.rows import Contracts
from cloud.settled import RANGES_HELD_MAX, SettledIndex
from edge_agent.buffer import Buffer
from edge_agent.clock import Moment
from edge_agent.contract.block import ORDINAL, BlockHeader, FixQuality, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.receipt import RANGES_MAX, LaneReceipt, Receipt, decode_receipt, encode_receipt
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import ROWS_MAX, Loss, coalesce, loss_table, read_losses
from edge_agent.draft import Draft
from tests.cloud.blocks import block, contract
from tests.cloud.test_lake import lose_log

SKIP = 2**20


def open_lake(path: Path) -> Lake:
    return Lake(path, Contracts([contract()]))


def loss(first: int, last: int | None = None, blocks: int | None = None, epoch: str = "e1", lane: str = "europe") -> Loss:
    end = first if last is None else last
    count = end - first + 1 if blocks is None else blocks
    return Loss(1, "pump", epoch, lane, first, end, count, math.nan, math.nan, math.nan, "evicted_full")


def ledger(sequence: int, *losses: Loss, lane: str = "europe", device: str = "d1", epoch: str = "e1") -> tuple[BlockHeader, Table]:
    rows = len(losses)
    header, _ = block(sequence, lane, device, epoch, rows, stream=LOSSES.stream, contract_version=LOSSES.version)
    return header, {**loss_table(list(losses)), ORDINAL: np.arange(rows, dtype=np.int64)}


def settled(receipts: list[Receipt]) -> LaneReceipt:
    (receipt,) = receipts
    (lane,) = decode_receipt(encode_receipt(receipt)).lanes
    return lane


def reach(lake: Lake, sequence: int) -> LaneReceipt:
    """What a receipt says after one more block."""
    return settled(lake.append("eu", [block(sequence)]).receipts)


def stored(lake: Lake) -> Counter[int]:
    rows = lake.read("pump", columns=["sequence", "row"])
    return Counter(n for n, row in zip(*(c.to_pylist() for c in rows.columns), strict=True) if row == 0)


def test_blocks_that_the_ledger_names_are_no_holes(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    assert settled(lake.append("eu", [block(1), block(4), block(6)]).receipts) == LaneReceipt(
        lane="europe", cumulative=1, ranges=[(4, 4), (6, 6)]
    )

    answer = lake.append("eu", [ledger(7, loss(2, 3), loss(5))])

    assert [i[3] for i in answer.committed] == [7]
    assert settled(answer.receipts) == LaneReceipt(lane="europe", cumulative=7)


def test_names_that_were_skipped_are_one_range_however_many(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1), block(2)])

    assert settled(lake.append("eu", [ledger(SKIP + 3, loss(3, SKIP + 2))]).receipts) == LaneReceipt(lane="europe", cumulative=SKIP + 3)


def test_what_is_given_up_is_known_after_reopening_compaction_and_a_cleaned_log(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1), block(5)])
    lake.append("eu", [ledger(6, loss(2))])
    lake.append("eu", [ledger(7, loss(3, 4))])
    assert reach(open_lake(tmp_path), 8).cumulative == 8

    for _ in range(2):  # one table at a time
        lake.compact(files_max=0)
    lose_log(tmp_path / "europe/losses")
    again = open_lake(tmp_path)
    assert reach(again, 9).cumulative == 9
    assert again.append("eu", [ledger(7, loss(3, 4))]).committed == []


def test_a_block_that_comes_although_it_was_given_up_is_stored_once(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1), ledger(4, loss(2, 3))])

    late = lake.append("eu", [block(2), block(2)])
    again = lake.append("eu", [block(2)])
    after = open_lake(tmp_path).append("eu", [block(2), block(3)])

    assert [i[3] for i in late.committed] == [2] and again.committed == []
    assert [i[3] for i in after.committed] == [3] and [i[3] for i in after.duplicates] == [2]
    assert settled(after.receipts).cumulative == 4
    assert stored(open_lake(tmp_path)) == {1: 1, 2: 1, 3: 1}


def test_a_query_tells_which_blocks_were_given_up_and_are_there_all_the_same(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1), ledger(4, loss(2, 3)), block(3)])

    given_up = lake.read("losses", columns=["device", "of_epoch", "of_lane", "first_sequence", "last_sequence"]).to_pylist()
    there = {tuple(r.values()) for r in lake.read("pump", columns=["device", "epoch", "lane", "sequence"]).to_pylist()}
    found = [
        (n, (x["device"], x["of_epoch"], x["of_lane"], n) in there)
        for x in given_up
        for n in range(x["first_sequence"], x["last_sequence"] + 1)
    ]

    assert found == [(2, False), (3, True)]


def test_a_block_and_the_ledger_that_names_it_in_one_batch_are_both_stored(tmp_path: Path) -> None:
    answer = open_lake(tmp_path).append("eu", [ledger(3, loss(1, 2)), block(2)])

    assert sorted(i[3] for i in answer.committed) == [2, 3]
    assert settled(answer.receipts).cumulative == 3


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(loss(2, 5, blocks=3), id="means fewer blocks than its range has names"),
        pytest.param(loss(2, 5, blocks=5), id="means more blocks than its range has names"),
        pytest.param(loss(2, 3, lane="canada"), id="is of another lane"),
        pytest.param(loss(2, 3, epoch="e0"), id="is of another epoch"),
        pytest.param(loss(2, 2**62), id="names what was not given out yet"),
        pytest.param(loss(-5, 3), id="begins before the first name"),
        pytest.param(loss(3, 2, blocks=0), id="ends before it begins"),
        pytest.param(loss(-(2**63), 2**63 - 1, blocks=0), id="is longer than 64 bits can say"),
    ],
)
def test_a_row_settles_nothing_of_a_lane_if_it(tmp_path: Path, row: Loss) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1), ledger(6, row)])

    assert reach(lake, 7) == reach(open_lake(tmp_path), 7) == LaneReceipt(lane="europe", cumulative=1, ranges=[(6, 7)])


def test_a_file_that_was_given_up_for_lost_and_is_back_still_delivers_its_blocks(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(1, epoch="e0"), ledger(1, loss(2, 9, epoch="e0"))])

    assert settled(lake.append("eu", [block(10, epoch="e0")]).receipts) == LaneReceipt(lane="europe", cumulative=1, ranges=[(10, 10)])
    assert settled(lake.append("eu", [block(n, epoch="e0") for n in range(2, 10)]).receipts).cumulative == 10


def test_devices_and_lanes_do_not_settle_each_others_names(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [ledger(3, loss(1, 2)), ledger(3, loss(1, 2, lane="canada"), lane="canada", device="d2")])

    found = {
        r.device: {x.lane: x.cumulative for x in r.lanes} for r in lake.append("eu", [block(9, "canada"), block(9, device="d2")]).receipts
    }
    assert found == {"d1": {"canada": 0}, "d2": {"europe": 0}}
    assert reach(lake, 4).cumulative == 4


def test_with_thousands_of_holes_receipts_reach_the_newest_block(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    last = 10_000
    lake.append("eu", [block(n, rows=1) for n in range(1, last, 2)])  # every second one is given up
    cut = reach(lake, last + 2)
    assert len(cut.ranges) == RANGES_MAX and cut.ranges[-1][1] < last, "so many holes do not fit a receipt"

    answer = lake.append("eu", [ledger(last + 1, *(loss(n) for n in range(2, last + 1, 2)))])

    assert settled(answer.receipts) == LaneReceipt(lane="europe", cumulative=last + 2)
    assert reach(open_lake(tmp_path), last + 3).cumulative == last + 3
    assert lake.append("eu", [block(2, rows=1), block(2, rows=1)]).committed == [("d1", "e1", "europe", 2)]


def test_another_writers_ledger_is_known_once_its_commits_are_seen(tmp_path: Path) -> None:
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(1), ledger(2, loss(99, epoch="e0"))])
    us.append("us", [ledger(6, loss(3, 4))])

    answer = eu.append("eu", [block(7), ledger(8, loss(5))])  # Delta refuses: it has not seen the other's commit to this table

    assert settled(answer.receipts) == LaneReceipt(lane="europe", cumulative=8)
    assert [i[3] for i in eu.append("eu", [block(3), block(6)]).committed] == [3], "the name 6 is the ledger's"
    assert eu.append("eu", [ledger(6, loss(3, 4))]).committed == []


def test_receipts_that_are_cut_off_make_a_writer_look_for_the_ledger_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.settled.RANGES_MAX", 3)
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(n) for n in (1, 3, 5)])
    us.append("us", [ledger(10, *(loss(n) for n in (2, 4, 6, 8)))])  # in a table that the other one does not know

    assert reach(eu, 7) == LaneReceipt(lane="europe", cumulative=1, ranges=[(3, 3), (5, 5), (7, 7)])
    assert reach(eu, 9) == LaneReceipt(lane="europe", cumulative=10)


def test_it_looks_again_only_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.settled.RANGES_MAX", 1)
    eu, us = open_lake(tmp_path), open_lake(tmp_path)
    eu.append("eu", [block(1), block(3), block(5)])
    us.append("us", [ledger(6, loss(2), loss(4))])
    assert reach(eu, 7).cumulative == 1

    monkeypatch.setattr(eu, "_refresh_due", {})  # the time has passed
    assert reach(eu, 8).cumulative == 8


def draft(number: int, stream: str) -> Draft:
    header, table = block(number, rows=200)
    columns = {name: table[name] for name in ("ts", "pump", "count")} | {"pressure": np.random.default_rng(number).normal(size=200)}
    return Draft("europe", stream, "1.0.0", FixQuality.STATIC, "p", columns, 200, header.first_us, header.last_us)


def test_a_real_buffer_that_gave_up_every_other_block_is_emptied_by_receipts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.settled.RANGES_MAX", 10)
    buffer = Buffer(tmp_path / "buffer.db", "d1", "b", bytes_max=450_000, priorities={"alarm": 5}, history_rows={})
    for n in range(1, 121):  # pump blocks go, those in between stay
        buffer.append([draft(n, "pump"), draft(n, "alarm")], [], Moment(n, n, True))
    waiting = [decode_block(b.block) for b in buffer.pending("europe", 0, 1_000)]
    others, rows = ([x for x in waiting if (x[0].stream == LOSSES.stream) is whose] for whose in (False, True))
    lost = [x for _, table in rows for x in read_losses(table)]
    assert len({x.first_sequence for x in lost if x.of_stream == "pump"}) > 10

    lake = Lake(tmp_path / "lake", Contracts([contract(), replace(contract(), stream="alarm")]))
    for receipt in lake.append("eu", others).receipts:
        buffer.settle(receipt)
    left = sum(s.blocks for s in buffer.lanes())
    assert left > len(rows), "the receipt had no room for the newest ones"
    for receipt in lake.append("eu", rows).receipts:
        buffer.settle(receipt)

    assert buffer.lanes() == []
    buffer.close()


def held(lake: Lake, device: str = "d1") -> int:
    """How many ranges are kept in memory for a device's names."""
    return sum(len(names.ranges) for key, names in lake._settled._named.items() if key[0] == device)


@pytest.mark.parametrize("spread", ["over one lane", "over epochs", "over lanes"])
def test_a_device_may_not_name_ranges_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: str) -> None:
    monkeypatch.setattr("cloud.settled.RANGES_HELD_MAX", 100)
    lake = open_lake(tmp_path)
    answers = []
    for turn in range(10):
        lane = ("europe", "canada")[turn % 2] if spread == "over lanes" else "europe"
        epoch = f"e{turn}" if spread == "over epochs" else "e1"
        row = [loss(100 * turn + 2 * n + 1, epoch=epoch, lane=lane) for n in range(1, 26)]
        answers.append(lake.append("eu", [ledger(1_000_000 + 2 * turn, *row, lane=lane, epoch=epoch)]))
        assert held(lake) <= 100 + 1, "a block's own name is one"
    assert [len(a.committed) for a in answers] == [1, 1, 1] + [0] * 7
    refused = [refusal for answer in answers for refusal in answer.refused]
    assert {r.reason for r in refused} == {Reason.OVERSIZE} and "at most 100" in refused[0].detail and len(refused) == 7
    assert all(not answer.receipts for answer in answers[3:]), "the device keeps what is refused"

    others = lake.append("eu", [ledger(9, loss(2), loss(4), device="d2"), block(7, device="d1", epoch="e77")])
    assert len(others.committed) == 2 and others.refused == []
    assert held(open_lake(tmp_path)) <= 101


def test_the_blocks_of_one_batch_are_counted_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.settled.RANGES_HELD_MAX", 100)
    lake = open_lake(tmp_path)
    rows = [[loss(100 * turn + 2 * n + 1) for n in range(1, 26)] for turn in range(10)]
    answer = lake.append("eu", [block(1), *(ledger(5_000 + turn, *rows[turn]) for turn in range(10))])
    assert [i[3] for i in answer.committed] == [1, 5_000, 5_001, 5_002, 5_003]
    assert [r.block[3] for r in answer.refused if r.block] == list(range(5_004, 5_010)) and held(lake) <= 102
    again = lake.append("eu", [ledger(5_000, *rows[0])])
    assert [i[3] for i in again.duplicates] == [5_000] and again.refused == [] and settled(again.receipts).cumulative == 1


def test_an_honest_device_waits_with_its_ledger_and_loses_and_doubles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other block was given up, and the ledger comes before those in between: what is refused now is taken when they are there."""
    monkeypatch.setattr("cloud.settled.RANGES_HELD_MAX", 100)
    lake = open_lake(tmp_path)
    waiting = {n: block(n, rows=1) for n in range(2, 802, 2)}
    waiting |= {1_000 + part: ledger(1_000 + part, *(loss(n) for n in range(200 * part + 1, 200 * part + 200, 2))) for part in range(4)}
    named = {n for part in range(4) for n in range(200 * part + 1, 200 * part + 200, 2)}
    turns = 0
    while waiting:
        turns += 1
        assert turns < 100
        ledgers = [waiting[n] for n in sorted(waiting, reverse=True) if n >= 1_000]
        batch = ledgers + [waiting[n] for n in sorted(waiting)[:60] if n < 1_000]
        for receipt in lake.append("eu", batch).receipts:
            there = settled([receipt]).settles()
            waiting = {n: found for n, found in waiting.items() if n not in there}
        lake = lake if turns % 3 else open_lake(tmp_path)
    assert stored(lake) == dict.fromkeys(range(2, 802, 2), 1)
    given_up = lake.read("losses", columns=["first_sequence", "sequence"]).to_pylist()
    assert Counter(row["first_sequence"] for row in given_up) == dict.fromkeys(named, 1)


def test_a_ledger_that_fills_holes_is_taken_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [block(n, rows=1) for n in range(1, 300, 2)])
    monkeypatch.setattr("cloud.settled.RANGES_HELD_MAX", 100)
    for part in range(3):
        answer = lake.append("eu", [ledger(301 + part, *(loss(n) for n in range(100 * part + 2, 100 * part + 102, 2)))])
        assert len(answer.committed) == 1
    assert settled(answer.receipts).cumulative == 303


def test_what_an_agent_writes_in_one_ledger_fits(tmp_path: Path) -> None:
    assert 4 * ROWS_MAX <= RANGES_HELD_MAX
    rows = [loss(2 * n) for n in range(1, ROWS_MAX + 1)]
    lake = open_lake(tmp_path)
    for turn in range(3):
        mine = [replace(r, first_sequence=r.first_sequence + 100_000 * turn, last_sequence=r.last_sequence + 100_000 * turn) for r in rows]
        assert lake.append("eu", [ledger(10**6 + turn, *coalesce(mine))]).refused == []
    assert held(lake) == 3 * ROWS_MAX + 1


def test_a_ledger_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts are a device's: as one table they took some 180 MB of memory for each block that one sent, well packed."""
    taken: list[int] = []
    give_up = SettledIndex.give_up
    open_lake(tmp_path).append("eu", [block(1), ledger(8, *(loss(n) for n in range(2, 8)))])
    monkeypatch.setattr(SettledIndex, "give_up", lambda index, rows: (taken.append(rows.num_rows), give_up(index, rows)))
    monkeypatch.setattr("cloud.upkeep.SCAN_ROWS", 2)
    assert reach(open_lake(tmp_path), 9) == LaneReceipt(lane="europe", cumulative=9)
    assert taken == [2, 2, 2]
