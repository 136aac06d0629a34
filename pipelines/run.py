"""Run the whole pipeline: one Ray for all stages, one MLflow run, and only the stages whose inputs have changed.

    python -m pipelines.run --state .fenceline --mlflow http://127.0.0.1:5000 --set train.folds=4 --json

- DVC decides what runs (`dvc repro`); each stage is a process that connects to the Ray started here, or to `--ray-address`.
- With an http(s) `--ray-address` the command submits itself as a Ray job; project and state must be on storage that the cluster sees.
- If nothing has changed there is no new run, and MLflow stays as it is: the answer names the run and the model version of last time,
  and says whether that is champion now. Whoever gave the alias back to the champion before, or took it away where there was none before,
  knew something that the gate does not: it has answered that question already, and a training by the clock must not undo what he did.
- Exit 0: done (look at `promoted`, and `gate` for why); 1: a stage failed; 2: a setting or the data must be changed by a person.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cloud.lake import Lake
from cloud.tracking_server import errors_told
from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError
from pipelines import cli, cluster, tracking
from pipelines.params import override, params_file
from pipelines.snapshot import pick_versions
from pipelines.stage import BUILD, Context, load_context, private

STAGES = ("snapshot", "features", "dataset", "train", "evaluate", "export", "register")
OUTPUT_LINES_KEPT = 40
STOP_S = 10.0

Say = Callable[[str], None]

_STARTS = re.compile(r"Running stage '(?:[^':]*:)?([^']+)'")
_SKIPPED = re.compile(r"Stage '(?:[^':]*:)?([^']+)' (?:didn't change, skipping|is cached - skipping run)")


@dataclass(frozen=True)
class Result:
    """What a pipeline run came to. `stages` has seconds, or None for a stage that had nothing to do.

    `promoted` says whether the version is champion now, `champion_version` which one is; None: none.
    """

    run_id: str
    run_url: str
    model: str
    model_version: str
    promoted: bool
    champion_version: str | None
    unchanged: bool
    metrics: dict[str, float]
    gate: dict[str, Any]
    lake_version: dict[str, int]
    stages: dict[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0


class StageError(FencelineError):
    """A stage failed; `exit_code` is what the whole command ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@errors_told()
def run(
    project: Path,
    state: Path | None = None,
    mlflow_url: str | None = None,
    overrides: list[str] | None = None,
    ray_address: str | None = None,
    say: Say = lambda line: None,
) -> Result:
    """Run what has changed.

    Args:
        state: the state directory; None asks the project's settings.
        mlflow_url: tracking server; None: MLFLOW_TRACKING_URI, or a SQLite file in the state directory.
        overrides: `section.key=value` for params.yaml.
        ray_address: a running cluster (`host:port`); None starts a local one.
        say: gets each line of progress.

    Raises:
        ConfigError, UnavailableError: before the first stage.
        StageError: a stage failed; its message is the stage's.
    """
    started = time.monotonic()
    project = project.absolute()
    with _alone(project):
        override(project, overrides or [])
        context = load_context(project, state)
        pick_versions(Lake(context.lake), context)  # the snapshot asks again; a person should not wait for Ray to hear that
        os.environ["MLFLOW_TRACKING_URI"] = mlflow_url or tracking.tracking_uri(context.state)
        _init_dvc(project)
        private(project / ".dvc/cache")
        tracking.leave_run(context)
        with _ray(ray_address, say) as ray_environment:
            stages = _repro(context, {**os.environ, **_environment(context), **ray_environment}, say)
        return replace(_result(context, stages), seconds=round(time.monotonic() - started, 3))


def submit(address: str, arguments: list[str], say: Say) -> int:
    """Run this command as a job of the Ray cluster whose dashboard is at `address`; the job's exit code. Interrupted, it stops the job.

    Raises:
        UnavailableError: nothing answers there, or no longer.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    passed = {k: v for k, v in os.environ.items() if k.startswith(("FENCELINE_", "MLFLOW_"))}
    passed.setdefault("FENCELINE_GIT_COMMIT", tracking.git_commit())
    passed["PYTHONPATH"] = _python_path()
    entrypoint = f"{sys.executable} -m pipelines.run {shlex.join(arguments)}"
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": passed})
    except (ConnectionError, RuntimeError) as e:
        raise UnavailableError(f"the Ray cluster at {address} does not take the job: {e}") from e
    say(f"Ray job {job} at {address}")
    try:
        status, code = _follow(client, job, say)
    except (ConnectionError, RuntimeError) as e:
        raise UnavailableError(f"the Ray cluster at {address} no longer answers ({e}); job {job} may still run there") from e
    except BaseException:
        client.stop_job(job)
        raise
    return code if code is not None else 0 if status == JobStatus.SUCCEEDED else 1


def _follow(client: Any, job: str, say: Say) -> tuple[Any, int | None]:
    """Pass on what a job writes until it has ended; its status and exit code."""
    shown = 0
    while True:
        status = client.get_job_status(job)
        log = client.get_job_logs(job)
        end = len(log) if status.is_terminal() else log.rfind("\n") + 1  # the rest of a line comes next time
        for line in log[shown:end].splitlines():
            say(line)
        shown = max(shown, end)
        if status.is_terminal():
            return status, client.get_job_info(job).driver_exit_code
        time.sleep(1.0)


def _sorted_out(line: str) -> None:
    """Say a line of a job's log, in which its stdout and stderr are one: its answer is the answer here, all else is beside it."""
    try:
        document = json.loads(line)
    except ValueError:
        document = None
    is_answer = isinstance(document, dict) and document.keys() == {member.name for member in fields(Result)}
    (cli.out if is_answer else cli.err)(line)


@contextmanager
def _alone(project: Path) -> Iterator[None]:
    """Be the only training of the project: a second one would change the first one's parameters and end its MLflow run.

    Raises:
        ConfigError: there is no such project, or a training runs already.
    """
    params_file(project)
    private(project / BUILD)
    with (project / BUILD / "train.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"a training runs already in {project}; wait for its end, or stop it") from None
        yield


@contextmanager
def _ray(address: str | None, say: Say) -> Iterator[dict[str, str]]:
    given = address or os.environ.get("RAY_ADDRESS")
    if given:
        yield {"RAY_ADDRESS": given}
        return
    say("starting Ray")
    os.environ["PYTHONPATH"] = _python_path()  # Ray's workers inherit it
    with cluster.local_head() as environment:
        yield environment


def _environment(context: Context) -> dict[str, str]:
    return {
        "FENCELINE_STATE": str(context.state),
        "FENCELINE_GIT_COMMIT": tracking.git_commit(),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(context.project / ".dvc/tmp/site"),
        "PYTHONPATH": _python_path(),
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


def _python_path() -> str:
    """This package for child processes, also where `pipelines/` of a copied project holds no code."""
    here = str(Path(__file__).resolve().parent.parent)
    parts = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != here]
    return os.pathsep.join([here, *parts])


def _init_dvc(project: Path) -> None:
    """Make the project a DVC repository of its own, if it is none."""
    if (project / ".dvc").is_dir():
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"]
    made = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if made.returncode:
        raise ConfigError(f"{project} cannot become a DVC repository: {made.stderr.strip()}")


def _repro(context: Context, environment: dict[str, str], say: Say) -> dict[str, float | None]:
    """Run DVC and pass its stages' progress on; seconds by stage."""
    (context.build / "error.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "dvc", "repro", "pipelines/dvc.yaml"]
    process = subprocess.Popen(
        command,
        cwd=context.project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the stage can be ended with DVC
    )
    assert process.stdout is not None
    watch = _Watch(say)
    finished = False
    try:
        for line in process.stdout:
            watch.take(line.rstrip())
        finished = process.wait() == 0
    finally:
        watch.end()
        _stop(process)
        with nullcontext() if finished else suppress(UnavailableError):  # why it failed is what counts; the next run ends it then
            _close_run(context, "FINISHED" if finished else "FAILED")
    if not finished:
        raise _stage_error(context, watch.tail)
    return {**dict.fromkeys(STAGES), **watch.seconds}


class _Watch:
    """Turns DVC's output into lines of progress, and takes the time of each stage."""

    def __init__(self, say: Say) -> None:
        self.seconds: dict[str, float] = {}
        self.tail: list[str] = []
        self._say = say
        self._stage = ""
        self._since = 0.0

    def take(self, line: str) -> None:
        self.tail = [*self.tail, line][-OUTPUT_LINES_KEPT:]
        starts, skipped = _STARTS.search(line), _SKIPPED.search(line)
        if starts:
            self.end()
            self._stage, self._since = starts.group(1), time.monotonic()
            self._say(_numbered(self._stage))
        elif skipped:
            self.end()
            self._say(f"{_numbered(skipped.group(1))}: unchanged")
        elif self._stage and line.startswith(cli.BULLET):
            self._say(f"      {line.removeprefix(cli.BULLET)}")

    def end(self) -> None:
        if self._stage:
            self.seconds[self._stage] = round(time.monotonic() - self._since, 3)
        self._stage = ""


def _numbered(stage: str) -> str:
    """A stage with its place; one that the project has added has none."""
    return f"[{STAGES.index(stage) + 1}/{len(STAGES)}] {stage}" if stage in STAGES else stage


def _stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is not None:
        return
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _stage_error(context: Context, tail: list[str]) -> StageError:
    path = context.build / "error.json"
    if path.exists():
        error = json.loads(path.read_text())
        return StageError(f"stage {error['stage']}: {error['message']}", error["exit_code"])
    return StageError("the pipeline failed; the end of its output:\n" + "\n".join(tail), 1)


def _close_run(context: Context, status: str) -> None:
    """End the MLflow run that a stage opened, if it came so far.

    Raises:
        UnavailableError: MLflow does not take it.
    """
    opened = tracking.opened_run(context)
    if opened is not None:
        with errors_told():
            tracking.client(context).set_terminated(opened, status)


def _result(context: Context, stages: dict[str, float | None]) -> Result:
    registered = json.loads((context.build / "register/registered.json").read_text())
    unchanged, opened = stages["register"] is None, tracking.opened_run(context)
    store = tracking.client(context)
    if not unchanged:
        reused = [name for name, seconds in stages.items() if seconds is None]
        store.set_tag(registered["run_id"], "fenceline.stages_unchanged", ",".join(reused))
    elif opened is not None:
        tracking.discard_run(store, opened)  # trials that led to the model of last time
        (context.build / tracking.RUN_FILE).unlink()
    champion = tracking.champion(store, registered["model"])
    return Result(
        run_id=registered["run_id"],
        run_url=tracking.run_url(context, registered["run_id"]),
        model=registered["model"],
        model_version=registered["version"],
        promoted=champion == {"version": registered["version"], "run_id": registered["run_id"]},
        champion_version=champion["version"] if champion else None,
        unchanged=unchanged,
        metrics=json.loads((context.build / "evaluate/metrics.json").read_text()),
        gate=json.loads((context.build / "evaluate/gate.json").read_text()),
        lake_version=json.loads(context.lake_version.read_text())["lanes"],
        stages=stages,
    )


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.run", description="Run the training pipeline.")
    parser.add_argument("--state", type=Path, help="state directory (default: FENCELINE_STATE, then fenceline.toml)")
    parser.add_argument(
        "--mlflow", metavar="URL", help="tracking server (default: MLFLOW_TRACKING_URI, then SQLite in the state directory)"
    )
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change params.yaml first; may be repeated")
    parser.add_argument("--ray-address", metavar="ADDRESS", help="a running cluster: host:port, or http(s)://… to submit a Ray job")
    parser.add_argument("--project", type=Path, default=Path.cwd(), help="directory with pipelines/dvc.yaml (default: here)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")
    args = parser.parse_args(argv)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # end the stages too
    say = cli.err if args.json else cli.out
    try:
        if args.ray_address and args.ray_address.startswith(("http://", "https://")):
            return submit(args.ray_address, _without_address(args), _sorted_out if args.json else cli.out)
        result = run(args.project, args.state, args.mlflow, args.set, args.ray_address, say)
    except FencelineError as e:
        cli.err(f"train: {e}")
        return e.exit_code if isinstance(e, StageError) else 2 if isinstance(e, ConfigError) else 1
    except OSError as e:
        if e.errno is None:  # not the operating system's, so a mistake of ours
            raise
        cli.err(f"train: {e}")
        return 1
    except KeyboardInterrupt:
        cli.err("train: stopped; the next run goes on with the stage that was cut off")
        return 130
    cli.out(json.dumps(asdict(result)) if args.json else _report(result))
    return 0


def _without_address(args: argparse.Namespace) -> list[str]:
    """The arguments for the job: absolute paths, no address."""
    words = ["--project", str(args.project.absolute())]
    words += ["--state", str(args.state.absolute())] if args.state else []
    words += ["--mlflow", args.mlflow] if args.mlflow else []
    words += [word for assignment in args.set for word in ("--set", assignment)]
    return words + (["--json"] if args.json else [])


def _report(result: Result) -> str:
    metrics = ", ".join(f"{name} {result.metrics[name]:.2f}" for name in ("rmse", "mae", "rmse_near_failure") if name in result.metrics)
    lines = [
        "nothing has changed since the last run" if result.unchanged else f"done in {result.seconds:.0f} s",
        f"model    {result.model} version {result.model_version} ({_outcome(result)})",
        f"hold-out {metrics}",
        f"lake     {', '.join(f'{k}@{v}' for k, v in sorted(result.lake_version.items()))}",
        f"run      {result.run_url}",
    ]
    return "\n".join(lines)


def _outcome(result: Result) -> str:
    """Champion, or why not: the gate said so, or somebody has changed the alias since."""
    if result.promoted:
        return "champion"
    if not result.gate["passed"]:
        return f"challenger only: {'; '.join(result.gate['reasons'])}"
    now = f"version {result.champion_version}" if result.champion_version else "none"
    return f"not champion: it passed its gate, but somebody has changed the alias since, and champion is {now}; MLflow can give it back"


if __name__ == "__main__":
    sys.exit(main())
