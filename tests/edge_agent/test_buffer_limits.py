"""What the buffer gives up when it is full or old: which blocks, what the ledger says, how large the files become."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.buffer import Buffer, BufferFullError, Draft, StoredBlock
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, decode_block
from edge_agent.contract.receipt import SEQUENCE_MAX, LaneReceipt, Receipt, decode_receipt, encode_receipt
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, read_losses
from edge_agent.draft import Sealed
from edge_agent.owned_file import OwnedFile
from edge_agent.settling import LANES_MAX, SKIPPED_MAX
from edge_agent.store import DiskError, bytes_on_disk

WALL_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests are about what is kept, not about fsync."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def at(seconds: float, wall_us: int = WALL_US) -> Moment:
    return Moment(wall_us, int(seconds * 1e6), True)


def open_buffer(path: Path, boot: str = "boot", **more: Any) -> Buffer:
    settings: dict[str, Any] = {"bytes_max": 400_000, "history_rows": {}, "clock": lambda: at(0.0)}
    return Buffer(path / "buffer.db", "plane-01", boot, **(settings | more))


def noise(seed: int, rows: int = 200) -> Any:
    return np.random.default_rng(seed).normal(size=rows)


def draft(number: int, lane: str = "europe", stream: str = "pump") -> Draft:
    return Draft(lane, stream, "1.0.0", FixQuality.STATIC, "policy", {"t": noise(number)}, 200, 1_000 * number, 1_000 * number + 999)


def blocks(buffer: Buffer, lane: str = "europe") -> list[StoredBlock]:
    found: list[StoredBlock] = []
    while more := buffer.pending(lane, found[-1].sequence if found else 0, 100):
        found += more
    return found


def ledger(buffer: Buffer, lane: str = "europe") -> list[Loss]:
    return [row for b in blocks(buffer, lane) if b.stream == LOSSES.stream for row in read_losses(decode_block(b.block)[1])]


def named(rows: list[Loss]) -> Iterator[int]:
    for row in rows:
        assert row.blocks == row.last_sequence - row.first_sequence + 1
        yield from range(row.first_sequence, row.last_sequence + 1)


def test_a_full_buffer_drops_the_oldest_and_names_each_block_once(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for number in range(1, 1_001):
        buffer.append([draft(number)], [], at(number))
    waiting, rows = blocks(buffer), ledger(buffer)
    kept = [b.sequence for b in waiting if b.stream == "pump"]
    lost = list(named([r for r in rows if r.of_stream == "pump"]))
    assert len(lost) == len(set(lost)) == 1_000 - len(kept) > 500
    last = max(b.sequence for b in waiting)
    merged = list(named([r for r in rows if r.of_stream == LOSSES.stream]))
    assert sorted([*kept, *lost, *merged, *(b.sequence for b in waiting if b.stream == LOSSES.stream)]) == list(range(1, last + 1))
    assert {r.readings / r.blocks for r in rows if r.of_stream == "pump"} == {200.0}
    assert {r.reason for r in rows} == {"evicted_full"}
    assert max(lost) < max(kept)
    state = buffer.state(at(2_000))
    assert state.lost_blocks["evicted_full"] >= len(lost)


def test_what_the_ledger_says_survives_a_restart_and_is_not_given_up(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for number in range(1, 301):
        buffer.append([draft(number)], [], at(number))
    before = {(r.of_stream, r.first_sequence): r for r in ledger(buffer)}
    buffer.close()
    buffer = open_buffer(tmp_path)
    for number in range(301, 901):
        buffer.append([draft(number)], [], at(number))
    lost = set(named([r for r in ledger(buffer) if r.of_stream == "pump"]))
    assert {n for r in before.values() if r.of_stream == "pump" for n in range(r.first_sequence, r.last_sequence + 1)} <= lost
    assert buffer.used_bytes() < 400_000


def test_file_and_log_stay_within_a_tenth_of_the_limit(tmp_path: Path) -> None:
    limit = 2_000_000
    buffer = open_buffer(tmp_path, bytes_max=limit, history_rows={"pump": 2_000})
    largest = 0
    for number in range(1, 901):
        buffer.append([draft(number), draft(number, "switzerland")], [], at(number))
        largest = max(largest, sum(p.stat().st_size for p in tmp_path.glob("buffer.db*") if not p.name.endswith("-shm")))
        if number % 7 == 0:
            lanes = [LaneReceipt(lane="switzerland", cumulative=number, ranges=[])]
            buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=lanes))
    assert largest <= 1.1 * limit
    assert buffer.used_bytes() > 0.8 * limit


def test_newest_history_stays_beside_readings_that_wait_for_long(tmp_path: Path) -> None:
    """Else a crash, and what a sensor's broker sends again because its PUBACK was under way, doubles readings that the lake holds."""
    buffer = open_buffer(tmp_path, history_rows={"pump": 1_000_000})
    for number in range(1, 1_001):
        buffer.append([draft(number, "nowhere"), draft(number)], [], at(number))
        lane = LaneReceipt(lane="europe", cumulative=number, ranges=[])
        buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[lane]))
        newest = buffer.history("pump", "1.0.0") if number % 100 == 0 else None
        if newest is not None:
            assert np.isin(noise(number - 5), newest["t"]).all() and np.isin(noise(number), newest["t"]).all()
    waiting = sum(s.bytes for s in buffer.lanes())
    before = buffer.state(at(2_000))
    assert before.lost_blocks["evicted_full"] > 0
    assert before.history_blocks > 20 and waiting > 0.5 * before.used_bytes
    assert buffer._file.catalogue.settled_bytes() <= before.used_bytes / 3
    buffer.close()
    buffer = open_buffer(tmp_path, history_rows={"pump": 1_000_000})
    assert buffer.state(at(2_001)).history_blocks == before.history_blocks
    settled = sum(s.settled_bytes for s in buffer._file.catalogue.shelves.values())
    assert settled == sum(bytes_on_disk(p.bytes) for p in buffer._file.catalogue.settled(1_000))
    buffer.close()


def test_no_more_history_gives_way_than_is_wanted(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows={"pump": 1_000_000})
    used = []
    for number in range(1, 501):
        buffer.append([draft(number)], [], at(number))
        lane = LaneReceipt(lane="europe", cumulative=number, ranges=[])
        buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[lane]))
        used.append(buffer.used_bytes())
    assert max(used) < 400_000
    assert min(used[300:]) > 0.8 * max(used)
    assert not buffer.lost_blocks


def test_streams_of_low_priority_go_first_wherever_they_are(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, priorities={"alarm": 5, "pump": 0, "debug": -1})
    for number in range(1, 401):
        streams = [("europe", "debug"), ("switzerland", "debug"), ("europe", "pump")]
        buffer.append([draft(number, lane, stream) for lane, stream in streams], [], at(number))
        if number <= 20:
            buffer.append([draft(number, "europe", "alarm")], [], at(number))
    left = [b.stream for lane in ("europe", "switzerland") for b in blocks(buffer, lane)]
    assert left.count("alarm") == 20
    assert left.count("debug") < 10 < left.count("pump") < 400


def test_a_ledger_that_fills_the_buffer_is_not_given_up(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    with pytest.raises(BufferFullError, match="only 0 blocks may be given up"):
        for number in range(1, 1_000):
            buffer.append([draft(number, stream=LOSSES.stream)], [], at(number))
    assert not buffer.lost_blocks


def test_an_incoming_block_that_is_worth_less_is_named_and_never_stored(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, priorities={"alarm": 5})
    alarms = 0
    while not buffer.lost_blocks:
        alarms += 1
        buffer.append([draft(alarms, stream="alarm")], [], at(alarms))
    while buffer.used_bytes() < 375_000:
        alarms += 1
        buffer.append([draft(alarms, stream="alarm")], [], at(alarms))
    before = [b.sequence for b in blocks(buffer) if b.stream == "alarm"]
    for number in range(1, 11):
        buffer.append([draft(number)], [], at(number))
    left = blocks(buffer)
    assert [b.sequence for b in left if b.stream == "alarm"] == before
    lost = list(named([r for r in ledger(buffer) if r.of_stream == "pump"]))
    assert lost
    assert len(lost) + sum(b.stream == "pump" for b in left) == 10


def test_block_refuses_and_loses_nothing(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, when_full="block")
    stored = 0
    with pytest.raises(BufferFullError, match="would pass the limit"):
        for number in range(1, 1_000):
            stored += len(buffer.append([draft(number)], [], at(number)))
    assert [b.sequence for b in blocks(buffer)] == list(range(1, stored + 1))
    assert not buffer.lost_blocks


def test_what_waits_too_long_is_given_up_by_the_time_the_device_was_up(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, age_s_max=100.0)
    for number in range(1, 11):
        buffer.append([draft(number)], [], at(10.0 * number))
    assert buffer.tidy(at(150.0)) != []  # blocks stored before 50 s
    assert list(named(ledger(buffer))) == [1, 2, 3, 4]
    assert {r.reason for r in ledger(buffer)} == {"evicted_age"}
    buffer.close()
    buffer = open_buffer(tmp_path, age_s_max=100.0, boot="another")
    assert buffer.tidy(at(0.0)) == []  # how long the device was off is not known
    assert [b.sequence for b in blocks(buffer) if b.stream == "pump"] == [5, 6, 7, 8, 9, 10]
    buffer.tidy(at(76.0))
    assert len([b for b in blocks(buffer) if b.stream == "pump"]) < 6


@pytest.mark.parametrize("wall_us", [0, 1, WALL_US - 24 * HOUR_US, WALL_US + 24 * HOUR_US, 2**31 * 1_000_000, 2**40 * 1_000])
def test_a_step_of_the_wall_clock_deletes_reorders_and_blocks_nothing(tmp_path: Path, wall_us: int) -> None:
    buffer = open_buffer(tmp_path, age_s_max=3_600.0, bytes_max=10_000_000)
    for number in range(1, 21):
        buffer.append([draft(number)], [], at(number, WALL_US if number % 2 else wall_us))
        buffer.tidy(at(number, wall_us))
    buffer.close()
    buffer = open_buffer(tmp_path, age_s_max=3_600.0, bytes_max=10_000_000, clock=lambda: at(30.0, wall_us))
    buffer.tidy(at(40.0, wall_us))
    assert [b.sequence for b in blocks(buffer)] == list(range(1, 21))
    assert 20.0 <= buffer.state(at(41.0, wall_us)).oldest_s <= 40.0


def test_the_ledger_of_a_small_buffer_stays_short(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, bytes_max=300_000)
    for number in range(1, 1_501):
        buffer.append([draft(number)], [], at(number))
    waiting = blocks(buffer)
    mine = [b for b in waiting if b.stream == LOSSES.stream]
    assert sum(len(b.block) for b in mine) < 300_000 // 8
    assert len(waiting) - len(mine) > 50
    lost = list(named([r for r in ledger(buffer) if r.of_stream == "pump"]))
    assert len(lost) == len(set(lost)) == 1_500 - (len(waiting) - len(mine))


def test_receipts_for_blocks_given_up_meanwhile_settle_nothing(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for number in range(1, 501):
        buffer.append([draft(number)], [], at(number))
    first = blocks(buffer)[0].sequence
    assert first > 1
    early = Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=first - 1, ranges=[])])
    assert buffer.settle(early) == 0
    everything = max(b.sequence for b in blocks(buffer))
    waiting = len(blocks(buffer))
    late = Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=everything, ranges=[])])
    assert buffer.settle(late) == waiting
    assert buffer.lanes() == []


def test_a_receipt_beyond_the_last_name_makes_the_buffer_skip_names(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft(1)], [], at(1))
    gone_back = Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=7, ranges=[])])
    assert buffer.settle(gone_back) == 1
    (stored,) = buffer.append([draft(2)], [], at(2))
    assert stored.sequence > 7 + 2**20
    (row,) = ledger(buffer)
    assert (row.first_sequence, row.last_sequence) == (8, 7 + 2**20)


def test_a_receipt_of_the_highest_name_does_not_use_up_all_names(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft(1)], [], at(1))

    def settled(cumulative: int) -> int:
        receipt = Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=cumulative)])
        return buffer.settle(decode_receipt(encode_receipt(receipt)))

    assert settled(SEQUENCE_MAX) == 0, "nobody has stored so many blocks"
    assert settled(SKIPPED_MAX) == 1
    (stored,) = buffer.append([draft(2)], [], at(2))
    assert settled(stored.sequence) == 2, "the block, and the ledger of what was skipped"
    buffer.close()
    assert open_buffer(tmp_path).append([draft(3)], [], at(3))[0].sequence == stored.sequence + 1
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_limit_that_was_lowered_gives_up_what_is_too_much_however_many_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = open_buffer(tmp_path, bytes_max=1_000_000_000)
    for number in range(30):
        buffer.append([draft(number, lane) for lane in ("europe", "asia") for _ in range(10)], [], at(number))
    buffer.close()
    monkeypatch.setattr("edge_agent.eviction.BLOCKS_MAX", 50)
    buffer = open_buffer(tmp_path, bytes_max=400_000)
    stored = buffer.append([draft(99)], [], at(99))
    (mine,) = [s for s in stored if s.stream == "pump"]
    assert len(stored) > 3, "it took several rounds, each with its rows of the ledger"
    assert buffer.used_bytes() < 400_000
    for lane, last in (("europe", mine.sequence), ("asia", 300)):
        there = [b.sequence for b in blocks(buffer, lane)]
        gone = list(named([row for row in ledger(buffer, lane) if row.of_stream == "pump"]))
        assert sorted([*gone, *there]) == list(range(1, max(last, *there) + 1))


def test_what_is_given_up_is_counted_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, insert, failed = open_buffer(tmp_path), OwnedFile.insert, list[int]()

    def fail_once(file: OwnedFile, sealed: list[Sealed]) -> list[Sealed]:
        inserted = insert(file, sealed)
        if any(s.stored.stream == LOSSES.stream for s in sealed) and not failed:
            failed.append(1)
            raise DiskError("for this test")
        return inserted

    monkeypatch.setattr(OwnedFile, "insert", fail_once)
    for number in range(1, 300):
        buffer.append([draft(number)], [], at(number))
    rows = ledger(buffer)
    assert failed and buffer.lost_blocks == {"evicted_full": sum(row.blocks for row in rows)}
    assert buffer.lost_readings == {"evicted_full": sum(row.readings for row in rows)}


def test_receipts_for_lanes_that_never_were_do_not_fill_the_buffer(tmp_path: Path) -> None:
    """A region may name all lanes that allow it, and of 20 zones there are a million."""
    buffer = open_buffer(tmp_path)
    buffer.append([draft(1)], [], at(1))
    for start, cumulative in ((0, 5), (200, 5), (400, 0)):
        lanes = [LaneReceipt(lane=f"zone-{n}", cumulative=cumulative) for n in range(start, start + 200)]
        buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=lanes))
    catalogue = buffer._file.catalogue
    assert len(catalogue.sequences) == LANES_MAX
    assert catalogue.receipts.keys() <= catalogue.sequences.keys()
    assert len(buffer.lanes()) == LANES_MAX, "each with the row that says so"
    (stored,) = buffer.append([draft(2, "asia")], [], at(2))
    assert stored.sequence == 1, "the device itself may come anywhere"
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="asia", cumulative=1)]))
    assert "asia" not in {s.lane for s in buffer.lanes()}
