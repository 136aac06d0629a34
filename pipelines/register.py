"""register: everything about the model into its MLflow run, and the model into the registry.

- The parent run gets params, metrics, plots, the dataset, lake, DVC and git versions, the bundle's two files, and the model
  (ONNX flavour with signature and input example), whichever stages of it were taken over unchanged from an earlier run.
- The new version gets the alias `challenger`; if the gate has passed, `champion` too, unless another has become champion meanwhile.
- `pipeline/dvc.lock` is kept as an artifact: `dvc_lock_sha256` in the bundle is its hash. It holds every stage before this one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import yaml

from cloud.tracking_server import errors_told
from edge_agent.contract.bundle import Manifest, Provenance
from edge_agent.contract.errors import UnavailableError
from pipelines import forest, stage, tracking
from pipelines.cli import progress
from pipelines.dataset import TARGET
from pipelines.stage import Context
from pipelines.tracking import CHALLENGER, CHAMPION
from pipelines.train import load

LOCK = "pipelines/dvc.lock"
EXAMPLE_ROWS = 3
NAME_LENGTH_MAX = 500


@errors_told()
def work(context: Context) -> None:
    """Log the run, register the model, set the aliases."""
    run_id = tracking.current_run(context)
    lake = json.loads(context.lake_version.read_text())
    gate = json.loads((context.build / "evaluate/gate.json").read_text())
    lock = _lock(context)
    provenance = Provenance(
        run_id=run_id,
        git_commit=tracking.git_commit(),
        dvc_lock_sha256=hashlib.sha256(lock).hexdigest() if lock else "",
        lake_version=lake["lanes"],
    )
    out = context.folder("register")
    _write_bundle(context, provenance)
    with tracking.resumed(context, run_id) as store:
        _log_numbers(context, store, run_id, gate)
        _log_versions(context, store, run_id, provenance, lake, lock)
        _log_dataset(context, lake)
        _log_files(context)
        version = _log_model(context, store, run_id, gate)
    name = context.params.register.model
    stage.write_json(out / "registered.json", {"run_id": run_id, "model": name, "version": version})
    progress(f"{name} version {version} is {CHALLENGER}{' and ' + CHAMPION if gate['passed'] else ''}")


def _write_bundle(context: Context, provenance: Provenance) -> None:
    """Copy the exported bundle, its manifest with provenance."""
    source, out = context.build / "export", context.folder("register/bundle")
    manifest = msgspec.json.decode((source / "manifest.json").read_bytes(), type=Manifest)
    whole = msgspec.structs.replace(manifest, provenance=provenance)
    (out / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(whole), indent=1))
    shutil.copyfile(source / "model.onnx", out / "model.onnx")


def _log_numbers(context: Context, store: Any, run_id: str, gate: dict[str, Any]) -> None:
    trials = json.loads((context.build / "train/trials.json").read_text())
    best = trials["trials"][trials["best"]]
    params = tracking.flatten(msgspec.to_builtins(context.params))
    params.pop("train.search")
    params |= {f"model.{name}": value for name, value in best["setting"].items()}
    metrics = {f"holdout_{k}": v for k, v in json.loads((context.build / "evaluate/metrics.json").read_text()).items()}
    metrics |= {"cv_rmse_best": best["rmse"], "gate_passed": float(gate["passed"])}
    metrics |= {k: gate[k] for k in ("champion_rmse", "challenger_rmse") if k in gate}
    metrics["onnx_max_abs_diff"] = json.loads((context.build / "export/agreement.json").read_text())["max_abs_diff"]
    tracking.log_batch(store, run_id, metrics, params)


def _log_versions(context: Context, store: Any, run_id: str, provenance: Provenance, lake: dict[str, Any], lock: bytes) -> None:
    tags = {
        "git.commit": provenance.git_commit,
        "dvc.lock_sha256": provenance.dvc_lock_sha256,
        "lake.versions": json.dumps(lake["lanes"], sort_keys=True),
        "lake.labels_version": str(lake["labels_version"]),
        "contract.version": context.contract.version,
    }
    for name, entry in ((yaml.safe_load(lock) or {}).get("stages", {}) if lock else {}).items():
        for out in entry.get("outs", []):
            tags[f"dvc.{name}.{out['path'].rsplit('/', 1)[-1]}"] = f"{out.get('hash', 'md5')}:{out.get('md5', '')}"
    for key, value in tags.items():
        store.set_tag(run_id, key, value)


def _log_dataset(context: Context, lake: dict[str, Any]) -> None:
    import mlflow
    from mlflow.data.pandas_dataset import PandasDataset

    from pipelines.lake_source import LakeSource

    frame = pq.read_table(context.dataset).to_pandas()
    at = ",".join(f"{lane}@{version}" for lane, version in sorted(lake["lanes"].items()))
    source = LakeSource(context.lake.describe(), context.params.stream, lake["lanes"], lake["labels_version"])
    data = PandasDataset(frame, source=source, targets=TARGET, name=f"{context.params.stream}@{at}"[:NAME_LENGTH_MAX])
    mlflow.log_input(data, context="training")


def _log_files(context: Context) -> None:
    import mlflow

    mlflow.log_artifacts(str(context.build / "evaluate"), "evaluate")
    mlflow.log_artifacts(str(context.build / "register/bundle"), "bundle")
    for path, folder in (
        (context.build / "train/split.json", "train"),
        (context.build / "train/trials.json", "train"),
        (context.build / "dataset/dataset.json", "dataset"),
        (context.lake_version, "snapshot"),
        (context.project / "pipelines/params.yaml", "pipeline"),
        (context.project / "pipelines/dvc.yaml", "pipeline"),
        (context.project / LOCK, "pipeline"),
    ):
        if path.exists():
            mlflow.log_artifact(str(path), folder)


def _log_model(context: Context, store: Any, run_id: str, gate: dict[str, Any]) -> str:
    """Log and register the model; its version."""
    import mlflow.onnx
    import onnx
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    example = load(context)[0][:EXAMPLE_ROWS]
    numbers = np.dtype(np.float32)
    signature = ModelSignature(
        inputs=Schema([TensorSpec(numbers, (-1, example.shape[1]), forest.INPUT)]),
        outputs=Schema([TensorSpec(numbers, (-1, 1), forest.OUTPUT)]),
    )
    import onnxruntime

    logged = mlflow.onnx.log_model(
        onnx.load_from_string((context.build / "export/model.onnx").read_bytes()),
        name="model",
        signature=signature,
        input_example={forest.INPUT: example},
        pip_requirements=[f"onnxruntime=={onnxruntime.__version__}", f"numpy=={np.__version__}"],
        save_as_external_data=False,
    )
    name = context.params.register.model
    registered = mlflow.register_model(logged.model_uri, name)
    version = str(registered.version)
    for key, value in (("gate", "; ".join(gate["reasons"])), ("run_id", run_id), ("holdout_rmse", f"{gate['rmse']:.4f}")):
        store.set_model_version_tag(name, version, key, value)
    store.set_registered_model_alias(name, CHALLENGER, version)
    if gate["passed"]:
        promote(context, store, version)
    return version


def promote(context: Context, store: Any, version: str) -> None:
    """Make a version champion.

    Raises:
        UnavailableError: the champion is no longer the one that the gate had before it.
    """
    name, judged = context.params.register.model, json.loads(context.champion.read_text())
    now = tracking.champion(store, name)
    if now != judged:
        before, after = (f"version {one['version']}" if one else "none" for one in (judged, now))
        raise UnavailableError(
            f"{name} version {version} stays {CHALLENGER}: the champion was {before} when it was judged and is {after} now; train again"
        )
    store.set_registered_model_alias(name, CHAMPION, version)


def _lock(context: Context) -> bytes:
    path = context.project / LOCK
    return path.read_bytes() if path.exists() else b""


if __name__ == "__main__":
    sys.exit(stage.main("register", work))
