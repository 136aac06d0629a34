"""The ways of `bench.join`, one per process: `python -m bench.join_ways WAY FOLDER TTL_H ROUNDS` prints seconds and peak memory as JSON.

Timed, the same for all: from labels in memory (pandas) and features in Parquet files to an Arrow table in memory that has every label once.
Not timed: imports, starting Ray, `feast apply`, one earlier reading of the files (they are in the page cache for all).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

COLUMNS = [f"f{i}" for i in range(14)]
OURS = "pipelines.offline_store.AsOfOfflineStore"
RAY_WORKERS = 2
STORES: dict[str, dict[str, Any]] = {
    "ours": {"type": OURS},
    "ours_ray": {"type": OURS, "partitions": RAY_WORKERS},
    "feast_duckdb": {"type": "duckdb"},
}
WAYS = [*STORES, "polars"]
FEATURES, LABELS = "features", "labels.parquet"


def main() -> None:
    way, folder, ttl, rounds = sys.argv[1], Path(sys.argv[2]), timedelta(hours=int(sys.argv[3])), int(sys.argv[4])
    import pandas as pd
    import pyarrow.parquet as pq

    for file in (folder / FEATURES).iterdir():
        file.read_bytes()
    labels = pd.read_parquet(folder / LABELS)
    with ExitStack() as stack:
        if way == "ours_ray":
            from pipelines import cluster

            stack.enter_context(cluster.connected())
        join = bare_polars(folder, ttl) if way == "polars" else feast_store(folder, ttl, STORES[way])
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            table = join(labels)
            times.append(time.perf_counter() - start)
    peak = peak_bytes()
    pq.write_table(table.select(["n", *COLUMNS]).sort_by("n"), folder / f"{way}.parquet")
    print(json.dumps({"s": min(times), "times": times, "peak_gb": peak / 1e9, "rows": table.num_rows}))


def peak_bytes() -> int:
    """The most memory that this program had. `ru_maxrss` would count what its parent had before it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def feast_store(folder: Path, ttl: timedelta, offline_store: dict[str, Any]) -> Callable[[Any], Any]:
    """Feast's historical features through an offline store."""
    os.environ["FEAST_USAGE"] = "False"
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.data_format import ParquetFormat
    from feast.repo_config import RepoConfig
    from feast.types import Float64

    files = sorted((folder / FEATURES).iterdir())
    path = files[0] if len(files) == 1 else folder / FEATURES
    engine = Entity(name="engine", join_keys=["engine"], value_type=ValueType.STRING)
    source = FileSource(
        name="s", path=str(path), file_format=ParquetFormat(), timestamp_field="event_time", created_timestamp_column="created_time"
    )
    view = FeatureView(name="bench", entities=[engine], ttl=ttl, schema=[Field(name=c, dtype=Float64) for c in COLUMNS], source=source)
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=str(folder / f"{offline_store['type']}.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store=offline_store,
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    store = FeatureStore(config=config)
    store.apply([engine, view])
    refs = [f"bench:{c}" for c in COLUMNS]
    return lambda labels: store.get_historical_features(entity_df=labels, features=refs).to_arrow()


def bare_polars(folder: Path, ttl: timedelta) -> Callable[[Any], Any]:
    """What a person would write: read, sort, `join_asof`, back in the labels' order."""
    import polars as pl

    def join(labels: Any) -> Any:
        features = pl.read_parquet(folder / FEATURES / "*.parquet", columns=["engine", "event_time", *COLUMNS]).sort("event_time")
        asked = pl.from_pandas(labels).sort("event_timestamp")
        found = asked.join_asof(
            features, left_on="event_timestamp", right_on="event_time", by="engine", tolerance=ttl, check_sortedness=False
        )
        return found.sort("n").to_arrow()

    return join


if __name__ == "__main__":
    main()
