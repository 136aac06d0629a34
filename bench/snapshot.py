"""The readings of a snapshot: in how much memory, and how fast, they are sorted out of the lake.

- The lake: 5 M readings of 26 fields by 100 devices, two epochs each, which change between two lanes; written by ingest's code in commits
  of up to half a million rows, not compacted.
- Ours (`pipelines.snapshot.write_readings`), and the same rows read into memory, sorted there by Arrow and written. Each runs in a process
  of its own. Both must write the same bytes, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from bench.join_ways import peak_bytes
from bench.report import Cell, Report, main
from cloud.lake import Lake
from edge_agent.contract.block import ORDINAL, SCORE
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.stream import FieldType
from pipelines.params import Snapshot
from pipelines.snapshot import ORIGIN, ROW_GROUP, write_readings
from tests.pipelines.lakes import LANES, START_US, header_of, open_lake, turbofan

DEVICES, ROWS = 100, 5_000_000
QUICK = (4, 40_000)
BLOCK_ROWS = 5_000
ENGINES = 10
WAYS = {"ours": "Fenceline", "memory": "sorted in memory"}
COLUMNS = [*(f.name for f in turbofan().fields), *ORIGIN]
WAY_S_MAX = 3_600


def measure(arguments: argparse.Namespace) -> Report:
    """CPU seconds and peak memory of each way."""
    devices, rows = QUICK if arguments.quick else (DEVICES, ROWS)
    with tempfile.TemporaryDirectory(prefix="snapshot-") as directory:
        folder = Path(directory)
        fill(folder / "lake", devices, rows // devices)
        found = {way: run(way, folder) for way in WAYS}
        files = {way: (folder / f"{way}.parquet").read_bytes() for way in WAYS}
        assert files["ours"] == files["memory"], "the files differ"
    table: list[list[Cell]] = [[name, found[way]["cpu_s"], found[way]["s"], found[way]["peak_gb"]] for way, name in WAYS.items()]
    notes = [f"{rows:,} readings of {len(COLUMNS)} columns, a file of {len(files['ours']) / 1e6:.0f} MB; equal bytes (checked)."]
    return Report("A snapshot's readings", ["way", "CPU s", "s", "peak GB"], table, {"rows": rows, "equal": True, **found}, notes)


def fill(root: Path, devices: int, rows: int) -> None:
    """A lake of so many readings of each device; a device's blocks go to one lane and the other in turn."""
    lake, random = open_lake(root), np.random.default_rng(1)
    for block, first in enumerate(range(0, rows, BLOCK_ROWS)):
        epoch, start = ("e0", 0) if first < rows // 2 else ("e1", rows // 2)
        lake.append("eu", [_block(random, f"plane-{d:04d}", epoch, block, d, first, start) for d in range(devices)])


def _block(random: np.random.Generator, device: str, epoch: str, block: int, turn: int, first: int, start: int) -> tuple[Any, Table]:
    place = np.arange(first, first + BLOCK_ROWS)
    table: Table = {ORDINAL: place - start, SCORE: np.round(random.normal(100, 20, BLOCK_ROWS), 2)}
    for field in turbofan().fields:
        if field.type is FieldType.TIMESTAMP:
            table[field.name] = START_US + place // ENGINES * 60_000_000
        elif field.type is FieldType.STRING:
            table[field.name] = Strings((place % ENGINES).astype(np.int32), tuple(f"{device}-engine-{i}" for i in range(ENGINES)))
        elif field.type is FieldType.INTEGER:
            table[field.name] = place // ENGINES
        else:
            table[field.name] = np.round(random.normal(500, 5, BLOCK_ROWS), 2)
    return header_of(device, epoch, LANES[(block + turn) % 2], block + 1, table, "a" * 64), table


def run(way: str, folder: Path) -> dict[str, float]:
    """One way in a process of its own."""
    command = [sys.executable, "-c", "import sys; from bench.snapshot import one; one(*sys.argv[1:])", way, str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=WAY_S_MAX, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def one(way: str, folder: str) -> None:
    """Write the file and say what it took."""
    lake, path = Lake(Path(folder) / "lake"), Path(folder) / f"{way}.parquet"
    versions, started, cpu_s = lake.versions("turbofan"), time.perf_counter(), time.process_time()
    if way == "ours":
        write_readings(lake, "turbofan", versions, COLUMNS, Snapshot().memory_mb, path)
    else:
        readings = lake.read("turbofan", versions=versions, columns=COLUMNS)
        pq.write_table(readings, path, compression="zstd", row_group_size=ROW_GROUP)
    print(json.dumps({"cpu_s": time.process_time() - cpu_s, "s": time.perf_counter() - started, "peak_gb": peak_bytes() / 1e9}))


if __name__ == "__main__":
    main(__doc__, measure)
