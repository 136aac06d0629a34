"""The snapshot of a lake whose zones lie apart, and the way back from what MLflow keeps of it."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from cloud.lake import Lake
from cloud.roots import Root, Roots
from cloud.rows import Contracts
from pipelines.lake_source import LakeSource
from pipelines.params import load_params
from pipelines.snapshot import write_snapshot
from tests.pipelines.lakes import LANES, ROOT, fill, turbofan


def test_a_snapshot_of_zones_that_lie_apart_can_be_read_again(tmp_path: Path) -> None:
    roots = Roots(Root(str(tmp_path / "all")), {LANES[0]: Root(str(tmp_path / "eu"))})
    fill(roots, devices=2, engines_per_device=1)
    lake = Lake(roots)
    assert sorted(lake.versions("turbofan")) == sorted(LANES) and Root(str(tmp_path / "eu")).folders() == [LANES[0]]

    found = write_snapshot(roots, tmp_path, load_params(ROOT), turbofan(), lake.versions("turbofan"))
    readings = pq.read_table(tmp_path / "readings.parquet")
    stored = json.loads(json.dumps(LakeSource(roots.describe(), "turbofan", found["lanes"], found["labels_version"]).to_dict()))
    Lake(roots, Contracts([turbofan()])).compact(files_max=0)

    assert found["rows"] == readings.num_rows > 0
    assert LakeSource.from_dict(stored).load().select(readings.column_names).equals(readings)
