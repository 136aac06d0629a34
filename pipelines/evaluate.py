"""evaluate: how good the model is on engines it never saw, and whether it may become champion.

- The gate: rmse on the hold-out at most `rmse_max`, and not worse than the champion's by more than `champion_slack`.
- The champion is the one that the snapshot stage saw. If it is this very model, it was judged when it became champion, and is judged
  against the same one again: the gate says what it said then, and nothing is registered.
- It is scored on the same labels, by its own bundle, from raw readings (its features may differ from ours): a label gets its newest
  score, at most `dataset.ttl_s` old, with `known_by_then` one that was known by its time; only on engines that it was not trained on
  either. What cannot be compared is not; the gate says why.
- Importance of a field: how much rmse grows when all its features are shuffled together among the hold-out rows.
"""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib  # type: ignore[import-untyped]
import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cloud.tracking_server import errors_told
from edge_agent.contract.bundle import Manifest
from edge_agent.contract.errors import BundleError, ConfigError
from edge_agent.contract.stream import StreamContract
from edge_agent.core.functions import Functions, check_functions
from pipelines import asof, cluster, stage, tracking
from pipelines.cli import progress
from pipelines.features import CREATED_TIME, EVENT_TIME, LakeWindows
from pipelines.forest import to_onnx
from pipelines.scoring import score
from pipelines.stage import Context
from pipelines.train import Floats, load

NEAR_FAILURE = 30.0
"""Cycles: errors below this much remaining life decide about maintenance."""


@dataclass(frozen=True)
class Champion:
    """The model to beat."""

    version: str
    manifest: Manifest
    model: bytes
    trained_on: set[str]


@errors_told()
def work(context: Context) -> None:
    """Write metrics, plots and the gate."""
    x, y, engines = load(context)
    model = joblib.load(context.build / "train/model.joblib")
    held = np.isin(engines, msgspec.json.decode((context.build / "train/split.json").read_bytes())["holdout"])
    predicted = model.predict(x[held])
    metrics = measure(y[held], predicted, engines[held])
    metrics["rmse_of_mean"] = float(np.sqrt(np.mean((y[held] - y[~held].mean()) ** 2)))
    progress(f"hold-out: {int(held.sum())} rows of {len(set(engines[held]))} engines, rmse {metrics['rmse']:.2f} cycles")
    importance = rank_fields(context, model, x[held], y[held])
    champion = load_champion(context, to_onnx(model, x.shape[1]))
    gate = judge(context, champion, metrics["rmse"], engines[held], y[held], predicted)
    progress(f"gate: {'passed' if gate['passed'] else 'failed'}: {'; '.join(gate['reasons'])}")
    out = context.folder("evaluate")
    stage.write_json(out / "metrics.json", metrics)
    stage.write_json(out / "gate.json", gate)
    rows = zip(engines[held], y[held], predicted, predicted - y[held], strict=True)
    _write_csv(out / "predictions.csv", ("engine", "target", "predicted", "residual"), rows)
    _write_csv(out / "importance.csv", ("field", "rmse_increase"), importance)
    draw(out, y[held], predicted, importance)


def measure(target: Floats, predicted: Floats, engines: npt.NDArray[Any]) -> dict[str, float]:
    """Errors in cycles."""
    error = predicted - target
    near = target <= NEAR_FAILURE
    per_engine = [float(np.sqrt(np.mean(error[engines == e] ** 2))) for e in sorted(set(engines))]
    spread = float(np.sum((target - target.mean()) ** 2))
    metrics = {
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "bias": float(np.mean(error)),
        "rmse_worst_engine": max(per_engine),
        "rmse_median_engine": float(np.median(per_engine)),
        "rows": float(len(target)),
        "engines": float(len(per_engine)),
    }
    if spread:
        metrics["r2"] = 1.0 - float(np.sum(error**2)) / spread
    if near.any():
        metrics["rmse_near_failure"] = float(np.sqrt(np.mean(error[near] ** 2)))
    return metrics


def rank_fields(context: Context, model: Any, x: npt.NDArray[np.float32], y: Floats) -> list[tuple[str, float]]:
    """Fields with the rise of rmse when they are shuffled, the largest first; a Ray task each."""
    spec = context.params.spec
    columns: dict[str, list[int]] = {}
    for i, feature in enumerate(spec.features):
        columns.setdefault(feature.field, []).append(i)
    shared, seed = (cluster.share(model), cluster.share(x), cluster.share(y)), context.params.train.seed
    calls = [(*shared, shuffled, seed) for shuffled in ([], *columns.values())]
    found = dict(cluster.as_done(_shuffled_rmse, calls))
    rises = [(field, found[i] - found[0]) for i, field in enumerate(columns, 1)]
    return sorted(rises, key=lambda r: (-r[1], r[0]))


def _shuffled_rmse(model: Any, x: npt.NDArray[np.float32], y: Floats, columns: list[int], seed: int) -> float:
    shuffled = x.copy()
    shuffled[:, columns] = x[np.random.default_rng(seed).permutation(len(x))][:, columns]
    return float(np.sqrt(np.mean((model.predict(shuffled) - y) ** 2)))


def judge(
    context: Context, champion: Champion | None, rmse: float, engines: npt.NDArray[Any], target: Floats, predicted: Floats
) -> dict[str, Any]:
    """Whether the model may become champion, and why."""
    limits = context.params.evaluate
    gate: dict[str, Any] = {"passed": rmse <= limits.rmse_max, "rmse": rmse, "rmse_max": limits.rmse_max}
    gate["reasons"] = [f"rmse {rmse:.3f} is {'at most' if gate['passed'] else 'above'} rmse_max {limits.rmse_max}"]
    if champion is None:
        gate["reasons"].append("there is no champion to compare with")
        return gate
    gate["champion_version"] = champion.version
    fair = np.array([e not in champion.trained_on for e in engines])
    theirs, obstacle = compare(context, champion, engines, fair)
    if obstacle:
        gate["reasons"].append(f"not compared with champion version {champion.version}: {obstacle}")
        return gate
    both = ~np.isnan(theirs)
    # Labels may have been cut off elsewhere when the champion was trained: both are measured up to our label_max.
    errors = [np.minimum(s, context.params.dataset.label_max) - target[both] for s in (theirs[both], predicted[both])]
    gate["champion_rmse"], gate["challenger_rmse"] = (float(np.sqrt(np.mean(e**2))) for e in errors)
    better = gate["challenger_rmse"] <= gate["champion_rmse"] * (1 + limits.champion_slack)
    gate["passed"] = bool(gate["passed"] and better)
    gate["reasons"].append(
        f"{gate['challenger_rmse']:.3f} against {gate['champion_rmse']:.3f} of champion version {champion.version} "
        f"({int(both.sum())} rows; slack {limits.champion_slack:.0%})"
    )
    return gate


def load_champion(context: Context, onnx_model: bytes) -> Champion | None:
    """The champion that a model has to beat, from its run's artifacts; None if there is none.

    Raises:
        ConfigError: it was registered by something else than this pipeline.
    """
    from mlflow.artifacts import download_artifacts

    store, found = tracking.client(context), json.loads(context.champion.read_text())
    while found is not None:
        if not found["run_id"] or not store.list_artifacts(found["run_id"], "bundle"):
            raise ConfigError(
                f"champion version {found['version']} of {context.params.register.model} has no bundle in its run, so it cannot be "
                "compared with; give the alias `champion` to a version that `fenceline train` registered, or take it away"
            )
        folder, split = (Path(download_artifacts(run_id=found["run_id"], artifact_path=path)) for path in ("bundle", "train/split.json"))
        champion = Champion(
            version=found["version"],
            manifest=msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest),
            model=(folder / "model.onnx").read_bytes(),
            trained_on=set(json.loads(split.read_text())["train"]),
        )
        if (champion.model, champion.manifest.features) != (onnx_model, context.params.spec):
            return champion
        gate = json.loads(Path(download_artifacts(run_id=found["run_id"], artifact_path="evaluate/gate.json")).read_text())
        before = gate.get("champion_version")
        found = before and tracking.registered(store, context.params.register.model, before)
    return None


def compare(context: Context, champion: Champion, engines: npt.NDArray[Any], fair: npt.NDArray[np.bool_]) -> tuple[Floats, str]:
    """The champion's score for each of our hold-out rows, NaN where it has none; and why there is none at all, else an empty text.

    Args:
        engines: of each row.
        fair: whether the champion never saw the row's engine.
    """
    spec, none = champion.manifest.features, np.full(len(engines), np.nan)
    missing = sorted(set(spec.fields) - {f.name for f in context.contract.fields})
    if missing:
        return none, f"the contract no longer has {', '.join(missing)}"
    try:
        check_functions(spec, context.params.functions)
    except BundleError as e:
        return none, str(e)
    if not fair.any():
        return none, "no hold-out engine is new to it"
    labels = pq.read_table(context.dataset, columns=[context.contract.entity, EVENT_TIME])
    labels = labels.filter(pc.is_in(labels[context.contract.entity], pa.array(sorted(set(engines)))))
    scores = score_champion(context, champion, sorted(set(engines[fair])), labels)
    scores[~fair] = np.nan
    if np.isnan(scores).all():
        return none, f"it has no score at most dataset.ttl_s {context.params.dataset.ttl_s} s older than a label of an engine new to it"
    return scores, ""


def score_champion(context: Context, champion: Champion, engines: list[str], labels: pa.Table) -> Floats:
    """The champion's newest score of each label (engine, event time), NaN if there is none; of these engines' readings only."""
    contract, functions = context.contract, context.params.functions
    scored: pa.Table = cluster.run(_score_readings, context.readings, contract, champion.manifest, champion.model, engines, functions)
    features = pl.DataFrame(scored)
    keys = pl.DataFrame({contract.entity: labels[contract.entity].to_pylist()})
    asked = asof.Labels.of(keys, pl.Series(labels[EVENT_TIME].cast(pa.int64()).to_numpy()))
    rule = asof.Rule(ttl=round(context.params.dataset.ttl_s * 1e6), known_by=context.params.dataset.known_by_then)
    found = asof.join(asof.candidates(features, asked, rule), asked, rule)["score"]
    return found.fill_null(np.nan).to_numpy(writable=True)


def _score_readings(
    readings: Path, contract: StreamContract, manifest: Manifest, model: bytes, engines: list[str], functions: Functions
) -> pa.Table:
    """Engine, time, when it was known, and score of each window."""
    windows = LakeWindows(contract, manifest.features, functions)
    made, _ = windows.push(pq.read_table(readings, columns=windows.columns, filters=[(contract.entity, "in", engines)]))
    features = np.column_stack([made[name].to_numpy() for name in manifest.features.names])
    return pa.table(
        {
            contract.entity: made[contract.entity],
            asof.AT: made[EVENT_TIME].cast(pa.int64()),
            asof.CREATED: made[CREATED_TIME].cast(pa.int64()),
            "score": score(model, features),
        }
    )


def draw(out: Path, target: Floats, predicted: Floats, importance: list[tuple[str, float]]) -> None:
    """Three pictures: predicted against true, residuals, importance."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    axes.scatter(target, predicted, s=4, alpha=0.3)
    axes.plot([0, target.max()], [0, target.max()], color="black", linewidth=1)
    axes.set(xlabel="remaining cycles (true, clipped)", ylabel="predicted", title="Hold-out engines")
    figure.savefig(out / "predicted_vs_true.png", dpi=100, metadata={"Software": None})
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.hist(predicted - target, bins=60)
    axes.set(xlabel="predicted - true (cycles)", ylabel="rows", title="Residuals on hold-out engines")
    figure.savefig(out / "residuals.png", dpi=100, metadata={"Software": None})
    figure = Figure(figsize=(6, 0.3 * len(importance) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in reversed(importance)], [rise for _, rise in reversed(importance)])
    axes.set(xlabel="rise of rmse when shuffled (cycles)", title="Importance by field")
    figure.savefig(out / "importance.png", dpi=100, metadata={"Software": None})


def _write_csv(path: Path, header: tuple[str, ...], rows: Any) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows])


if __name__ == "__main__":
    sys.exit(stage.main("evaluate", work))
