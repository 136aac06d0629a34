"""The whole chain on a small lake: real Ray, DVC, Feast, MLflow on SQLite. The tests build on each other, in this order.

The first training starts a Ray of its own, as it does for a person; the others are given one, as on a cluster.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from pyarrow import compute as pc

from edge_agent.contract.bundle import Bundle, Manifest, pack_bundle, read_bundle
from edge_agent.contract.columns import Floats, Strings, Table, take
from edge_agent.core.features import Windows
from edge_agent.core.golden import golden_readings
from pipelines.scoring import score
from tests.pipelines.lakes import LANES, ROOT, fill, open_lake, readings, store

pytestmark = pytest.mark.timeout(420)  # minutes on a busy machine: each stage is a process with heavy imports

SMALL = [
    "train.search=[{learning_rate: 0.1, max_iter: 40, max_leaf_nodes: 7, min_samples_leaf: 10, l2_regularization: 0.0}]",
    "train.folds=2",
    "features.window_rows=8",
    "features.parts=2",
    "dataset.label_max=40.0",
    "export.golden_rows=24",
]


@dataclass
class Project:
    """A workspace as the demo makes it: no git, no code, only settings and definitions."""

    path: Path
    state: Path

    def command(self, module: str, *arguments: str, ray: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a module; `ray` is the environment of a cluster, None lets it start its own."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "FENCELINE_"))}
        environment |= {"FENCELINE_GIT_COMMIT": "c0ffee", **(ray or {})}
        command = [sys.executable, "-m", module, "--project", str(self.path), "--state", str(self.state), "--json", *arguments]
        return subprocess.run(command, cwd=self.path.parent, env=environment, capture_output=True, text=True, timeout=400)

    def train(self, *arguments: str, ray: dict[str, str] | None = None) -> dict[str, Any]:
        done = self.command("pipelines.run", *arguments, ray=ray)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)  # type: ignore[no-any-return]

    @property
    def build(self) -> Path:
        return self.path / "build/pipeline"

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.state}/mlflow/mlflow.db")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = tmp_path_factory.mktemp("work")
    path = root / "project"
    (path / "pipelines").mkdir(parents=True)
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / "pipelines" / name, path / "pipelines")
    shutil.copytree(ROOT / "feature_repo", path / "feature_repo", ignore=shutil.ignore_patterns("data", "__pycache__"))
    shutil.copytree(ROOT / "contracts", path / "contracts")
    return Project(path, root / "state")


@pytest.fixture(scope="module")
def trained(project: Project) -> dict[str, Any]:
    fill(project.state / "lake")
    sets = [word for assignment in SMALL for word in ("--set", assignment)]
    return project.train(*sets)


def test_training_on_an_empty_lake_says_what_to_do_and_exits_2(project: Project) -> None:
    done = project.command("pipelines.run")
    assert done.returncode == 2
    assert f"the lake {project.state / 'lake'} holds no readings of stream 'turbofan'" in done.stderr
    assert "fenceline replay FILE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project.build / "run.json").exists()


def test_training_registers_a_model_with_its_whole_story(project: Project, trained: dict[str, Any]) -> None:
    store_, run_id = project.client(), trained["run_id"]
    run = store_.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["holdout_rmse"] == pytest.approx(trained["metrics"]["rmse"])
    assert run.data.metrics["holdout_rmse"] < run.data.metrics["holdout_rmse_of_mean"]
    assert run.data.params["features.window_rows"] == "8"
    assert run.data.tags["git.commit"] == "c0ffee"
    assert json.loads(run.data.tags["lake.versions"]) == trained["lake_version"]
    assert sorted(trained["lake_version"]) == sorted(LANES)
    assert run.data.tags["dvc.train.model.joblib"].startswith("md5:")
    (dataset,) = run.inputs.dataset_inputs
    assert json.loads(dataset.dataset.source)["lanes"] == trained["lake_version"]
    trials = store_.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id}'")
    assert [t.data.params["max_iter"] for t in trials] == ["40"]
    files = {f.path for folder in ("bundle", "evaluate", "pipeline", "train") for f in store_.list_artifacts(run_id, folder)}
    assert {"bundle/manifest.json", "bundle/model.onnx", "evaluate/residuals.png", "pipeline/dvc.lock", "train/split.json"} <= files
    version = store_.get_model_version_by_alias("turbofan-rul", "champion")
    assert version.run_id == run_id
    assert str(version.version) == trained["model_version"]
    assert sorted(version.aliases) == ["challenger", "champion"]


def test_logged_model_has_signature_and_example_and_predicts(project: Project, trained: dict[str, Any]) -> None:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{project.state}/mlflow/mlflow.db")
    model = mlflow.pyfunc.load_model("models:/turbofan-rul@champion")
    assert [i.name for i in model.metadata.signature.inputs.inputs] == ["features"]
    example = model.metadata.load_input_example(None) if model.metadata.saved_input_example_info is None else model.input_example
    assert np.asarray(model.predict(example)["score"]).shape == (3, 1)


def test_bundle_is_one_that_a_device_accepts(project: Project, trained: dict[str, Any]) -> None:
    bundle = bundle_of(project, trained)
    golden = bundle.manifest.golden
    features = Windows(bundle.manifest.features).push(*golden_readings(golden)).features
    expected = np.array([[np.nan if v is None else v for v in row] for row in golden.features])
    assert np.array_equal(features, expected, equal_nan=True)
    assert np.abs(score(bundle.model, features) - golden.scores).max() <= golden.tolerance
    provenance = bundle.manifest.provenance
    assert (provenance.run_id, provenance.git_commit, provenance.lake_version) == (trained["run_id"], "c0ffee", trained["lake_version"])
    lock = Path(project.client().download_artifacts(trained["run_id"], "pipeline/dvc.lock"))
    assert hashlib.sha256(lock.read_bytes()).hexdigest() == provenance.dvc_lock_sha256


def test_hold_out_engines_are_in_no_training_row(project: Project, trained: dict[str, Any]) -> None:
    split = json.loads((project.build / "train/split.json").read_text())
    engines = set(pq.read_table(project.build / "dataset/dataset.parquet")["engine"].to_pylist())
    assert set(split["train"]) | set(split["holdout"]) == engines
    assert not set(split["train"]) & set(split["holdout"])
    assert split["holdout"]


def test_online_store_has_the_newest_features_of_each_engine(project: Project, trained: dict[str, Any]) -> None:
    from pipelines.feature_store import open_repo

    repo = open_repo(project.path)
    features = pq.read_table(project.build / "features").sort_by("event_time")
    mine = features.filter(pc.equal(features["engine"], "engine-1-1"))
    served = repo.store.get_online_features(repo.service, entity_rows=[{"engine": "engine-1-1"}]).to_dict()
    assert served["sensor_4_mean"] == [mine["sensor_4_mean"][-1].as_py()]


def test_nothing_runs_again_and_no_version_is_added_when_nothing_has_changed(
    project: Project, trained: dict[str, Any], ray_head: dict[str, str]
) -> None:
    again = project.train(ray=ray_head)
    assert again["unchanged"]
    assert (again["run_id"], again["model_version"]) == (trained["run_id"], trained["model_version"])
    # The champion is another than when the gate was asked: itself. It is asked once more and says the same.
    assert [name for name, seconds in again["stages"].items() if seconds is not None] == ["snapshot", "evaluate"]
    assert again["gate"] == trained["gate"]
    assert len(project.client().search_model_versions("name = 'turbofan-rul'")) == 1
    experiment = project.client().get_experiment_by_name("turbofan").experiment_id
    parents = [r for r in project.client().search_runs([experiment]) if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_id for r in parents] == [trained["run_id"]]


def test_worse_model_does_not_become_champion(project: Project, trained: dict[str, Any], ray_head: dict[str, str]) -> None:
    worse = "train.search=[{learning_rate: 0.01, max_iter: 3, max_leaf_nodes: 2, min_samples_leaf: 10, l2_regularization: 0.0}]"
    second = project.train("--set", worse, "--set", "evaluate.rmse_max=1000", ray=ray_head)
    assert not second["promoted"]
    assert second["gate"]["champion_rmse"] == pytest.approx(trained["metrics"]["rmse"], rel=0.01)
    assert second["gate"]["challenger_rmse"] > second["gate"]["champion_rmse"]
    assert second["stages"]["features"] is None
    assert second["run_id"] != trained["run_id"]
    client = project.client()
    assert str(client.get_model_version_by_alias("turbofan-rul", "champion").version) == trained["model_version"]
    assert str(client.get_model_version_by_alias("turbofan-rul", "challenger").version) == second["model_version"]


def test_data_and_model_of_an_earlier_run_come_back_with_its_dvc_lock(project: Project, trained: dict[str, Any]) -> None:
    model = project.build / "train/model.joblib"
    tag = project.client().get_run(trained["run_id"]).data.tags["dvc.train.model.joblib"]
    assert f"md5:{md5(model)}" != tag
    lock = project.client().download_artifacts(trained["run_id"], "pipeline/dvc.lock")
    shutil.copy(lock, project.path / "pipelines/dvc.lock")
    for stage in ("dataset", "train"):
        command = [sys.executable, "-m", "dvc", "checkout", "--force", f"pipelines/dvc.yaml:{stage}"]
        subprocess.run(command, cwd=project.path, check=True, capture_output=True, timeout=120)
    assert f"md5:{md5(model)}" == tag
    assert pq.read_table(project.build / "dataset/dataset.parquet").num_rows


def test_cloud_recomputes_the_scores_of_a_device_in_every_bit(
    project: Project, trained: dict[str, Any], ray_head: dict[str, str], tmp_path: Path
) -> None:
    data = pack_bundle(bundle_of(project, trained))
    path = tmp_path / "model.bundle"
    path.write_bytes(data)
    bundle = read_bundle(data)
    table, _ = readings(["new-1", "new-2"], 99)

    def device(entity: Strings, event_us: np.ndarray, columns: Table) -> Floats:
        windows = Windows(bundle.manifest.features)
        scores = []
        for first in range(0, len(entity), 11):
            rows = slice(first, first + 11)
            scores.append(score(bundle.model, windows.push(entity[rows], event_us[rows], take(columns, rows)).features))
        return np.concatenate(scores)

    lake = open_lake(project.state / "lake")
    store(lake, "plane-9", table, model=hashlib.sha256(data).hexdigest(), scorer=device)
    done = project.command("pipelines.score", "--bundle", str(path), "--out", str(tmp_path / "scores.parquet"), ray=ray_head)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["max_abs_diff"] == 0.0
    assert report["rows_compared"] == report["rows_with_model"] == len(table["ts"])
    assert (report["missing_readings"], report["devices"]) == (0, 5)
    assert pq.read_table(tmp_path / "scores.parquet").num_rows == report["rows_scored"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def bundle_of(project: Project, result: dict[str, Any]) -> Bundle:
    """The bundle as a release packs it."""
    folder = Path(project.client().download_artifacts(result["run_id"], "bundle"))
    manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    return Bundle(msgspec.structs.replace(manifest, model_version=result["model_version"]), (folder / "model.onnx").read_bytes())
