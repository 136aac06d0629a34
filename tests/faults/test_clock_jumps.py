"""A wall clock that jumps, back, forward, to 1970 and past 2038, deletes, reorders and blocks nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from edge_agent.buffer import Buffer
from edge_agent.clock import Moment
from edge_agent.contract.block import decode_block
from edge_agent.contract.receipt import LaneReceipt, Receipt
from tests.brokers import nats_broker
from tests.edge_agent.gateway import Bench, reading, wait_for
from tests.faults.account import settle_accounts
from tests.faults.oracle import LANES, draft, look

HOUR_S = 3_600
TRUE_S = int(datetime(2026, 11, 22, tzinfo=UTC).timestamp())
JUMPS_S = (  # of the wall clock, to these times
    TRUE_S - 1,
    TRUE_S + 2,
    TRUE_S - HOUR_S,
    TRUE_S + HOUR_S,
    TRUE_S - 400 * 24 * HOUR_S,
    TRUE_S + 400 * 24 * HOUR_S,
    0,  # 1970: a gateway without a battery
    1,
    2**31 - 2,  # 2038, and over it
    2**31 + 1,
    2**32 + 5,  # 2106
    TRUE_S + 10,
)
AGE_S_MAX = 600.0
READINGS_PER_JUMP = 10

_AGENT = """
import sys, time
from pathlib import Path
target, real, real_ns = Path(sys.argv[1]), time.time, time.time_ns
def shift(): return int(target.read_text())
time.time = lambda: real() + shift()
time.time_ns = lambda: real_ns() + shift() * 10**9
from edge_agent.cli import main
sys.exit(main(["run", "--config", sys.argv[2]]))
"""


class Hands:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.now = Moment(TRUE_S * 1_000_000, 0, True)

    def set(self, wall_s: int, monotonic_s: int) -> Moment:
        self.now = Moment(wall_s * 1_000_000, monotonic_s * 1_000_000, wall_s > TRUE_S)
        return self.now

    def __call__(self) -> Moment:
        return self.now


def open_buffer(path: Path, boot: str, clock: Hands) -> Buffer:
    limits = {"bytes_max": 1 << 24, "age_s_max": AGE_S_MAX}
    return Buffer(path, "plane-01", boot, history_rows={"pump": 30}, clock=clock, **limits)  # type: ignore[arg-type]


def test_jumps_delete_reorder_and_block_nothing_in_the_buffer(tmp_path: Path) -> None:
    clock = Hands()
    buffer = open_buffer(tmp_path / "b.db", "boot-0", clock)
    sealed = []
    for number, wall_s in enumerate(JUMPS_S, 1):
        now = clock.set(wall_s, 2 * number)
        sealed += buffer.append([draft(2 * number), draft(2 * number + 1)], [], now)
        buffer.tidy(now)
        if number % 4 == 0:  # the machine starts again: another boot, and its monotonic clock from zero
            buffer.close()
            clock.set(wall_s, 0)
            buffer = open_buffer(tmp_path / "b.db", f"boot-{number}", clock)
    found = look(buffer)
    assert not found.losses and len(found.blocks) == 2 * len(JUMPS_S)
    assert [decode_block(s.block)[0].sealed_us for s in sealed[::2]] == [s * 1_000_000 for s in JUMPS_S]
    for lane in LANES:
        tables = [decode_block(s.block)[1]["t"] for s in buffer.pending(lane, 0, 100)]
        assert [int(np.asarray(t)[0]) for t in tables] == sorted(int(np.asarray(t)[0]) for t in tables)
    lanes = [LaneReceipt(lane=lane, cumulative=len(JUMPS_S), ranges=[]) for lane in LANES]
    assert buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=lanes)) == 2 * len(JUMPS_S)
    history = buffer.history("pump", "1.0.0")
    assert history is not None and np.asarray(history["ordinal"]).tolist()[-1] == 6 * len(JUMPS_S) - 1
    buffer.close()


def test_age_still_counts_when_the_wall_clock_stands_or_runs_back(tmp_path: Path) -> None:
    clock = Hands()
    buffer = open_buffer(tmp_path / "b.db", "boot", clock)
    buffer.append([draft(2)], [], clock.set(TRUE_S, 1))
    for second in (60, 300, 700):
        buffer.tidy(clock.set(TRUE_S - 2 * second, second))
        assert len(look(buffer).losses) == (second > AGE_S_MAX)
    assert [(loss.blocks, loss.readings, loss.reason) for loss in look(buffer).losses] == [(1, 3.0, "evicted_age")]
    buffer.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        made.replace("[position]", f"[buffer]\nage_s_max = {AGE_S_MAX}\n[position]")
        yield made
        made.close()


def test_the_whole_agent_lives_through_jumps_while_its_uplink_is_down(bench: Bench, tmp_path: Path) -> None:
    shift = tmp_path / "shift"
    shift.write_text("0")
    with (tmp_path / "agent.log").open("ab") as log:
        bench.agent = subprocess.Popen([sys.executable, "-c", _AGENT, str(shift), str(bench.config)], stderr=log)
    wait_for(lambda: bench.status()["sensors"]["connected"], bench.log)
    cycle = 0
    for number, wall_s in enumerate(JUMPS_S):
        if number == 2:
            bench.eu.kill()
        new = tmp_path / "new"
        new.write_text(str(wall_s - int(time.time())))
        new.replace(shift)
        for _ in range(READINGS_PER_JUMP):
            cycle += 1
            bench.publish(reading(cycle))
        wait_for(lambda: bench.status()["buffer"]["readings_stored"] == cycle, bench.log)  # noqa: B023 - called at once
    assert bench.agent.poll() is None, bench.log()
    bench.eu.restart()
    assert settle_accounts(bench, cycle).named == 0
    ordered = sorted(bench.cloud.headers.items(), key=lambda item: item[0][2])
    cycles = [int(c) for name, _ in ordered for c in np.asarray(bench.cloud.tables[name]["cycle"]).tolist()]
    assert cycles == sorted(cycles), "the order of the lane is the order seen"
    years = {datetime.fromtimestamp(header.sealed_us / 1e6, UTC).year for header in bench.cloud.headers.values()}
    assert {1970, 2038, 2106} <= years
