"""The whole agent while its disk is full, read-only or failing: it holds its sensors' broker, does not end, and goes on by itself."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_agent.contract.receipt import LaneReceipt, Receipt, encode_receipt
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import nats_broker
from tests.conftest import SYSTEM_PATH
from tests.edge_agent.gateway import Bench, reading, wait_for
from tests.faults.account import settle_accounts
from tests.faults.mounts import LoopDisk, tmpfs

HELD_S = 1.5
FILL_MAX = 20_000

pytestmark = pytest.mark.needs_root


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        made.replace("[position]", '[buffer]\nwhen_full = "block"\nhistory_rows = 100\n[position]')
        yield made
        made.close()


def noisy(cycle: int) -> bytes:
    """A reading that does not compress."""
    chance, base = random.Random(cycle), json.loads(reading(cycle))
    return reading(cycle, **{name: value * (1 + chance.random() / 1_000) for name, value in base.items() if name.startswith("sensor_")})


def stored(bench: Bench) -> int:
    return int(bench.status()["buffer"]["readings_stored"])


def is_held(bench: Bench, published: int) -> bool:
    """Whether the agent takes nothing any more, although there is something to take."""
    before = stored(bench)
    time.sleep(HELD_S)
    return before == stored(bench) < published


def fill(bench: Bench) -> int:
    """Publish until the agent is held for good: near the limit it is held, finds a little room when it tidies up, and goes on."""
    for cycle in range(1, FILL_MAX + 1):
        bench.publish(noisy(cycle))
        log = bench.log() if cycle % 10 == 0 else ""
        if log.rfind("source held") > log.rfind("takes readings again") and is_held(bench, cycle):
            return cycle
    raise AssertionError(f"{FILL_MAX} readings did not fill the disk: {bench.log()[-2000:]}")


def arrived_once(bench: Bench, published: int) -> None:
    """Every reading is in the cloud exactly once, and the agent is still the same process."""
    assert bench.agent is not None
    assert settle_accounts(bench, published).named == 0
    assert bench.agent.poll() is None, "the agent ended"


def receipts_for_all(bench: Bench) -> None:
    """The lake's answer to everything that arrived while it was silent."""
    bench.cloud.answering = True
    lanes: dict[tuple[str, str], int] = {}
    for epoch, lane, sequence in list(bench.cloud.headers):
        lanes[epoch, lane] = max(sequence, lanes.get((epoch, lane), 0))
    for (epoch, lane), last in lanes.items():
        receipt = Receipt(device="plane-01", epoch=epoch, lanes=[LaneReceipt(lane=lane, cumulative=last, ranges=[])])
        bench.cloud._client.publish(DeviceTopics("plane-01").receipts, encode_receipt(receipt), qos=1)


def test_a_full_disk_of_one_mebibyte_holds_the_sensors_until_receipts_make_room(bench: Bench, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "state", "1m"):
        bench.cloud.answering = False
        bench.start()
        cycle = fill(bench)
        for _ in range(20):
            cycle += 1
            bench.publish(noisy(cycle))
        receipts_for_all(bench)
        arrived_once(bench, cycle)
        bench.kill()


def test_a_file_system_that_turns_read_only_holds_the_sensors_until_it_is_mounted_again(bench: Bench, tmp_path: Path) -> None:
    with LoopDisk(tmp_path, "ext4", "errors=remount-ro", "state") as disk:
        bench.start()
        for cycle in range(1, 21):
            bench.publish(noisy(cycle))
        wait_for(lambda: stored(bench) == 20, bench.log)
        disk.turn_read_only()
        for cycle in range(21, 61):
            bench.publish(noisy(cycle))
        time.sleep(HELD_S)
        assert bench.agent is not None and bench.agent.poll() is None, f"the agent ended: {bench.log()[-2000:]}"
        disk.replace()
        arrived_once(bench, 60)
        bench.kill()


def test_an_agent_that_starts_on_a_read_only_disk_holds_the_sensors_until_it_is_mounted_again(bench: Bench, tmp_path: Path) -> None:
    with LoopDisk(tmp_path, "ext4", "errors=remount-ro", "state") as disk:
        bench.start()  # so that the sensors' broker keeps what is not acknowledged
        for cycle in range(1, 11):
            bench.publish(noisy(cycle))
        wait_for(lambda: stored(bench) == 10, bench.log)
        bench.kill()
        disk.turn_read_only()
        for cycle in range(11, 31):
            bench.publish(noisy(cycle))
        bench.start_now()
        wait_for(lambda: "buffer unavailable, source held" in bench.log(), bench.log)
        time.sleep(HELD_S)
        assert bench.agent is not None and bench.agent.poll() is None, f"the agent ended: {bench.log()[-2000:]}"
        disk.replace()
        arrived_once(bench, 30)
        bench.kill()


def test_an_agent_that_waits_for_its_disk_stops_when_asked(bench: Bench, tmp_path: Path) -> None:
    with LoopDisk(tmp_path, "ext4", "errors=remount-ro", "state") as disk:
        disk.turn_read_only()
        bench.start_now()
        wait_for(lambda: "buffer unavailable, source held" in bench.log(), bench.log)
        assert bench.kill(signal.SIGTERM) == 0


@contextmanager
def failing(pid: int, rule: str) -> Iterator[None]:
    """Let system calls of a process and its threads fail by strace's rule."""
    if not shutil.which("strace", path=SYSTEM_PATH):
        pytest.skip("needs strace: make system-deps")
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"inject={rule}", "-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, env={**os.environ, "PATH": SYSTEM_PATH})
    try:
        wait_for(lambda: _traced(pid), lambda: "strace does not attach")
        yield
    finally:
        tracer.terminate()
        tracer.wait(10)


def _traced(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    return "TracerPid:\t0\n" not in status


RULES = (
    "fsync,fdatasync:error=EIO",
    "pwrite64,pwritev:error=ENOSPC",
    "fsync,fdatasync:error=EIO:when=1",  # once: the pages count as clean afterwards
    "fsync,fdatasync:error=EIO:when=2+3",
    "pwrite64,pwritev:error=EIO",
    "pwrite64,pwritev,ftruncate,fsync,fdatasync:error=EROFS",
)


def live_through(bench: Bench, rule: str) -> None:
    bench.start()
    for cycle in range(1, 11):
        bench.publish(noisy(cycle))
    wait_for(lambda: stored(bench) == 10, bench.log)
    assert bench.agent is not None
    with failing(bench.agent.pid, rule):
        for cycle in range(11, 41):
            bench.publish(noisy(cycle))
            time.sleep(0.02)
        assert bench.agent.poll() is None, f"the agent ended: {bench.log()[-2000:]}"
    arrived_once(bench, 40)
    bench.kill()


@pytest.mark.parametrize("rule", RULES[:1])
def test_system_calls_that_fail_for_a_while_lose_and_double_nothing(bench: Bench, rule: str) -> None:
    live_through(bench, rule)


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES[1:])
def test_other_system_calls_that_fail_lose_and_double_nothing(bench: Bench, rule: str) -> None:
    live_through(bench, rule)
