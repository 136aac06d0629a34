"""What the durable buffer costs: bytes written per byte stored, CPU per append, blocks drained per second, time to open a large backlog.

Bytes written are counted twice: as SQLite asks for them (what a disk with small sectors would write), and as the kernel hands them to the
disk in pages of 4 KiB (`/proc/self/io`; the file system's own journal is not in it). Drain means: read from the buffer and settled.
"""

from __future__ import annotations

import argparse
import re
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apsw
import numpy as np

from bench.report import Cell, Report, main
from bench.streams import Stream, engines, pump
from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality
from edge_agent.contract.columns import Table, take
from edge_agent.contract.receipt import LaneReceipt, Receipt

WALL_US = 1_700_000_000_000_000
FLUSH_ROWS = (16, 24, 40, 100, 1_000)  # at the default flush of 12 ms: of some 1,300, 2,000, 3,300, 8,300 and 83,000 readings/s
BLOCKS = 4_000
HISTORY_ROWS = 20_000
BACKLOG_BYTES = 1_000_000_000
BACKLOG_ROWS = 1_900  # some 17 kB, as at 50,000 readings/s
DRAIN_BLOCKS = 100_000
SETTLE_EVERY = 5
GIB = 1 << 30


class CountingDisk(apsw.VFS):
    """A VFS that counts the bytes that SQLite writes."""

    def __init__(self) -> None:
        super().__init__("fenceline-counting", "")
        self.bytes = 0

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _CountingFile(self, name, flags)


class _CountingFile(apsw.VFSFile):
    def __init__(self, disk: CountingDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        super().__init__("", name, flags)

    def xWrite(self, data: bytes, offset: int) -> None:
        self._disk.bytes += len(data)
        super().xWrite(data, offset)


@dataclass(frozen=True)
class Cost:
    """Of storing blocks of one size: per byte stored, and per call."""

    block_bytes: float
    written_per_byte: float
    disk_per_byte: float
    append_cpu_us: float


def measure(arguments: argparse.Namespace) -> Report:
    """All of it; with --quick a small part."""
    share = 200 if arguments.quick else 1
    rows: list[list[Cell]] = []
    numbers: dict[str, Any] = {}
    for stream in (engines(20), pump(6_000)):
        for size in FLUSH_ROWS:
            count = max(60, min(BLOCKS, 200_000 // size) // share)
            for online in (True, False):
                cost = measure_cost(stream, size, count, online=online)
                state = "online" if online else "outage"
                rows.append(
                    [f"{stream.name} {size} rows, {state}", cost.block_bytes, cost.written_per_byte, cost.disk_per_byte, cost.append_cpu_us]
                )
                numbers[f"{stream.name}_{size}_{state}"] = cost.__dict__
    drained, settled = measure_drain(DRAIN_BLOCKS // share)
    numbers |= {"drain_blocks_per_s": drained, "settle_blocks_per_s": settled}
    numbers |= measure_backlog(BACKLOG_BYTES // share)
    notes = [f"{name}: {value:,.3g}" for name, value in numbers.items() if isinstance(value, float)]
    columns = ["blocks", "bytes each", "written/byte", "on disk/byte", "CPU us/append"]
    return Report("The durable buffer", columns, rows, numbers, notes)


def measure_cost(stream: Stream, size: int, count: int, *, online: bool) -> Cost:
    """Store `count` blocks of `size` rows; `online`: receipts come a few blocks later, and history is full already. Else all stays."""
    drafts = [_draft(stream, size, i) for i in range(min(count, len(stream.messages) // size))]
    disk = CountingDisk()
    written, io, cpu, stored = 0, 0, 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        buffer = _open(Path(folder), vfs="fenceline-counting")
        before = HISTORY_ROWS // size if online else 1
        for number in range(before + count):
            if number == before:
                buffer.close()  # its log is not of what is counted
                buffer = _open(Path(folder), vfs="fenceline-counting")
                written, io, cpu, stored = disk.bytes, _disk_bytes(), 0.0, 0
            start = _cpu_s()
            blocks = buffer.append([drafts[number % len(drafts)]], [], _now(number))
            cpu += _cpu_s() - start
            stored += sum(len(b.block) for b in blocks)
            if online and number % SETTLE_EVERY == 0:
                buffer.settle(_receipt(buffer, max(1, blocks[0].sequence - SETTLE_EVERY)))
            buffer.tidy(_now(number))
        buffer.close()
        written, on_disk = disk.bytes - written, _disk_bytes() - io
    disk.unregister()
    return Cost(stored / count, written / stored, on_disk / stored, cpu / count * 1e6)


def measure_drain(count: int) -> tuple[float, float]:
    """Blocks read per second of CPU time, and settled, from a backlog of `count`."""
    with tempfile.TemporaryDirectory() as folder:
        buffer = _open(Path(folder))
        drafts = [_noise(i, 20) for i in range(64)]
        for number in range(0, count, 64):
            buffer.append(drafts, [], _now(number))
        start, after, found = _cpu_s(), 0, 0
        while blocks := buffer.pending("europe", after, 64):
            found, after = found + len(blocks), blocks[-1].sequence
        read_s, start = _cpu_s() - start, _cpu_s()
        settled = sum(buffer.settle(_receipt(buffer, cumulative)) for cumulative in range(500, found + 500, 500) if cumulative <= found)
        settle_s = _cpu_s() - start
        buffer.close()
    return found / read_s, settled / settle_s


def measure_backlog(size: int) -> dict[str, float]:
    """Seconds to open a backlog of `size` bytes after a kill, its blocks, and the memory that its catalogue takes."""
    with tempfile.TemporaryDirectory() as folder:
        buffer = _open(Path(folder), bytes_max=4 * size + GIB)
        drafts, stored, number = [_noise(i, BACKLOG_ROWS) for i in range(256)], 0, 0
        while stored < size:
            stored += sum(len(b.block) for b in buffer.append(drafts, [], _now(number)))
            number += 1
        blocks = sum(s.blocks for s in buffer.lanes())
        start = time.perf_counter()
        again = _open(Path(folder), bytes_max=4 * size + GIB)  # the first one is not closed: as after a kill
        open_s = time.perf_counter() - start
        start = time.perf_counter()
        again.pending("europe", 0, 16)
        first_s = time.perf_counter() - start
        again.close()
        buffer.close()
    return {"backlog_open_s": open_s, "backlog_first_blocks_s": first_s, "backlog_bytes": float(stored), "backlog_blocks": float(blocks)}


def _open(folder: Path, bytes_max: int = GIB, vfs: str | None = None) -> Buffer:
    return Buffer(folder / "buffer.db", "plane-01", "boot", bytes_max=bytes_max, history_rows={"bench": HISTORY_ROWS}, vfs=vfs)


def _draft(stream: Stream, size: int, number: int) -> Draft:
    part = take(stream.table, slice(number * size, (number + 1) * size))
    return Draft("europe", "bench", "1.0.0", FixQuality.STATIC, "0" * 64, part, size, WALL_US, WALL_US + 1_000)


def _noise(seed: int, rows: int) -> Draft:
    table: Table = {"t": np.random.default_rng(seed).normal(size=rows)}
    return Draft("europe", "bench", "1.0.0", FixQuality.STATIC, "0" * 64, table, rows, WALL_US, WALL_US + 1_000)


def _receipt(buffer: Buffer, cumulative: int) -> Receipt:
    return Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=cumulative)])


def _now(number: int) -> Moment:
    return Moment(WALL_US + 20_000 * number, 20_000 * number, True)


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _disk_bytes() -> int:
    found = re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


if __name__ == "__main__":
    main(__doc__, measure)
