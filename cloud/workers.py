"""Workers: the ingest processes of one region, how they share what devices send, and the process that keeps several of them running.

- Where the broker knows shared subscriptions (`shared_subscriptions` of the region: Mosquitto, EMQX, HiveMQ) it deals blocks out to all
  workers of GROUP, on however many hosts.
- Where it does not (the embedded NATS accepts `$share/…` and then delivers nothing), every worker is sent every block, and worker i of N
  keeps those of the devices whose name falls to i. The other N-1 PUBACK them unread.
- Which worker gets a block never matters for what is stored: the lake takes it once, and what no worker kept has no receipt, so the device
  sends it again.
- A worker is a session of its own, by its name: `ingest-1`, `ingest-2` … The session of a number that is not used any more is ended, or
  its broker would keep blocks for it.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cloud import brokers
from cloud.config import WORKERS_MAX, Region, Settings
from cloud.ingest_status import status_paths
from cloud.intake import everything, forget
from cloud.tether import tethered
from edge_agent.contract.errors import ConfigError, FencelineError
from edge_agent.contract.topics import ALL_BLOCKS, check_name

log = logging.getLogger(__name__)

NAME = "ingest"
GROUP = "fenceline-ingest"
BACKOFF_S = (0.2, 10.0)
STEADY_S = 30.0  # a worker that ran this long begins with the first backoff again
POLL_S = 0.1
TERM_S_MAX = 10.0


@dataclass(frozen=True)
class Worker:
    """Number `number` of `count`; `prefix` tells the workers of several hosts apart."""

    number: int = 1
    count: int = 1
    prefix: str = NAME

    def __post_init__(self) -> None:
        check_name(self.prefix, "worker name")
        if not 1 <= self.number <= self.count <= WORKERS_MAX:
            raise ConfigError(f"worker {self.number} of {self.count}: numbers begin with 1, and {WORKERS_MAX} workers are the most")

    @property
    def name(self) -> str:
        """The session's name: client id, and CN of the certificate."""
        return f"{self.prefix}-{self.number}"

    @property
    def first(self) -> bool:
        """One worker of a host reads what its broker refused."""
        return self.number == 1

    def filters(self, region: Region) -> list[str]:
        """What it subscribes to."""
        return [f"$share/{GROUP}/{ALL_BLOCKS}" if region.shared_subscriptions else ALL_BLOCKS]

    def kept(self, region: Region) -> Callable[[str], bool]:
        """Whether a topic's blocks are for this worker."""
        if region.shared_subscriptions or self.count == 1:
            return everything
        return lambda topic: zlib.crc32(_device(topic)) % self.count == self.number - 1


ONE = Worker()


def _device(topic: str) -> bytes:
    return topic.split("/", 3)[2].encode() if topic.count("/") >= 2 else b""


def end_unused(settings: Settings, region: Region, worker: Worker) -> None:
    """End the sessions of workers that ran here under higher numbers; where the broker does not answer or refuses, at the next start."""
    for path in status_paths(settings, region.name):
        name = path.stem.partition(".")[2] or path.stem  # before workers had numbers, session and file were called alike
        prefix, _, number = name.rpartition("-")
        if path.stem == name or (prefix == worker.prefix and number.isdecimal() and int(number) > worker.count):
            try:
                forget(region, name, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER))
            except FencelineError as e:
                log.warning("session not ended name=%s region=%s reason=%s", name, region.name, e)
            else:
                path.unlink(missing_ok=True)
                log.info("session ended name=%s region=%s", name, region.name)


def command(settings: Settings, region: str, worker: Worker) -> list[str]:
    """The command of one worker."""
    where = ["--project", str(settings.project), "--state", str(settings.state_dir)]
    which = ["--region", region, "--worker", str(worker.number), "--of", str(worker.count), "--name", worker.prefix]
    return [sys.executable, "-m", "cloud.ingest", *which, *where]


class Pool:
    """Keeps workers running until `stop` is set; one that dies is started again after a wait that grows."""

    def __init__(self, commands: Sequence[list[str]], stop: threading.Event) -> None:
        self._commands, self._stop = list(commands), stop

    def run(self) -> None:
        """Start them, wait for `stop`, and end them."""
        count = len(self._commands)
        running: list[subprocess.Popen[bytes] | None] = [None] * count
        started, wait_s, due = [0.0] * count, [BACKOFF_S[0]] * count, [0.0] * count
        try:
            while not self._stop.wait(POLL_S):
                now = time.monotonic()
                for i, child in enumerate(running):
                    if child is not None and child.poll() is not None:
                        wait_s[i] = BACKOFF_S[0] if now - started[i] >= STEADY_S else min(2 * wait_s[i], BACKOFF_S[1])
                        running[i], due[i] = None, now + wait_s[i]
                        log.warning("worker died number=%d code=%s retry_s=%.1f", i + 1, child.returncode, wait_s[i])
                    if running[i] is None and now >= due[i]:
                        running[i], started[i] = subprocess.Popen(tethered(self._commands[i])), now
        finally:
            _end([child for child in running if child is not None])


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    for child in children:
        child.terminate()
    deadline = time.monotonic() + TERM_S_MAX
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
