"""The snapshot of a lake whose zones lie apart, and the way back from what MLflow keeps of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cloud.lake import Lake
from cloud.roots import Root, Roots
from cloud.rows import Contracts
from pipelines import snapshot
from pipelines.lake_source import LakeSource
from pipelines.params import load_params
from pipelines.snapshot import write_snapshot
from pipelines.stage import load_context
from tests.pipelines.lakes import LANES, ROOT, fill, turbofan
from tests.pipelines.repos import turbofan_project


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


def test_code_json_is_another_when_a_line_of_a_stage_or_a_library_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = turbofan_project(tmp_path / "project")
    shutil.copy(ROOT / "pipelines/dvc.yaml", project / "pipelines")
    context = load_context(project, tmp_path / "state")
    context.folder("snapshot")
    installed = tmp_path / "site-packages"
    for room in snapshot.ROOMS:
        shutil.copytree(ROOT / room, installed / room, ignore=shutil.ignore_patterns("__pycache__"))

    def written() -> str:
        snapshot.write_code(context)
        return context.code.read_text()

    here = written()
    monkeypatch.setattr(snapshot, "__file__", str(installed / "pipelines/snapshot.py"))
    assert written() == here, "wherever it is installed"
    with (installed / "pipelines/split.py").open("a") as file:
        file.write("# another\n")
    changed = written()
    assert changed != here
    monkeypatch.setattr(snapshot.metadata, "version", lambda name: "999")
    assert written() != changed
