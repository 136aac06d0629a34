"""docs/your-own-features.md, followed: its settings, its function, on a pump with vibration at 100 Hz."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml

from edge_agent.contract.columns import Strings
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.features import Windows
from pipelines.features import LakeWindows
from pipelines.params import PARAMS, load_params

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/your-own-features.md").read_text()
PUMP = StreamContract(
    stream="pump",
    version="1.0.0",
    fields=(Field("ts", FieldType.TIMESTAMP), Field("pump", FieldType.STRING), Field("vibration", FieldType.NUMBER)),
    key=("pump", "ts"),
    event_time="ts",
    entity="pump",
    topic="sensors/pump",
)
SECONDS = 20


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.S)
    assert found
    return found[1]


def test_the_page_works_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    (tmp_path / "pump_functions.py").write_text(block("python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("pump_functions", None)
    (tmp_path / "pipelines").mkdir()
    shutil.copy(ROOT / PARAMS, tmp_path / PARAMS)
    settings = yaml.safe_load((tmp_path / PARAMS).read_text()) | yaml.safe_load(block("yaml"))
    (tmp_path / PARAMS).write_text(yaml.safe_dump(settings))
    params = load_params(tmp_path)
    spec, functions = params.spec, params.functions
    assert spec.names == ["vibration_rms", "vibration_q95", "vibration_slope", "vibration_crest"]
    random = np.random.default_rng(seed)
    ts = 1_700_000_000_000_000 + np.arange(SECONDS * 100) * 10_000
    vibration = np.round(2.1 + random.normal(0, 0.3, len(ts)), 3)
    arrival = np.argsort(ts + random.integers(0, 400_000, len(ts)), kind="stable")  # in time: lateness_s is 0.5
    device = Windows(spec, functions).push(Strings.of(["p-1"] * len(ts)), ts[arrival], {"vibration": vibration[arrival]})
    assert len(device.features) == SECONDS - 1 and not len(device.late) and not len(device.overfull)
    second = vibration[300:400]
    rms = np.sqrt((second * second).mean())
    np.testing.assert_allclose(device.features[3, [0, 1, 3]], [rms, np.quantile(second, 0.95), second.max() / rms], rtol=1e-12)
    assert lake(ts[arrival], vibration[arrival], params).tobytes() == np.ascontiguousarray(device.features).tobytes()
    sys.modules.pop("pump_functions", None)


def lake(ts: np.ndarray, vibration: np.ndarray, params: object) -> np.ndarray:
    """The same from rows of the lake, as ingest commits them."""
    time = pa.timestamp("us", "UTC")
    rows = pa.table(
        {
            "ts": pa.array(ts).cast(time),
            "pump": ["p-1"] * len(ts),
            "vibration": vibration,
            "device": ["gateway-1"] * len(ts),
            "epoch": ["e"] * len(ts),
            "arrived_at": pa.array(ts).cast(time),
        }
    )
    windows = LakeWindows(PUMP, params.spec, params.functions)  # type: ignore[attr-defined]
    made = pa.concat_tables([windows.push(rows.slice(first, 333))[0] for first in range(0, len(ts), 333)])
    assert made["event_time"][0].as_py() > made["window_start"][0].as_py()
    return np.column_stack([made[name].to_numpy() for name in params.spec.names])  # type: ignore[attr-defined]
