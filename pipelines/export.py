"""export: the trained model as a bundle for devices.

- ONNX and the trained model must agree on every row of the dataset, and on rows that lie on the thresholds or miss values, to `tolerance`.
- Golden vectors come from real readings: the start of one engine's life (short windows) and the end of another's.
- The manifest's provenance names the MLflow run, so it is filled in by register; `model_version` by the release.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.bundle import Bundle, Golden, Manifest, Provenance, check_manifest, pack_bundle, read_bundle
from edge_agent.contract.errors import BundleError, ConfigError
from edge_agent.core.features import Windows
from edge_agent.core.golden import golden_readings
from pipelines import cluster, stage
from pipelines.cli import progress
from pipelines.forest import Float32s, to_onnx
from pipelines.scoring import score
from pipelines.stage import Context
from pipelines.train import load

HARD_ROWS = 2_000
NO_RUN = Provenance(run_id="")


def work(context: Context) -> None:
    """Write `model.onnx`, `manifest.json` and what was checked.

    Raises:
        BundleError: ONNX and the trained model disagree, or the bundle is not one that a device would take.
        ConfigError: the settings of `export` do not fit the model's scores.
    """
    model = joblib.load(context.build / "train/model.joblib")
    spec = context.params.spec
    onnx_model = to_onnx(model, len(spec.features))
    x, _, _ = load(context)
    worst = cluster.run(disagreement, model, onnx_model, x, context.params.train.seed)
    tolerance = context.params.export.tolerance
    if not worst["max_abs_diff"] <= tolerance:
        raise BundleError(f"ONNX and the trained model differ by {worst['max_abs_diff']}; at most {tolerance} allowed")
    progress(f"ONNX agrees to {worst['max_abs_diff']:.2g} on {worst['rows']} rows")
    manifest = make_manifest(context, onnx_model)
    read_bundle(pack_bundle(Bundle(manifest, onnx_model)))
    out = context.folder("export")
    (out / "model.onnx").write_bytes(onnx_model)
    (out / "manifest.json").write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    stage.write_json(out / "agreement.json", worst)


def disagreement(model: Any, onnx_model: bytes, x: Float32s, seed: int) -> dict[str, float]:
    """The largest difference between both models, over the dataset and over rows made to be hard."""
    rows = np.concatenate([x, hard_rows(model, x, seed)])
    return {"max_abs_diff": float(np.max(np.abs(model.predict(rows) - score(onnx_model, rows)))), "rows": len(rows)}


def hard_rows(model: Any, x: Float32s, seed: int) -> Float32s:
    """Rows whose values lie on thresholds, next to them, or are missing."""
    random = np.random.default_rng(seed)
    rows: Float32s = x[random.integers(0, len(x), HARD_ROWS)].copy()
    nodes = np.concatenate([predictor.nodes for (predictor,) in model._predictors])
    nodes = nodes[nodes["is_leaf"] == 0]
    if len(nodes):
        for _ in range(rows.shape[1]):
            picked = nodes[random.integers(0, len(nodes), len(rows))]
            at = picked["num_threshold"].astype(np.float32)
            choices = np.stack([at, np.nextafter(at, np.float32(np.inf)), np.full_like(at, np.nan)])
            rows[np.arange(len(rows)), picked["feature_idx"]] = choices[random.integers(0, 3, len(rows)), np.arange(len(rows))]
    return rows


def make_manifest(context: Context, onnx_model: bytes) -> Manifest:
    """The manifest of the model, still without provenance and version."""
    limits, contract = context.params.export, context.contract
    manifest = Manifest(
        model=context.params.register.model,
        model_version="",
        stream=contract.stream,
        contract_version=contract.version,
        features=context.params.spec,
        golden=make_golden(context, onnx_model),
        provenance=NO_RUN,
        score_min=limits.score_min,
        score_max=limits.score_max,
        probation_rows=limits.probation_rows,
        zones=limits.zones,
        format=context.params.spec.format,
    )
    check_manifest(manifest)
    return manifest


def make_golden(context: Context, onnx_model: bytes) -> Golden:
    """Golden vectors from readings of the hold-out engines.

    Raises:
        ConfigError: a score of real readings lies outside [score_min, score_max]: the device would roll the model back; or the readings
            close no window.
    """
    spec, contract, limits = context.params.spec, context.contract, context.params.export
    readings = pick_golden(context.readings, contract.entity, _holdout(context), limits.golden_rows)
    names = list(dict.fromkeys(f.field for f in spec.features))
    golden = Golden(
        entity=readings[contract.entity].to_pylist(),
        event_us=readings[contract.event_time].cast(pa.int64()).to_pylist(),
        fields={name: readings[name].cast(pa.float64()).to_pylist() for name in names},
        features=[],
        scores=[],
        tolerance=limits.tolerance,
    )
    features = Windows(spec, context.params.functions).push(*golden_readings(golden)).features
    if not len(features):
        raise ConfigError(f"{limits.golden_rows} golden readings close no window of {spec.window_s} s; raise export.golden_rows")
    scores = score(onnx_model, features)
    if scores.min() < limits.score_min or scores.max() > limits.score_max:
        raise ConfigError(
            f"golden scores lie in [{scores.min():.1f}, {scores.max():.1f}], outside [{limits.score_min}, {limits.score_max}]; "
            "set export.score_min and score_max in pipelines/params.yaml"
        )
    return msgspec.structs.replace(golden, features=_with_none(features), scores=scores.tolist())


def pick_golden(path: Path, entity: str, engines: list[str], rows: int) -> pa.Table:
    """At most `rows` readings in the order seen: the first of one engine, then the last of another, each from one device."""
    table = pq.read_table(path, filters=[(entity, "in", engines[:2])])
    half = max(1, rows // 2)
    stretches = []
    for i, engine in enumerate(engines[:2]):
        mine = table.filter(pc.equal(table[entity], engine))
        mine = mine.filter(pc.and_(pc.equal(mine["device"], mine["device"][0]), pc.equal(mine["epoch"], mine["epoch"][0])))
        stretches.append(mine.slice(0, half) if i == 0 else mine.slice(max(0, mine.num_rows - half)))
    return pa.concat_tables(stretches)


def _holdout(context: Context) -> list[str]:
    split = msgspec.json.decode((context.build / "train/split.json").read_bytes())
    return list(split["holdout"] + split["train"])


def _with_none(features: npt.NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if np.isnan(v) else float(v) for v in row] for row in features]


if __name__ == "__main__":
    sys.exit(stage.main("export", work))
