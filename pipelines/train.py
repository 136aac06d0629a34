"""train: a small search on Ray, then the best setting on all training engines.

- One Ray task per setting and fold. Folds are cut by engine; the hold-out engines are in none of them.
- Each setting is a nested MLflow run, logged by this process as its last fold comes in.
- Features are cast to float32 first: that is what the device's model gets.
- The final model is frozen (see `pipelines.forest`): what is evaluated is what will be exported, bit for bit.
"""

from __future__ import annotations

import sys
from typing import Any

import joblib  # type: ignore[import-untyped]
import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import GroupKFold

from cloud.tracking_server import errors_told
from pipelines import cluster, stage, tracking
from pipelines.cli import progress
from pipelines.dataset import TARGET
from pipelines.forest import Float32s, freeze
from pipelines.params import Setting
from pipelines.split import holdout_of
from pipelines.stage import Context

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


@errors_told()
def work(context: Context) -> None:
    """Search, fit, and write the model, the trials and the split."""
    x, y, engines = load(context)
    held = holdout_of(engines, context.params.train.holdout)
    training = np.flatnonzero(~np.isin(engines, sorted(held)))
    x, y, engines = x[training], y[training], engines[training]
    trials = search(context, x, y, engines)
    best = min(range(len(trials)), key=lambda i: trials[i]["rmse"])
    setting = context.params.train.search[best]
    progress(f"best: setting {best + 1}, rmse {trials[best]['rmse']:.2f} over the folds; fitting it on {len(set(engines))} engines")
    model = cluster.run(fit_frozen, setting, context.params.train.seed, x, y)
    out = context.folder("train")
    joblib.dump(model, out / "model.joblib")
    stage.write_json(out / "trials.json", {"best": best, "trials": trials})
    split = {"train": sorted(set(engines.tolist())), "holdout": sorted(held)}
    stage.write_json(out / "split.json", split)


def load(context: Context) -> tuple[Float32s, Floats, npt.NDArray[Any]]:
    """The dataset: features float32 (rows, features), targets (rows,), engines (rows,)."""
    table = pq.read_table(context.dataset)
    x = np.column_stack([table[name].to_numpy() for name in context.params.spec.names]).astype(np.float32)
    return x, table[TARGET].to_numpy(), np.array(table[context.contract.entity].to_pylist())


def search(context: Context, x: Float32s, y: Floats, engines: npt.NDArray[Any]) -> list[dict[str, Any]]:
    """Cross-validate every setting; for each its parameters, its error over all folds and that of each fold."""
    settings = context.params.train.search
    cuts = folds(engines, context.params.train.folds, context.params.train.seed)
    data, target = cluster.share(x), cluster.share(y)
    places = [(i, k) for i in range(len(settings)) for k in range(len(cuts))]
    calls = [(settings[i], context.params.train.seed, data, target, *cuts[k]) for i, k in places]
    squares = np.full((len(settings), len(cuts)), np.nan)
    sizes = np.array([len(outside) for _, outside in cuts])
    store, parent = tracking.client(context), tracking.current_run(context)
    for done, (n, error) in enumerate(cluster.as_done(score_fold, calls), 1):
        i, k = places[n]
        squares[i, k] = error
        progress(f"setting {i + 1} fold {k + 1}: rmse {np.sqrt(error / sizes[k]):.2f}", done, len(calls))
        if not np.isnan(squares[i]).any():
            _log_trial(store, parent, i, settings[i], squares[i], sizes)
    return [
        {"setting": msgspec.to_builtins(s), "rmse": _rmse(squares[i], sizes), "rmse_folds": np.sqrt(squares[i] / sizes).tolist()}
        for i, s in enumerate(settings)
    ]


def folds(engines: npt.NDArray[Any], count: int, seed: int) -> list[tuple[Rows, Rows]]:
    """Row indices (inside, outside) of each fold; no engine is on both sides."""
    groups = min(count, len(set(engines.tolist())))
    return list(GroupKFold(groups, shuffle=True, random_state=seed).split(engines, groups=engines))


def score_fold(setting: Setting, seed: int, x: Float32s, y: Floats, inside: Rows, outside: Rows) -> float:
    """Sum of squared errors outside, of a model fitted inside."""
    model = _regressor(setting, seed).fit(x[inside], y[inside])
    return float(np.sum((model.predict(x[outside]) - y[outside]) ** 2))


def fit_frozen(setting: Setting, seed: int, x: Float32s, y: Floats) -> HistGradientBoostingRegressor:
    """The model that will be evaluated and exported."""
    model = _regressor(setting, seed).fit(x, y)
    freeze(model)
    return model


def _regressor(setting: Setting, seed: int) -> HistGradientBoostingRegressor:
    return HistGradientBoostingRegressor(**msgspec.to_builtins(setting), early_stopping=False, random_state=seed)


def _log_trial(store: Any, parent: str, i: int, setting: Setting, squares: Floats, sizes: Rows) -> None:
    run = tracking.child_run(store, parent, f"setting-{i + 1}")
    metrics = {f"cv_rmse_fold_{k + 1}": float(np.sqrt(s / n)) for k, (s, n) in enumerate(zip(squares, sizes, strict=True))}
    metrics["cv_rmse"] = _rmse(squares, sizes)
    tracking.log_batch(store, run, metrics, msgspec.to_builtins(setting))
    store.set_terminated(run, "FINISHED")
    tracking.log_batch(store, parent, {"cv_rmse": metrics["cv_rmse"]}, step=i)


def _rmse(squares: Floats, sizes: Rows) -> float:
    return float(np.sqrt(np.sum(squares) / np.sum(sizes)))


if __name__ == "__main__":
    sys.exit(stage.main("train", work))
