"""Where features lie must not matter: Parquet or Delta, one file or many, on disk or in S3, here or on Ray: the same answers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pytest
from deltalake import DeltaTable, write_deltalake

pytest.importorskip("feast")

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.data_format import DeltaFormat, ParquetFormat
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.types import Float64, String

from edge_agent.contract.errors import ConfigError, UnavailableError
from pipelines.feature_query import Asked, Query, View
from pipelines.feature_sources import Source
from pipelines.offline_store import AsOfOfflineStore
from pipelines.partitioned import Deadline, here, merge, split
from tests.object_store import BUCKET, KEYS, WRITER, ObjectStore, object_store  # noqa: F401
from tests.pipelines.feast_repos import feature_store, seconds, write

engine = Entity(name="engine", join_keys=["engine"], value_type=ValueType.STRING)


def rows(seed: int, number: int = 3_000) -> pa.Table:
    """Few engines and times: duplicates and corrections abound. `number` of them are told apart by their value."""
    random = np.random.default_rng(seed)
    at = random.integers(0, 400, number)
    columns: dict[str, Any] = {
        "engine": pa.array([f"e{i}" for i in random.integers(0, 20, number)]),
        "at": seconds(at.tolist()),
        "created": seconds((at + random.integers(0, 300, number)).tolist()),
        "value": random.permutation(number).astype(float),
        "note": pa.array([None if i % 7 == 0 else f"n{i}" for i in range(number)]),
    }
    return pa.table(columns)


def labels(seed: int, number: int = 500) -> pd.DataFrame:
    random = np.random.default_rng(seed + 1)
    engines = [None if i == 21 else f"e{i}" for i in random.integers(0, 22, number)]
    return pd.DataFrame({"engine": engines, "event_timestamp": pd.to_datetime(random.integers(0, 600, number), unit="s", utc=True)})


def answers(store: Any, source: FileSource, asked: pd.DataFrame, ttl_s: int = 60, known_by: bool = False) -> dict[str, list[Any]]:
    fields = [Field(name="engine", dtype=String), Field(name="value", dtype=Float64), Field(name="note", dtype=String)]
    view = FeatureView(name="view", entities=[engine], ttl=timedelta(seconds=ttl_s), schema=fields, source=source)
    job = AsOfOfflineStore.get_historical_features(
        store.config, [view], ["view:value", "view:note"], asked, store.registry, "t", filter_by_created_timestamp=known_by
    )
    return {name: job.to_arrow()[name].to_pylist() for name in ("value", "note")}


def file_source(path: Path | str, delta: bool = False, **more: Any) -> FileSource:
    kind = DeltaFormat() if delta else ParquetFormat()
    return FileSource(name="s", path=str(path), file_format=kind, timestamp_field="at", created_timestamp_column="created", **more)


@dataclass(frozen=True)
class Expected:
    table: pa.Table
    asked: pd.DataFrame
    plain: dict[str, list[Any]]
    known: dict[str, list[Any]]


@pytest.fixture
def expected(tmp_path: Path, seed: int) -> Expected:
    """The answers from one file in this process, which the oracle's tests have proven."""
    table, asked, store = rows(seed), labels(seed), feature_store(tmp_path / "plain")
    source = file_source(write(tmp_path / "plain/all.parquet", {name: table[name] for name in table.column_names}))
    plain, known = answers(store, source, asked), answers(store, source, asked, known_by=True)
    assert plain != known and 0 < plain["value"].count(None) < len(asked)
    return Expected(table, asked, plain, known)


def check(store: Any, source: FileSource, expected: Expected) -> None:
    assert answers(store, source, expected.asked) == expected.plain
    assert answers(store, source, expected.asked, known_by=True) == expected.known


def test_view_whose_keys_are_not_known_yet_is_refused(tmp_path: Path) -> None:
    """Feast learns a view's keys when it is applied; without keys everybody would get the newest row of all."""
    view = FeatureView(name="view", entities=[engine], schema=[Field(name="value", dtype=Float64)], source=file_source("x.parquet"))
    store = feature_store(tmp_path)
    with pytest.raises(ConfigError, match="apply it first"):
        AsOfOfflineStore.get_historical_features(store.config, [view], ["view:value"], labels(0), store.registry, "t")


@pytest.mark.parametrize("batch_mb", [0, 768])
def test_many_files_and_little_memory(tmp_path: Path, expected: Expected, batch_mb: int) -> None:
    for i in range(7):
        part = expected.table.take(list(range(i, expected.table.num_rows, 7)))
        write(tmp_path / f"many/{i}.parquet", {name: part[name] for name in part.column_names})
    (tmp_path / "many/_SUCCESS").touch()
    check(feature_store(tmp_path, batch_mb=batch_mb), file_source("many"), expected)


def test_hive_partitions_are_columns_and_take_new_rows(tmp_path: Path, expected: Expected) -> None:
    first, second = expected.table.slice(0, 2_500), expected.table.slice(2_500)
    pads.write_dataset(first, tmp_path / "hive", format="parquet", partitioning=["engine"], partitioning_flavor="hive")
    store, source = feature_store(tmp_path), file_source("hive")
    view = FeatureView(name="view", entities=[engine], source=source)
    AsOfOfflineStore.offline_write_batch(store.config, view, second, None)
    check(store, source, expected)


def test_directory_is_read_while_rows_are_added_and_other_files_lie_there(tmp_path: Path, expected: Expected, seed: int) -> None:
    folder = tmp_path / "x.parquet"  # a directory in spite of its name
    columns = {name: expected.table[name] for name in expected.table.column_names}
    write(folder / "part-0.parquet", columns)
    for name in (".part-1.parquet", ".part-1.parquet.0123", "_temporary/0/part-1.parquet", ".part-0.parquet.crc", "_SUCCESS"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half written")
    store, source = feature_store(tmp_path), file_source("x.parquet")
    check(store, source, expected)
    before = Source.of(source, store.config).pinned()
    AsOfOfflineStore.offline_write_batch(store.config, FeatureView(name="view", entities=[engine], source=source), rows(seed, 10), None)
    assert before.scan().collect().height == expected.table.num_rows
    assert Source.of(source, store.config).scan().collect().height == expected.table.num_rows + 10


def test_file_is_taken_by_its_name_not_as_a_pattern(tmp_path: Path, seed: int) -> None:
    source = Source("s", str(tmp_path / "a[1]*" / "f.parquet"))
    source.write(rows(seed, 10))
    assert source.scan().collect().height == 10


@pytest.mark.parametrize("by", [[], ["engine"]])
def test_reader_sees_no_half_written_file(tmp_path: Path, seed: int, by: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment at which a file is being written, reading succeeds."""
    source, table, reads = Source("s", str(tmp_path / "d")), rows(seed, 1_000), []
    source.add_partitioned(table, by)

    def look(*_: Any) -> None:
        reads.append(source.scan().collect().height)

    slow = pa.RecordBatchReader.from_batches(table.schema, (look() or batch for batch in table.to_batches(100)))  # type: ignore[func-returns-value]
    source.add_partitioned(slow, by)
    assert reads and set(reads) == {1_000}
    assert source.scan().collect().height == 2_000
    with pytest.raises(ConfigError), source._explained():
        source.add_partitioned(pa.RecordBatchReader.from_batches(table.schema, _breaking(table)), by)
    assert source.scan().collect().height == 2_000 and not [p for p in (tmp_path / "d").rglob("*") if p.name.startswith(".")]


def _breaking(table: pa.Table) -> Iterator[pa.RecordBatch]:
    yield from table.to_batches(100)
    raise pa.ArrowInvalid("no more")


def test_folders_above_a_source_are_no_partitions(tmp_path: Path) -> None:
    folder = tmp_path / "engine=elsewhere/we[i]rd *"
    for day in (1, 2):
        write(folder / f"day={day}/a.parquet", {"engine": ["a"], "x": [1.0]})
    assert Source("s", str(folder)).scan().select("engine", "day", "x").collect().rows() == [("a", 1, 1.0), ("a", 2, 1.0)]


@pytest.mark.parametrize("delta", [False, True])
def test_shares_hold_every_row_once_whatever_happens_to_the_source_meanwhile(tmp_path: Path, delta: bool) -> None:
    source = Source("s", str(tmp_path / "x"), delta)
    for first in range(0, 80, 10):
        source.append(pa.table({"x": list(range(first, first + 10))}))
    shares = source.parts(4)
    found = [shares[0].scan().collect()]
    source.append(pa.table({"x": list(range(80, 90))}))
    if delta:
        DeltaTable(source.path).optimize.z_order(["x"])
        DeltaTable(source.path).create_checkpoint()
    found += [share.scan().collect() for share in shares[1:]]
    assert sorted(pl.concat(found)["x"]) == list(range(80))


def test_pinned_delta_takes_no_rows(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "delta", rows(0, 10))
    store, source = feature_store(tmp_path), file_source("delta", delta=True, tags={"delta_version": "0"})
    with pytest.raises(ConfigError, match="pinned to version 0"):
        AsOfOfflineStore.offline_write_batch(store.config, FeatureView(name="view", entities=[engine], source=source), rows(1, 10), None)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ConfigError, match=r"data source 's' at .*/d cannot be read"):
        answers(feature_store(tmp_path), file_source("d"), labels(0))


def test_delta_newest_or_pinned(tmp_path: Path, expected: Expected) -> None:
    write_deltalake(tmp_path / "delta", expected.table.slice(0, 2_500), partition_by=["engine"])
    write_deltalake(tmp_path / "delta", expected.table.slice(2_500), mode="append")
    write_deltalake(tmp_path / "delta", rows(0, 1_000), mode="append")
    store = feature_store(tmp_path)
    check(store, file_source("delta", delta=True, tags={"delta_version": "1"}), expected)
    assert answers(store, file_source("delta", delta=True), expected.asked) != expected.plain
    with pytest.raises(ConfigError, match="delta_version"):
        answers(store, file_source("delta", delta=True, tags={"delta_version": "latest"}), expected.asked)


def test_delta_takes_new_rows_and_saved_datasets(tmp_path: Path, expected: Expected) -> None:
    store, source = feature_store(tmp_path), file_source(tmp_path / "delta", delta=True)
    view = FeatureView(name="view", entities=[engine], source=source)
    for piece in (expected.table.slice(0, 10), expected.table.slice(10)):
        AsOfOfflineStore.offline_write_batch(store.config, view, piece, None)
    check(store, source, expected)
    job = AsOfOfflineStore.pull_all_from_table_or_query(store.config, source, ["engine"], ["value"], "at")
    for overwrite in (False, True):
        job.persist(SavedDatasetFileStorage(path=str(tmp_path / "saved"), file_format=DeltaFormat()), allow_overwrite=overwrite)
    assert pl.read_delta(str(tmp_path / "saved")).height == expected.table.num_rows


@pytest.mark.parametrize("stored", ["ns", "ms", "naive", "date"])
def test_times_of_every_kind_are_compared_exactly(tmp_path: Path, stored: str) -> None:
    at = {"ns": seconds([86_400], "ns"), "ms": seconds([86_400], "ms"), "naive": seconds([86_400], zone=None)}
    at["date"] = pa.array([1], pa.int32()).cast(pa.date32())
    write(tmp_path / "x.parquet", {"engine": ["a"], "at": at[stored], "created": at[stored], "value": [7.0], "note": ["x"]})
    before, after = pd.Timestamp(86_400 * 10**9 - 1, unit="ns", tz="UTC"), pd.Timestamp(86_400 * 10**9 + 1, unit="ns", tz="UTC")
    asked = pd.DataFrame({"engine": ["a", "a", "a"], "event_timestamp": [before, before.ceil("us"), after]})
    assert answers(feature_store(tmp_path), file_source("x.parquet"), asked)["value"] == [None, 7.0, 7.0]


def test_nanosecond_of_a_feature_is_not_cut_off(tmp_path: Path) -> None:
    at = pa.array([1_000_000_000_000_000_500], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    write(tmp_path / "x.parquet", {"engine": ["a"], "at": at, "created": at, "value": [7.0], "note": ["x"]})
    asked = pd.DataFrame(
        {"engine": ["a"] * 3, "event_timestamp": pd.to_datetime([1_000_000_000_000_000_000 + i for i in (0, 499, 500)], utc=True)}
    )
    assert answers(feature_store(tmp_path), file_source("x.parquet"), asked)["value"] == [None, None, 7.0]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("labels_unit", ["s", "us", "ns"])
@pytest.mark.parametrize("ttl", [timedelta(0), timedelta(days=365 * 150), timedelta.max])
def test_times_and_ttls_as_far_as_they_go(tmp_path: Path, unit: str, labels_unit: str, ttl: timedelta) -> None:
    """A label of the year 2200 (or 9999) sees a row of 1970, if it may be that old."""
    at = seconds([0], unit)
    write(tmp_path / "x.parquet", {"engine": ["a"], "at": at, "created": at, "value": [7.0], "note": ["x"]})
    year = 2200 if labels_unit == "ns" else 9999
    times = pa.array([datetime(year, 1, 1, tzinfo=UTC)], pa.timestamp(labels_unit, "UTC"))
    store, fields = feature_store(tmp_path), [Field(name="engine", dtype=String), Field(name="value", dtype=Float64)]
    view = FeatureView(name="view", entities=[engine], ttl=ttl, schema=fields, source=file_source("x.parquet"))
    asked = pa.table({"engine": ["a"], "event_timestamp": times})
    found = AsOfOfflineStore.get_historical_features(store.config, [view], ["view:value"], asked, store.registry, "t").to_arrow()
    assert found["value"].to_pylist() == [None if ttl == timedelta(days=365 * 150) else 7.0]


def test_rows_with_nanoseconds_match_themselves_when_no_labels_are_given(tmp_path: Path) -> None:
    at = pa.array([1_000_000_000_000_000_123], pa.int64()).cast(pa.timestamp("ns", "UTC"))
    write(tmp_path / "x.parquet", {"engine": ["a"], "at": at, "created": at, "value": [7.0]})
    store, fields = feature_store(tmp_path), [Field(name="engine", dtype=String), Field(name="value", dtype=Float64)]
    view = FeatureView(name="view", entities=[engine], schema=fields, source=file_source("x.parquet"))
    span = {"start_date": datetime(2001, 1, 1, tzinfo=UTC), "end_date": datetime(2002, 1, 1, tzinfo=UTC)}
    found = AsOfOfflineStore.get_historical_features(store.config, [view], ["view:value"], None, store.registry, "t", **span).to_arrow()
    assert found["value"].to_pylist() == [7.0]
    assert found["event_timestamp"].cast(pa.int64()).to_pylist() == [1_000_000_000_000_000_123]


@pytest.mark.parametrize(("labels_type", "stored_type"), [("int64", pa.int32()), ("int32", pa.uint8()), ("category", pa.string())])
def test_keys_match_whatever_their_width(tmp_path: Path, labels_type: str, stored_type: pa.DataType) -> None:
    values: list[Any] = ["1", "2"] if stored_type == pa.string() else [1, 2]
    stored = {"engine": pa.array(values, stored_type), "at": seconds([0, 0]), "created": seconds([0, 0])}
    write(tmp_path / "x.parquet", stored | {"value": [1.0, 2.0], "note": ["x", "y"]})
    asked = pd.DataFrame(
        {"engine": pd.Series(values[::-1]).astype(labels_type), "event_timestamp": pd.to_datetime([5, 5], unit="s", utc=True)}
    )
    assert answers(feature_store(tmp_path), file_source("x.parquet"), asked)["value"] == [2.0, 1.0]


def test_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("nowhere.parquet", "nowhere", "empty"):
        with pytest.raises(ConfigError, match=path):
            answers(feature_store(tmp_path), file_source(path), labels(0))
    with pytest.raises(ConfigError, match="nowhere"):
        answers(feature_store(tmp_path), file_source(tmp_path / "nowhere", delta=True), labels(0))


def test_pull_all_comes_in_batches_and_latest_in_little_memory(tmp_path: Path, seed: int) -> None:
    """Several files of a row group each; 0 MB lets nothing gather."""
    table = rows(seed, 200_000)
    for i in range(4):
        part = table.slice(i * 50_000, 50_000)
        write(tmp_path / f"many/{i}.parquet", {name: part[name] for name in part.column_names})
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, 0, 5, tzinfo=UTC)
    found = []
    for batch_mb in (0, 768):
        store = feature_store(tmp_path, batch_mb=batch_mb)
        columns = (store.config, file_source("many"), ["engine"], ["value"], "at")
        sizes = [b.num_rows for b in AsOfOfflineStore.pull_all_from_table_or_query(*columns).batches()]
        assert sum(sizes) == 200_000 and len(sizes) > 1
        latest = AsOfOfflineStore.pull_latest_from_table_or_query(*columns, "created", first, last).to_arrow()
        found.append(latest.sort_by("engine").to_pylist())
    assert found[0] == found[1] and len(found[0]) == 20
    best: dict[str, tuple[Any, ...]] = {}
    for row in table.select(["engine", "at", "created", "value"]).to_pylist():
        if row["at"] <= last:
            best[row["engine"]] = max(best.get(row["engine"], ()), (row["at"], row["created"], row["value"]))
    assert {r["engine"]: (r["at"], r["created"], r["value"]) for r in found[0]} == best


@pytest.fixture
def bucket(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[tuple[str, str]]:  # noqa: F811
    """The endpoint and a prefix of one's own; the keys where AWS's libraries look."""
    for name, value in zip(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), KEYS[WRITER], strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    yield object_store.endpoint, f"s3://{BUCKET}/features-{seed}"


@pytest.mark.parametrize("kind", ["file.parquet", "folder", "delta"])
def test_s3_takes_rows_and_gives_the_same_answers(tmp_path: Path, bucket: tuple[str, str], kind: str, expected: Expected) -> None:
    endpoint, prefix = bucket
    store = feature_store(tmp_path)
    source = file_source(f"{prefix}/{kind}", delta=kind == "delta", s3_endpoint_override=endpoint)
    view = FeatureView(name="view", entities=[engine], source=source)
    for piece in (expected.table.slice(0, 1_000), expected.table.slice(1_000)):
        AsOfOfflineStore.offline_write_batch(store.config, view, piece, None)
    check(store, source, expected)
    names = store._get_provider().get_table_column_names_and_types_from_data_source(store.config, source)
    assert [name for name, _ in names] == expected.table.column_names


def test_s3_keys_by_prefix_and_a_saved_dataset(tmp_path: Path, bucket: tuple[str, str], expected: Expected) -> None:
    endpoint, prefix = bucket
    store = feature_store(tmp_path, staging_location=f"{prefix}/staging", staging_endpoint=endpoint)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        os.environ.pop(name)
    source = file_source(f"{prefix}/tagged", s3_endpoint_override=endpoint, tags={"credentials": WRITER})
    AsOfOfflineStore.offline_write_batch(store.config, FeatureView(name="view", entities=[engine], source=source), expected.table, None)
    check(store, source, expected)
    with pytest.raises(ConfigError, match="NOBODY_AWS_ACCESS_KEY_ID"):
        answers(store, file_source(f"{prefix}/tagged", s3_endpoint_override=endpoint, tags={"credentials": "NOBODY"}), expected.asked)


def test_s3_that_does_not_answer_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    source = file_source("s3://nothing/here", delta=True, s3_endpoint_override="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="nothing/here"):
        answers(feature_store(tmp_path), source, labels(0))


@pytest.mark.parametrize("partitions", [1, 2, 5])
@pytest.mark.parametrize("known_by", [False, True])
def test_tasks_of_any_number_of_partitions_make_up_the_whole(tmp_path: Path, seed: int, partitions: int, known_by: bool) -> None:
    """What the Ray tasks do, without Ray: shares of the rows are pruned, dealt out by entity, and joined part by part."""
    table, asked = rows(seed), labels(seed)
    path = write(tmp_path / "all.parquet", {name: table[name] for name in table.column_names})
    view = View("view", Source("s", str(path)), {"engine": "engine"}, {"value": "value"}, "at", "created", 60_000_000, known_by)
    arrow = pa.Table.from_pandas(asked)
    query = Query.of(view, Asked.of(arrow.select(["engine"]), arrow["event_timestamp"]))
    whole = here(query, 10**9, Deadline(None))
    shares = [split(query, share, partitions, 0) for share in view.source.parts(partitions)]
    parts = [merge(part, query, partitions, *(share[part] for share in shares)) for part in range(partitions)]
    values = [value for _, found in parts for value in found["value"].to_pylist()]
    places = np.concatenate([found for found, _ in parts])
    assert [values[i] for i in np.argsort(places)] == whole["value"].to_list()
    assert whole.equals(here(query, 0, Deadline(None)))


@pytest.mark.usefixtures("ray_head")
@pytest.mark.parametrize("partitions", [1, 2, 5])
def test_any_number_of_partitions_on_ray_gives_the_same_answers(tmp_path: Path, expected: Expected, partitions: int) -> None:
    for i in range(3):
        part = expected.table.take(list(range(i, expected.table.num_rows, 3)))
        write(tmp_path / f"many/{i}.parquet", {name: part[name] for name in part.column_names})
    store = feature_store(tmp_path, partitions=partitions)
    check(store, file_source("many"), expected)
    none = expected.asked.assign(event_timestamp=pd.Series(pd.NaT, expected.asked.index, "datetime64[us, UTC]"))
    assert answers(store, file_source("many"), none)["value"] == [None] * len(none)


@pytest.mark.usefixtures("ray_head")
def test_error_in_a_ray_task_is_the_error_of_the_join(tmp_path: Path, expected: Expected) -> None:
    write_deltalake(tmp_path / "delta", expected.table)
    store, source = feature_store(tmp_path, partitions=2), file_source(tmp_path / "delta", delta=True)
    for file in (tmp_path / "delta").glob("*.parquet"):
        file.unlink()
    with pytest.raises((ConfigError, UnavailableError), match="delta"):
        answers(store, source, expected.asked)
