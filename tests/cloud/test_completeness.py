"""Completeness: every number of a lane is stored, in quarantine, in the ledger, waited for, or an alarm."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.audit import Audit
from cloud.block_index import BlockIndex
from cloud.completeness import Gap, State, _gaps, _Lane, _Loss, examine
from cloud.quarantine import CheckedLake
from cloud.quarantined import Selection, parse_name
from cloud.readmission import Readmission
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, loss_table
from tests.cloud.blocks import block
from tests.cloud.test_quarantine import bad, checked

LATER_US = time.time_ns() // 1_000 + 3_600_000_000


def ledger(sequence: int, losses: list[Loss], device: str = "d1", epoch: str = "e1") -> Any:
    header, _ = block(sequence, device=device, epoch=epoch, rows=len(losses), stream=LOSSES.stream, contract_version=LOSSES.version)
    return header, {**loss_table(losses), ORDINAL: np.arange(len(losses), dtype=np.int64)}


def loss(
    first: int,
    last: int,
    blocks: int | None = None,
    stream: str = "pump",
    readings: float = 30.0,
    epoch: str = "e1",
    lane: str = "europe",
) -> Loss:
    count = last - first + 1 if blocks is None else blocks
    return Loss(5, stream, epoch, lane, first, last, count, readings, 1.0, 2.0, Reason.EVICTED_FULL.value, "full")


@pytest.fixture
def lake(tmp_path: Path) -> CheckedLake:
    return checked(tmp_path)


def test_every_gap_is_named_with_what_is_known_of_it(lake: CheckedLake) -> None:
    blocks = [block(n, rows=4) for n in (1, 2, 5, 12, 13)] + [bad(3, [0, 1, 2, 3]), bad(4, [1])]
    lake.append("eu", [*blocks, ledger(11, [loss(6, 8)])])
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.gaps == [
        Gap("d1", "e1", "europe", 6, 8, 3, State.LOST, "pump", "evicted_full", 30.0),
        Gap("d1", "e1", "europe", 9, 10, 2, State.UNACCOUNTED),
    ]
    assert found.stored == 7 and found.blocks[State.QUARANTINED] == 1 and found.captured == 13 and found.alarm
    assert found.share == 8 / 13 and (found.readings, found.quarantined_readings, found.lost_readings) == (24, 5, 30.0)


def test_a_gap_is_waited_for_first_and_as_long_as_the_device_holds_as_many(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(4)])
    now = time.time_ns() // 1_000
    assert [g.state for g in examine(lake, BlockIndex(), now).gaps] == [State.PENDING]
    assert [g.state for g in examine(lake, BlockIndex(), now, grace_s=0).gaps] == [State.UNACCOUNTED]
    for held, state in ((2, State.WAITING), (1, State.UNACCOUNTED), (0, State.UNACCOUNTED)):
        found = examine(lake, BlockIndex(), LATER_US, waiting={("d1", "e1"): held})
        assert [g.state for g in found.gaps] == [state] and found.alarm == (state is State.UNACCOUNTED)
    assert examine(lake, BlockIndex(), LATER_US, waiting={("d1", "older"): 9}).alarm


def test_what_is_missing_of_a_removed_device_is_named_and_no_alarm(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(4), block(1, device="d2"), block(3, device="d2")])
    found = examine(lake, BlockIndex(), LATER_US, removed={"d1": LATER_US})
    assert found.gaps == [Gap("d1", "e1", "europe", 2, 3, 2, State.REMOVED), Gap("d2", "e1", "europe", 2, 2, 1, State.UNACCOUNTED)]
    assert (found.captured, found.due, found.share) == (7, 5, 4 / 7)
    assert not examine(lake, BlockIndex(), LATER_US, device="d1", removed={"d1": LATER_US}).alarm
    now = time.time_ns() // 1_000
    assert [g.state for g in examine(lake, BlockIndex(), now, device="d1", removed={"d1": now}).gaps] == [State.PENDING]


def test_a_device_that_was_added_again_answers_for_what_it_sends_from_then_on(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(3)])
    removed = {"d1": time.time_ns() // 1_000}
    lake.append("eu", [block(1, epoch="e2"), block(3, epoch="e2")])
    found = examine(lake, BlockIndex(), LATER_US, removed=removed)
    assert [(g.epoch, g.state) for g in found.gaps] == [("e1", State.REMOVED), ("e2", State.UNACCOUNTED)]
    found = examine(lake, BlockIndex(), LATER_US, removed=removed, waiting={("d1", "e1"): 1})
    assert found.gaps[0].state is State.WAITING, "it came back with the buffer that it had"


def test_streams_and_devices_and_times(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(3), ledger(4, [loss(2, 2, stream="other")]), block(1, device="d2"), block(3, device="d2")])
    assert examine(lake, BlockIndex(), LATER_US, device="d2").blocks[State.UNACCOUNTED] == 1
    assert not examine(lake, BlockIndex(), LATER_US, device="d1").alarm
    pump, other = (examine(lake, BlockIndex(), LATER_US, stream=name) for name in ("pump", "other"))
    assert (pump.stored, pump.blocks[State.LOST]) == (4, 0) and (other.stored, other.blocks[State.LOST]) == (0, 1)
    assert examine(lake, BlockIndex(), LATER_US, since_us=LATER_US).captured == 0


def test_a_ledger_row_that_means_fewer_blocks_than_are_missing_excuses_none(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(6), ledger(7, [loss(2, 5, blocks=2)])])
    assert examine(lake, BlockIndex(), LATER_US).blocks[State.UNACCOUNTED] == 4
    lake.append("eu", [block(3), block(4)])
    assert examine(lake, BlockIndex(), LATER_US).blocks[State.LOST] == 2


def test_names_that_were_never_used_are_no_blocks(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(2**20 + 2), ledger(2**20 + 3, [loss(2, 2**20 + 1, stream="unused")])])
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.captured == 3 and found.gaps == [] and found.share == 1.0


def test_what_a_buffer_that_is_gone_held_above_all_that_came_is_lost(lake: CheckedLake) -> None:
    rows = [loss(3, 9), loss(12, 12, readings=7.0), loss(1, 4, epoch="e0", lane="canada", stream="unknown")]
    lake.append("eu", [block(1), block(2), ledger(1, rows, epoch="e2")])
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.gaps == [
        Gap("d1", "e0", "canada", 1, 4, 4, State.LOST, "unknown", "evicted_full", 30.0),
        Gap("d1", "e1", "europe", 3, 9, 7, State.LOST, "pump", "evicted_full", 30.0),
        Gap("d1", "e1", "europe", 10, 11, 2, State.UNACCOUNTED),
        Gap("d1", "e1", "europe", 12, 12, 1, State.LOST, "pump", "evicted_full", 7.0),
    ]
    assert (found.stored, found.captured, found.lost_readings) == (3, 17, 67.0)
    assert examine(lake, BlockIndex(), time.time_ns() // 1_000).blocks[State.PENDING] == 2
    pump = examine(lake, BlockIndex(), LATER_US, stream="pump")
    assert (pump.stored, pump.blocks[State.LOST], pump.blocks[State.UNACCOUNTED]) == (2, 8, 2)
    assert examine(lake, BlockIndex(), LATER_US, since_us=LATER_US).gaps == []


def test_names_that_were_skipped_above_all_that_came_are_no_blocks(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), ledger(1, [loss(2, 2**20 + 1, stream="unused")], epoch="e2")])
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.captured == 2 and found.gaps == []


def test_a_loss_of_nobody_knows_which_stream_counts_for_each_stream_of_the_lane(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(4), ledger(5, [loss(2, 3, stream="unknown")]), block(1, lane="canada"), block(3, lane="canada")])
    for stream, lost in (("pump", 2), ("losses", 2), ("other", 0)):
        assert examine(lake, BlockIndex(), LATER_US, stream=stream).blocks[State.LOST] == lost


def test_a_lane_that_has_a_stream_in_quarantine_only_belongs_to_the_stream(lake: CheckedLake) -> None:
    lake.append("eu", [bad(n, [0, 1, 2, 3]) for n in (1, 2, 5)])
    for stream in ("pump", None):
        found = examine(lake, BlockIndex(), LATER_US, stream=stream)
        assert (found.blocks[State.QUARANTINED], found.blocks[State.UNACCOUNTED], found.captured) == (3, 2, 5) and found.alarm


def test_released_rows_are_counted_in_their_stream_only(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    lake.append("eu", [bad(1, [0, 2]), bad(2, [1])])
    Readmission(lake, Audit(tmp_path / "audit.db")).release(Selection(name=parse_name("d1/e1/europe/1/2")), "boss", as_is=True)
    found = examine(lake, BlockIndex(), LATER_US)
    assert (found.readings, found.quarantined_readings) == (6, 2)


def test_what_is_waited_for_does_not_depend_on_the_part_that_is_asked_for(lake: CheckedLake) -> None:
    elsewhere = [loss(n, n, stream="other", lane="canada") for n in (1, 3)]
    lake.append("eu", [block(1), block(4), ledger(1, elsewhere, epoch="e2")])
    time.sleep(0.01)
    now_us = time.time_ns() // 1_000
    lake.append("eu", [block(6)])
    for held, state in ((3, State.UNACCOUNTED), (4, State.WAITING)):
        for since_us, gaps in ((None, [(2, 3), (5, 5)]), (now_us, [(5, 5)])):
            for stream in (None, "pump"):
                waiting = {("d1", "e1"): held}
                found = examine(lake, BlockIndex(), LATER_US, stream=stream, since_us=since_us, waiting=waiting)
                assert [(g.first, g.last, g.state) for g in found.gaps if g.lane == "europe"] == [(*gap, state) for gap in gaps]


def test_any_text_may_be_an_epoch(lake: CheckedLake) -> None:
    """The contract refuses such a block; a lake may have one from before."""
    lake.append("eu", [block(1), block(3, epoch="e\n2", device="d9"), block(1, epoch="", device="d9")])
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.stored == 3 and [(g.device, g.epoch, g.blocks) for g in found.gaps] == [("d9", "e\n2", 2)]


def test_against_an_oracle_that_looks_at_every_number(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    lake, index = checked(tmp_path), BlockIndex()
    fate = {n: chance.choice("sssqlu") for n in range(1, 60)}
    order = [n for n, f in fate.items() if f in "sq"]
    chance.shuffle(order)
    half = len(order) // 2
    for part in (order[:half], order[half:]):
        lake.append("eu", [block(n, rows=4) if fate[n] == "s" else bad(n, [0, 1, 2, 3]) for n in part])
        examine(lake, index, LATER_US)  # what is remembered of the files must not hide new ones
    lake.append("eu", [ledger(60, [loss(n, n) for n, f in fate.items() if f == "l"] or [loss(61, 61)])])
    found = examine(lake, index, LATER_US)
    count = {letter: sum(f == letter for f in fate.values()) for letter in "sqlu"}
    assert found.stored == count["s"] + 1 and found.blocks[State.QUARANTINED] == count["q"]
    named = {n: gap.state for gap in found.gaps for n in range(gap.first, gap.last + 1)}
    expected = {n: State.LOST if f == "l" else State.UNACCOUNTED for n, f in fate.items() if f in "lu"}
    assert named == expected | ({} if count["l"] else {61: State.LOST})


def test_tens_of_thousands_of_ledger_rows_are_gone_through_once() -> None:
    """A full buffer that gives up blocks of two streams in turn. Each row was compared with each other one: half a minute for these."""
    rows = 32_768
    lane = _Lane([np.array([rows + 1])], [np.array([1])])
    lane.ledger = [_Loss(f"s{n % 2}", n, n, 1, 1.0, "evicted_full", 1) for n in random.Random(1).sample(range(1, rows + 1), rows)]
    began = time.process_time()
    gaps = [gap for gap, _ in _gaps(("d1", "e1", "europe"), lane, 10)]
    assert time.process_time() - began < 5
    assert [(g.first, g.last, g.stream) for g in gaps] == [(n, n, f"s{n % 2}") for n in range(1, rows + 1)]


def test_of_several_ledger_rows_that_name_a_number_the_first_counts() -> None:
    lane = _Lane([np.array([1, 9])], [np.array([1, 1])])
    lane.ledger = [
        _Loss("a", 4, 6, 3, 3.0, "evicted_full", 1),
        _Loss("b", 3, 9, 7, 7.0, "evicted_age", 1),
        _Loss("c", 1, 2, 2, 2.0, "x", 1),
    ]
    gaps = [gap for gap, _ in _gaps(("d1", "e1", "europe"), lane, 10)]
    assert [(g.first, g.last, g.stream, g.readings) for g in gaps] == [
        (2, 2, "c", None),
        (3, 3, "b", None),
        (4, 6, "a", 3.0),
        (7, 8, "b", None),
    ]
