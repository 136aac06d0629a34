"""DVC decides which stages run: `dvc repro`, its lines turned into progress, its failures into the failed stage's own words."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError
from pipelines import cli, tracking
from pipelines.stage import Context

STAGES = ("snapshot", "features", "dataset", "train", "evaluate", "export", "register")
OUTPUT_LINES_KEPT = 40
STOP_S = 10.0

_STARTS = re.compile(r"Running stage '(?:[^':]*:)?([^']+)'")
_SKIPPED = re.compile(r"Stage '(?:[^':]*:)?([^']+)' (?:didn't change, skipping|is cached - skipping run)")


class StageError(FencelineError):
    """A stage failed; `exit_code` is what the whole command ends with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def init(project: Path) -> None:
    """Make the project a DVC repository of its own, if it is none."""
    if (project / ".dvc").is_dir():
        return
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", "init", "--no-scm", "-q"]
    made = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if made.returncode:
        raise ConfigError(f"{project} cannot become a DVC repository: {made.stderr.strip()}")


def run(context: Context, environment: dict[str, str], say: cli.Say) -> dict[str, float | None]:
    """Run the stages whose inputs have changed, and pass their progress on.

    Returns:
        Seconds by stage; None for one that had nothing to do.

    Raises:
        StageError: a stage failed.
    """
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
            tracking.end_run(context, "FINISHED" if finished else "FAILED")
    if not finished:
        raise _stage_error(context, watch.tail)
    return {**dict.fromkeys(STAGES), **watch.seconds}


class _Watch:
    """Turns DVC's output into lines of progress, and takes the time of each stage."""

    def __init__(self, say: cli.Say) -> None:
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
