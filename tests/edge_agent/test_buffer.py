"""The buffer on a real SQLite file."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from edge_agent.buffer import Buffer, BufferFullError, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, decode_block
from edge_agent.contract.columns import Strings
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.contract.stream import LOSSES
from edge_agent.core.fix import Fix
from edge_agent.core.ledger import read_losses
from edge_agent.core.track import FIXES_MAX
from edge_agent.slots import stored_blocks
from edge_agent.store import DamagedError, DiskError, Store, open_store

NOW = Moment(1_700_000_000_000_000, 5_000_000, True)

APPENDS = 300


def open_buffer(path: Path, *, bytes_max: int = 1 << 30, history_rows: int = 0, **more: Any) -> Buffer:
    return Buffer(path / "buffer.db", "plane-01", "boot", bytes_max=bytes_max, history_rows={"pump": history_rows}, **more)


def draft(values: list[float], lane: str = "europe") -> Draft:
    table = {"t": np.array(values)}
    return Draft(lane, "pump", "1.0.0", FixQuality.STATIC, "policy", table, len(values), 1, 2)


def receipt(buffer: Buffer, cumulative: int, ranges: list[tuple[int, int]] | None = None) -> Receipt:
    lane = LaneReceipt(lane="europe", cumulative=cumulative, ranges=ranges or [])
    return Receipt(device="plane-01", epoch=buffer.epoch, lanes=[lane])


def test_blocks_survive_a_reopen_with_sequence_ordinal_and_epoch(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0, 2.0]), draft([3.0], "switzerland")], [], NOW)
    epoch = buffer.epoch
    buffer.close()
    buffer = open_buffer(tmp_path)
    (stored,) = buffer.append([draft([4.0])], [], NOW)
    header, table = decode_block(stored.block)
    assert (buffer.epoch, header.epoch, header.sequence) == (epoch, epoch, 2)
    assert (table["t"].tolist(), table["ordinal"].tolist()) == ([4.0], [3])
    assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [1, 2]
    assert [(s.lane, s.blocks, s.rows) for s in buffer.lanes()] == [("europe", 2, 3), ("switzerland", 1, 1)]


def test_only_a_receipt_of_this_epoch_frees_blocks(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    for i in range(5):
        buffer.append([draft([float(i)])], [], NOW)
    foreign = Receipt(device="plane-01", epoch="other", lanes=receipt(buffer, 5).lanes)
    assert buffer.settle(foreign) == 0
    assert buffer.settle(receipt(buffer, 2, [(4, 4)])) == 3
    assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [3, 5]
    assert buffer.settle(receipt(buffer, 2, [(4, 4)])) == 0


def test_a_block_read_in_the_moment_of_its_commit_is_not_taken_for_damaged(tmp_path: Path) -> None:
    buffer, done, seen = open_buffer(tmp_path), threading.Event(), set[int]()

    def read() -> None:
        while not done.is_set():
            seen.update(b.sequence for b in buffer.pending("europe", max(seen, default=0), 100))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(APPENDS):
        buffer.append([draft([float(i)])], [], NOW)
    done.set()
    reader.join()
    assert [(b.sequence, b.stream) for b in buffer.pending("europe", 0, 2 * APPENDS)] == [(n, "pump") for n in range(1, APPENDS + 1)]


def test_a_block_is_found_while_its_place_is_being_written(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=100, clock=lambda: NOW)
    for i in range(3):
        buffer.append([draft([float(i)])], [], NOW)
    with buffer._file.writing():  # as every TAIL_BLOCKS_MAX blocks, and as the uplink's thread does when it settles
        buffer._file.catalogue.write_tail()
        assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [1, 2, 3]
        history = buffer.history("pump", "1.0.0")
        assert history is not None and history["t"].tolist() == [0.0, 1.0, 2.0]
        assert buffer.lanes()[0].oldest_us == NOW.monotonic_us
    assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [1, 2, 3]
    assert buffer._file.catalogue.committed() == []


def test_settled_blocks_stay_as_history_and_are_not_sent_again(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=3)
    for i in range(6):
        buffer.append([draft([float(i)])], [], NOW)
    buffer.settle(receipt(buffer, 6))
    assert buffer.lanes() == []
    history = buffer.history("pump", "1.0.0")
    assert history is not None and history["t"].tolist() == [3.0, 4.0, 5.0]


def test_history_comes_in_the_order_seen_across_lanes(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=10)
    first = replace(draft([0.0, 2.0]), order=np.array([0, 2]))
    second = replace(draft([1.0, 3.0], "switzerland"), order=np.array([1, 3]))
    buffer.append([first, second], [], NOW)
    buffer.append([draft([4.0])], [], NOW)
    history = buffer.history("pump", "1.0.0")
    assert history is not None and history["t"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert history["ordinal"].tolist() == [0, 1, 2, 3, 4]


def test_a_full_buffer_refuses_and_takes_again_after_a_receipt(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, bytes_max=200_000, when_full="block")
    noise = np.random.default_rng(1).normal(size=2_000)
    stored = 0
    with pytest.raises(BufferFullError, match="limit of 200000"):
        for _ in range(100):
            stored += len(buffer.append([draft(noise.tolist())], [], NOW))
    assert len(buffer.pending("europe", 0, 1_000)) == stored
    buffer.settle(receipt(buffer, stored))
    assert buffer.append([draft([1.0])], [], NOW)[0].sequence == stored + 1


def test_history_gives_way_to_new_readings_when_the_buffer_is_full(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, bytes_max=200_000, history_rows=1_000_000)
    noise = np.random.default_rng(1).normal(size=200)
    for sequence in range(1, 301):
        buffer.append([draft(noise.tolist())], [], NOW)
        buffer.settle(receipt(buffer, sequence))
    assert buffer.used_bytes() <= 200_000
    history = buffer.history("pump", "1.0.0")
    assert history is not None and isinstance(history["ordinal"], np.ndarray)
    assert history["ordinal"][-1] == 300 * 200 - 1


@pytest.mark.needs_root
def test_a_full_disk_refuses_readings_but_still_takes_receipts(tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], check=True)
    try:
        buffer = open_buffer(tmp_path, history_rows=1_000_000)
        rng = np.random.default_rng(1)
        stored = 0
        for _ in range(3):
            with pytest.raises(BufferFullError, match="bytes free"):
                for _ in range(1_000):
                    stored += len(buffer.append([draft(rng.normal(size=100).tolist())], [], NOW))
            waiting = sum(s.blocks for s in buffer.lanes())
            assert waiting > 20
            assert buffer.settle(receipt(buffer, stored)) == waiting
        assert buffer.append([draft([1.0])], [], NOW)[0].sequence == stored + 1
        buffer.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_fixes_are_kept_newest_first_up_to_the_limit(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([], [Fix(t, "europe") for t in range(FIXES_MAX + 10)], NOW)
    assert len(buffer.fixes()) == FIXES_MAX
    assert buffer.fixes()[-1] == Fix(FIXES_MAX + 9, "europe")


@pytest.mark.parametrize("change", ["time_us = time_us + 1", "lane = replace(lane, 'europe', 'eurooe')", "lane = '{'", "lane = x'ff'"])
def test_a_fix_that_is_not_what_was_written_is_not_used(tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    """It would put readings of its time into another zone."""
    buffer = open_buffer(tmp_path)
    buffer.append([], [Fix(t, "europe", ((9, "switzerland"),)) for t in (1, 3, 5)], NOW)
    buffer.close()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db, db:
        db.execute(f"UPDATE fixes SET {change} WHERE time_us = 3")
    assert [fix.time_us for fix in open_buffer(tmp_path).fixes()] == [1, 5]
    assert "stored fixes damaged, not used count=1 of=3" in caplog.text


def test_fixes_on_a_damaged_page_keep_no_agent_from_starting(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    stored = buffer.append([draft([1.0])], [Fix(1, "europe")], NOW)
    buffer.close()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db:
        ((page, size),) = db.execute("SELECT rootpage, page_size FROM sqlite_schema, pragma_page_size WHERE name = 'fixes'")
    with (tmp_path / "buffer.db").open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\0")
    again = open_buffer(tmp_path)
    assert again.fixes() == []
    assert [b.block for b in again.pending("europe", 0, 1)] == [b.block for b in stored]


def test_a_fraction_among_the_places_is_damage(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    stored = buffer.append([draft(list(np.random.default_rng(n).normal(size=n))) for n in (1, 10, 100)], [], NOW)
    buffer.close()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db, db:
        assert db.execute("UPDATE places SET bytes = bytes + 0.5 WHERE sequence = 2").rowcount == 1
    again = open_buffer(tmp_path)
    assert list(tmp_path.glob("buffer.db.damaged-*"))
    assert [b.block for b in again.pending("europe", 0, 3)] == [b.block for b in stored]


def test_a_damaged_file_is_moved_aside_and_a_new_epoch_begins(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    old_epoch = buffer.epoch
    buffer.close()
    (tmp_path / "buffer.db").write_bytes(b"not a database" * 1_000)
    buffer = open_buffer(tmp_path)
    assert buffer.epoch != old_epoch
    (aside,) = tmp_path.glob("buffer.db.damaged-*")
    assert aside.read_bytes().startswith(b"not a database")
    assert buffer.append([draft([1.0])], [], NOW)


def test_history_leaves_out_damaged_blocks_and_other_contract_versions(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=10)
    for value, version in ((1.0, "0.9.0"), (2.0, "1.0.0"), (3.0, "1.0.0")):
        buffer.append([replace(draft([value]), contract_version=version)], [], NOW)
    buffer.close()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db, db:
        db.execute("UPDATE slots SET block = zeroblob(length(block)) WHERE slot = 3")
    history = open_buffer(tmp_path, history_rows=10).history("pump", "1.0.0")
    assert history is not None and history["t"].tolist() == [2.0]


def test_history_leaves_out_columns_that_were_text_at_times(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=10)
    texts = {"t": Strings.of(["cold"]), "u": np.array([2.0])}
    buffer.append([replace(draft([1.0]), table={"t": np.array([1.0]), "u": np.array([1.0])}), replace(draft([1.0]), table=texts)], [], NOW)
    history = buffer.history("pump", "1.0.0")
    assert history is not None and sorted(history) == ["ordinal", "u"] and history["u"].tolist() == [1.0, 2.0]


def test_receipt_that_waits_while_the_file_is_made_new_settles_none_of_the_new_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0]), draft([2.0])], [], NOW)
    old = receipt(buffer, 2)

    def another_thread_is_faster() -> None:
        monkeypatch.undo()
        buffer._file.store.close(checkpoint=False)
        for path in tmp_path.iterdir():
            path.write_bytes(b"not a database" * 1_000)
        buffer._file.fault = DamagedError("damaged")
        buffer.append([draft([3.0]), draft([4.0])], [], NOW)

    monkeypatch.setattr(buffer._file, "recover", another_thread_is_faster)
    assert buffer.settle(old) == 0
    assert buffer.epoch != old.epoch
    assert [b.stream for b in buffer.pending("europe", 0, 9)].count("pump") == 2
    buffer.close()


def test_damage_that_is_found_after_another_fault_is_salvaged(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0])], [], NOW)
    other = apsw.Connection(str(tmp_path / "buffer.db"))
    other.execute("UPDATE meta SET value = 'none' WHERE key = 'epoch'")
    other.close()
    with pytest.raises(ZeroDivisionError), buffer._file.writing():
        _ = 1 / 0
    buffer.append([draft([2.0])], [], NOW)
    assert [decode_block(b.block)[1]["t"].tolist() for b in buffer.pending("europe", 0, 10) if b.stream == "pump"] == [[1.0], [2.0]]


def test_a_file_that_does_not_open_after_its_salvage_is_not_salvaged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0])], [], NOW)
    with pytest.raises(DamagedError), buffer._file.noting_faults():
        raise DamagedError("for this test")
    tried: list[Path] = []

    def refuse(path: Path, **how: Any) -> Store:
        tried.append(path)
        if len(tried) <= 4:
            raise DiskError("not yet")
        return open_store(path, **how)

    monkeypatch.setattr("edge_agent.owned_file.open_store", refuse)
    for _ in range(2):
        with pytest.raises(DiskError, match="not yet"):
            buffer.append([draft([2.0])], [], NOW)
    buffer.append([draft([2.0])], [], NOW)
    assert len([path for path in tmp_path.glob("buffer.db.damaged-*") if path.suffix.rpartition("-")[2].isdecimal()]) == 1


def test_what_is_gone_after_a_fault_is_named_without_marks_too(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0])], [], NOW)
    buffer._file.store.checkpoint(truncate=True)
    older = (tmp_path / "buffer.db").read_bytes()
    buffer.append([draft([2.0])], [], NOW)
    buffer._file.store.checkpoint(truncate=True)
    (tmp_path / "buffer.db").write_bytes(older)
    (tmp_path / "buffer.db.marks").unlink()
    with pytest.raises(DiskError), buffer._file.noting_faults():
        raise DiskError("for this test")
    assert buffer.append([draft([3.0])], [], NOW)[0].sequence > 2
    rows = [loss for b in buffer.pending("europe", 0, 10) if b.stream == LOSSES.stream for loss in read_losses(decode_block(b.block)[1])]
    assert [(loss.first_sequence, loss.last_sequence, loss.reason) for loss in rows] == [(2, 2, "damaged")]


def test_history_stays_when_it_is_the_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells what comes again after a crash, and no page of the file that gets free is room on the disk."""
    buffer = open_buffer(tmp_path, history_rows=1_000)
    for i in range(100):
        buffer.append([draft([float(i)])], [], NOW)
    buffer.settle(receipt(buffer, 100))
    with monkeypatch.context() as full:
        full.setattr(Store, "free_bytes", lambda _: 0)
        with pytest.raises(BufferFullError, match="0 bytes free"):
            buffer.append([draft([100.0])], [], NOW)
    assert buffer.state(NOW).history_blocks == 100
    assert buffer.append([draft([100.0])], [], NOW)[0].sequence == 101


def test_blocks_that_were_read_when_another_thread_made_the_file_new_are_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = open_buffer(tmp_path)
    stored = [s for i in range(3) for s in buffer.append([draft([float(i)])], [], NOW)]

    def overtaken(*arguments: Any) -> Any:
        found = stored_blocks(*arguments)
        monkeypatch.undo()
        buffer._file.store.close(checkpoint=False)
        for path in tmp_path.iterdir():
            path.write_bytes(b"not a database" * 1_000)
        buffer._file.fault = DamagedError("damaged")
        buffer._file.recover()
        assert not buffer._file.catalogue.shelves
        return found

    monkeypatch.setattr("edge_agent.reading.stored_blocks", overtaken)
    assert buffer.pending("europe", 0, 10) == stored
    assert buffer.pending("europe", 0, 10) == []


def test_a_receipt_for_a_long_backlog_holds_no_reading_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, appended = open_buffer(tmp_path), list[int]()
    for _ in range(11):
        buffer.append([draft([1.0]) for _ in range(100)], [], NOW)

    def append() -> None:
        appended.extend(s.sequence for s in buffer.append([draft([2.0])], [], NOW))

    def meanwhile(_: float) -> None:
        thread = threading.Thread(target=append)
        thread.start()
        thread.join(10)

    monkeypatch.setattr("edge_agent.settling.time.sleep", meanwhile)
    assert buffer.settle(receipt(buffer, 1_100)) == 1_100
    assert appended == [1_101, 1_102]
    assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [1_101, 1_102]


@pytest.mark.parametrize("owed", [b"\xff", b"\x91\xa1\xff", "text"])
def test_a_damaged_note_of_what_is_owed_to_the_ledger_keeps_no_agent_from_starting(tmp_path: Path, owed: object) -> None:
    buffer = open_buffer(tmp_path)
    buffer.append([draft([1.0])], [], NOW)
    buffer.close()
    with closing(sqlite3.connect(tmp_path / "buffer.db")) as db, db:
        db.execute("INSERT INTO meta VALUES ('owed', ?)", (owed,))
    buffer = open_buffer(tmp_path)
    assert [b.sequence for b in buffer.pending("europe", 0, 10) if b.stream == "pump"] == [1]
    assert list(tmp_path.glob("*.damaged-*"))
    buffer.close()
