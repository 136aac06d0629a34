"""Blocks are found in the pages of real SQLite files, whatever has happened to their tables."""

from __future__ import annotations

import random
from pathlib import Path

import apsw
import pytest

from edge_agent.core.carve import Patched, carve, page_bytes_of

SIZES = (1, 30, 400, 470, 480, 500, 900, 4_000, 70_000)


def make(path: Path, page_bytes: int, chance: random.Random) -> dict[int, bytes]:
    db = apsw.Connection(str(path))
    db.pragma("page_size", page_bytes)
    db.pragma("journal_mode", "wal")
    db.pragma("wal_autocheckpoint", 0)
    db.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, True)
    db.execute("CREATE TABLE blocks (id INTEGER PRIMARY KEY, lane TEXT, block BLOB)")
    blobs = {number: chance.randbytes(size) for number, size in enumerate(SIZES * 4, 1)}
    for number, blob in blobs.items():
        db.execute("INSERT INTO blocks VALUES (?, 'europe', ?)", (number, blob))
        if number == len(blobs) // 2:
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    db.close()
    return blobs


@pytest.mark.parametrize("page_bytes", [512, 1_024, 4_096, 65_536])
def test_every_blob_is_found_in_file_and_log(tmp_path: Path, page_bytes: int, seed: int) -> None:
    path = tmp_path / "x.db"
    blobs = make(path, page_bytes, random.Random(seed))
    file, log = path.read_bytes(), Path(f"{path}-wal").read_bytes()
    assert page_bytes_of(file, 0) == page_bytes
    assert blobs.items() <= dict(carve(file, log, page_bytes, 100_000)).items()


def test_the_first_page_may_be_gone(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "x.db"
    blobs = make(path, 512, random.Random(seed))
    file, log = bytes(512) + path.read_bytes()[512:], Path(f"{path}-wal").read_bytes()
    assert page_bytes_of(file, 512) == 512
    assert blobs.items() <= dict(carve(file, log, 512, 100_000)).items()


def test_pages_of_an_earlier_round_of_the_log_do_not_hide_what_is_current(tmp_path: Path, seed: int) -> None:
    """In use, a log always has such pages behind its last commit, and pages are used again and again."""
    chance, blobs, path = random.Random(seed), dict[int, bytes](), tmp_path / "x.db"
    db = apsw.Connection(str(path))
    for name, value in {"page_size": 512, "journal_mode": "wal", "wal_autocheckpoint": 0}.items():
        db.pragma(name, value)
    db.execute("CREATE TABLE blocks (id INTEGER PRIMARY KEY, block BLOB)")
    for number in range(1, 121):
        blobs[number] = chance.randbytes(chance.randrange(400, 4_000))
        db.execute("INSERT INTO blocks VALUES (?, ?)", (number, blobs[number]))
        db.execute("DELETE FROM blocks WHERE id <= ?", (number - 5,))
        if number % 20 == 0:
            db.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_RESTART)
        found = set(carve(path.read_bytes(), Path(f"{path}-wal").read_bytes(), 512, 100_000))
        assert {(n, blobs[n]) for n in range(max(1, number - 4), number + 1)} <= found
    db.close()


def test_noise_is_no_trouble(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(200):
        noise = bytearray(chance.randbytes(512 * chance.randrange(1, 8)))
        for start in range(0, len(noise), 512):
            noise[start] = 0x0D
        assert all(len(blob) <= 10_000 for _, blob in carve(bytes(noise), bytes(noise), 512, 10_000))


def test_patched_bytes_are_those_but_for_some_blocks(seed: int) -> None:
    data = random.Random(seed).randbytes(50)
    patched = Patched(memoryview(data), {1, 4}, 10)
    wanted = data[:10] + bytes(10) + data[20:40] + bytes(10)
    assert len(patched) == 50
    assert bytes(patched[i] for i in range(50)) == wanted
    assert all(patched[a:b] == wanted[a:b] for a in range(51) for b in range(55))
