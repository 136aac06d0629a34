"""What the disk has to write: counted, with real SQLite, at the sizes that the default flush makes. And the same bench, whole."""

from __future__ import annotations

import argparse
import tempfile

import pytest

from bench import edge_buffer
from bench.streams import engines


@pytest.mark.parametrize(("rows", "limit"), [(24, 3.4), (100, 3.0), (1_000, 2.4)])
def test_few_bytes_are_written_per_byte_stored(rows: int, limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")  # bytes are counted, not fsyncs
    for online in (True, False):
        cost = edge_buffer.measure_cost(engines(10), rows, 130, online=online)
        assert 1.0 < cost.written_per_byte <= limit


@pytest.mark.long
def test_the_bench_of_the_buffer_runs_whole() -> None:
    report = edge_buffer.measure(argparse.Namespace(quick=False))
    print(report.text())
    assert report.numbers["drain_blocks_per_s"] >= 5_000
    assert report.numbers["settle_blocks_per_s"] >= 5_000
