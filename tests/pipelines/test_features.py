from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.columns import Strings, take
from edge_agent.contract.feature_spec import AGGREGATES, Feature, FeatureSpec
from edge_agent.core.features import Windows
from pipelines import cluster, features
from pipelines.features import count_by_device, deal, runs, windows_of, write_part
from pipelines.snapshot import ORIGIN
from pipelines.stage import load_context
from tests.pipelines.lakes import fill, open_lake, readings, store, turbofan
from tests.pipelines.repos import turbofan_project

SPEC = FeatureSpec(
    features=[Feature(f, a) for f in ("sensor_2", "sensor_11") for a in AGGREGATES],
    window_rows=6,
    window_s=4 * 3600.0,
)


@pytest.fixture(scope="module")
def lake_rows(tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    lake = tmp_path_factory.mktemp("lake")
    fill(lake, devices=3, engines_per_device=3)
    columns = [f.name for f in turbofan().fields] + list(ORIGIN)
    return open_lake(lake).read("turbofan", columns=columns)


@pytest.mark.parametrize("batch_rows", [1, 3, 64, 100_000])
def test_windows_do_not_depend_on_how_readings_are_cut(lake_rows: pa.Table, batch_rows: int) -> None:
    rows = lake_rows.slice(0, 300)
    cut, whole = (windows_of(rows, turbofan(), SPEC, batch_rows=n).features for n in (batch_rows, 10**6))
    assert np.array_equal(cut, whole, equal_nan=True)


def test_lake_gives_the_features_that_the_device_computed(tmp_path: Path, seed: int) -> None:
    """The device sees one stream of readings; the lake gets it in blocks of two lanes and puts it together again."""
    table, _ = readings(["a", "b", "c"], seed % 2**31)
    lake = open_lake(tmp_path)
    store(lake, "plane", table)
    windows, random = Windows(SPEC), np.random.default_rng(seed)
    cuts = np.unique(np.concatenate([[0], random.integers(0, len(table["ts"]), 12), [len(table["ts"])]]))
    device = []
    for first, last in pairwise(cuts):
        part = take(table, slice(int(first), int(last)))
        device.append(windows.push(part["engine"], part["ts"], part).features)  # type: ignore[arg-type]
    columns = [*(f.name for f in turbofan().fields), "device", "epoch"]
    cloud = windows_of(lake.read("turbofan", columns=columns), turbofan(), SPEC).features
    assert np.array_equal(np.concatenate(device), cloud, equal_nan=True)


def test_new_epoch_and_other_device_start_with_empty_windows(lake_rows: pa.Table) -> None:
    rows = lake_rows.slice(0, 20)
    twice = pa.concat_tables([rows, rows.set_column(rows.schema.get_field_index("epoch"), "epoch", pa.array(["zz"] * 20))])
    assert runs(twice) == [(0, 20), (20, 40)]
    features = windows_of(twice, turbofan(), SPEC).features
    assert np.array_equal(features[:20], features[20:], equal_nan=True)


def test_parts_together_hold_every_reading_once(lake_rows: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "readings.parquet"
    pq.write_table(lake_rows, path)
    groups = deal(count_by_device(path), 2)
    rows = sum(write_part(path, devices, turbofan(), SPEC, {}, tmp_path / f"{i}.parquet").windows for i, devices in enumerate(groups))
    parts = pa.concat_tables([pq.read_table(tmp_path / f"{i}.parquet") for i in range(len(groups))])
    assert rows == parts.num_rows == lake_rows.num_rows
    assert parts.column_names[:4] == ["engine", "event_time", "created_time", "device"]
    whole = windows_of(lake_rows, turbofan(), SPEC).features
    assert np.array_equal(np.sort(parts["sensor_2_mean"].to_numpy()), np.sort(whole[:, SPEC.names.index("sensor_2_mean")]))


def test_devices_are_dealt_out_evenly() -> None:
    assert deal({"d": 1, "a": 10, "c": 8, "b": 9}, 2) == [["a"], ["b", "c", "d"]]
    assert deal({f"{i:02d}": 7 for i in range(12)}, 3) == [[f"{i:02d}" for i in range(n, n + 4)] for n in (0, 4, 8)]
    assert deal({"a": 5}, 4) == [["a"]]


def test_missing_values_stay_missing() -> None:
    table = pa.table(
        {
            "engine": ["e"] * 3,
            "ts": pa.array([0, 1, 2]).cast(pa.timestamp("us", "UTC")),
            "sensor_2": [1.0, None, 3.0],
            "sensor_11": pa.array([None] * 3, pa.float64()),
            "device": ["d"] * 3,
            "epoch": ["x"] * 3,
        }
    )
    features = windows_of(table, turbofan(), SPEC).features
    names = SPEC.names
    assert features[:, names.index("sensor_2_mean")].tolist() == [1.0, 1.0, 2.0]
    assert np.isnan(features[:, names.index("sensor_11_mean")]).all()
    assert Strings.of(["e"]).values == ("e",)


def test_features_appear_together(lake_rows: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever materialises while the stage runs must not take a part of the devices for all of them."""
    project = turbofan_project(tmp_path / "project")
    (project / "fenceline.toml").touch()
    context = load_context(project, tmp_path / "state")
    context.readings.parent.mkdir(parents=True)
    pq.write_table(lake_rows, context.readings)
    seen = []

    def as_done(function: Any, calls: list[Any]) -> Any:
        for i, arguments in enumerate(calls):
            yield i, function(*arguments)
            seen.append(context.features.exists())

    monkeypatch.setattr(cluster, "as_done", as_done)
    for _ in range(2):
        features.work(context)
        assert pq.read_table(context.features).num_rows == lake_rows.num_rows
        assert len(seen) > 1 and not any(seen)
