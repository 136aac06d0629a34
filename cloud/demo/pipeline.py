"""The pipelines' commands as processes: training, and the cloud's own recomputation of the devices' scores.

They run as a user would run them, with `python -m`, in the demonstration's project. Progress comes on stderr, the result on stdout.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cloud.config import Settings
from cloud.tether import tethered
from edge_agent.contract.errors import FencelineError

TAIL_LINES = 20
STOP_S = 15.0
TIMEOUT_S = 900.0
_PROGRESS = re.compile(r"\[\d+/\d+\] | {2,}\S|starting ")
"""What the pipelines' `say` writes; the rest of stderr is what libraries warn of, and goes to the log alone."""


class PipelineError(FencelineError):
    """A pipeline command failed; the message holds the end of what it said."""


def train(settings: Settings, log_path: Path, say: Callable[[str], None], overrides: list[str]) -> dict[str, Any]:
    """`python -m pipelines.run`: its result."""
    sets = [word for assignment in overrides for word in ("--set", assignment)]
    return _run(["pipelines.run", "--mlflow", settings.mlflow_url, *sets], settings, log_path, say, {0})


def recompute(settings: Settings, bundle: Path, log_path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """`python -m pipelines.score`: how far the devices' scores are from the cloud's (its exit code 1 says: too far)."""
    return _run(["pipelines.score", "--bundle", str(bundle)], settings, log_path, say, {0, 1})


def _run(words: list[str], settings: Settings, log_path: Path, say: Callable[[str], None], codes: set[int]) -> dict[str, Any]:
    """Run one command to its end; whatever happens, it and its children are gone afterwards."""
    command = [sys.executable, "-m", words[0], "--project", str(settings.project), "--state", str(settings.state_dir), "--json", *words[1:]]
    process = subprocess.Popen(
        tethered(command),
        cwd=settings.project,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None and process.stderr is not None
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    reader = threading.Thread(target=_follow, args=(process.stderr, log_path, say, tail), daemon=True)
    watchdog = threading.Timer(TIMEOUT_S, process.kill)
    reader.start()
    watchdog.start()
    try:
        output = process.stdout.read()
        code = process.wait()
        reader.join(STOP_S)
    finally:
        watchdog.cancel()
        _end(process)
    if code not in codes or not output.strip():
        raise PipelineError(f"python -m {words[0]} ended with code {code}; all it said is in {log_path}:\n" + "\n".join(tail))
    return msgspec.json.decode(output, type=dict[str, Any])


def _follow(stream: Any, log_path: Path, say: Callable[[str], None], tail: deque[str]) -> None:
    with log_path.open("a") as log:
        for line in stream:
            log.write(line)
            tail.append(line.rstrip())
            if _PROGRESS.match(line):
                say(line.rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    """End the command (it stops Ray and its stages), then whatever is left of its session."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
