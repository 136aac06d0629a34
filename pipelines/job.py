"""The training run as a job of a Ray cluster: submitted to its dashboard, followed to its end, stopped with the command."""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import Any

from edge_agent.contract.errors import UnavailableError
from pipelines import cli, cluster, tracking

POLL_S = 1.0


def submit(address: str, arguments: list[str], say: cli.Say) -> int:
    """Run `pipelines.run` as a job of the Ray cluster whose dashboard is at `address`; the job's exit code. Interrupted, it stops the job.

    Raises:
        UnavailableError: nothing answers there, or no longer.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    passed = {k: v for k, v in os.environ.items() if k.startswith(("FENCELINE_", "MLFLOW_"))}
    passed.setdefault("FENCELINE_GIT_COMMIT", tracking.git_commit())
    passed["PYTHONPATH"] = cluster.python_path()
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


def _follow(client: Any, job: str, say: cli.Say) -> tuple[Any, int | None]:
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
        time.sleep(POLL_S)
