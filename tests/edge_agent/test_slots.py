"""Slots: blocks in rows that are used again; what is stale never comes back, what counts is never overwritten."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from edge_agent.buffer import Buffer, Draft
from edge_agent.buffer_file import BufferFile, connect
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.core.retention import Place
from edge_agent.inspection import inspect
from edge_agent.room import RESERVE_BYTES
from edge_agent.sealed import Keys
from edge_agent.slots import HEAD_BYTES, OVERFLOW_PAGES_MAX, WAITING_MAX, blocks_in_slots, fill, stored_blocks, unfill
from edge_agent.store import PAGE_BYTES, TAIL_BLOCKS_MAX, Store, bytes_on_disk
from tests.faults.oracle import Name, check

FRAME_BYTES = 24 + PAGE_BYTES


def moment(number: int = 0) -> Moment:
    return Moment(1_700_000_000_000_000 + number, 5_000_000 + number, True)


def open_buffer(folder: Path, *, bytes_max: int = 1 << 30, history_rows: int = 0, keys: Keys | None = None) -> Buffer:
    folder.mkdir(exist_ok=True)
    return Buffer(folder / "buffer.db", "plane-01", "boot", bytes_max=bytes_max, history_rows={"pump": history_rows}, keys=keys)


def draft(number: int, rows: int = 20, lane: str = "europe") -> Draft:
    table: Table = {"t": number + np.random.default_rng(number).random(rows)}
    return Draft(lane, "pump", "1.0.0", FixQuality.STATIC, "policy", table, rows, 1, 2)


def store(buffer: Buffer, numbers: range, rows: int = 20) -> dict[Name, bytes]:
    stored = [s for n in numbers for s in buffer.append([draft(n, rows)], [], moment(n))]
    return {(buffer.epoch, s.lane, s.sequence): s.block for s in stored}


def settle(buffer: Buffer, cumulative: int) -> None:
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=cumulative)]))


def leave(buffer: Buffer, cumulative: int) -> None:
    """The blocks up to this one are out of the file, however new they are."""
    settle(buffer, cumulative)
    with buffer._file.writing():
        buffer._file.catalogue.write_tail()
        buffer._file.catalogue.trim(buffer._file.floors())


def killed(folder: Path, name: str) -> Path:
    """The files as a killed agent leaves them."""
    copy = folder.with_name(name)
    shutil.copytree(folder, copy)
    return copy


def ask(folder: Path, query: str) -> Any:
    db = apsw.Connection(str(folder / "buffer.db"))
    found = db.execute(query).get
    db.close()
    return found


@pytest.mark.parametrize("size", [12, 456, 457, 458, 965, 966, 8_000])
def test_a_slot_gives_back_what_was_put_in_and_fills_its_pages(size: int, tmp_path: Path) -> None:
    stored = random.Random(size).randbytes(size)
    blob = fill(2**40, stored)
    assert unfill(blob) == (2**40, stored)
    db = apsw.Connection(str(tmp_path / "one.db"))
    db.pragma("page_size", PAGE_BYTES)
    db.execute("CREATE TABLE slots (slot INTEGER PRIMARY KEY, block BLOB NOT NULL)")
    db.execute("INSERT INTO slots VALUES (16384, ?)", (blob,))
    query = "SELECT count(*), sum(unused) FROM dbstat WHERE name = 'slots' AND pagetype <> 'internal'"
    pages, unused = (int(str(value)) for value in db.execute(query).fetchall()[0])
    assert pages == 1 + -(-max(0, size + HEAD_BYTES - 473) // (PAGE_BYTES - 4))
    assert unused < 24, "all of it is in the last page"


@pytest.mark.parametrize("blob", [b"", bytes(500), "text", None, fill(7, b"block")[1:], b"\1" + fill(7, b"block")[1:]])
def test_what_is_no_slot_is_refused(blob: object) -> None:
    with pytest.raises(ContractError):
        unfill(blob)


def test_a_slot_that_is_used_again_costs_its_own_pages_and_no_other(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 11))
    leave(buffer, 10)
    buffer._file.store.checkpoint(truncate=True)
    size = (tmp_path / "a" / "buffer.db").stat().st_size
    written = []
    for number in range(11, 16):
        before = buffer._file.store.log_bytes()
        (block,) = store(buffer, range(number, number + 1)).values()
        written.append((buffer._file.store.log_bytes() - before) // FRAME_BYTES)
    assert written == [1 + -(-(len(block) + HEAD_BYTES - 473) // (PAGE_BYTES - 4))] * 5
    assert (tmp_path / "a" / "buffer.db").stat().st_size == size


@pytest.mark.parametrize("left", [3, TAIL_BLOCKS_MAX, TAIL_BLOCKS_MAX + 10])
def test_what_is_stale_does_not_come_back_after_a_kill(left: int, tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    gone = store(buffer, range(1, left + 1))
    leave(buffer, left)
    again = open_buffer(killed(tmp_path / "a", "b"))
    assert again.lanes() == [] and again.pending("europe", 0, 10) == []
    fresh = store(again, range(left + 1, left + 4))
    assert not fresh.keys() & gone.keys()
    last = open_buffer(killed(tmp_path / "b", "c"))
    assert check(last, fresh).blocks == fresh
    assert not list(tmp_path.glob("*/buffer.db.damaged-*"))


def test_what_was_put_in_a_used_slot_is_there_after_a_kill_and_in_an_export(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    old = store(buffer, range(1, 9))
    leave(buffer, 6)
    kept = {name: block for name, block in old.items() if name[2] > 6} | store(buffer, range(9, 12))
    assert ask(tmp_path / "a", "SELECT count(*) FROM slots") == 8
    for folder in (killed(tmp_path / "a", "b"), killed(tmp_path / "a", "c")):
        found = inspect(folder / "buffer.db", None)
        assert found.clean and found.blocks == len(kept), found.problems
        assert [f.block for f in BufferFile(folder / "buffer.db").blocks()] == list(kept.values())
        again = open_buffer(folder)
        assert check(again, kept).blocks == kept
        again.close()


def test_who_reads_the_file_of_a_running_agent_sees_one_state_of_it(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    kept = store(buffer, range(1, 9))
    with connect(tmp_path / "a" / "buffer.db") as db:
        leave(buffer, 8)
        store(buffer, range(9, 20))
        assert sorted(blocks_in_slots(db.execute)) == list(enumerate(kept.values(), 1))


def test_a_random_life_with_kills_loses_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    folder, number = tmp_path / "0", 1
    buffer = open_buffer(folder, history_rows=200)
    kept: dict[Name, bytes] = {}
    for life in range(1, 8):
        for _ in range(chance.randrange(1, 150)):
            kept |= store(buffer, range(number, number + 1), rows=chance.choice([1, 20, 20, 60, 4_000]))
            number += 1
            if chance.random() < 0.3:
                waiting = buffer.pending("europe", 0, 512)
                until = chance.choice(waiting).sequence if waiting else 0
                settle(buffer, until)
                kept = {name: block for name, block in kept.items() if name[2] > until}
        assert inspect(folder / "buffer.db", None).clean
        folder = killed(folder, str(life))
        buffer.close()
        buffer = open_buffer(folder, history_rows=200)
        found = check(buffer, kept)
        assert found.losses == []
        settle(buffer, number - 1)  # what only the tail knew as settled waits again
        kept = {}
    assert not list(tmp_path.glob("*/buffer.db.damaged-*"))


@pytest.mark.parametrize("wrong", ["slot + 1", "slot + 1000", "0", "-1", "1e300", "'four'"])
def test_a_place_with_another_slot_is_damage_that_costs_nothing(wrong: str, tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a", history_rows=10**6)
    kept = store(buffer, range(1, 9))
    buffer.close()
    ask(tmp_path / "a", f"UPDATE places SET slot = {wrong} WHERE sequence = 4")
    assert not inspect(tmp_path / "a" / "buffer.db", None).clean
    assert check(open_buffer(tmp_path / "a"), kept).blocks.keys() >= kept.keys()


def test_a_damaged_head_of_a_block_with_a_place_costs_nothing(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    kept = store(buffer, range(1, 9))
    buffer.close()
    damage_head(tmp_path / "a", 4)
    assert len(list(BufferFile(tmp_path / "a" / "buffer.db").blocks())) == 8
    assert check(open_buffer(tmp_path / "a"), kept).blocks == kept
    assert not list(tmp_path.glob("*/buffer.db.damaged-*"))


def test_a_damaged_head_of_a_stale_slot_harms_nobody_and_fsck_tells_it(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 9))
    leave(buffer, 6)
    kept = dict(list(store(buffer, range(9, 11)).items()))
    buffer.close()
    (stale, *_) = [slot for slot in range(1, 9) if not ask(tmp_path / "a", f"SELECT count(*) FROM places WHERE slot = {slot}")]
    damage_head(tmp_path / "a", stale)
    assert inspect(tmp_path / "a" / "buffer.db", None).problems == [f"slot {stale}: its head is damaged"]
    assert check(open_buffer(tmp_path / "a"), kept).blocks.keys() >= kept.keys()
    assert not list(tmp_path.glob("*/buffer.db.damaged-*"))


def test_a_damaged_head_of_a_block_without_a_place_is_noticed(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    kept = store(buffer, range(1, 9))
    for slot in (3, 8):  # the newest of its lane: no count would miss it
        folder = killed(tmp_path / "a", f"slot{slot}")
        (folder / "buffer.db.marks").unlink()
        damage_head(folder, slot)
        check(open_buffer(folder), kept)
        assert list(folder.glob("buffer.db.damaged-*"))


def damage_head(folder: Path, slot: int) -> None:
    blob = bytearray(ask(folder, f"SELECT block FROM slots WHERE slot = {slot}"))
    blob[5] ^= 1
    ask(folder, f"UPDATE slots SET block = x'{blob.hex()}' WHERE slot = {slot}")


@pytest.mark.parametrize("value", ["''", "'7'", "'70 ' || substr(value, instr(value, ' ') + 1)", "x'00'"])
def test_a_damaged_number_of_the_last_place_is_damage_that_costs_nothing(value: str, tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 9))
    leave(buffer, 6)
    kept = store(buffer, range(9, 12))
    folder = killed(tmp_path / "a", "b")
    ask(folder, f"UPDATE meta SET value = {value} WHERE key = 'placed'")
    assert not inspect(folder / "buffer.db", None).clean
    assert check(open_buffer(folder), kept).blocks.keys() >= kept.keys()


def test_a_reader_that_finds_another_block_in_a_slot_takes_nothing_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 5))
    waiting = buffer._file.catalogue.waiting

    def overtaken(*arguments: Any) -> Any:
        places = waiting(*arguments)
        monkeypatch.undo()
        leave(buffer, 4)
        store(buffer, range(5, 8))
        return places

    monkeypatch.setattr(buffer._file.catalogue, "waiting", overtaken)
    assert [b.sequence for b in buffer.pending("europe", 0, 10)] == [5, 6, 7]
    assert not buffer.lost_blocks and not list(tmp_path.glob("*/buffer.db.damaged-*"))


def test_whichever_blocks_are_read_the_statements_are_the_same() -> None:
    asked = set[str]()

    def read(query: str, values: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        asked.add(query)
        return []

    for size in range(1, 9):
        stored_blocks(read, [Place(1, n, n, 1, 1, 1, 1, 1, 1, slot=n % 2 and n) for n in range(1, 2 * size)])
    assert len(asked) == 2


def test_slots_are_made_over_when_blocks_become_larger_and_stay_within_their_share(tmp_path: Path) -> None:
    limit = 64_000
    buffer, last = open_buffer(tmp_path / "a", bytes_max=limit), 0
    for rows in (1, 20, 60, 200, 20):
        for number in range(last + 1, last + 20):
            store(buffer, range(number, number + 1), rows)
            leave(buffer, number)
        last += 19
        assert ask(tmp_path / "a", "SELECT sum(length(block)) FROM slots") <= limit // 16
    assert ask(tmp_path / "a", "SELECT count(*) FROM blocks") == 0
    assert buffer._file.catalogue.slots.bytes == buffer._file.catalogue.slots.free_bytes <= limit // 16


def test_slots_beyond_a_lowered_limit_go(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 101))
    leave(buffer, 100)
    buffer.close()
    buffer = open_buffer(tmp_path / "a", bytes_max=200_000)
    store(buffer, range(101, 102))
    buffer.close()
    assert ask(tmp_path / "a", "SELECT sum(length(block)) FROM slots") <= 200_000 // 16
    assert inspect(tmp_path / "a" / "buffer.db", None).clean


def test_an_outage_and_large_blocks_make_no_slots(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, WAITING_MAX + 50))
    assert ask(tmp_path / "a", "SELECT count(*) FROM slots") <= WAITING_MAX + 1
    buffer = open_buffer(tmp_path / "b")
    store(buffer, range(1, 4), rows=4_000)
    assert ask(tmp_path / "b", "SELECT min(length(block)) FROM blocks") > OVERFLOW_PAGES_MAX * PAGE_BYTES
    assert ask(tmp_path / "b", "SELECT count(*) FROM slots") == 0


def test_a_key_is_asked_for_by_what_counts_and_not_by_what_is_stale(tmp_path: Path) -> None:
    first, second = bytes(range(32)), bytes(range(1, 33))
    buffer = open_buffer(tmp_path / "a", keys=Keys([first]))
    store(buffer, range(1, 5))
    buffer.close()
    with pytest.raises(ConfigError, match="blocks are sealed under the key"):
        open_buffer(tmp_path / "a", keys=Keys([second]))
    buffer = open_buffer(tmp_path / "a", keys=Keys([second, first]))
    leave(buffer, 4)
    buffer.close()
    buffer = open_buffer(tmp_path / "a", keys=Keys([second]))
    kept = store(buffer, range(5, 7))
    buffer.close()
    ask(tmp_path / "a", "UPDATE lanes SET gone = gone + 1")
    assert check(open_buffer(tmp_path / "a", keys=Keys([second])), kept).blocks.keys() >= kept.keys()
    assert list((tmp_path / "a").glob("buffer.db.damaged-*"))


def test_a_full_disk_gets_free_slots_back_as_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = open_buffer(tmp_path / "a")
    store(buffer, range(1, 101))
    leave(buffer, 100)
    slots, size = buffer._file.catalogue.slots, bytes_on_disk(33_000)
    assert slots.free_bytes > size > buffer._file.store.spare_bytes()
    monkeypatch.setattr(Store, "free_bytes", lambda _: RESERVE_BYTES + 3 * size)  # enough, if the file need not grow
    kept = store(buffer, range(101, 102), rows=4_000)
    assert slots.bytes == 0 and check(buffer, kept).blocks == kept


def test_slots_are_made_over_for_larger_blocks_when_their_share_is_used_up(tmp_path: Path) -> None:
    limit = 64_000
    buffer = open_buffer(tmp_path / "a", bytes_max=limit)
    kept = store(buffer, range(1, 11), rows=1)
    slots = buffer._file.catalogue.slots
    assert slots.bytes + PAGE_BYTES > limit // 16
    leave(buffer, 10)
    (name, block), *_ = store(buffer, range(11, 12), rows=60).items()
    assert len(block) > PAGE_BYTES
    assert ask(tmp_path / "a", "SELECT count(*) FROM blocks") == 0 and slots.bytes <= limit // 16
    again = open_buffer(killed(tmp_path / "a", "b"), bytes_max=limit)
    assert check(again, {name: block}).blocks == {name: block}
    assert again._file.catalogue.slots.bytes == slots.bytes
    assert inspect(tmp_path / "b" / "buffer.db", None).clean
    assert not kept.keys() & store(again, range(12, 14)).keys()
