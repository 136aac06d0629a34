"""What the disk has to write: counted, with real SQLite, at the sizes that the default flush makes. And the same bench, whole."""

from __future__ import annotations

import argparse
import tempfile

import pytest

from bench import edge_buffer
from bench.streams import engines


@pytest.mark.parametrize(("rows", "blocks", "online", "outage"), [(24, 1_500, 3.0, 3.6), (100, 600, 2.4, 3.0), (1_000, 130, 2.4, 2.4)])
def test_few_bytes_are_written_per_byte_stored(
    rows: int, blocks: int, online: float, outage: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")  # bytes are counted, not fsyncs
    assert 1.0 < edge_buffer.measure_cost(engines(10), rows, blocks, online=True).written_per_byte <= online
    assert 1.0 < edge_buffer.measure_cost(engines(10), rows, blocks, online=False).written_per_byte <= outage


@pytest.mark.long
def test_the_bench_of_the_buffer_runs_whole() -> None:
    report = edge_buffer.measure(argparse.Namespace(quick=False))
    print(report.text())
    assert report.numbers["drain_blocks_per_s"] >= 5_000
    assert report.numbers["settle_blocks_per_s"] >= 5_000
