"""Labels and the mapping files they share with the replay."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from cloud import labels
from cloud.labels import SCHEMA, add, from_column, plain, run_to_failure
from cloud.lake import Lake
from cloud.mapping import (
    CHUNK_ROWS,
    ColumnMapping,
    EntityRule,
    TimeRule,
    adjust,
    count_rows,
    load_mapping,
    parse_mapping,
    read_rows,
    same_names,
)
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract

PROJECT = Path(__file__).parents[2]
START_US = round(datetime(2024, 1, 1, tzinfo=UTC).timestamp() * 1e6)
HOUR_US = 3_600_000_000


def cmapss_line(unit: int, cycle: int) -> str:
    return " ".join([str(unit), str(cycle), "-0.0007", "-0.0004", "100.0", *[f"{s}.25" for s in range(1, 22)]]) + "  \n"


@pytest.fixture
def cmapss() -> ColumnMapping:
    return load_mapping("cmapss", PROJECT)


@pytest.fixture
def turbofan() -> StreamContract:
    return parse_contract((PROJECT / "contracts/turbofan.odcs.yaml").read_text())


@pytest.fixture
def two_engines(tmp_path: Path) -> Path:
    path = tmp_path / "train.txt.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(cmapss_line(unit, cycle) for unit, life in ((1, 3), (2, 2)) for cycle in range(1, life + 1))
    return path


def test_run_to_failure_counts_cycles_until_the_last_row_of_each_engine(two_engines: Path, cmapss: ColumnMapping) -> None:
    table = run_to_failure(two_engines, cmapss)
    assert table.schema == SCHEMA
    assert table["entity"].to_pylist() == ["engine-001"] * 3 + ["engine-002"] * 2
    assert table["label"].to_pylist() == [2.0, 1.0, 0.0, 1.0, 0.0]
    assert table["event_time"].cast(pa.int64()).to_pylist() == [START_US + c * HOUR_US for c in (1, 2, 3, 1, 2)]


def test_rows_out_of_order_get_the_same_labels(tmp_path: Path, cmapss: ColumnMapping) -> None:
    path = tmp_path / "train.txt"
    path.write_text("".join(cmapss_line(1, c) for c in (3, 1, 2)))
    assert run_to_failure(path, cmapss)["label"].to_pylist() == [0.0, 2.0, 1.0]


def test_run_to_failure_without_a_cycle_column_counts_rows_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_text("who,when\na,30\na,10\nb,5\na,20\n")
    assert run_to_failure(path, plain("who", "when"))["label"].to_pylist() == [0.0, 2.0, 0.0, 1.0]


def test_plain_columns_take_iso_text_and_leave_out_missing_labels(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("who,when,rul\na,2024-01-01T01:00:00Z,7\na,2024-01-01T03:00:00+01:00,6\na,2024-01-01T04:00:00Z,\n")
    table = from_column(path, plain("who", "when"), "rul")
    assert table["label"].to_pylist() == [7.0, 6.0]
    assert table["event_time"].cast(pa.int64()).to_pylist() == [START_US + HOUR_US, START_US + 2 * HOUR_US]


def test_adding_twice_changes_nothing_and_a_new_value_replaces_the_old(tmp_path: Path, two_engines: Path, cmapss: ColumnMapping) -> None:
    lake, table = Lake(tmp_path / "lake"), run_to_failure(two_engines, cmapss)
    assert add(lake, "turbofan", table) == 5
    once = lake.labels("turbofan")
    assert add(lake, "turbofan", table) == 5
    assert lake.labels("turbofan") == once
    corrected = table.slice(0, 1).set_column(2, "label", pa.array([99.0]))
    assert add(lake, "turbofan", corrected) == 5
    assert stored(lake)["label"].to_pylist() == [99.0, 1.0, 0.0, 1.0, 0.0]


def stored(lake: Lake) -> pa.Table:
    found = lake.labels("turbofan")
    assert found is not None
    return found


@pytest.mark.parametrize("before", [[], ["zero"]], ids=["the first ones", "more"])
def test_who_adds_at_the_same_time_as_another_adds_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[str]) -> None:
    one, other = Lake(tmp_path), Lake(tmp_path)
    for name in before:
        add(one, "turbofan", label(name))
    real, waiting = labels.write_deltalake, ["other", "another"]

    def write(*args: Any, **kw: Any) -> None:
        if waiting:
            add(other, "turbofan", label(waiting.pop()))
        real(*args, **kw)

    monkeypatch.setattr(labels, "write_deltalake", write)
    assert add(one, "turbofan", label("mine")) == 3 + len(before)
    assert stored(Lake(tmp_path))["entity"].to_pylist() == sorted(["another", "mine", "other", *before])


def label(entity: str) -> pa.Table:
    times = pa.array([START_US], pa.timestamp("us", "UTC"))
    return pa.table([pa.array([entity]), times, pa.array([1.0])], schema=SCHEMA)


def test_a_root_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(UnavailableError, match="add them again"):
        add(Lake(tmp_path / "file"), "turbofan", label("mine"))


@pytest.mark.parametrize("values", [[1_700_000_000_000_000], [1e30], [-1], [1_700_000_000_000], ["1969-12-31T00:00:00Z"], [2**63]])
def test_a_time_that_no_reading_can_have_is_refused(tmp_path: Path, values: list[object]) -> None:
    """Microseconds taken for seconds, first of all: in 64 bits they became other times."""
    path = tmp_path / "labels.csv"
    path.write_text("who,when,rul\n" + "".join(f"a,{value},1\n" for value in values))
    with pytest.raises(ConfigError, match=r"row 1: column 'when' holds .*, not a time from 1970 to 2200; \[time\]"):
        from_column(path, plain("who", "when"), "rul")


def test_a_time_counted_beyond_2200_is_refused(tmp_path: Path, cmapss: ColumnMapping) -> None:
    path = tmp_path / "train.txt"
    path.write_text(cmapss_line(1, 10**15))
    with pytest.raises(ConfigError, match="not a time from 1970 to 2200"):
        run_to_failure(path, cmapss)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("who,when,rul\na,1,soon\n", "column 'rul'.*labels are numbers"),
        ("who,when\na,1\n", "no column 'rul'; columns: who, when"),
        ("who,rul\na,1\n", "no column 'when' for the time; columns: who, rul"),
        ("who,when,rul\na,1,2\na,later,2\n", "row 2: column 'when' holds 'later', not a time"),
        ("who,when,rul\na,1,2\n,2,2\n", "row 2: column 'who' names no entity"),
        ("who,when,rul\n", "holds no rows"),
        ("", "is empty"),
    ],
)
def test_file_that_does_not_fit_says_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        from_column(path, plain("who", "when"), "rul")


@pytest.mark.parametrize("suffix", [".csv", ".csv.gz", ".parquet"])
def test_text_and_parquet_read_alike(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame({"who": [1, 2], "when": [1700000000.5, 1700000001.0], "t": [0.1, np.nan]})
    path = tmp_path / f"rows{suffix}"
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False)
    mapping = ColumnMapping(entity=EntityRule("who", "e-", 2), time=TimeRule(column="when"), fields={"x": "t"})
    (chunk,) = read_rows(path, mapping)
    assert chunk.entity == ["e-01", "e-02"]
    assert chunk.event_us.tolist() == [1_700_000_000_500_000, 1_700_000_001_000_000]
    assert chunk.frame["t"].tolist()[0] == 0.1
    assert count_rows(path, mapping) == 2


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", [1.5]),
        ("ms", [1500.0]),
        ("us", [1_500_000]),
        ("iso", ["1970-01-01T00:00:01.5Z"]),
        ("auto", [1.5]),
        ("auto", ["1970-01-01T00:00:01.500"]),
        ("auto", [pd.Timestamp(1.5, unit="s")]),
    ],
)
def test_times_in_every_unit(tmp_path: Path, unit: str, values: list[object]) -> None:
    path = tmp_path / "rows.parquet"
    pd.DataFrame({"who": ["a"], "when": values}).to_parquet(path)
    (chunk,) = read_rows(path, ColumnMapping(entity=EntityRule("who"), time=TimeRule(column="when", unit=unit)))  # type: ignore[arg-type]
    assert chunk.event_us.tolist() == [1_500_000]


def test_an_entity_has_one_name_whatever_its_neighbours_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("unit,t\n" + "7,1\n" * CHUNK_ROWS + "7,2\nA7,2\n-7,2\n")
    rule = parse_mapping('entity = {column = "unit", prefix = "e-", digits = 3}\ntime = {column = "t"}\n')
    assert {name for chunk in read_rows(path, rule) for name in chunk.entity} == {"e-007", "e-A7", "e--07"}


def test_a_damaged_archive_is_said(tmp_path: Path) -> None:
    whole = bytearray(gzip.compress(b"unit,t\n" + b"".join(b"%d,%d\n" % (n, n * 7_919 % 1_000) for n in range(20_000))))
    whole[2_000:2_050] = b"\xff" * 50
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(whole)
    rule = parse_mapping('entity = {column = "unit"}\ntime = {column = "t"}\n')
    for read in (lambda: count_rows(path, rule), lambda: list(read_rows(path, rule))):
        with pytest.raises(ConfigError, match=r"rows\.csv\.gz does not read"):
            read()


def test_text_with_another_number_of_columns_is_refused(tmp_path: Path, cmapss: ColumnMapping) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("1 2 3\n")
    with pytest.raises(ConfigError, match="has 3 columns, the mapping names 26"):
        list(read_rows(path, cmapss))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[entity]\ncolumn='a'\n[time]\ncolumn='b'\nunitt='s'", "time.unitt; did you mean 'unit'"),
        ("[entity]\ncolumn='a'\n[time]\ncolumn='b'\nstep_s=1.0", "either `column`, or all of"),
        ("[entity]\ncolumn='a'\n[time]\norder='b'", "either `column`, or all of"),
        ("[entity]\ncolumn='a'\n[time]\norder='b'\nstep_s=1.0\nstart=2024-01-01T00:00:00", "has no zone"),
        ("separator='ab'\n[entity]\ncolumn='a'\n[time]\ncolumn='b'", "separator 'ab'"),
        ("columns=['a','b','b']\n[entity]\ncolumn='a'\n[time]\ncolumn='b'", "columns repeat: b"),
        ("columns=['aa','b']\n[entity]\ncolumn='a'\n[time]\ncolumn='b'", "'a' of the entity .* did you mean 'aa'"),
        ("[entity]\ncolumn='a'", "time"),
        ("[entity", "not TOML"),
    ],
)
def test_mapping_that_makes_no_sense_is_refused(document: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_mapping(document, "m.toml")


def test_unknown_mapping_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cmapss'"):
        load_mapping("cmaps", PROJECT)


def test_set_changes_single_columns_and_is_checked_against_the_contract(cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    same = adjust(same_names(turbofan), turbofan)
    assert same.fields["sensor_1"] == "sensor_1"
    changed = adjust(same, turbofan, {"engine": "tail", "ts": "when", "sensor_1": "T2"}, entity_prefix="x-")
    assert (changed.entity, changed.time.column, changed.fields["sensor_1"]) == (EntityRule("tail", "x-"), "when", "T2")
    with pytest.raises(ConfigError, match="no field 'sensor_22'; did you mean"):
        adjust(same, turbofan, {"sensor_22": "T2"})
    later = datetime(2025, 1, 1, tzinfo=UTC)
    assert adjust(cmapss, turbofan, start=later).time.start == later
    with pytest.raises(ConfigError, match="start is of no use"):
        adjust(same, turbofan, start=later)


def test_required_field_without_a_column_is_refused(turbofan: StreamContract) -> None:
    mapping = ColumnMapping(entity=EntityRule("engine"), time=TimeRule(column="ts"), fields={"cycle": "cycle"})
    with pytest.raises(ConfigError, match=r"no column for setting_1, .*--set setting_1=COLUMN"):
        adjust(mapping, turbofan)


def test_a_column_of_times_is_no_label(tmp_path: Path) -> None:
    pd.DataFrame({"who": ["a"], "when": [1.0], "failed": pd.to_datetime(["2026-01-01"])}).to_parquet(tmp_path / "labels.parquet")
    with pytest.raises(ConfigError, match="column 'failed' holds times; labels are numbers"):
        from_column(tmp_path / "labels.parquet", plain("who", "when"), "failed")
