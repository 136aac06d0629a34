"""Small real lakes for the pipeline's tests: engines that wear, some of them on the same device, in two zones."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cloud.labels import add as add_labels
from cloud.lake import Lake
from cloud.roots import Roots
from cloud.rows import TIME, Contracts
from edge_agent.contract.block import ORDINAL, SCORE, BlockHeader, FixQuality
from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import FieldType, StreamContract

ROOT = Path(__file__).resolve().parents[2]
START_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000
BLOCK_ROWS = 37
LANES = ("europe", "united-states")

Scorer = Callable[[Strings, np.ndarray, Table], Floats]


def turbofan() -> StreamContract:
    return parse_contract((ROOT / "contracts/turbofan.odcs.yaml").read_bytes())


def open_lake(directory: Path | Roots) -> Lake:
    return Lake(directory, Contracts([turbofan()]))


def readings(engines: list[str], seed: int, life: tuple[int, int] = (45, 80)) -> tuple[Table, Floats]:
    """Run-to-failure readings of engines that take turns on one device, and the remaining cycles of each reading."""
    random = np.random.default_rng(seed)
    lives = {e: int(random.integers(*life)) for e in engines}
    order = [(cycle, e) for e in engines for cycle in range(1, lives[e] + 1)]
    order.sort(key=lambda p: (p[0], p[1]))
    cycle = np.array([c for c, _ in order], np.int64)
    left = np.array([lives[e] - c for c, e in order], float)
    wear = np.exp(-left / 25.0)
    table: Table = {}
    for place, field in enumerate(turbofan().fields):
        if field.type is FieldType.TIMESTAMP:
            table[field.name] = START_US + cycle * HOUR_US
        elif field.type is FieldType.STRING:
            table[field.name] = Strings.of([e for _, e in order])
        elif field.type is FieldType.INTEGER:
            table[field.name] = cycle
        else:
            low, high = max(field.minimum, -100.0), min(field.maximum, 5_000.0)
            middle, room = (low + high) / 2, (high - low) / 8
            values = middle + room * (wear * (1 if place % 2 else -1) + random.normal(0, 0.15, len(cycle)))
            table[field.name] = np.round(values, 3)
    return table, left


def store(lake: Lake, device: str, table: Table, model: str | None = None, scorer: Scorer | None = None, first_ordinal: int = 0) -> None:
    """Append a device's readings as blocks that alternate between two lanes, as on a flight to and fro."""
    rows = len(table["cycle"])
    sequences = dict.fromkeys(LANES, 0)
    if first_ordinal:
        sequences = dict.fromkeys(LANES, first_ordinal)  # high enough to be new
    scores = np.full(rows, np.nan) if scorer is None else scorer(table["engine"], table["ts"], table)  # type: ignore[arg-type]
    blocks = []
    for turn, first in enumerate(range(0, rows, BLOCK_ROWS)):
        lane = LANES[turn % 2]
        part: Table = {name: column[first : first + BLOCK_ROWS] for name, column in table.items()}
        count = len(part["cycle"])
        part[ORDINAL] = np.arange(first_ordinal + first, first_ordinal + first + count, dtype=np.int64)
        part[SCORE] = scores[first : first + count]
        sequences[lane] += 1
        header = header_of(device, f"epoch-{device}", lane, sequences[lane], part, model)
        blocks.append((header, part))
    lake.append("eu", blocks)


def header_of(device: str, epoch: str, lane: str, sequence: int, part: Table, model: str | None = None) -> BlockHeader:
    """The header of a block of turbofan readings."""
    return BlockHeader(
        device=device,
        epoch=epoch,
        lane=lane,
        sequence=sequence,
        stream="turbofan",
        contract_version=turbofan().version,
        rows=len(part["ts"]),
        first_us=int(np.asarray(part["ts"])[0]),
        last_us=int(np.asarray(part["ts"])[-1]),
        fix=FixQuality.FIX,
        policy=hashlib.sha256(b"zones").hexdigest(),
        boot="boot",
        monotonic_us=int(np.asarray(part[ORDINAL])[0]),
        sealed_us=START_US,
        clock_synced=True,
        model=model,
    )


def fill(directory: Path | Roots, devices: int = 4, engines_per_device: int = 4, seed: int = 1) -> None:
    """A lake of run-to-failure readings with a label for each."""
    lake = open_lake(directory)
    names: list[str] = []
    times: list[np.ndarray] = []
    lefts: list[Floats] = []
    for d in range(devices):
        table, left = readings([f"engine-{d}-{e}" for e in range(engines_per_device)], seed + d)
        store(lake, f"plane-{d}", table)
        names += table["engine"].tolist()
        times.append(np.asarray(table["ts"]))
        lefts.append(left)
    labels = {"entity": pa.array(names), "event_time": pa.array(np.concatenate(times)).cast(TIME), "label": pa.array(np.concatenate(lefts))}
    add_labels(lake, "turbofan", pa.table(labels))
