"""Power cuts under a writing buffer, on real file systems: what was acknowledged is there after the machine has started again.

The writer is frozen (SIGSTOP), the file system shut down without a flush, the writer killed, the file system mounted again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_agent.buffer import Buffer
from edge_agent.contract.receipt import LaneReceipt, Receipt
from tests.faults.mounts import LoopDisk
from tests.faults.oracle import LANES, Found, draft, look, moment, open_buffer

CUTS = {"ext4": 300, "xfs": 50}
CUTS_REDUCED = {"ext4": 6, "xfs": 3}
ROWS = 40
WRITES_S_MAX = 0.15
SETTLED_SHARE = 0.3

pytestmark = pytest.mark.needs_root


def write_for_ever(path: Path, first: int, acknowledged: int) -> None:
    """Append drafts `first`, `first + 1`, … and note each in the file `acknowledged` when it is on disk. In a child process."""
    buffer = open_buffer(path)
    number = first
    while True:
        buffer.append([draft(number, ROWS)], [], moment(number))
        os.pwrite(acknowledged, number.to_bytes(8, "little"), 0)
        number += 1


def freeze(child: int) -> None:
    """Stop a process, and wait until it stands still; a process that waits for the disk finishes that first."""
    os.kill(child, signal.SIGSTOP)
    os.waitid(os.P_PID, child, os.WSTOPPED)


def cut_while_writing(disk: LoopDisk, first: int, chance: random.Random) -> int:
    """Write from draft `first` on, and cut the power; the last draft that was acknowledged."""
    note = os.memfd_create("acknowledged")
    os.pwrite(note, (first - 1).to_bytes(8, "little"), 0)
    child = os.fork()
    if not child:
        try:
            write_for_ever(disk.path / "buffer.db", first, note)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while int.from_bytes(os.pread(note, 8, 0), "little") < first and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, WRITES_S_MAX))
    freeze(child)
    disk.power_cut()
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the writer ended by itself"
    last = int.from_bytes(os.pread(note, 8, 0), "little")
    os.close(note)
    disk.restart()
    return last


def settle(buffer: Buffer, found: Found) -> None:
    """The lake has all that is there; the file gets free pages."""
    last = {lane: max(sequence for _, name, sequence in found.blocks if name == lane) for lane in LANES}
    lanes = [LaneReceipt(lane=lane, cumulative=sequence, ranges=[]) for lane, sequence in last.items()]
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=lanes))


def run(tmp_path: Path, kind: str, cuts: int, seed: int) -> None:
    chance = random.Random(seed)
    gone, first, acknowledged, unsaid = 0, 1, 0, 0
    with LoopDisk(tmp_path, kind) as disk:
        for number in range(cuts):
            last = cut_while_writing(disk, first, chance)
            acknowledged += last - first + 1
            buffer = open_buffer(disk.path / "buffer.db")
            found = look(buffer)
            there = {int(value // 1_000) for value in found.readings}
            missing = sorted(set(range(gone + 1, last + 1)) - there)
            assert not missing, f"cut {number}: acknowledged drafts {missing} of {first} to {last} are gone"
            assert len(found.readings) == ROWS * len(there) and max(found.readings.values()) == 1, f"cut {number}: half a draft, or doubled"
            assert not found.losses
            unsaid += len([n for n in there if n > last])
            first = max(there) + 1
            if chance.random() < SETTLED_SHARE and len(there) > 1:
                settle(buffer, found)
                gone = max(there)
            buffer.close()
    print(f"{cuts} power cuts on {kind}: {acknowledged} appends acknowledged, 0 lost, {unsaid} on disk before they were acknowledged")


@pytest.mark.parametrize("kind", CUTS)
def test_a_few_power_cuts_lose_nothing(tmp_path: Path, kind: str, seed: int) -> None:
    run(tmp_path, kind, CUTS_REDUCED[kind], seed)


@pytest.mark.long
@pytest.mark.parametrize("kind", CUTS)
def test_power_cuts_lose_nothing(tmp_path: Path, kind: str, seed: int) -> None:
    run(tmp_path, kind, int(os.environ.get("FENCELINE_RUNS") or CUTS[kind]), seed)


def test_what_a_disk_with_bad_sectors_still_gives_is_exported_and_salvaged(tmp_path: Path) -> None:
    """Looked at in a mapping, they would end the process without a word (SIGBUS)."""

    def edge_agent(*command: str) -> subprocess.CompletedProcess[str]:
        arguments = [sys.executable, "-m", "edge_agent.cli", "--log-level", "error", *command, str(disk.path / "buffer.db")]
        return subprocess.run(arguments, capture_output=True, text=True)

    with LoopDisk(tmp_path, "ext4", "noatime") as disk:
        buffer = open_buffer(disk.path / "buffer.db")
        for number in range(100):
            buffer.append([draft(number, rows=2_000)], [], moment(number))
        buffer.close()
        disk.lose_half(disk.path / "buffer.db")
        found = edge_agent("fsck", "--json")
        assert found.returncode == 1 and 20 < json.loads(found.stdout)["blocks"] < 80, found
        exported = edge_agent("export", "--jsonl")
        assert exported.returncode == 1 and "more may be missing" in exported.stderr, exported.stderr
        assert len(exported.stdout.splitlines()) == 2_000 * json.loads(found.stdout)["blocks"]
        repaired = edge_agent("fsck", "--json", "--repair")
        assert json.loads(repaired.stdout)["repaired"], repaired
        buffer = open_buffer(disk.path / "buffer.db")
        assert len(look(buffer).blocks) > 20 and look(buffer).losses
        buffer.close()
