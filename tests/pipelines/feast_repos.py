"""Small Feast repositories for tests: a store in a folder, and sources written from columns."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TIME = pa.timestamp("us", "UTC")


def feature_store(folder: Path, **offline_store: Any) -> Any:
    """A store with our offline store and its settings."""
    os.environ.setdefault("FEAST_USAGE", "False")
    from feast import FeatureStore
    from feast.repo_config import RepoConfig

    folder.mkdir(parents=True, exist_ok=True)
    config = RepoConfig(
        project="t",
        provider="local",
        registry=str(folder / "registry.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": "pipelines.offline_store.AsOfOfflineStore", **offline_store},
        entity_key_serialization_version=3,
        repo_path=folder,
    )
    return FeatureStore(config=config)


def seconds(values: list[int | None], unit: str = "us", zone: str | None = "UTC") -> pa.Array:
    """Timestamps from seconds since 1970."""
    each = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}[unit]
    scaled = pa.array([None if v is None else v * each for v in values], pa.int64())
    return scaled.cast(pa.timestamp(unit, zone))


def write(path: Path, columns: dict[str, Any]) -> Path:
    """A Parquet file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path
