"""The command around the stages: one training at a time, stages of one's own, and a Ray job that is interrupted."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any, ClassVar

import pytest
import ray.job_submission
from ray.job_submission import JobStatus

from edge_agent.contract.errors import ConfigError
from pipelines import run
from tests.pipelines.repos import turbofan_project


def test_a_second_training_is_refused_before_it_touches_anything(tmp_path: Path) -> None:
    project = turbofan_project(tmp_path / "project")
    params, opened = project / "pipelines/params.yaml", project / "build/pipeline/run.json"
    before = params.read_text()
    opened.parent.mkdir(parents=True)
    opened.write_text('{"run_id": "first"}')
    with (opened.parent / "train.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="a training runs already in"):
            run.run(project, tmp_path / "state", overrides=["train.seed=3"])
    assert params.read_text() == before and opened.read_text() == '{"run_id": "first"}'
    with run._alone(project):
        assert opened.parent.stat().st_mode & 0o777 == 0o700  # rows of all zones lie there


def test_where_no_project_is_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--project DIR"):
        run.run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_stage_of_the_projects_own_is_timed_and_named() -> None:
    said: list[str] = []
    watch = run._Watch(said.append)
    for line in (
        "Running stage 'pipelines/dvc.yaml:train':",
        "Running stage 'pipelines/dvc.yaml:my-report':",
        "Stage 'pipelines/dvc.yaml:per-zone@eu' didn't change, skipping",
        "Stage 'pipelines/dvc.yaml:export' is cached - skipping run, checking out outputs",
    ):
        watch.take(line)
    assert said == ["[4/7] train", "my-report", "per-zone@eu: unchanged", "[6/7] export: unchanged"]
    assert set(watch.seconds) == {"train", "my-report"}


class Job:
    """Stands in for Ray's job API: a job that is asked for once and then fails to be followed."""

    error: BaseException = KeyboardInterrupt()
    stopped: ClassVar[list[str]] = []

    def __init__(self, address: str) -> None:
        self.stopped.clear()

    def submit_job(self, **settings: Any) -> str:
        return "job-1"

    def get_job_status(self, job: str) -> JobStatus:
        raise self.error

    def stop_job(self, job: str) -> bool:
        self.stopped.append(job)
        return True


@pytest.mark.parametrize(("error", "code", "stopped"), [(KeyboardInterrupt(), 130, ["job-1"]), (RuntimeError("gone"), 1, [])])
def test_interrupted_command_stops_its_ray_job_and_a_lost_cluster_is_said(
    error: BaseException, code: int, stopped: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Job)
    monkeypatch.setattr(Job, "error", error)
    assert run.main(["--project", str(tmp_path), "--ray-address", "http://ray.example:8265"]) == code
    assert Job.stopped == stopped
    assert ("job job-1 may still run there" in capsys.readouterr().err) == (not stopped)
