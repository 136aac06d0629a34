"""Completeness: every number of a lane is stored, in quarantine, in the ledger, waited for, or an alarm."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from cloud.block_index import BlockIndex
from cloud.completeness import Gap, State, examine
from cloud.quarantine import CheckedLake
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, loss_table
from tests.cloud.blocks import block
from tests.cloud.test_quarantine import bad, checked

LATER_US = time.time_ns() // 1_000 + 3_600_000_000


def ledger(sequence: int, losses: list[Loss], device: str = "d1") -> object:
    header, _ = block(sequence, device=device, rows=len(losses), stream=LOSSES.stream, contract_version=LOSSES.version)
    return header, {**loss_table(losses), ORDINAL: np.arange(len(losses), dtype=np.int64)}


def loss(first: int, last: int, blocks: int | None = None, stream: str = "pump", readings: float = 30.0) -> Loss:
    count = last - first + 1 if blocks is None else blocks
    return Loss(5, stream, "e1", "europe", first, last, count, readings, 1.0, 2.0, Reason.EVICTED_FULL.value, "full")


@pytest.fixture
def lake(tmp_path: Path) -> CheckedLake:
    return checked(tmp_path)


def test_every_gap_is_named_with_what_is_known_of_it(lake: CheckedLake) -> None:
    blocks = [block(n, rows=4) for n in (1, 2, 5, 12, 13)] + [bad(3, [0, 1, 2, 3]), bad(4, [1])]
    lake.append("eu", [*blocks, ledger(11, [loss(6, 8)])])  # type: ignore[list-item]
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


def test_streams_and_devices_and_times(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(3), ledger(4, [loss(2, 2, stream="other")]), block(1, device="d2"), block(3, device="d2")])  # type: ignore[list-item]
    assert examine(lake, BlockIndex(), LATER_US, device="d2").blocks[State.UNACCOUNTED] == 1
    assert not examine(lake, BlockIndex(), LATER_US, device="d1").alarm
    pump, other = (examine(lake, BlockIndex(), LATER_US, stream=name) for name in ("pump", "other"))
    assert (pump.stored, pump.blocks[State.LOST]) == (4, 0) and (other.stored, other.blocks[State.LOST]) == (0, 1)
    assert examine(lake, BlockIndex(), LATER_US, since_us=LATER_US).captured == 0


def test_a_ledger_row_that_means_fewer_blocks_than_are_missing_excuses_none(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(6), ledger(7, [loss(2, 5, blocks=2)])])  # type: ignore[list-item]
    assert examine(lake, BlockIndex(), LATER_US).blocks[State.UNACCOUNTED] == 4
    lake.append("eu", [block(3), block(4)])
    assert examine(lake, BlockIndex(), LATER_US).blocks[State.LOST] == 2


def test_names_that_were_never_used_are_no_blocks(lake: CheckedLake) -> None:
    lake.append("eu", [block(1), block(2**20 + 2), ledger(2**20 + 3, [loss(2, 2**20 + 1, stream="unused")])])  # type: ignore[list-item]
    found = examine(lake, BlockIndex(), LATER_US)
    assert found.captured == 3 and found.gaps == [] and found.share == 1.0


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
    lake.append("eu", [ledger(60, [loss(n, n) for n, f in fate.items() if f == "l"] or [loss(61, 61)])])  # type: ignore[list-item]
    found = examine(lake, index, LATER_US)
    count = {letter: sum(f == letter for f in fate.values()) for letter in "sqlu"}
    assert found.stored == count["s"] + 1 and found.blocks[State.QUARANTINED] == count["q"]
    named = {n: gap.state for gap in found.gaps for n in range(gap.first, gap.last + 1)}
    assert named == {n: State.LOST if f == "l" else State.UNACCOUNTED for n, f in fate.items() if f in "lu"}
