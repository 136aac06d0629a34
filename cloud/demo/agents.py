"""The gateways' agents as processes of their own: start, kill, start again, stop.

- Each runs in its own session, so that Ctrl-C reaches the demo alone and the demo stops them in order. If the demo itself
  is killed, the kernel ends them.
- `stop` leaves nothing behind: what remains of the agent's process groups is killed, and logged as a fault of the agent.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from cloud.tether import tethered
from edge_agent.contract.errors import UnavailableError

log = logging.getLogger(__name__)

STOP_S = 15.0
STATUS_S = 30.0


@dataclass
class AgentProcess:
    """One agent: its device, its agent.toml and the file that takes its log."""

    device: str
    config: Path
    log_path: Path
    kills: int = 0

    def __post_init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []

    def start(self) -> None:
        """Start the agent; it has not connected to anything yet."""
        with self.log_path.open("ab") as out:
            command = tethered([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(self.config)])
            home = {**os.environ, "RUNTIME_DIRECTORY": str(self.config.parent)}  # nothing of the demo stays in /dev/shm
            self._process = subprocess.Popen(command, env=home, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        self._groups.append(self._process.pid)
        log.info("agent started device=%s pid=%d", self.device, self._process.pid)

    def check(self) -> None:
        """Raise UnavailableError if the agent has ended by itself."""
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise UnavailableError(f"agent {self.device} ended with code {code}; its log is {self.log_path}:\n{_tail(self.log_path)}")

    def status(self) -> dict[str, Any] | None:
        """What `edge-agent status` says; None while the agent does not answer."""
        command = [sys.executable, "-m", "edge_agent.cli", "status", "--json", "--config", str(self.config)]
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=STATUS_S)
        return msgspec.json.decode(answer.stdout, type=dict[str, Any]) if answer.returncode == 0 else None

    def kill(self) -> None:
        """kill -9, as a power cut would: no goodbye to anyone."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self.kills += 1
        log.info("agent killed device=%s pid=%d", self.device, self._process.pid)
        self._process = None

    def terminate(self) -> None:
        """Ask the agent to end, without waiting."""
        if self._process is not None:
            self._process.terminate()

    def stop(self) -> None:
        """Ask the agent to end, wait, and make sure."""
        if self._process is not None:
            self.terminate()
            try:
                self._process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                log.warning("agent did not stop device=%s after_s=%.0f", self.device, STOP_S)
                self._process.kill()
                self._process.wait()
            self._process = None
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):  # the usual case: the group is empty
                os.killpg(group, signal.SIGKILL)
                log.warning("agent left processes device=%s group=%d", self.device, group)
        self._groups.clear()


def _tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def stop_all(agents: list[AgentProcess]) -> None:
    """Stop all agents, those that are slow at the same time as the others."""
    for agent in agents:
        agent.terminate()
    for agent in agents:
        agent.stop()
