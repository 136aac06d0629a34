"""A buffer whose file was cut off or whose bits fell over: opening never fails, nothing is altered silently, nothing is lost silently."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.buffer import Buffer
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.core.fix import Fix
from tests.faults.oracle import DEVICE, LANES, Found, Name, check, draft, moment, open_buffer

FIXES = 4
HEADER_BYTES = 100  # of SQLite's database file
FLIPS_SAMPLED = 100
CUTS_SAMPLED = 60
LARGE_APPENDS = 600
LARGE_FLIPS = 100_000
FLIPS_AT_ONCE = 100
PART, PARTS = map(int, os.environ.get("FENCELINE_PART", "1/1").split("/"))  # of every bit: what this process does of it


@dataclass(frozen=True)
class Image:
    """The files of a buffer, by the end of their names, what was acknowledged, and what of that the lake has."""

    files: dict[str, bytes]
    acknowledged: dict[Name, bytes]
    settled: set[Name]
    fixes: list[Fix]

    def write(self, folder: Path, changed: dict[str, bytes]) -> Path:
        folder.mkdir()
        for suffix, data in (self.files | changed).items():
            (folder / f"buffer.db{suffix}").write_bytes(data)
        return folder / "buffer.db"


@pytest.fixture(scope="module")
def memory_disk() -> Iterator[Path]:
    """A folder in memory: these tests open thousands of buffers and are not about fsync."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    folder = base / f"fenceline-every-byte-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


def make(folder: Path, appends: int, *, in_log: bool, rows: int = 3, reused: bool = False) -> Image:
    """A buffer of that many appends, all in the database file, or the later part only in the write-ahead log.

    `reused`: what the first part stored has left; the later part lies in some of the same slots, the others are stale.
    """
    folder.mkdir()
    path = folder / "buffer.db"
    acknowledged: dict[Name, bytes] = {}
    settled: set[Name] = set()
    fixes: list[Fix] = []
    buffer = open_buffer(path)
    for number in range(1, appends + 1):
        if number == appends * (2 if reused else 1) // (3 if reused else 2) + 1:
            if reused:
                settled = set(acknowledged)
                settle(buffer)
            buffer.close()  # brings the log into the file
            buffer = open_buffer(path)
        fixes += [Fix(number, "europe", ((1_000_000, "europe,switzerland"),) if number % 2 else ())] * (number <= FIXES)
        stored = buffer.append([draft(number, rows)], fixes[-1:] * (number <= FIXES), moment(number))
        acknowledged |= {(buffer.epoch, s.lane, s.sequence): s.block for s in stored}
    if in_log:
        files = read(folder)
        buffer.close()
    else:
        buffer.close()
        files = read(folder)
    shutil.rmtree(folder)
    return Image(files, acknowledged, settled, fixes)


def settle(buffer: Buffer) -> None:
    """The lake has all of it."""
    last = [LaneReceipt(lane=lane, cumulative=buffer.pending(lane, 0, 64)[-1].sequence) for lane in LANES]
    buffer.settle(Receipt(device=DEVICE, epoch=buffer.epoch, lanes=last))


def read(folder: Path) -> dict[str, bytes]:
    named = {path.name.removeprefix("buffer.db"): path for path in folder.iterdir()}
    return {suffix: path.read_bytes() for suffix, path in named.items() if suffix in ("", "-wal", ".marks")}


def survive(folder: Path, image: Image, changed: dict[str, bytes], what: str) -> Found:
    """Open a damaged buffer, check the promise, use it, open it once more and check again."""
    path = image.write(folder, changed)
    try:
        buffer = open_buffer(path)
        found = check(buffer, image.acknowledged, image.settled)
        assert all(fix in image.fixes for fix in buffer.fixes()), "a fix was altered"
        fresh = {(buffer.epoch, s.lane, s.sequence): s.block for s in buffer.append([draft(900), draft(901)], [], moment(900))}
        assert not fresh.keys() & image.acknowledged.keys(), "a name was used twice"
        buffer.close()
        buffer = open_buffer(path)
        check(buffer, image.acknowledged | fresh, image.settled)
        buffer.close()
    except Exception as e:
        raise AssertionError(f"{what}: {type(e).__name__}: {e}") from e
    finally:
        shutil.rmtree(folder)
    return found


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_marks_that_are_damaged_do_no_harm(memory_disk: Path, seed: int) -> None:
    chance = random.Random(seed)
    for image in cases(memory_disk):
        data = image.files[".marks"]
        for bit in chance.sample(range(8 * len(data)), FLIPS_SAMPLED // 3):
            assert not flip_and_survive(memory_disk / "run", image, ".marks", bit).losses
        for size in chance.sample(range(len(data)), CUTS_SAMPLED // 3):
            assert not cut_and_survive(memory_disk / "run", image, ".marks", size).losses


def flip_and_survive(folder: Path, image: Image, suffix: str, bit: int) -> Found:
    return survive(folder, image, {suffix: flipped(image.files[suffix], bit)}, f"bit {bit % 8} of byte {bit // 8} of buffer.db{suffix}")


def cut_and_survive(folder: Path, image: Image, suffix: str, size: int) -> Found:
    return survive(folder, image, {suffix: image.files[suffix][:size]}, f"buffer.db{suffix} cut off at byte {size}")


def parts(image: Image) -> list[str]:
    """The files of SQLite; the marks are what tells when these were cut off."""
    return [suffix for suffix, data in image.files.items() if data and suffix != ".marks"]


IMAGES: dict[str, dict[str, Any]] = {
    "in the file": {"appends": 4, "in_log": False},
    "in the log": {"appends": 4, "in_log": True},
    "in used slots": {"appends": 6, "in_log": True, "reused": True, "rows": 60},
}


def cases(folder: Path) -> list[Image]:
    return [make(folder / "make", **how) for how in IMAGES.values()]


def test_a_small_buffer_survives_random_bit_flips(memory_disk: Path, seed: int) -> None:
    chance = random.Random(seed)
    for image in cases(memory_disk):
        for suffix in parts(image):
            for bit in chance.sample(range(8 * len(image.files[suffix])), FLIPS_SAMPLED):
                flip_and_survive(memory_disk / "run", image, suffix, bit)


def test_a_small_buffer_survives_each_bit_flip_in_its_header(memory_disk: Path) -> None:
    for image in cases(memory_disk):
        for bit in range(8 * HEADER_BYTES):
            flip_and_survive(memory_disk / "run", image, "", bit)


def test_a_small_buffer_survives_being_cut_off(memory_disk: Path, seed: int) -> None:
    chance = random.Random(seed)
    for image in cases(memory_disk):
        for suffix in parts(image):
            for size in {0, *chance.sample(range(len(image.files[suffix])), CUTS_SAMPLED)}:
                cut_and_survive(memory_disk / "run", image, suffix, size)


def test_a_large_buffer_survives_many_bit_flips_at_once(memory_disk: Path, seed: int) -> None:
    image = make(memory_disk / "make", LARGE_APPENDS // 4, in_log=True, rows=200)
    flips(memory_disk, image, random.Random(seed), 10)


def test_an_undamaged_buffer_has_lost_nothing(memory_disk: Path) -> None:
    for image in cases(memory_disk):
        assert survive(memory_disk / "run", image, {}, "nothing").losses == []


@pytest.mark.long
@pytest.mark.parametrize("kind", IMAGES)
def test_a_small_buffer_survives_every_bit_flip(memory_disk: Path, kind: str) -> None:
    image = make(memory_disk / "make", **IMAGES[kind])
    for suffix in parts(image):
        bits = 8 * len(image.files[suffix])
        mine = range(PART - 1, bits, PARTS)
        for number, bit in enumerate(mine, 1):
            flip_and_survive(memory_disk / "run", image, suffix, bit)
            if number % 1_000 == 0 or number == len(mine):
                print(f"{number} of {len(mine)} bits of {bits} of buffer.db{suffix}, {kind}", flush=True)


@pytest.mark.long
def test_a_small_buffer_survives_being_cut_off_at_every_byte(memory_disk: Path) -> None:
    for image in cases(memory_disk):
        for suffix in parts(image):
            print(f"{len(image.files[suffix])} bytes of buffer.db{suffix}")
            for size in range(len(image.files[suffix])):
                cut_and_survive(memory_disk / "run", image, suffix, size)


@pytest.mark.long
def test_a_large_buffer_survives_a_hundred_thousand_bit_flips(memory_disk: Path, seed: int) -> None:
    image = make(memory_disk / "make", LARGE_APPENDS, in_log=True, rows=200)
    flips(memory_disk, image, random.Random(seed), LARGE_FLIPS // FLIPS_AT_ONCE)


def flips(folder: Path, image: Image, chance: random.Random, rounds: int) -> None:
    """Rounds of FLIPS_AT_ONCE flips in the database and its log."""
    whole = {suffix: np.frombuffer(data, np.uint8) for suffix, data in image.files.items()}
    kept = 0
    for number in range(rounds):
        changed = {suffix: data.copy() for suffix, data in whole.items()}
        for _ in range(FLIPS_AT_ONCE):
            suffix = chance.choice(list(changed))
            changed[suffix][chance.randrange(len(changed[suffix]))] ^= 1 << chance.randrange(8)
        found = survive(folder / "run", image, {s: d.tobytes() for s, d in changed.items()}, f"round {number} of {FLIPS_AT_ONCE} flips")
        kept += len(found.blocks.keys() & image.acknowledged.keys())
    print(f"{rounds * FLIPS_AT_ONCE} flips: {kept} of {rounds * len(image.acknowledged)} blocks readable, the others named")
