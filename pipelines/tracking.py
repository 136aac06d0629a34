"""MLflow: one parent run per pipeline run, found again by every stage.

- The first stage that has something to log opens the run, unless FENCELINE_RUN_ID names one; its id travels in `build/pipeline/run.json`.
  Register ends it. One that was cut off is ended by the next pipeline run.
- The tracking server is MLFLOW_TRACKING_URI; without it a SQLite file under the state directory.
- Numbers are sent with `log_batch`.
- What MLflow refuses in the midst of a stage is told by `cloud.tracking_server.errors_told` around it.
- Code version: FENCELINE_GIT_COMMIT, else the commit of the checkout that this package runs from, else nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cloud.tracking_server import errors_told, public
from edge_agent.contract.errors import UnavailableError
from pipelines.stage import Context, write_json

RUN_FILE = "run.json"
CHALLENGER, CHAMPION = "challenger", "champion"
PARAM_LENGTH_MAX = 500


def tracking_uri(state: Path) -> str:
    """MLFLOW_TRACKING_URI, or the SQLite file of a stack without a server."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(state / 'mlflow' / 'mlflow.db').absolute()}"


def client(context: Context) -> Any:
    """An MlflowClient of the tracking server, which is also made MLflow's current one.

    Raises:
        UnavailableError: the server does not answer.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # stdout is for results
    import mlflow

    uri = tracking_uri(context.state)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    with errors_told(uri, "does not answer"):
        mlflow.set_tracking_uri(uri)
        found = mlflow.MlflowClient(tracking_uri=uri)
        found.search_experiments(max_results=1)
    return found


def champion(store: Any, model: str) -> dict[str, str] | None:
    """`version` and `run_id` of the model that carries the alias; None if none does."""
    from mlflow.exceptions import MlflowException

    try:
        found = store.get_model_version_by_alias(model, CHAMPION)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return {"version": str(found.version), "run_id": found.run_id}


def registered(store: Any, model: str, version: str) -> dict[str, str] | None:
    """`version` and `run_id` of a version of a model; None if it is not there.

    Raises:
        UnavailableError: MLflow does not say.
    """
    from mlflow.exceptions import MlflowException

    try:
        found = store.get_model_version(model, version)
    except MlflowException as e:
        if e.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise UnavailableError(f"MLflow refuses to name version {version} of {model}: {e}") from e
    return {"version": str(found.version), "run_id": found.run_id}


def current_run(context: Context) -> str:
    """The id of the parent run: the one that FENCELINE_RUN_ID names, the one that this pipeline run has opened, or a new one."""
    given = os.environ.get("FENCELINE_RUN_ID")
    if given:
        return given
    run_id = opened_run(context)
    if run_id is None:
        run_id = open_run(context)
        write_json(context.build / RUN_FILE, {"run_id": run_id})
    return run_id


def opened_run(context: Context) -> str | None:
    """The id of the run that this pipeline run has opened, if it has."""
    path = context.build / RUN_FILE
    return str(json.loads(path.read_text())["run_id"]) if path.exists() else None


def leave_run(context: Context) -> None:
    """Begin a new pipeline run: what the last one opened is its own. If it was cut off, its run is ended here."""
    from mlflow.exceptions import MlflowException

    run_id = opened_run(context)
    if run_id is None:
        return
    store = client(context)
    try:
        if store.get_run(run_id).info.status == "RUNNING":
            store.set_terminated(run_id, "FAILED")
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":  # it lies in another MLflow
            raise UnavailableError(f"MLflow refuses to name run {run_id}: {e}") from e
    (context.build / RUN_FILE).unlink()


def end_run(context: Context, status: str) -> None:
    """End the run that this pipeline run has opened, if it came so far.

    Raises:
        UnavailableError: MLflow does not take it.
    """
    opened = opened_run(context)
    if opened is not None:
        with errors_told():
            client(context).set_terminated(opened, status)


def open_run(context: Context) -> str:
    """Create a parent run in the experiment of the stream; its id."""
    store = client(context)
    experiment = _experiment(context, store)
    tags = {"mlflow.source.name": "fenceline train", "mlflow.source.type": "PROJECT", "fenceline.stream": context.params.stream}
    commit = git_commit()
    if commit:
        tags["mlflow.source.git.commit"] = commit
    name = time.strftime("pipeline-%Y%m%d-%H%M%S", time.gmtime())
    return str(store.create_run(experiment, run_name=name, tags=tags).info.run_id)


@contextmanager
def resumed(context: Context, run_id: str) -> Iterator[Any]:
    """MLflow's fluent API on the parent run, for what the client cannot do (models, datasets); yields the client. Ends the run."""
    import mlflow

    store = client(context)
    mlflow.set_experiment(experiment_id=store.get_run(run_id).info.experiment_id)
    with mlflow.start_run(run_id=run_id, log_system_metrics=False):
        yield store
    if os.environ.get("FENCELINE_RUN_ID") == run_id:
        store.update_run(run_id, status="RUNNING")  # leaving the block has ended it, but whoever opened it ends it


def log_batch(store: Any, run_id: str, metrics: Mapping[str, float] = {}, params: Mapping[str, Any] = {}, step: int = 0) -> None:
    """Send metrics and params in one request."""
    from mlflow.entities import Metric, Param

    now = time.time_ns() // 1_000_000
    store.log_batch(
        run_id,
        metrics=[Metric(key, float(value), now, step) for key, value in metrics.items()],
        params=[Param(key, str(value)[:PARAM_LENGTH_MAX]) for key, value in params.items()],
    )


def child_run(store: Any, parent: str, name: str) -> str:
    """Create a nested run; its id."""
    experiment = store.get_run(parent).info.experiment_id
    return str(store.create_run(experiment, run_name=name, tags={"mlflow.parentRunId": parent}).info.run_id)


def discard_run(store: Any, run_id: str) -> None:
    """Delete a run and those nested in it, which MLflow leaves."""
    experiment = store.get_run(run_id).info.experiment_id
    for nested in store.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run_id}'"):
        store.delete_run(nested.info.run_id)
    store.delete_run(run_id)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def run_url(context: Context, run_id: str) -> str:
    """Where to look at a run: its page, or the command that opens it."""
    uri = public(tracking_uri(context.state))
    if not uri.startswith("http"):
        return f"{uri} (look with: mlflow ui --backend-store-uri {uri})"
    experiment = client(context).get_run(run_id).info.experiment_id
    return f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def git_commit() -> str:
    """The commit of the code, with `-dirty` if the checkout has changes; empty if there is no checkout."""
    given = os.environ.get("FENCELINE_GIT_COMMIT")
    if given is not None:
        return given
    package = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "-C", package, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10)
        status = subprocess.run(
            ["git", "-C", package, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""  # no git, or no checkout: the documented answer
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def _experiment(context: Context, store: Any) -> str:
    name = context.params.stream
    found = store.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri(context.state).startswith("sqlite:")
    artifacts = (context.state / "mlflow" / "artifacts").absolute().as_uri() if local else None
    return str(store.create_experiment(name, artifact_location=artifacts))
