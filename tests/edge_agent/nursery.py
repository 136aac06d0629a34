"""Agents for tests that start a thousand of them: processes like any other, but forked from one that has imported everything already.

What is left out is Python's own start and the imports, during which an agent touches nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from pathlib import Path

PRELOADED = ["edge_agent.agent", "edge_agent.cli", "edge_agent.config", "edge_agent.mqtt.link", "tests.edge_agent.nursery"]


class Forked:
    """Such an agent, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, process: multiprocessing.process.BaseProcess) -> None:
        self._process = process
        assert process.pid is not None
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, sign: signal.Signals) -> None:
        os.kill(self.pid, sign)

    def wait(self, timeout_s: float) -> int:
        self._process.join(timeout_s)
        assert self._process.exitcode is not None, f"agent {self.pid} did not end in {timeout_s} s"
        return self._process.exitcode


class Nursery:
    """Starts agents."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def start(self, arguments: list[str], log: Path, environment: dict[str, str]) -> Forked:
        process = self._context.Process(target=_live, args=(arguments, str(log), environment), daemon=True)
        process.start()
        return Forked(process)


def _live(arguments: list[str], log: str, environment: dict[str, str]) -> None:
    from edge_agent.cli import main

    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    sys.exit(main(arguments))
