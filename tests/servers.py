"""A server process for tests: started and waited for, frozen, ended or killed, and started again with the same command.

    server = Server([program, "--port", str(port)], folder / "log", partial(port_answers, port))
    with running(server):
        server.kill()
        server.start()

`brokers.py`, `object_store.py`, `postgres.py` and `redis_server.py` say what to start, and when it answers.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

HOST = "127.0.0.1"
START_S_MAX = 20.0
STOP_S_MAX = 20.0
PAUSE_S = 0.02

S = TypeVar("S", bound="Server")


class Server:
    """A program and, while it runs, its process. What it prints is added to `log`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        answers: Callable[[], bool],
        *,
        start_s_max: float = START_S_MAX,
        env: dict[str, str] | None = None,
    ) -> None:
        """`answers` tells whether the server is ready; `env` is added to the environment."""
        self.log = log
        self._command, self._answers, self._start_s_max, self._env = command, answers, start_s_max, env or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the end of its log.
        """
        assert self._process is None, f"{self._name} is already running"
        with self.log.open("ab") as log:  # a session of its own, so that its children can be killed with it
            self._process = subprocess.Popen(
                self._command,
                cwd=self.log.parent,
                env={**os.environ, **self._env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL, for its children too; works on a frozen server. Nothing happens if it is not running."""
        if self._process is not None:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to end, and wait for an orderly end."""
        self._running().send_signal(number)
        self._running().wait(STOP_S_MAX)
        self._process = None

    def restart(self) -> None:
        """Kill if running, then start on the same port with the same storage."""
        self.kill()
        self.start()

    def stop_signal(self) -> None:
        """SIGSTOP: connections stay open and nothing answers any more."""
        self._running().send_signal(signal.SIGSTOP)

    def continue_signal(self) -> None:
        """SIGCONT: the frozen server goes on."""
        self._running().send_signal(signal.SIGCONT)

    @property
    def _name(self) -> str:
        return Path(self._command[0]).name

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self._name} is not running"
        return self._process

    def _wait(self) -> None:
        deadline = time.monotonic() + self._start_s_max
        while self._running().poll() is None and time.monotonic() < deadline:
            if self._answers():
                return
            time.sleep(PAUSE_S)
        raise RuntimeError(f"{self._name} did not start: {self.log.read_text(errors='replace')[-2000:]}")


@contextmanager
def running(server: S) -> Iterator[S]:
    """Start it, and kill what runs of it in the end."""
    server.start()
    try:
        yield server
    finally:
        server.kill()


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def port_answers(port: int, host: str = HOST) -> bool:
    """Whether someone listens at the port."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def find_program(name: str, package: str) -> str:
    """A program that a package from PyPI brings beside this Python, or one on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    assert found, f"{name} is missing: pip install {package}"
    return found
