"""Train = cloud = edge: one trace through the device, the features stage on Ray and Feast's join gives the same bits.

The trace is simulated, and with FENCELINE_CMAPSS=DIR also NASA's C-MAPSS FD001 from that directory.

- Device: the sensors' own messages, cut into batches as they come, through `Intake`, `ActiveModel` and its worker; the features are those
  that the worker is asked for.
- Cloud: the readings as blocks in a Delta lake, snapshot, then `pipelines.features.write_part` in Ray tasks.
- Feast: a point-in-time join of those files for the time of each window, by the project's offline store.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud.demo import cmapss
from cloud.demo.cmapss import station_messages
from cloud.demo.simulator import build_engine
from cloud.demo.track import FRANKFURT
from edge_agent import scoring
from edge_agent.active_model import ActiveModel
from edge_agent.config import load
from edge_agent.contract.bundle import Limits
from edge_agent.contract.columns import Floats, Table, concat
from edge_agent.contract.feature_spec import AGGREGATES, Feature, FeatureSpec, WindowKind
from edge_agent.contract.state import BundleRef
from edge_agent.core.features import Windows
from edge_agent.core.fix import Precision, Rules
from edge_agent.core.track import Track
from edge_agent.fence import Fence
from edge_agent.inference import ModelWorker
from edge_agent.intake import Intake, Readings
from edge_agent.metrics import Metrics
from edge_agent.updater import Activation
from pipelines import cluster
from pipelines.features import EVENT_TIME, count_by_device, deal, runs, windows_of, write_part
from pipelines.score import score_rows
from pipelines.scoring import scorer
from pipelines.snapshot import ORIGIN
from tests.edge_agent import models
from tests.edge_agent.test_config import write
from tests.pipelines.lakes import open_lake, store, turbofan

ALL = (*AGGREGATES, "quantile(0.9)")
FEATURES = [Feature(f, a) for f in ("sensor_2", "sensor_11", "sensor_14") for a in ALL]
HOUR_S = 3600.0
SPECS = {
    "trailing": FeatureSpec(features=FEATURES, window_rows=30, window_s=48 * HOUR_S),
    "tumbling": FeatureSpec(features=FEATURES, window_rows=64, window_s=12 * HOUR_S, kind=WindowKind.TUMBLING, lateness_s=HOUR_S),
    "hopping": FeatureSpec(features=FEATURES, window_rows=64, window_s=24 * HOUR_S, kind=WindowKind.HOPPING, every_s=6 * HOUR_S),
}
DEVICES = ("plane-01", "plane-02")
WEIGHTS = [0.001] * len(FEATURES)


def sensor_messages(source: str, config: Any) -> dict[str, list[tuple[str, bytes]]]:
    """What the sensors of each device send; engines take turns, and now and then a reading comes late."""
    directory = os.environ.get("FENCELINE_CMAPSS", "")
    if source == "cmapss" and not directory:
        pytest.skip("FENCELINE_CMAPSS does not name a directory with NASA's FD001")
    found = cmapss.load(Path(directory)).train[:8] if source == "cmapss" else [build_engine(f"engine-{i}", 5) for i in range(4)]
    out = {}
    for turn, device in enumerate(DEVICES):
        each = [station_messages("plane-01", FRANKFURT, [engine], config.zones) for engine in found[turn::2]]
        mixed = [m for cycle in range(max(map(len, each))) for messages in each for m in messages[cycle : cycle + 1]]
        for i in range(7, len(mixed) - 1, 13):
            mixed[i], mixed[i - 7] = mixed[i - 7], mixed[i]
        out[device] = [(m.topic, m.payload) for m in mixed]
    return out


class Device:
    """The agent's code from the sensors' messages to the model, and what the model was asked."""

    def __init__(self, folder: Path, spec: FeatureSpec) -> None:
        config = load(write(folder))
        fence = Fence(
            Track(config.zones, Rules(speed_m_s_max=400_000.0)), {"turbofan": Precision.ZONE_ONLY}, Metrics(), lambda *_, **__: None
        )
        self._intake = Intake(config.contracts, None, fence, 10_000)
        self._model = ActiveModel(config.contracts, lambda *_: None, Metrics(), lambda *_, **__: None)
        bundle = models.bundle(onnx=models.linear(WEIGHTS), stream="turbofan", features=spec, limits=Limits(score_timeout_s=60.0))
        self._model.activate(Activation(BundleRef(target="x", model="m", model_version="1", sha256="aa"), bundle, on_probation=False))
        self.tables: list[Table] = []
        self.scores: list[Floats] = []

    def take(self, messages: list[tuple[str, bytes]]) -> None:
        taken = self._intake.take([topic for topic, _ in messages], [payload for _, payload in messages], 0)
        assert not taken.rejected
        for readings in taken.readings:
            self._score(readings)

    def _score(self, readings: Readings) -> None:
        self._model.swap()
        scores, model = self._model.score(readings)
        assert scores is not None and model == "aa"
        self.tables.append(readings.table)
        self.scores.append(scores)

    def close(self) -> None:
        self._model.close()


@pytest.mark.usefixtures("ray_head")
@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("source", ["simulated", "cmapss"])
def test_device_ray_and_feast_have_the_same_bits(
    source: str, kind: str, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "PATIENCE_S", 60.0)
    spec = SPECS[kind]
    lake, asked, scored = open_lake(tmp_path / "lake"), {}, {}
    for device, messages in sensor_messages(source, load(write(tmp_path))).items():
        asked[device], table, scored[device] = on_device(tmp_path, spec, messages, seed, monkeypatch)
        store(lake, device, table, model="aa", scorer=lambda *_, scores=scored[device]: scores)  # type: ignore[misc]
    readings = lake.read("turbofan", columns=[*(f.name for f in turbofan().fields), *ORIGIN, "sequence"])
    whole = windows_of(readings, turbofan(), spec)
    device_bits = np.concatenate([asked[device] for device in DEVICES])
    assert device_bits.tobytes() == np.ascontiguousarray(whole.features).tobytes(), "device and cloud"
    files = on_ray(readings, spec, tmp_path)
    assert bits(files, spec) == sorted(row.tobytes() for row in device_bits), "device and Ray"
    check_feast(files, spec, tmp_path)
    score = scorer(models.linear(WEIGHTS))
    parts = [score_rows(readings.slice(start, end - start), turbofan(), Windows(spec), score) for start, end in runs(readings)]
    again = pa.concat_tables(parts)["score"].to_numpy()
    np.testing.assert_array_equal(again, np.concatenate([scored[device] for device in DEVICES]), "scores")
    assert np.isnan(again).any() == (kind != "trailing")


def on_device(
    folder: Path, spec: FeatureSpec, messages: list[tuple[str, bytes]], seed: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[Floats, Table, Floats]:
    """What the device's worker was asked, the readings, and their scores."""
    asked: list[Floats] = []
    ask = ModelWorker.try_score

    def listening(worker: ModelWorker, features: Floats, patience_s: float) -> Floats | None:
        asked.append(features.copy())
        return ask(worker, features, patience_s)

    monkeypatch.setattr(ModelWorker, "try_score", listening)
    device, random, start = Device(folder, spec), np.random.default_rng(seed), 0
    while start < len(messages):
        size = int(random.choice([1, 2, 17, 100, 600]))
        device.take(messages[start : start + size])
        start += size
    device.close()
    monkeypatch.setattr(ModelWorker, "try_score", ask)
    return np.concatenate(asked), concat(device.tables), np.concatenate(device.scores)


def on_ray(readings: pa.Table, spec: FeatureSpec, folder: Path) -> pa.Table:
    """What the features stage writes, from a snapshot with small row groups."""
    path = folder / "readings.parquet"
    pq.write_table(readings, path, row_group_size=100)
    (folder / "features").mkdir()
    calls = [
        (path, devices, turbofan(), spec, {}, folder / f"features/part-{i}.parquet")
        for i, devices in enumerate(deal(count_by_device(path), 2))
    ]
    made = sum(counts.windows for _, counts in cluster.as_done(write_part, calls))
    files = pq.read_table(folder / "features")
    assert made == files.num_rows
    return files


def check_feast(files: pa.Table, spec: FeatureSpec, folder: Path) -> None:
    """The project's offline store gives each window's features at the window's time."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    (folder / "feature_store.yaml").write_text(
        "project: t\nprovider: local\nregistry: registry.db\nonline_store: {type: sqlite, path: online.db}\n"
        "offline_store: {type: pipelines.offline_store.AsOfOfflineStore}\nentity_key_serialization_version: 3\n"
    )
    entity = Entity(name="engine", join_keys=["engine"], value_type=ValueType.STRING)
    source = FileSource(name="s", path="features", timestamp_field=EVENT_TIME, created_timestamp_column="created_time")
    schema = [Field(name=name, dtype=Float64) for name in spec.names]
    feast = FeatureStore(repo_path=str(folder))
    feast.apply([entity, FeatureView(name="w", entities=[entity], schema=schema, source=source)])
    times = files[EVENT_TIME].to_pandas()
    wanted = pd.DataFrame({"engine": files["engine"].to_pandas(), "event_timestamp": times, "row": range(len(times))})
    joined = feast.get_historical_features(entity_df=wanted, features=[f"w:{name}" for name in spec.names]).to_arrow().sort_by("row")
    assert bits(joined, spec) == bits(files, spec)
    for name in spec.names:
        np.testing.assert_array_equal(joined[name].to_numpy(), files[name].to_numpy(), name)


def bits(table: pa.Table, spec: FeatureSpec) -> list[bytes]:
    """The bits of all rows, sorted."""
    rows = np.column_stack([table[name].to_numpy() for name in spec.names])
    return sorted(row.tobytes() for row in rows)
