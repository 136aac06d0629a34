"""Quarantine: every row of every block is in its stream or in quarantine, once, whatever ends between the two commits."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud import lake as lake_module
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.rows import Contracts
from cloud.stacks import Block
from edge_agent.contract.errors import Reason, UnavailableError
from edge_agent.contract.stream import Field, FieldType, StreamContract
from tests.cloud.blocks import block, contract

Name = tuple[str, str, str, int, int]


def wider() -> StreamContract:
    """The contract when somebody has found out that pressures may be higher."""
    fields = tuple(replace(f, maximum=1e6) if f.name == "pressure" else f for f in contract().fields)
    return replace(contract(), fields=fields)


def checked(path: Path, stream: StreamContract | None = None) -> CheckedLake:
    return CheckedLake(Lake(path, Contracts([stream or contract()])))


def bad(sequence: int, rows: list[int], count: int = 4, **kw: Any) -> Block:
    """A block in which these rows have an impossible pressure."""
    header, table = block(sequence, rows=count, **kw)
    pressure = np.full(count, 50.0)
    pressure[rows] = 1_000.0 + np.array(rows)
    return header, {**table, "pressure": pressure}


def names(lake: Lake, stream: str = "pump") -> list[Name]:
    table = lake.read(stream, columns=["device", "epoch", "lane", "sequence", "row"])
    return sorted(zip(*(c.to_pylist() for c in table.columns), strict=True)) if table.num_columns else []


def rows(lake: Lake) -> list[tuple[int, int]]:
    return [name[3:] for name in names(lake)]


def cumulative(settled: Any) -> list[tuple[int, list[tuple[int, int]]]]:
    return [(lane.cumulative, lane.ranges) for r in settled.receipts for lane in r.lanes]


def test_bad_rows_go_to_quarantine_with_their_reason_and_the_others_to_their_stream(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    settled = lake.append("eu", [block(1, rows=4), bad(2, [1, 3]), bad(3, [0, 1, 2, 3])])
    assert sorted(i[3] for i in settled.committed) == [1, 2, 3] and cumulative(settled) == [(3, [])]
    assert rows(lake.lake) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2)]
    held = lake.held.read("pump")
    assert rows(lake.held) == [(2, 1), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)]
    assert set(held["violation"].to_pylist()) == {Reason.OUT_OF_RANGE} and set(held["violation_field"].to_pylist()) == {"pressure"}
    assert held["pressure"].to_pylist() == [1_001.0, 1_003.0, 1_000.0, 1_001.0, 1_002.0, 1_003.0]
    assert held["violation_detail"].to_pylist()[0] == "0 to 100 allowed" and held["lane"].to_pylist()[0] == "europe"
    found = lake.take_found()
    assert [(f.device, f.lane, f.stream, f.reason, f.rows) for f in found] == [
        ("d1", "europe", "pump", Reason.OUT_OF_RANGE, 2),
        ("d1", "europe", "pump", Reason.OUT_OF_RANGE, 4),
    ]
    assert lake.take_found() == [] and lake.lake.streams() == ["pump"]


def test_a_block_that_comes_again_changes_nothing(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    blocks = [block(1, rows=4), bad(2, [1]), bad(3, [0, 1, 2, 3])]
    lake.append("eu", blocks)
    before = rows(lake.lake), rows(lake.held)
    for again in (lake, checked(tmp_path), checked(tmp_path, wider())):
        settled = again.append("eu", [*blocks, *blocks])
        assert settled.committed == [] and cumulative(settled) == [(3, [])]
        assert (rows(again.lake), rows(again.held)) == before


def test_a_block_wholly_in_quarantine_is_settled_after_a_restart_too(tmp_path: Path) -> None:
    checked(tmp_path).append("eu", [bad(1, [0, 1, 2, 3])])
    again = checked(tmp_path)
    assert cumulative(again.append("eu", [block(2)])) == [(2, [])]


def fail_at(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool], landed: bool) -> None:
    """Commits to tables whose address `fails` end with an error, after or before they landed."""
    real = lake_module.write_deltalake

    def write(table: Any, *args: Any, **kw: Any) -> None:
        wrong = fails(table.table_uri)
        if not wrong or landed:
            real(table, *args, **kw)
        if wrong:
            raise OSError("the storage has gone")

    monkeypatch.setattr(lake_module, "write_deltalake", write)


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("which", ["quarantine", "stream"])
@pytest.mark.parametrize("later", [contract(), wider()], ids=["same", "wider"])
def test_what_ends_between_the_two_commits_is_finished_when_the_block_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, landed: bool, later: StreamContract
) -> None:
    blocks = [block(1, rows=4), bad(2, [1, 3]), bad(3, [0, 1, 2, 3])]
    with monkeypatch.context() as patch:
        fail_at(patch, lambda uri: ("_quarantine" in uri) == (which == "quarantine"), landed)
        with pytest.raises(UnavailableError):
            checked(tmp_path).append("eu", blocks)
    held_before = which == "stream" or landed
    lake = checked(tmp_path, later)
    settled = lake.append("eu", blocks)
    assert cumulative(settled) == [(3, [])]
    everything = sorted(rows(lake.lake) + rows(lake.held))
    assert everything == [(s, r) for s in (1, 2, 3) for r in range(4)], "each row once"
    if held_before or later == contract():
        assert rows(lake.held) == [(2, 1), (2, 3), (3, 0), (3, 1), (3, 2), (3, 3)], "what was quarantined first stays so"


def test_two_workers_with_the_same_blocks_in_any_order_and_any_commit_failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Random blocks to two workers, half of them sent again, one commit in five failing before or after it landed."""
    chance = random.Random(seed)
    sent = [bad(n, [r for r in range(4) if chance.random() < 0.4], lane=chance.choice(["europe", "canada"])) for n in range(1, 17)]
    real = lake_module.write_deltalake

    def write(table: Any, *args: Any, **kw: Any) -> None:
        dice = chance.random()
        if dice > 0.1:
            real(table, *args, **kw)
        if dice < 0.2:
            raise OSError("the storage has gone")

    monkeypatch.setattr(lake_module, "write_deltalake", write)
    workers = [checked(tmp_path), checked(tmp_path)]
    waiting = [*sent, *chance.sample(sent, len(sent) // 2)]
    chance.shuffle(waiting)
    while waiting:
        batch, waiting = waiting[:5], waiting[5:]
        place = chance.randrange(2)
        try:
            workers[place].append("eu", batch)
        except UnavailableError:
            waiting += batch
            if chance.random() < 0.3:
                workers[place] = checked(tmp_path)  # killed
    lake = checked(tmp_path)
    count = Counter(names(lake.lake) + names(lake.held))
    assert count == Counter((*header.identity, r) for header, _ in sent for r in range(4))
    good = {(*h.identity, r) for h, t in sent for r in range(4) if np.asarray(t["pressure"])[r] <= 100}
    assert set(names(lake.lake)) == good


def test_a_block_that_quarantine_refuses_takes_no_other_of_its_stream_with_it(tmp_path: Path) -> None:
    heat = Field("heat", FieldType.NUMBER, required=False)
    made, older, newer = (replace(contract(), version=version) for version in ("1.2.0", "1.1.0", "1.3.0"))
    header, table = bad(1, [1], contract_version="1.2.0")
    checked(tmp_path, replace(made, fields=(*made.fields, heat))).append("eu", [(header, {**table, "heat": np.zeros(4)})])

    lake = CheckedLake(Lake(tmp_path, Contracts([older, newer])))  # the newer one has lost a field
    settled = lake.append("eu", [bad(2, [0, 1], contract_version="1.1.0"), bad(3, [2], contract_version="1.3.0")])
    assert [i[3] for i in settled.committed] == [2] and cumulative(settled) == [(2, [])]
    assert [(refusal.reason, refusal.block) for refusal in settled.refused] == [(Reason.CONTRACT_BROKEN, ("d1", "e1", "europe", 3))]
    assert rows(lake.held) == [(1, 1), (2, 0), (2, 1)] and (2, 3) in rows(lake.lake)


def test_a_name_that_comes_again_in_another_stream_keeps_nobody_waiting(tmp_path: Path) -> None:
    fan = replace(contract(), stream="fan")
    lake = CheckedLake(Lake(tmp_path, Contracts([contract(), fan])))
    lake.append("eu", [bad(1, [0, 1, 2, 3])])
    lie = block(1, rows=4, stream="fan"), bad(1, [0], stream="fan")
    for again in lie:
        settled = lake.append("eu", [again, block(2, device="d2")])
        assert settled.committed in ([("d2", "e1", "europe", 2)], []) and not settled.refused
    assert (rows(lake.held), names(lake.lake, "fan"), len(rows(lake.lake))) == ([(1, r) for r in range(4)], [], 3)


def test_a_whole_block_in_quarantine_that_comes_again_is_a_duplicate(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    first, again = (lake.append("eu", [bad(1, [0, 1, 2, 3])]) for _ in range(2))
    assert (first.committed, first.duplicates) == ([("d1", "e1", "europe", 1)], [])
    assert (again.committed, again.duplicates) == ([], [("d1", "e1", "europe", 1)])
