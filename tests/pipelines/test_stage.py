"""How a stage ends when the disk, and not a person, is to blame."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

from pipelines import cluster, stage
from pipelines.stage import Context
from tests.pipelines.repos import turbofan_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of stages without work for Ray."""
    path = turbofan_project(tmp_path / "project")
    (path / "fenceline.toml").touch()
    monkeypatch.chdir(path)
    monkeypatch.setattr(cluster, "connected", nullcontext)
    return path


def write_over_a_directory(path: Path) -> None:
    path.mkdir()
    path.write_text("what a disk does not take")


def test_what_the_operating_system_refuses_is_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert stage.main("train", lambda context: write_over_a_directory(context.folder("train") / "model.onnx")) == 1
    message = f"[Errno 21] Is a directory: '{project}/build/pipeline/train/model.onnx'"
    assert capsys.readouterr().err == f"train: {message}\n"
    assert json.loads((project / stage.BUILD / "error.json").read_text()) == {"stage": "train", "message": message, "exit_code": 1}


def test_a_disk_that_does_not_even_take_the_error_hides_nothing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def work(context: Context) -> None:
        (context.build / "error.json").mkdir()
        raise OSError(28, "No space left on device")

    assert stage.main("train", work) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "train: [Errno 28] No space left on device"
    assert "error.json" in second


def test_a_mistake_of_ours_shows_where(project: Path) -> None:
    def work(context: Context) -> None:
        raise OSError("500000 requested and 32752 written")  # NumPy's, for instance

    with pytest.raises(OSError, match="32752 written"):
        stage.main("train", work)


def test_what_the_operating_system_says_to_a_task_of_ray_is_told_as_it_was(ray_head: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError) as raised:
        cluster.run(write_over_a_directory, tmp_path / "part.parquet")
    assert str(raised.value) == f"[Errno 21] Is a directory: '{tmp_path}/part.parquet'"
