"""A released window model for the pumps, laid down in a device's state directory as an earlier run of the agent would have left it.

The model is of the kind that the demo trains (200 trees of up to 15 leaves), over windows of 30 readings per pump.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from bench.peers.sensors import START_S, STREAM, payload
from edge_agent.contract.bundle import Bundle, Golden, Limits, Manifest, Provenance, pack_bundle
from edge_agent.contract.columns import Strings
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from edge_agent.contract.state import BundleRef, Phase
from edge_agent.core.features import Windows
from edge_agent.updater import UpdaterState
from pipelines.forest import to_onnx
from pipelines.scoring import score

FIELDS = ("temperature", "vibration", "pressure")
SPEC = FeatureSpec(
    features=[Feature(field, a) for field in FIELDS for a in ("last", "mean", "slope")],
    window_rows=30,
    window_s=3_600.0,
)
TREES = 200
LEAVES = 15
TRAINING_ROWS = 20_000
GOLDEN_ROWS = 8
SEED = 1


def lay_down(state_dir: Path) -> None:
    """Write the bundle and the updater's state: the model is active and proved."""
    data = pack_bundle(_bundle())
    sha256 = hashlib.sha256(data).hexdigest()
    bundles = state_dir / "models" / "bundles"
    bundles.mkdir(parents=True)
    (bundles / f"{sha256}.bundle").write_bytes(data)
    ref = BundleRef(target="bench.bundle", model="bench", model_version="1", sha256=sha256)
    state = UpdaterState(desired_version=1, phase=Phase.ACTIVE, active=ref)
    (state_dir / "models" / "state.json").write_bytes(msgspec.json.encode(state))


def _bundle() -> Bundle:
    readings = [msgspec.json.decode(payload(i)) for i in range(TRAINING_ROWS)]
    columns = {name: np.array([r[name] for r in readings]) for name in ("ts", *FIELDS)}
    event_us = np.round(columns["ts"] * 1e6).astype(np.int64)
    x = Windows(SPEC).push(Strings.of([r["pump"] for r in readings]), event_us, dict(columns)).features.astype(np.float32)
    scaled = (x - x.mean(axis=0)) / (x.std(axis=0) + 1e-9)
    y = scaled[:, 0] + scaled[:, 4] * scaled[:, 8] + np.random.default_rng(SEED).normal(size=TRAINING_ROWS)
    model = HistGradientBoostingRegressor(max_iter=TREES, max_leaf_nodes=LEAVES, learning_rate=0.05, early_stopping=False).fit(x, y)
    onnx = to_onnx(model, len(SPEC.features))
    return Bundle(_manifest(onnx), onnx)


def _manifest(onnx: bytes) -> Manifest:
    event_us = START_S * 1_000_000 + np.arange(GOLDEN_ROWS) * 1_000_000
    fields = {field: np.round(20 + np.arange(GOLDEN_ROWS) * 0.25, 2) for field in FIELDS}
    entity = ["pump-00"] * GOLDEN_ROWS
    features = Windows(SPEC).push(Strings.of(entity), event_us, dict(fields)).features
    golden = Golden(
        entity=entity,
        event_us=event_us.tolist(),
        fields={name: values.tolist() for name, values in fields.items()},
        features=features.tolist(),
        scores=score(onnx, features.astype(np.float32)).tolist(),
    )
    return Manifest(
        model="bench",
        model_version="1",
        stream=STREAM,
        contract_version="1.0.0",
        features=SPEC,
        golden=golden,
        provenance=Provenance(run_id="bench"),
        score_min=-1e6,
        score_max=1e6,
        limits=Limits(memory_mb=512, score_timeout_s=5.0),
    )
