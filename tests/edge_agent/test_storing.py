"""Holding on while the disk fails: nothing ends, nothing is acknowledged, the operator is told, and it goes on by itself."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Clock
from edge_agent.contract.block import FixQuality
from edge_agent.contract.errors import UnavailableError
from edge_agent.metrics import Metrics
from edge_agent.storing import Storing
from tests.faults.disk import DiskError, faulty_disk


def draft(seed: int, rows: int = 10) -> Draft:
    table = {"t": np.random.default_rng(seed).normal(size=rows)}
    return Draft("europe", "pump", "1.0.0", FixQuality.STATIC, "policy", table, rows, 1, 2)


class Operator:
    """Hears events, and repairs the disk when the data path has waited `patience` times. A good disk is not waited for."""

    def __init__(self, repair: Callable[[], Any] = lambda: None, patience: int = 3) -> None:
        self.events: list[tuple[str, str]] = []
        self._repair, self._patience = repair, patience

    def tell(self, event: str, **fields: str) -> None:
        self.events.append((event, fields["detail"]))

    def pause(self) -> None:
        self._patience -= 1
        if self._patience == 0:
            self._repair()
        assert self._patience > -40, "held although the disk is well"


def storing(path: Path, operator: Operator, **limits: Any) -> tuple[Storing, Buffer, Metrics]:
    clock, metrics = Clock(), Metrics()
    settings = {"bytes_max": 1 << 30, "history_rows": {}, "clock": clock.now}
    buffer = Buffer(path / "buffer.db", "plane-01", clock.boot, **(settings | limits))
    return Storing(buffer, clock, metrics, operator.tell, operator.pause), buffer, metrics


@pytest.mark.parametrize("error", list(DiskError))
def test_an_error_of_the_disk_is_no_end(tmp_path: Path, error: DiskError) -> None:
    with faulty_disk() as disk:
        operator = Operator()
        store, buffer, _ = storing(tmp_path, operator)
        for number in range(1, 30):
            disk.fail_at(number % 7, error)
            (stored,) = store.append([draft(number)], [])
            assert stored.sequence == number
        found = [b.sequence for b in buffer.pending("europe", 0, 100)]
        assert found == list(range(1, 30))
        buffer.close()


@pytest.mark.needs_root
def test_a_read_only_file_system_is_unavailable_until_it_is_writable_again(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(tmp_path)], check=True)
    try:
        store, buffer, _ = storing(tmp_path, Operator())
        store.append([draft(1)], [])
        buffer.close()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
        with pytest.raises(UnavailableError):
            storing(tmp_path, Operator())
        subprocess.run(["mount", "-o", "remount,rw", str(tmp_path)], check=True)
        store, buffer, _ = storing(tmp_path, Operator())
        assert store.append([draft(2)], [])[0].sequence == 2
        buffer.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


@pytest.mark.needs_root
def test_a_disk_that_others_have_filled_holds_the_source_and_drops_nothing(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    try:
        hog = tmp_path / "hog"
        operator = Operator(hog.unlink)
        store, buffer, metrics = storing(tmp_path, operator)
        store.append([draft(1)], [])
        with hog.open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(65_536))
                file.flush()
        (stored,) = store.append([draft(2, 1_000)], [])
        assert stored.sequence == 2
        assert [event for event, _ in operator.events] == ["buffer_full", "buffer_recovered"]
        assert "disk" in operator.events[0][1]
        assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [1, 2]
        assert metrics.registry.get_sample_value("fenceline_buffer_refusals_total") == 3.0
        buffer.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_losses_are_counted_by_reason(tmp_path: Path) -> None:
    store, _, metrics = storing(tmp_path, Operator(), bytes_max=100_000)
    for number in range(100):
        store.append([draft(number, 200)], [])
    store.tidy()
    labels = {"reason": "evicted_full"}
    blocks = metrics.registry.get_sample_value("fenceline_blocks_lost_total", labels)
    readings = metrics.registry.get_sample_value("fenceline_readings_lost_total", labels)
    assert blocks is not None and blocks > 10
    assert readings == 200 * blocks
