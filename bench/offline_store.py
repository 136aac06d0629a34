"""Point-in-time joins for training: Feast with our offline store, with its own (dask), and `pandas.merge_asof`.

All read the same Parquet file of features and give each label the newest features not after it and not older than the TTL.
Ours is compared value by value with merge_asof; of Feast's own store the table says how many of the labels came back. It runs
at the small size only: its memory grows with labels times features of an engine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench.report import Cell, Report, best_of, main

OURS, FEASTS = "pipelines.offline_store.AsOfOfflineStore", "dask"
FEASTS_ROWS_MAX = 100_000
COLUMNS = [f"f{i}" for i in range(14)]
SIZES = ((100_000, 10_000), (1_000_000, 20_000))
QUICK = ((2_000, 200),)
ENTITIES = 200
TTL = timedelta(hours=2)
SPAN_S = 30 * 86_400
ROUNDS = 2
SEED = 5


def measure(arguments: argparse.Namespace) -> Report:
    """Seconds by size."""
    rows: list[list[Cell]] = []
    numbers: dict[str, Any] = {"sizes": []}
    for features, labels in QUICK if arguments.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            numbers["sizes"].append(result := one_size(Path(folder), features, labels))
        rows += [[f"{features:,} features, {labels:,} labels", *way] for way in result["ways"]]
    notes = [f"{len(COLUMNS)} features of {ENTITIES} engines; ours and merge_asof agree in every value (checked)."]
    return Report("Point-in-time joins", ["size", "way", "s", "labels returned"], rows, numbers, notes)


def one_size(folder: Path, features: int, labels: int) -> dict[str, Any]:
    """Time each way; raises AssertionError if ours and merge_asof differ."""
    path = write_features(folder, features)
    wanted = make_labels(labels)
    ours, theirs = feature_store(folder, path, OURS), feature_store(folder, path, FEASTS)
    check_equal(historical(ours, wanted), merged(path, wanted))
    ways: dict[str, Callable[[], pd.DataFrame]] = {
        "Feast, our store": lambda: historical(ours, wanted),
        "pandas.merge_asof": lambda: merged(path, wanted),
    }
    if features <= FEASTS_ROWS_MAX:
        ways["Feast, dask store"] = lambda: historical(theirs, wanted)
    measured = [[name, best_of(ROUNDS, way), len(way())] for name, way in ways.items()]
    return {"features": features, "labels": labels, "ways": measured}


def write_features(folder: Path, rows: int) -> Path:
    """Random features, sorted by engine and time."""
    rng = np.random.default_rng(SEED)
    path = folder / "features.parquet"
    pd.DataFrame(
        {
            "engine": np.sort(rng.integers(0, ENTITIES, rows)).astype(str),
            "event_time": times(rng.integers(0, SPAN_S * 1_000, rows) * 1_000),
            **{name: rng.normal(size=rows) for name in COLUMNS},
        }
    ).drop_duplicates(["engine", "event_time"]).sort_values(["engine", "event_time"]).to_parquet(path, index=False)
    return path


def make_labels(rows: int) -> pd.DataFrame:
    rng = np.random.default_rng(SEED + 1)
    engine, at = rng.integers(0, ENTITIES, rows).astype(str), times(rng.integers(0, SPAN_S * 1_000, rows) * 1_000)
    return pd.DataFrame({"engine": engine, "event_timestamp": at})


def times(us: Any) -> Any:
    return pd.to_datetime(us + 1_700_000_000_000_000, unit="us", utc=True).astype("datetime64[us, UTC]")


def feature_store(folder: Path, path: Path, offline_store: str) -> Any:
    """A Feast repository in `folder` with one feature view."""
    os.environ["FEAST_USAGE"] = "False"
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.repo_config import RepoConfig
    from feast.types import Float64

    engine = Entity(name="engine", join_keys=["engine"], value_type=ValueType.STRING)
    source = FileSource(name="bench", path=str(path), timestamp_field="event_time")
    view = FeatureView(name="bench", entities=[engine], ttl=TTL, schema=[Field(name=c, dtype=Float64) for c in COLUMNS], source=source)
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": offline_store},
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    store.apply([engine, view])
    return store


def historical(store: Any, labels: pd.DataFrame) -> pd.DataFrame:
    found: pd.DataFrame = store.get_historical_features(entity_df=labels, features=[f"bench:{c}" for c in COLUMNS]).to_df()
    return found


def merged(path: Path, labels: pd.DataFrame) -> pd.DataFrame:
    """The same join with pandas, in the order of `labels`."""
    features = pd.read_parquet(path).sort_values("event_time")
    ordered = labels.assign(place=np.arange(len(labels))).sort_values("event_timestamp")
    joined = pd.merge_asof(ordered, features, left_on="event_timestamp", right_on="event_time", by="engine", tolerance=TTL)
    return joined.sort_values("place")


def check_equal(ours: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Raise AssertionError unless both frames hold the same labels and features in the same order."""
    assert ours["engine"].tolist() == theirs["engine"].tolist(), "labels came back in another order"
    assert np.array_equal(ours[COLUMNS].to_numpy(float), theirs[COLUMNS].to_numpy(float), equal_nan=True), "the joins differ"
    assert ours[COLUMNS[0]].notna().any(), "nothing was joined"


if __name__ == "__main__":
    main(__doc__, measure)
