"""Other tools read the same rows: what docs/lake.md tells the reader to write."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import duckdb
import polars as pl
import pytest
from deltalake import DeltaTable

from cloud.lake import Lake
from tests.cloud.test_lake import open_lake
from tests.cloud.test_upkeep import on


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lake:
    """A lake with a sorted date, a merged date, late rows, and rows without a date."""
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0, 1)])
    monkeypatch.setattr("cloud.upkeep.QUIET_S", -60.0)
    lake.compact(files_max=0)
    lake.append("eu", [on(4, 0, -500), on(5, 3_000_000)])
    return lake


def test_duckdb_and_polars_read_the_rows_that_fenceline_reads(lake: Lake, tmp_path: Path) -> None:
    path = str(tmp_path / "europe/pump")
    assert lake.read("pump").num_rows == 9

    rows = DeltaTable(path).to_pyarrow_dataset()
    assert duckdb.sql("SELECT count(*) FROM rows WHERE event_date = DATE '2024-10-04'").fetchall() == [(4,)]
    assert duckdb.from_arrow(rows).aggregate("count(*), count(event_date), sum(sequence)").fetchall() == [(9, 8, 25)]

    scan = pl.scan_delta(path)
    assert scan.select(pl.len(), pl.col("sequence").sum()).collect().row(0) == (9, 25)
    assert scan.filter(pl.col("event_date") == date(2024, 10, 4)).select("sequence").collect()["sequence"].sort().to_list() == [1, 2, 3, 4]
    assert scan.filter(pl.col("event_date").is_null()).select("sequence").collect()["sequence"].to_list() == [5]


def test_the_tables_ask_nothing_special_of_a_reader(lake: Lake) -> None:
    protocol = lake.table("pump", "europe").protocol()
    assert (protocol.min_reader_version, protocol.min_writer_version, protocol.reader_features) == (1, 2, None)
