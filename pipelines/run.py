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
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cloud.lake import Lake
from cloud.tracking_server import errors_told
from edge_agent.contract.errors import ConfigError, FencelineError
from pipelines import cli, cluster, job, repro, tracking
from pipelines.params import override, params_file
from pipelines.repro import StageError
from pipelines.snapshot import pick_versions
from pipelines.stage import BUILD, Context, load_context, private


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


@errors_told()
def run(
    project: Path,
    state: Path | None = None,
    mlflow_url: str | None = None,
    overrides: list[str] | None = None,
    ray_address: str | None = None,
    say: cli.Say = lambda line: None,
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
        repro.init(project)
        private(project / ".dvc/cache")
        tracking.leave_run(context)
        with _ray(ray_address, say) as ray_environment:
            stages = repro.run(context, {**os.environ, **_environment(context), **ray_environment}, say)
        return replace(_result(context, stages), seconds=round(time.monotonic() - started, 3))


def _sorted_out(line: str) -> None:
    """cli.Say a line of a job's log, in which its stdout and stderr are one: its answer is the answer here, all else is beside it."""
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
def _ray(address: str | None, say: cli.Say) -> Iterator[dict[str, str]]:
    given = address or os.environ.get("RAY_ADDRESS")
    if given:
        yield {"RAY_ADDRESS": given}
        return
    say("starting Ray")
    os.environ["PYTHONPATH"] = cluster.python_path()  # Ray's workers inherit it
    with cluster.local_head() as environment:
        yield environment


def _environment(context: Context) -> dict[str, str]:
    return {
        "FENCELINE_STATE": str(context.state),
        "FENCELINE_GIT_COMMIT": tracking.git_commit(),
        "DVC_NO_ANALYTICS": "1",
        "DVC_SITE_CACHE_DIR": str(context.project / ".dvc/tmp/site"),
        "PYTHONPATH": cluster.python_path(),
        "PYTHONUNBUFFERED": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }


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
            return job.submit(args.ray_address, _without_address(args), _sorted_out if args.json else cli.out)
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
