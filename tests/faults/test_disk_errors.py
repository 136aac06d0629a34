"""EIO, ENOSPC and power cuts at every write, truncation and sync that SQLite asks for. Nothing acknowledged is lost, nothing doubled."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from edge_agent.buffer import Buffer
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.slots import HEAD_BYTES
from tests.faults.disk import DiskError, FaultyDisk, faulty_disk
from tests.faults.oracle import Name, check, draft, is_skip, look, moment, open_buffer

APPENDS = 6
ATTEMPTS_MAX = 50
SAMPLE = 10  # operations broken in `make test`, of each kind
TIMES = (1, 3, 25)  # how long the disk fails


class Run:
    """A short life of a buffer on a faulty disk: open, append, settle, append, close. What fails is tried again, as the agent does.

    `then` is called after every step, when what it stored is acknowledged.
    """

    def __init__(self, path: Path, then: Callable[[], None] = lambda: None) -> None:
        path.mkdir()
        self.path, self._then = path, then
        self.acknowledged: dict[Name, bytes] = {}
        self.settled: set[Name] = set()
        self.errors = 0

    def go(self) -> None:
        buffer = self._try(lambda: open_buffer(self.path / "buffer.db"))
        for number in range(1, APPENDS + 1):
            drafts = [draft(2 * number), draft(2 * number + 1)]
            stored = self._try(lambda drafts=drafts, number=number: buffer.append(drafts, [], moment(number)))
            self.acknowledged |= {(buffer.epoch, s.lane, s.sequence): s.block for s in stored}
            self._then()
            if number == APPENDS // 2:
                self._settle(buffer)
        buffer.close()

    def _settle(self, buffer: Buffer) -> None:
        receipt = Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=2, ranges=[])])
        self.settled |= {(buffer.epoch, "europe", 1), (buffer.epoch, "europe", 2)}
        self._try(lambda: buffer.settle(receipt))
        self._then()

    def _try(self, step):  # type: ignore[no-untyped-def]
        for _ in range(ATTEMPTS_MAX):
            try:
                return step()
            except UnavailableError as e:
                self.errors += 1
                last = e
        raise last


def operations(tmp_path: Path) -> int:
    with faulty_disk() as disk:
        Run(tmp_path / "count").go()
        shutil.rmtree(tmp_path / "count")
        return disk.operations


def verify(image: Path, run: Run, acknowledged: dict[Name, bytes]) -> None:
    buffer = open_buffer(image / "buffer.db")
    found = check(buffer, acknowledged, run.settled)
    assert all(is_skip(loss) for loss in found.losses), "a disk that only failed has lost nothing"
    (stored,) = buffer.append([draft(900)], [], moment(900))
    assert (buffer.epoch, stored.lane, stored.sequence) not in acknowledged, "a name was used twice"
    buffer.close()
    shutil.rmtree(image)


def break_at(tmp_path: Path, operation: int, error: DiskError, chance: random.Random, times: int = 1) -> None:
    with faulty_disk() as disk:
        known: dict[Name, bytes] | None = None

        def cut_when_it_works_again() -> None:
            nonlocal known
            if disk.failed and known is None:
                known = dict(run.acknowledged)
                disk.power_cut(run.path, tmp_path / "soon")
                disk.power_cut(run.path, tmp_path / "soon, torn", chance)

        disk.fail_at(operation, error, times)
        run = Run(tmp_path / "run", cut_when_it_works_again)
        run.go()
        assert disk.failed, f"operation {operation} was never asked for"
        disk.power_cut(run.path, tmp_path / "cut")
        disk.power_cut(run.path, tmp_path / "torn", chance)
    images = {"cut": run.acknowledged, "torn": run.acknowledged}
    images |= {"soon": known, "soon, torn": known} if known is not None else {}
    for image, acknowledged in images.items():
        try:
            verify(tmp_path / image, run, acknowledged)
        except AssertionError as e:
            raise AssertionError(f"{times} x {error} from operation {operation} ({disk.failed[0]}), {image}: {e}") from e
    verify(run.path, run, run.acknowledged)  # without a power cut


def cut_at(tmp_path: Path, operation: int, chance: random.Random) -> None:
    run = Run(tmp_path / "run")
    known: dict[str, dict[Name, bytes]] = {}

    with faulty_disk() as disk:

        def cut() -> None:
            known["acknowledged"] = dict(run.acknowledged)
            disk.power_cut(run.path, tmp_path / "cut")
            disk.power_cut(run.path, tmp_path / "torn", chance)

        disk.call_at(operation, cut)
        run.go()
    shutil.rmtree(run.path)
    for image in ("cut", "torn"):
        try:
            verify(tmp_path / image, run, known["acknowledged"])
        except AssertionError as e:
            raise AssertionError(f"power cut before operation {operation}, {image}: {e}") from e


def test_an_error_at_a_random_operation_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    chance, total = random.Random(seed), operations(tmp_path)
    for error in DiskError:
        for operation in chance.sample(range(total), SAMPLE):
            break_at(tmp_path, operation, error, chance, chance.choice(TIMES))


def test_a_power_cut_before_a_random_operation_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    chance, total = random.Random(seed), operations(tmp_path)
    for operation in chance.sample(range(total), SAMPLE):
        cut_at(tmp_path, operation, chance)


def last_of_append(tmp_path: Path) -> int:
    """The number of the last operation of an append, from 0: its sync."""
    tmp_path.mkdir(exist_ok=True)
    with faulty_disk() as disk:
        buffer = open_buffer(tmp_path / "counted.db")
        buffer.append([draft(1)], [], moment(1))
        before = disk.operations
        buffer.append([draft(2)], [], moment(2))
        count = disk.operations - before
        buffer.close()
    return count - 1


def die_in_a_sync(disk: FaultyDisk, path: Path, sync: int) -> dict[Name, bytes]:
    """Leave a log of which the disk has the first append and not the second; what was acknowledged."""
    buffer = open_buffer(path)
    known = {(buffer.epoch, s.lane, s.sequence): s.block for s in buffer.append([draft(1)], [], moment(1))}
    disk.fail_at(sync, DiskError.IO, times=1_000)
    with pytest.raises(UnavailableError):
        buffer.append([draft(2)], [], moment(2))
    assert disk.failed[0] == "sync db-wal"
    buffer.close()  # without a last word to the disk, after a fault
    return known


def test_what_a_start_without_room_finds_is_on_the_disk_from_then_on(tmp_path: Path) -> None:
    """It is sent, known again when it comes again, and added to: a power cut must not take what a dead process could not sync."""
    (tmp_path / "run").mkdir()
    path, sync = tmp_path / "run/buffer.db", last_of_append(tmp_path)
    with faulty_disk() as disk:
        known = die_in_a_sync(disk, path, sync)
        disk.fail_at(0, DiskError.FULL)
        buffer = open_buffer(path)
        found = look(buffer).blocks
        assert len(found) == 2 and found.keys() > known.keys()
        disk.power_cut(path.parent, tmp_path / "at once")
        added = found | {(buffer.epoch, s.lane, s.sequence): s.block for s in buffer.append([draft(3)], [], moment(3))}
        disk.power_cut(path.parent, tmp_path / "later")
        buffer.close()
    for image, blocks in (("at once", found), ("later", added)):
        left = open_buffer(tmp_path / image / "buffer.db")
        assert check(left, blocks).blocks == blocks
        left.close()


def test_a_start_that_can_write_nothing_waits_and_loses_nothing(tmp_path: Path) -> None:
    path, sync = tmp_path / "buffer.db", last_of_append(tmp_path / "count")
    with faulty_disk() as disk:
        known = die_in_a_sync(disk, path, sync)
        disk.fail_at(0, DiskError.FULL, times=1_000)
        with pytest.raises(UnavailableError):
            open_buffer(path)
        disk.fail_at(0, DiskError.FULL, times=0)
        buffer = open_buffer(path)
        assert check(buffer, known).blocks.keys() > known.keys()
        buffer.close()


def test_a_commit_that_landed_in_a_damaged_file_is_not_stored_twice(tmp_path: Path) -> None:
    path, sync = tmp_path / "buffer.db", last_of_append(tmp_path)
    with faulty_disk() as disk:
        buffer, known = open_buffer(path), dict[Name, bytes]()
        known |= {(buffer.epoch, s.lane, s.sequence): s.block for s in buffer.append([draft(1)], [], moment(1))}
        other = apsw.Connection(str(path))
        other.execute("UPDATE meta SET value = 'none' WHERE key = 'epoch'")  # the file is salvaged when it is opened again
        other.close()
        disk.fail_at(sync, DiskError.IO)
        known |= {(buffer.epoch, s.lane, s.sequence): s.block for s in buffer.append([draft(2)], [], moment(2))}
        assert disk.failed == ["sync db-wal"] and list(tmp_path.glob("buffer.db.damaged-*"))
        assert check(buffer, known).blocks.keys() >= known.keys()
        buffer.close()


def test_a_damaged_block_on_a_full_disk_keeps_back_no_other(tmp_path: Path) -> None:
    path = tmp_path / "buffer.db"
    buffer = open_buffer(path, history_rows=1_000)
    for number in range(1, 7):
        buffer.append([draft(2 * number)], [], moment(number))
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=2)]))
    buffer.close()
    db = apsw.Connection(str(path))
    for slot in (2, 4):
        blob = bytearray(db.execute("SELECT block FROM slots WHERE slot = ?", (slot,)).get)
        blob[HEAD_BYTES + 60] ^= 1
        db.execute("UPDATE slots SET block = ? WHERE slot = ?", (bytes(blob), slot))
    db.close()
    with faulty_disk() as disk:
        buffer = open_buffer(path, history_rows=1_000)
        disk.fail_at(0, DiskError.FULL, times=1_000_000)
        history = buffer.history("pump", "1.0.0")
        assert history is not None and len(history["t"]) == 4 * 3
        assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [3, 5, 6]
        disk.fail_at(0, DiskError.FULL, times=0)
        assert [(b.sequence, b.stream) for b in buffer.pending("europe", 0, 10)] == [(3, "pump"), (5, "pump"), (6, "pump"), (7, "losses")]
        buffer.close()


@pytest.mark.long
def test_an_error_or_a_power_cut_at_every_operation_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    chance, total = random.Random(seed), operations(tmp_path)
    print(f"{total} operations, each broken with {', '.join(DiskError)}, and each preceded by a power cut")
    for operation in range(total):
        for error in DiskError:
            for times in TIMES:
                break_at(tmp_path, operation, error, chance, times)
        cut_at(tmp_path, operation, chance)
