"""How a stack gets over faults of its own: with one small part in place of brokers and servers."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cloud import config
from cloud.parts import Part
from cloud.stack import Stack
from edge_agent.contract.errors import UnavailableError
from tests.cloud.test_stack import alive, wait_until

ROOT = Path(__file__).parents[2]
SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


def a_stack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ready: Callable[[int], bool] = lambda pid: True, command: list[str] = SLEEP
) -> Stack:
    monkeypatch.setattr("cloud.stack.parts", lambda settings: [Part("part", command, ready)])
    monkeypatch.setattr("cloud.stack.check_ports", lambda settings: None)
    return Stack(config.load(ROOT, tmp_path / "state"))


def test_a_disk_without_room_for_its_files_ends_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_stack(tmp_path, monkeypatch) as stack:
        stack.wait_ready()
        blocked, log = stack.settings.stack_path.with_suffix(".tmp"), stack.settings.logs_dir / "part.log"
        blocked.mkdir()
        log.unlink()
        log.mkdir()
        first = stack.pids()["part"]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: stack.restarts()["part"] >= 2)
        blocked.rmdir()
        log.rmdir()
        stack.wait_ready()
        wait_until(lambda: (config.running_stack(stack.settings) or {})["pids"] == stack.pids())
        assert alive(stack.pids()["part"]) and stack.pids()["part"] != first


def test_a_part_that_writes_and_writes_fills_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.stack.LOG_BYTES_MAX", 10_000)
    lines = "import time, itertools\nfor i in itertools.count():\n    print('refused', i, flush=True)\n    i % 100 or time.sleep(0.01)"
    with a_stack(tmp_path, monkeypatch, command=[sys.executable, "-I", "-S", "-c", lines]) as stack:
        path, old = stack.settings.logs_dir / "part.log", stack.settings.logs_dir / "part.log.1"
        wait_until(old.exists)
        begun_anew = old.stat().st_mtime_ns
        wait_until(lambda: old.stat().st_mtime_ns > begun_anew and path.stat().st_size)
        assert b"\0" not in path.read_bytes(), "it goes on at the end"
        assert stack.restarts()["part"] == 0


def test_a_supervision_that_fails_ends_the_stack_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def ready(pid: int) -> bool:
        started.append(pid)
        raise RuntimeError("a mistake of ours")

    stack = a_stack(tmp_path, monkeypatch, ready)
    stack.start()
    try:
        with pytest.raises(UnavailableError, match="supervision of the stack failed"):
            stack.wait()
        deadline = time.monotonic() + 10.0
        while alive(started[0]) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(started[0])
    finally:
        stack.stop()
