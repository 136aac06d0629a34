"""The snapshot's readings: the same bytes as from memory, however they lie in the lake, in memory that does not grow with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from cloud import upkeep
from cloud.lake import Lake
from cloud.rows import DAY_US, Contracts
from edge_agent.contract.block import ORDINAL, BlockHeader
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.stream import Field, FieldType
from pipelines import snapshot
from pipelines.snapshot import ORIGIN, write_readings
from tests.cloud.blocks import block, contract
from tests.faults.mounts import tmpfs
from tests.pipelines.lakes import ROOT

NEWER = replace(contract(), version="1.1.0", fields=(*contract().fields, Field("Heat", FieldType.NUMBER, required=False)))
NEWEST = replace(NEWER, version="1.2.0", fields=(*NEWER.fields, Field("Row", FieldType.NUMBER, required=False)))
"""A name that is another's but for its case: to SQL they are one."""
COLUMNS = [f.name for f in NEWEST.fields] + list(ORIGIN)
LANES = {"europe": contract(), "canada": NEWER, "canada_europe": contract()}
TEXTS = ("p1", "", "Pumpe ä", "\U0001f600", "p\0x", "p" * 40)
TIMES_US = (0, -1, 2**63 - 1, -(2**63), -(2**63) + 1, *(20_000 * DAY_US + hour * 3_600_000_000 for hour in range(0, 96, 7)))


def history(seed: int) -> list[list[tuple[BlockHeader, Table]]]:
    """Blocks of devices whose readings go to one lane and another, in the groups in which they arrive: late, and mixed."""
    random = np.random.default_rng(seed)
    blocks = []
    for device, epoch in [("d1", "e1"), ("d1", "e2"), ("d-1", "e1"), ("d10", "e1"), ("d2", "e1")]:
        ordinal, sequences = 0, dict.fromkeys(LANES, 0)
        for _ in range(20):
            lane, rows = str(random.choice(list(LANES))), int(random.integers(1, 30))
            sequences[lane] += 1
            header, table = block(sequences[lane], lane, device, epoch, rows, contract_version=LANES[lane].version)
            table["ts"] = random.choice(np.array(TIMES_US, np.int64), rows)
            table["pump"] = Strings(random.integers(0, len(TEXTS), rows).astype(np.int32), TEXTS)
            table[ORDINAL] = np.arange(ordinal, ordinal + rows)
            if lane == "canada":
                table["Heat"] = np.where(random.random(rows) < 0.5, np.nan, random.choice([0.0, -0.0, 0.1, 1e300], rows))
            ordinal += rows
            blocks.append((header, table))
    order = random.permutation(len(blocks))
    return [[blocks[i] for i in part] for part in np.array_split(order, 5)]


def fill(root: Path, seed: int) -> Lake:
    lake = Lake(root, Contracts([contract(), NEWER]))
    for n, blocks in enumerate(history(seed)):
        assert len(lake.append("eu", blocks).committed) == len(blocks)
        if n == 3:
            compact(lake)
    return lake


def compact(lake: Lake) -> None:
    while lake.compact(files_max=0):
        pass


def written(lake: Lake, folder: Path) -> bytes:
    """The snapshot's file."""
    path = folder / "readings.parquet"
    rows = write_readings(lake, "pump", lake.versions("pump"), COLUMNS, 256, path)
    assert rows == pq.read_metadata(path).num_rows and [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    return path.read_bytes()


def from_memory(lake: Lake, folder: Path) -> bytes:
    """The file as it was written when the readings were held in memory."""
    path = folder / "whole.parquet"
    pq.write_table(lake.read("pump", columns=COLUMNS), path, compression="zstd", row_group_size=snapshot.ROW_GROUP)
    return path.read_bytes()


@pytest.fixture(params=[100, 1_000, 65_536])
def row_group(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(snapshot, "ROW_GROUP", request.param)
    return int(request.param)


@pytest.mark.usefixtures("row_group")
def test_the_file_has_the_bytes_that_it_has_from_memory(tmp_path: Path, seed: int) -> None:
    lake = fill(tmp_path / "lake", seed)
    assert written(lake, tmp_path) == from_memory(lake, tmp_path)

    table = pq.read_table(tmp_path / "readings.parquet")
    assert table["Row"].null_count == table.num_rows > table["Heat"].null_count > 0


def test_the_file_has_the_same_bytes_however_the_rows_lie(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "ROW_GROUP", 100)
    lake = fill(tmp_path / "lake", seed)
    for n in (999, 998):
        header, table = block(n, rows=7, device="d1", epoch="e1")
        lake.append("eu", [(header, table | {ORDINAL: np.arange(7)})])  # numbered as others are
    first = written(lake, tmp_path)

    compact(lake)
    merged = written(lake, tmp_path)
    monkeypatch.setattr(upkeep, "QUIET_S", -60.0)
    upkeep.compact(lake.table("pump", "europe"), files_max=-1, dates_max=None)
    for lane in lake.lanes("pump"):
        delta = lake.table("pump", lane)
        rows = delta.to_pyarrow_dataset().to_table()
        write_deltalake(delta, rows.take(np.random.default_rng(seed).permutation(rows.num_rows)), mode="overwrite")
    shuffled = written(Lake(tmp_path / "lake"), tmp_path)

    assert first == merged == shuffled


def test_more_text_than_one_column_holds_is_written_in_one_row_group(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = fill(tmp_path / "lake", seed)
    rows = lake.read("pump", columns=COLUMNS)
    monkeypatch.setattr("cloud.reading.TAKE_BYTES_MAX", 1_000)
    written(lake, tmp_path)
    file = pq.ParquetFile(tmp_path / "readings.parquet")
    assert file.num_row_groups == 1 and file.read().equals(rows)


def test_without_rows_there_is_no_file(tmp_path: Path) -> None:
    lake = Lake(tmp_path / "lake", Contracts([contract()]))
    lake.append("eu", [block(1)])
    lake.table("pump", "europe").delete()
    assert write_readings(lake, "pump", lake.versions("pump"), COLUMNS, 256, tmp_path / "readings.parquet") == 0
    assert not (tmp_path / "readings.parquet").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-100])], ids=["gone", "torn"])
def test_a_file_that_does_not_read_leaves_nothing_half_done(tmp_path: Path, seed: int, damage: Callable[[Path], object]) -> None:
    lake = fill(tmp_path / "lake", seed)
    before, versions = written(lake, tmp_path), lake.versions("pump")
    for file in (tmp_path / "lake/europe/pump").glob("event_date=*/*.parquet"):
        damage(file)
    with pytest.raises(UnavailableError, match="does not sort"):
        write_readings(lake, "pump", versions, COLUMNS, 256, tmp_path / "readings.parquet")
    assert (tmp_path / "readings.parquet").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lake", "readings.parquet"]


def test_too_little_memory_is_said_with_what_to_change(tmp_path: Path) -> None:
    lake = many(tmp_path / "lake", 3)
    with pytest.raises(ConfigError, match=r"does not sort: Out of Memory Error.* raise snapshot\.memory_mb \(now 8\)"):
        write_readings(Lake(lake), "pump", Lake(lake).versions("pump"), COLUMNS, 8, tmp_path / "readings.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["lake"]


@pytest.mark.needs_root
def test_a_disk_without_room_is_said_and_left_empty(tmp_path: Path) -> None:
    lake = Lake(many(tmp_path / "lake", 6))
    with tmpfs(tmp_path / "small", "8m") as small:
        with pytest.raises(UnavailableError, match=r"does not sort: the disk of .*/small/\.readings\.parquet/sort has no room for it"):
            write_readings(lake, "pump", lake.versions("pump"), COLUMNS, 64, small / "readings.parquet")
        assert list(small.iterdir()) == []


PEAK = """
import sys
from pathlib import Path
from cloud.lake import Lake
from pipelines.snapshot import ORIGIN, write_readings
lake, columns = Lake(sys.argv[1]), ["pump", "ts", "count", "pressure", *ORIGIN]
print(write_readings(lake, "pump", lake.versions("pump"), columns, 96, Path(sys.argv[1]) / "readings.parquet"))
(peak,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) // 1024)
"""


def many(root: Path, blocks: int) -> Path:
    """A lake with so many times 100,000 readings of three devices."""
    lake, rows = Lake(root, Contracts([contract()])), 100_000
    for n in range(blocks):
        header, table = block(1 + n, ("europe", "canada")[n % 2], f"d{n % 3}", rows=rows)
        lake.append("eu", [(header, table | {"ts": np.full(rows, 20_000 * DAY_US)})])
    return root


def peak_mb(root: Path) -> tuple[int, int]:
    """Readings written by a process of their own, and the most memory that it had."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(root)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows, peak = map(int, done.stdout.split())
    return rows, peak


def test_memory_does_not_grow_with_the_readings(tmp_path: Path) -> None:
    few, small = peak_mb(many(tmp_path / "few", 2))
    lots, large = peak_mb(many(tmp_path / "many", 20))
    whole = Lake(tmp_path / "many").read("pump", columns=["pump", "ts", "count", "pressure", *ORIGIN])
    assert (few, lots) == (200_000, 2_000_000)
    assert pq.read_table(tmp_path / "many/readings.parquet").equals(whole)
    assert large < 1.5 * small, "ten times the readings took far more memory"
