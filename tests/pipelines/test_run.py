"""The command around the stages: one training at a time, stages of one's own, what it says in the end, and Ray jobs."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import ray.job_submission
from ray.job_submission import JobStatus

from edge_agent.contract.errors import ConfigError, UnavailableError
from pipelines import job, repro, run, stage, tracking
from pipelines.stage import load_context
from tests.pipelines.lakes import ROOT
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
    watch = repro._Watch(said.append)
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


RESULT = run.Result(
    run_id="r1",
    run_url="",
    model="rul",
    model_version="3",
    promoted=False,
    champion_version=None,
    unchanged=True,
    metrics={},
    gate={"passed": True, "reasons": []},
    lake_version={},
)


def test_a_ray_job_s_answer_is_the_only_thing_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    answer = json.dumps(run.asdict(RESULT))
    log = f'[1/7] snapshot\n{{"a": 1}}\n{answer}\nRay goes\n'
    read = iter([log[:10], log[:40], log[: len(log) - 20], log])  # as it grows, cut within lines
    states = iter([JobStatus.RUNNING] * 3 + [JobStatus.SUCCEEDED])
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", Job)
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Job, "get_job_status", lambda self, job: next(states))
    monkeypatch.setattr(Job, "get_job_logs", lambda self, job: next(read), raising=False)
    monkeypatch.setattr(Job, "get_job_info", lambda self, job: SimpleNamespace(driver_exit_code=0), raising=False)
    assert run.main(["--project", str(tmp_path), "--ray-address", "http://ray.example:8265", "--json"]) == 0
    told = capsys.readouterr()
    assert told.out == f"{answer}\n"
    assert told.err.splitlines() == ["Ray job job-1 at http://ray.example:8265", "[1/7] snapshot", '{"a": 1}', "Ray goes"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"promoted": True, "champion_version": "3"}, "(champion)"),
        ({"gate": {"passed": False, "reasons": ["rmse 31 is above"]}}, "(challenger only: rmse 31 is above)"),
        ({}, "somebody has changed the alias since, and champion is none;"),
        ({"champion_version": "2"}, "somebody has changed the alias since, and champion is version 2;"),
    ],
)
def test_the_report_says_who_is_champion_now_and_why(changes: dict[str, Any], says: str) -> None:
    assert says in run._report(run.replace(RESULT, **changes))


def test_a_stage_that_failed_is_named_although_mlflow_does_not_take_the_end_of_its_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    project = turbofan_project(tmp_path / "project")
    shutil.copy(ROOT / "pipelines/dvc.yaml", project / "pipelines")
    context = load_context(project, tmp_path / "state")
    stage.write_json(context.folder(".") / tracking.RUN_FILE, {"run_id": "r1"})
    with pytest.raises(repro.StageError, match="the pipeline failed"):  # DVC finds no repository
        repro.run(context, {**os.environ, "DVC_NO_ANALYTICS": "1"}, lambda line: None)
    with pytest.raises(UnavailableError, match=r"MLflow at .* does not answer"):
        tracking.end_run(context, "FINISHED")
