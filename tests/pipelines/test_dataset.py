"""The dataset stage on the features stage's output: the feature service, labels as of their time, and what was known by then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.errors import ConfigError
from pipelines import dataset, features, snapshot
from pipelines.feature_store import open_repo
from pipelines.params import Params, load_contract, load_params
from pipelines.stage import load_context
from tests.pipelines.lakes import fill, open_lake
from tests.pipelines.repos import TIME, turbofan_project


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose snapshot and features are made, without Ray."""
    path = turbofan_project(tmp_path / "project")
    (path / "fenceline.toml").write_text(f"state = '{tmp_path}/state'\n")
    fill(tmp_path / "state/lake", devices=2, engines_per_device=2)
    context = load_context(path)
    versions = open_lake(tmp_path / "state/lake").versions("turbofan")
    out = context.folder("snapshot")
    snapshot.write_snapshot(context.lake, out, context.params, context.contract, versions)
    parts = context.folder("features")
    functions = context.params.functions
    for device in features.count_by_device(context.readings):
        features.write_part(context.readings, [device], context.contract, context.params.spec, functions, parts / f"{device}.parquet")
    return path


def build(project: Path, params: Params) -> dict[str, Any]:
    context = load_context(project)
    return dataset.build(project, context.labels, params, load_contract(project, params).entity, context.folder("dataset"))


def test_every_label_gets_the_features_of_its_reading_and_the_newest_go_online(project: Path) -> None:
    params = load_params(project)
    found = build(project, params)
    rows = pq.read_table(project / "build/pipeline/dataset/dataset.parquet")
    labels = pq.read_table(load_context(project).labels)
    assert (found["rows"], found["entities"], found["labels_without_features"]) == (labels.num_rows, 4, 0)
    assert [name for name in rows.column_names if name in params.spec.names] == params.spec.names
    repo = open_repo(project)
    mine = rows.filter(pc.equal(rows["engine"], "engine-1-1")).sort_by("event_time")
    served = repo.store.get_online_features(repo.service, entity_rows=[{"engine": "engine-1-1"}]).to_dict()
    assert [served[name][0] for name in params.spec.names] == [mine[name][-1].as_py() for name in params.spec.names]
    assert found["online_until"] == pc.max(labels["event_time"]).as_py().isoformat()


def test_known_by_then_leaves_out_what_arrived_after_the_label(project: Path) -> None:
    params = load_params(project)
    strict = msgspec.structs.replace(params, dataset=msgspec.structs.replace(params.dataset, known_by_then=True, ttl_s=1e9))
    with pytest.raises(ConfigError, match=r"none of the .* labels"):
        build(project, strict)  # the readings are of 2023 and have arrived just now
    path = load_context(project).labels
    late = datetime.now(UTC) + timedelta(minutes=5)
    pq.write_table(pa.table({"entity": ["engine-0-0"], "event_time": pa.array([late], TIME), "label": [7.0]}), path)
    (project / "pipelines/params.yaml").write_text(
        (project / "pipelines/params.yaml").read_text().replace("ttl_s: 7200.0 ", "ttl_s: 1.0e+9 ")
    )
    assert build(project, strict)["rows"] == 1
