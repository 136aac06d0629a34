"""Appends, compactions, restarts and reads in any order, by several writers, against a model in plain Python."""

from __future__ import annotations

import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cloud.lake import Lake
from cloud.rows import DAY_US
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.receipt import Receipt
from tests.cloud.blocks import block
from tests.cloud.test_lake import open_lake

RUNS_LONG = int(os.environ.get("FENCELINE_RUNS", "50"))
STEPS, WRITERS, SEQUENCES = 30, 3, 25
DAY0 = 20_000
Row = tuple[str, str, int, int, int]  # device, lane, sequence, row, event time


class Model:
    """What the lake must hold: the rows of every block that an append was told of, once."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, int], list[Row]] = {}
        self.versions: list[tuple[dict[str, int], Counter[Row]]] = []

    def all(self, from_us: int = -(2**63), to_us: int = 2**63 - 1) -> Counter[Row]:
        return Counter(row for rows in self.rows.values() for row in rows if from_us <= row[4] < to_us)

    def check(self, receipt: Receipt) -> None:
        """A receipt names no block that is not stored; what another writer stored a moment ago, its sender need not know."""
        for lane in receipt.lanes:
            named = set(range(1, lane.cumulative + 1)) | {n for first, last in lane.ranges for n in range(first, last + 1)}
            stored = {n for device, where, n in self.rows if (device, where) == (receipt.device, lane.lane)}
            assert named <= stored, f"{receipt.device}/{lane.lane}: receipt names {sorted(named - stored)}, which are not stored"


def made(device: str, lane: str, sequence: int) -> tuple[BlockHeader, Table]:
    """The block of that name: always the same rows, over a few dates, some of them far away."""
    own = np.random.default_rng([sequence, len(device), len(lane), ord(device[-1])])
    count = int(own.integers(1, 6))
    days = DAY0 + own.integers(0, 3, count) - (400 if sequence % 7 == 0 else 0)
    times = days * DAY_US + own.integers(0, DAY_US, count)
    header, table = block(sequence, lane=lane, device=device, rows=count)
    return header, {**table, "ts": times, "pump": Strings.of(own.choice(["a", "b", "c"], count).tolist())}


def rows_of(header: BlockHeader, table: Table) -> list[Row]:
    times = table["ts"]
    assert not isinstance(times, Strings)
    return [(header.device, header.lane, header.sequence, row, int(us)) for row, us in enumerate(times.tolist())]


def read(lake: Lake, **how: object) -> Counter[Row]:
    found = lake.read("pump", columns=["device", "lane", "sequence", "row", "ts"], **how)  # type: ignore[arg-type]
    if not found.num_rows:
        return Counter()
    columns = [found[name].to_pylist() for name in ("device", "lane", "sequence", "row")]
    return Counter(zip(*columns, found["ts"].cast("int64").to_pylist(), strict=True))


def test_whatever_happens_in_whatever_order_the_lake_holds_what_it_was_told(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(tmp_path, seed, monkeypatch)


@pytest.mark.long
def test_many_histories_of_the_lake(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for run in range(RUNS_LONG):
        play(tmp_path / str(run), seed + run, monkeypatch)


def play(path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One history: steps of several writers, looked at by a reader of its own now and then."""
    print(f"history {seed}")
    monkeypatch.setattr("cloud.handle.REOPEN_COMMITS", 2)
    rng, model = random.Random(seed), Model()
    lakes = [open_lake(path) for _ in range(WRITERS)]
    for step in range(STEPS):
        act(rng, model, lakes, path, monkeypatch)
        if step % 10 == 9:
            assert read(open_lake(path)) == model.all(), f"history {seed}, step {step}"
    for versions, rows in model.versions:
        assert read(lakes[0], versions=versions) == rows, f"history {seed}, versions {versions}"


def act(rng: random.Random, model: Model, lakes: list[Lake], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of one writer."""
    writer = rng.randrange(WRITERS)
    lake = lakes[writer]
    match rng.choices(["append", "merge", "sort", "restart", "pin", "range"], [60, 8, 8, 8, 8, 8])[0]:
        case "append":
            names = [
                (rng.choice(["d1", "d2"]), rng.choice(["europe", "canada"]), rng.randint(1, SEQUENCES)) for _ in range(rng.randint(1, 6))
            ]
            blocks = [made(*name) for name in names]
            settled = lake.append(f"r{writer}", blocks)
            fresh = {name for name in names if name not in model.rows}
            assert {(d, lane, n) for d, _, lane, n in settled.committed} == fresh
            assert len(settled.committed) + len(settled.duplicates) == len(set(names)) and not settled.refused
            model.rows |= {(h.device, h.lane, h.sequence): rows_of(h, t) for h, t in blocks}
            for receipt in settled.receipts:
                model.check(receipt)
        case "merge" | "sort" as how:
            monkeypatch.setattr("cloud.upkeep.QUIET_S", 3600.0 if how == "merge" else -60.0)
            lake.compact(files_max=0)
        case "restart":
            lakes[writer] = open_lake(path)
        case "pin":
            if versions := lake.versions("pump"):  # of an empty lake, none names nothing: it would read what is there now
                model.versions.append((versions, model.all()))
        case _:
            from_us = (DAY0 + rng.randint(-1, 3)) * DAY_US + rng.randrange(DAY_US)
            to_us = from_us + rng.randrange(2 * DAY_US)
            assert read(lake, during_us=(from_us, to_us)) == model.all(from_us, to_us)
