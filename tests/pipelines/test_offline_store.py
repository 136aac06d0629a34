"""The point-in-time join against a brute-force oracle, through a real Feast registry."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

feast = pytest.importorskip("feast")

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType  # noqa: E402
from feast.types import Float64  # noqa: E402

from pipelines.offline_store import AsOfOfflineStore  # noqa: E402

TIME = pa.timestamp("us", "UTC")
TTL_S = 5
VIEW = "windows"


@dataclass(frozen=True)
class Row:
    engine: str | None
    at: int
    created: int | None
    value: float | None


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    repo = tmp_path_factory.mktemp("repo")
    (repo / "feature_store.yaml").write_text(
        "project: t\nprovider: local\nregistry: registry.db\nonline_store: {type: sqlite, path: online.db}\n"
        "offline_store: {type: pipelines.offline_store.AsOfOfflineStore}\n"
        "materialization: {pull_latest_features: true}\nentity_key_serialization_version: 3\n"
    )
    entity = Entity(name="engine", join_keys=["engine"], value_type=ValueType.STRING)
    write(repo / "features", [Row("a", 1, 1, 1.0)])
    source = FileSource(name="s", path="features", timestamp_field="at", created_timestamp_column="created")
    made = FeatureStore(repo_path=str(repo))
    views = [
        FeatureView(name=name, entities=[entity], ttl=ttl, schema=[Field(name="value", dtype=Float64)], source=source)
        for name, ttl in ((VIEW, timedelta(seconds=TTL_S)), ("forever", timedelta(0)))
    ]
    made.apply([entity, *views])
    return made


def write(folder: Path, rows: list[Row], files: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for i in range(files):
        part = rows[i::files]
        table = pa.table(
            {
                "engine": pa.array([r.engine for r in part], pa.string()),
                "at": pa.array([r.at * 1_000_000 for r in part], pa.int64()).cast(TIME),
                "created": pa.array([None if r.created is None else r.created * 1_000_000 for r in part], pa.int64()).cast(TIME),
                "value": pa.array([r.value for r in part], pa.float64()),
            }
        )
        pq.write_table(table, folder / f"part-{i}.parquet")


def frame(entities: list[tuple[str | None, int]]) -> pd.DataFrame:
    times = pd.to_datetime([t for _, t in entities], unit="s", utc=True)
    return pd.DataFrame({"engine": pd.Series([e for e, _ in entities], dtype=object), "event_timestamp": times, "n": range(len(entities))})


def joined(store: Any, entities: pd.DataFrame, view: str = VIEW, full: bool = False) -> pa.Table:
    views = [store.get_feature_view(view)]
    return AsOfOfflineStore.get_historical_features(
        store.config, views, [f"{view}:value"], entities, store.registry, store.project, full
    ).to_arrow()


def oracle(rows: list[Row], engine: str | None, at: int, ttl: int) -> float | None:
    known = [r for r in rows if engine is not None and r.engine == engine and r.at <= at]
    if not known:
        return None
    newest = max(known, key=lambda r: (r.at, -1 if r.created is None else r.created))
    return newest.value if not ttl or at - newest.at <= ttl else None


engines = st.sampled_from(["a", "b", "c", None])
times = st.integers(0, 30)


@st.composite
def feature_rows(draw: Any) -> list[Row]:
    """Few engines and times, so that duplicates, corrections and ties abound; created times differ, so that there is one answer."""
    drawn = draw(st.lists(st.tuples(engines, times, st.one_of(st.none(), st.floats(-9, 9))), max_size=40))
    created = draw(st.permutations(range(len(drawn))))
    rows = [Row(e, t, c, v) for (e, t, v), c in zip(drawn, created, strict=True)]
    return rows or [Row("a", 0, 0, 0.0)]


@settings(max_examples=60)
@given(rows=feature_rows(), entities=st.lists(st.tuples(engines, times), min_size=1, max_size=30), files=st.integers(1, 3))
@pytest.mark.parametrize(("view", "ttl"), [(VIEW, TTL_S), ("forever", 0)])
def test_join_equals_the_oracle(
    store: Any, view: str, ttl: int, rows: list[Row], entities: list[tuple[str | None, int]], files: int
) -> None:
    write(Path(store.repo_path) / "features", rows, files)
    result = joined(store, frame(entities), view)
    assert result["n"].to_pylist() == list(range(len(entities)))
    assert result["value"].to_pylist() == [oracle(rows, e, t, ttl) for e, t in entities]


@pytest.mark.parametrize(("age", "expected"), [(TTL_S, 7.0), (TTL_S + 1, None), (0, 7.0), (-1, None)])
def test_ttl_is_inclusive_and_the_future_invisible(store: Any, age: int, expected: float | None) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 100, 1, 7.0)])
    assert joined(store, frame([("a", 100 + age)]))["value"].to_pylist() == [expected]


def test_stale_value_does_not_hide_behind_the_newest_missing_one(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 1, 1, 7.0), Row("a", 2, 2, None)])
    assert joined(store, frame([("a", 3)]))["value"].to_pylist() == [None]


def test_late_correction_wins(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 1, 50, 8.0), Row("a", 1, 2, 7.0), Row("a", 1, None, 6.0)])
    assert joined(store, frame([("a", 3)]))["value"].to_pylist() == [8.0]


def test_full_tie_has_the_same_answer_in_any_order(store: Any) -> None:
    rows = [Row("a", 1, 1, float(v)) for v in range(6)]
    answers = set()
    for turn in range(6):
        write(Path(store.repo_path) / "features", rows[turn:] + rows[:turn], files=2)
        answers.add(joined(store, frame([("a", 3)]))["value"].to_pylist()[0])
    assert len(answers) == 1


def test_microseconds_count_and_nanoseconds_do_not_reach_into_the_future(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 10, 1, 7.0)])
    frame_ns = frame([("a", 0)] * 3)
    frame_ns["event_timestamp"] = pd.to_datetime([9_999_999_999, 9_999_999_000, 10_000_000_001], unit="ns", utc=True)
    assert joined(store, frame_ns)["value"].to_pylist() == [None, None, 7.0]


def test_times_without_a_zone_are_utc(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 10, 1, 7.0)])
    naive = frame([("a", 10)])
    naive["event_timestamp"] = naive["event_timestamp"].dt.tz_localize(None)
    assert joined(store, naive)["value"].to_pylist() == [7.0]


def test_full_feature_names_carry_the_view(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 10, 1, 7.0)])
    assert joined(store, frame([("a", 10)]), full=True).column_names == ["engine", "event_timestamp", "n", f"{VIEW}__value"]


def test_pull_latest_takes_one_row_per_engine_within_the_range(store: Any) -> None:
    rows = [Row("a", 1, 1, 1.0), Row("a", 5, 1, 2.0), Row("a", 5, 9, 3.0), Row("a", 9, 1, 4.0), Row("b", 3, 1, 5.0)]
    write(Path(store.repo_path) / "features", rows, files=2)
    source = store.get_feature_view(VIEW).batch_source
    start, end = datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, 0, 0, 8, tzinfo=UTC)
    table = AsOfOfflineStore.pull_latest_from_table_or_query(
        store.config, source, ["engine"], ["value"], "at", "created", start, end
    ).to_arrow()
    assert sorted(zip(table["engine"].to_pylist(), table["value"].to_pylist(), strict=True)) == [("a", 3.0), ("b", 5.0)]
    assert table.schema.field("at").type == TIME


def test_pull_all_keeps_every_row_of_the_range(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", t, 1, float(t)) for t in range(10)])
    source = store.get_feature_view(VIEW).batch_source
    start = datetime(1970, 1, 1, 0, 0, 4, tzinfo=UTC)
    table = AsOfOfflineStore.pull_all_from_table_or_query(store.config, source, ["engine"], ["value"], "at", start_date=start).to_arrow()
    assert sorted(table["value"].to_pylist()) == [float(t) for t in range(4, 10)]


def test_online_store_serves_the_newest_features(store: Any) -> None:
    write(Path(store.repo_path) / "features", [Row("a", 1, 1, 1.0), Row("a", 5, 2, 3.0), Row("b", 3, 1, 5.0)])
    store.materialize(datetime(1970, 1, 1, tzinfo=UTC), datetime(1970, 1, 2, tzinfo=UTC), feature_views=["forever"])
    rows = [{"engine": "a"}, {"engine": "b"}, {"engine": "nobody"}]
    assert store.get_online_features(["forever:value"], entity_rows=rows).to_dict()["value"] == [3.0, 5.0, None]


def test_many_rows_join_in_seconds(store: Any) -> None:
    random = np.random.default_rng(0)
    n = 200_000
    table = pa.table(
        {
            "engine": [f"e{i % 500}" for i in range(n)],
            "at": pa.array(random.integers(0, 10**12, n)).cast(TIME),
            "created": pa.array(np.zeros(n, np.int64)).cast(TIME),
            "value": random.random(n),
        }
    )
    write(Path(store.repo_path) / "features", [Row("a", 1, 1, 1.0)])
    pq.write_table(table, Path(store.repo_path) / "features/part-0.parquet")
    entities = pd.DataFrame({"engine": [f"e{i % 500}" for i in range(20_000)]})
    entities["event_timestamp"] = pd.to_datetime(random.integers(0, 10**12, 20_000), unit="us", utc=True)
    assert joined(store, entities, "forever")["value"].null_count < 200
