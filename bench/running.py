"""Processes of a benchmark: brokers and peers, started, read from, and always ended; and the processor time that they used.

- A peer is a module run with `-m` that talks in lines on its standard output.
- Processor time is user and system time of a process and all its descendants, from /proc, those that have ended included.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.brokers import Broker
from tests.servers import HOST, free_port, running

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class Peer:
    """A running program of ours; `line` reads what it says."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.pid = process.pid
        self._process, self._log = process, log
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def line(self, timeout_s: float) -> str:
        """The next line that it prints.

        Raises:
            RuntimeError: there is none in time, or the program has ended.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            line = None
        if line is None:
            raise RuntimeError(f"{self._process.args!r} said nothing in {timeout_s:g} s, or ended: {self.log()}")
        return line

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def log(self) -> str:
        """The end of what it wrote to standard error."""
        return self._log.read_text(errors="replace")[-2_000:]

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)


@contextlib.contextmanager
def peer(home: Path, module: str, *arguments: object) -> Iterator[Peer]:
    """`python -m module arguments`; its standard error goes to a file in `home`."""
    log = home / f"{module}.log"
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True)
    running = Peer(process, log)
    try:
        yield running
    finally:
        running.end()


@contextlib.contextmanager
def mosquitto(home: Path, name: str, *lines: str) -> Iterator[Broker]:
    """A Mosquitto with persistence, room for every message, and more `lines` of configuration."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise RuntimeError("this benchmark needs Mosquitto: sudo make system-deps")
    folder, port = home / name, free_port()
    folder.mkdir()
    own = [
        f"listener {port} {HOST}",
        "allow_anonymous true",
        f"user {pwd.getpwuid(os.getuid()).pw_name}",
        "persistence true",
        f"persistence_location {folder}/",
        "max_inflight_messages 0",
        "max_queued_messages 1000000",
        "set_tcp_nodelay true",
        "sys_interval 1",
    ]
    (folder / "mosquitto.conf").write_text("\n".join([*own, *lines]) + "\n")
    with running(Broker([found, "-c", str(folder / "mosquitto.conf")], port, folder / "log")) as broker:
        yield broker


def cpu_s(pid: int) -> float:
    """Seconds of processor time of a process and its descendants."""
    parents, used = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            fields = stat.read_text().rsplit(")", 1)[1].split()
            number = int(stat.parent.name)
            parents[number], used[number] = int(fields[1]), sum(map(int, fields[11:15]))
    family, more = {pid}, True
    while more:
        found = {child for child, parent in parents.items() if parent in family} - family
        family |= found
        more = bool(found)
    return sum(used.get(member, 0) for member in family) / TICKS_PER_S


def peak_mb(pid: int) -> float:
    """The largest resident set that a process has had, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/{pid}/status has no VmHWM")


def wait_for(done: Callable[[], bool], timeout_s: float, explain: Callable[[], str]) -> None:
    """Wait for a condition.

    Raises:
        RuntimeError: it did not come true in time; `explain` says what is known.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(explain())
        time.sleep(0.05)
