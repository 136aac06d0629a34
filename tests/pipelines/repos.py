"""Small feature repositories for tests: a view `pumps` with two features, its Parquet source, and an online store."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.feature_store import Repo, open_repo
from tests.pipelines.lakes import ROOT

START = datetime(2026, 3, 1, tzinfo=UTC)
TIME = pa.timestamp("us", "UTC")
SQLITE = "{type: pipelines.online_store.NewestSqliteOnlineStore, path: data/online.db}"
FEAST_SQLITE = "{type: sqlite, path: data/online.db}"

DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.data_format import DeltaFormat
from feast.types import Float64, Int64

pump = Entity(name="pump", join_keys=["pump"], value_type=ValueType.STRING)
source = FileSource(name="pumps_source", SOURCE, timestamp_field="event_time", created_timestamp_column="created_time")
push_source = PushSource(name="pumps_push", batch_source=source)
fields = [Field(name="pressure_mean", dtype=Float64), Field(name="pressure_count", dtype=Int64)]
view = FeatureView(name="pumps", entities=[pump], ttl=timedelta(hours=2), schema=fields, source=push_source, online=True)
service = FeatureService(name="pump-model", features=[view])
"""


def redis_store(port: int) -> str:
    return f'{{type: pipelines.online_store.NewestRedisOnlineStore, connection_string: "127.0.0.1:{port}"}}'


def make_repo(project: Path, online_store: str = SQLITE, source: str = 'path="../features"') -> Repo:
    """`source`: where the view's rows lie, as arguments of FileSource."""
    folder = project / "feature_repo"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "feature_definitions.py").write_text(DEFINITIONS.replace("SOURCE", source))
    (folder / "feature_store.yaml").write_text(
        "project: test\nprovider: local\nregistry: data/registry.db\nentity_key_serialization_version: 3\n"
        f"online_store: {online_store}\noffline_store: {{type: pipelines.offline_store.AsOfOfflineStore}}\n"
    )
    return open_repo(project)


def turbofan_project(folder: Path, online_store: str = SQLITE) -> Path:
    """A project with this repository's own pipeline settings, contract and feature definitions."""
    (folder / "pipelines").mkdir(parents=True)
    shutil.copy(ROOT / "pipelines/params.yaml", folder / "pipelines")
    shutil.copytree(ROOT / "feature_repo", folder / "feature_repo", ignore=shutil.ignore_patterns("data", "__pycache__"))
    shutil.copytree(ROOT / "contracts", folder / "contracts")
    file = folder / "feature_repo/feature_store.yaml"
    text = file.read_text()
    start, end = text.index("online_store:"), text.index("offline_store:")
    file.write_text(f"{text[:start]}online_store: {online_store}\n{text[end:]}")
    return folder


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def rows(*values: tuple[str | None, float, float, float]) -> pa.RecordBatch:
    """Rows of (pump, event time s, created time s, mean)."""
    pumps, events, created, means = (list(column) for column in zip(*values, strict=True))
    return pa.RecordBatch.from_pydict(
        {
            "pump": pa.array(pumps, pa.string()),
            "event_time": pa.array([at(s) for s in events], TIME),
            "created_time": pa.array([at(s) for s in created], TIME),
            "pressure_mean": pa.array(means, pa.float64()),
            "pressure_count": pa.array([round(m) for m in means], pa.int64()),
        }
    )


def write_source(project: Path, name: str, batch: pa.RecordBatch) -> None:
    """One more file of the view's source."""
    (project / "features").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_batches([batch]), project / "features" / f"{name}.parquet")


def served(repo: Repo, pumps: Sequence[str], feature: str = "pressure_mean") -> list[Any]:
    """What an application gets."""
    found = repo.store.get_online_features(features=repo.service, entity_rows=[{"pump": p} for p in pumps]).to_dict()
    return found[feature]
