"""When an open batch is handed over, on a clock that the test turns."""

from __future__ import annotations

import pytest

from edge_agent.mqtt import inlet
from edge_agent.mqtt.inlet import FAST_ROWS, FAST_TIMES, BatchLimits, OpenBatch


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(inlet, "time", found)
    return found


def fill(batch: OpenBatch, clock: Clock, rows: int, every_s: float, until_s: float) -> float:
    """Add so many rows each `every_s` until the batch is ready; how long it was open."""
    start = clock.now
    while clock.now - start < until_s:
        batch.add(["t"] * rows, [b"x"] * rows, 2 * rows)
        if batch.ready(hungry=True):
            break
        clock.now += every_s
    return clock.now - start


def test_few_messages_wait_for_their_time_and_no_longer(clock: Clock) -> None:
    batch = OpenBatch(BatchLimits(ms=12.0))
    assert batch.due_s(clock.now) == float("inf") and not batch.ready(hungry=True)
    batch.add(["t"], [b"x"], 2)
    assert batch.due_s(clock.now) == pytest.approx(0.012)
    clock.now += 0.0119
    batch.add(["t"] * (FAST_ROWS - 2), [b"x"] * (FAST_ROWS - 2), 2 * FAST_ROWS)
    assert not batch.ready(hungry=True)
    clock.now += 0.0002
    assert batch.ready(hungry=True) and not batch.ready(hungry=False)


def test_a_batch_that_fills_fast_goes_on_while_messages_come(clock: Clock) -> None:
    batch = OpenBatch(BatchLimits(ms=12.0))
    open_s = fill(batch, clock, rows=40, every_s=0.001, until_s=1.0)
    assert open_s == pytest.approx(FAST_TIMES * 0.012, abs=0.0011) and len(batch) == pytest.approx(40 * 49, abs=80)


def test_it_is_handed_over_when_they_pause(clock: Clock) -> None:
    batch = OpenBatch(BatchLimits(ms=12.0))
    fill(batch, clock, rows=100, every_s=0.001, until_s=0.015)  # the sender's window is full now
    assert not batch.ready(hungry=True) and 0 < batch.due_s(clock.now) <= 0.003
    clock.now += 0.0031
    assert batch.ready(hungry=True)


def test_a_full_batch_does_not_wait(clock: Clock) -> None:
    batch = OpenBatch(BatchLimits(rows_max=1_000, ms=12.0))
    assert fill(batch, clock, rows=250, every_s=0.001, until_s=1.0) == pytest.approx(0.003) and batch.ready(hungry=False)
