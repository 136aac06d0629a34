"""A disk that fails and loses power, under a real SQLite: a VFS shim that counts what SQLite asks of the disk.

- What SQLite writes goes to a real file, which plays the page cache. Beside it stands a model of the platter: it takes a file's writes
  when the file is synced, and not before.
- `fail_at` breaks the n-th write, sync or truncation, once or for a while. A broken sync does what Linux does: it reports the error,
  forgets that the pages are dirty, and the next sync succeeds without writing them ("fsyncgate").
- `power_cut` copies what the platter holds: whatever was not synced is gone. With `torn` some of it is there, in no order.
- Names are durable at once: that a directory entry survives is left to the tests on real file systems.

    with faulty_disk() as disk:
        disk.fail_at(7, DiskError.IO)
        buffer = Buffer(...)
        disk.power_cut(tmp_path / "before", tmp_path / "after")
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import apsw

NAME, BASE = "fenceline-faulty", "unix"
SECTOR = 512


class DiskError(StrEnum):
    """What the disk says."""

    IO = "io"
    FULL = "full"


@dataclass
class _Platter:
    """What of one file survives: `kept`, and the operations since the last sync, which do not."""

    kept: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, bytes | None]] = field(default_factory=list)  # None: cut off there

    def sync(self) -> None:
        for offset, data in self.dirty:
            _apply(self.kept, offset, data)
        self.dirty.clear()

    def torn(self, chance: random.Random) -> bytearray:
        image = bytearray(self.kept)
        for offset, data in self.dirty:
            if data is None:
                if chance.random() < 0.5:
                    _apply(image, offset, None)
                continue
            for start in range(0, len(data), SECTOR):
                if chance.random() < 0.5:
                    _apply(image, offset + start, data[start : start + SECTOR])
        return image


def _apply(image: bytearray, offset: int, data: bytes | None) -> None:
    if data is None:
        del image[offset:]
        return
    if len(image) < offset:
        image.extend(bytes(offset - len(image)))
    image[offset : offset + len(data)] = data


class FaultyDisk(apsw.VFS):
    """See the module's rules. While it exists, every connection of this process goes through it."""

    def __init__(self) -> None:
        super().__init__(NAME, BASE, makedefault=True)
        self.operations = 0
        self.failed: list[str] = []
        self._platters: dict[int, _Platter] = {}
        self._failing = range(0)
        self._error = DiskError.IO
        self._call_at: int | None = None
        self._act: Callable[[], None] = lambda: None

    def fail_at(self, operation: int, error: DiskError, times: int = 1) -> None:
        """Let the n-th operation from now fail, n from 0, and those after it, `times` in all."""
        first = self.operations + operation
        self._failing, self._error = range(first, first + times), error

    def call_at(self, operation: int, act: Callable[[], None]) -> None:
        """Call `act` before the n-th operation from now."""
        self._call_at, self._act = self.operations + operation, act

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:
        return _File(self, name, flags)

    def platter(self, path: str) -> _Platter:
        """The platter of the file that has this name now."""
        number = Path(path).stat().st_ino
        if number not in self._platters:  # what was there before the disk turned bad is safe
            self._platters[number] = _Platter(bytearray(Path(path).read_bytes()))
        return self._platters[number]

    def count(self, what: str) -> bool:
        """Count an operation; whether it has to fail."""
        if self.operations == self._call_at:
            self._act()
        self.operations += 1
        if self.operations - 1 not in self._failing:
            return False
        self.failed.append(what)
        return True

    def error(self, code: type[apsw.Error], message: str) -> apsw.Error:
        """The exception that SQLite turns into its error code."""
        return apsw.FullError("disk full") if self._error is DiskError.FULL else code(message)

    def power_cut(self, source: Path, target: Path, torn: random.Random | None = None) -> None:
        """Write what of the folder `source` is on the platter into the new folder `target`."""
        target.mkdir()
        for path in source.iterdir():
            platter = self._platters.get(path.stat().st_ino)
            if platter is None:
                (target / path.name).write_bytes(path.read_bytes())
            elif not path.name.endswith("-shm"):
                (target / path.name).write_bytes(platter.torn(torn) if torn else platter.kept)


class _File(apsw.VFSFile):
    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        self._disk = disk
        super().__init__(BASE, name, flags)
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        self._platter = disk.platter(str(path)) if path else _Platter()
        self._suffix = str(path).rpartition(".")[2]

    def xWrite(self, data: bytes, offset: int) -> None:
        if self._disk.count(f"write {self._suffix}"):
            raise self._disk.error(apsw.IOError, "write failed")
        super().xWrite(data, offset)
        self._platter.dirty.append((offset, bytes(data)))

    def xTruncate(self, newsize: int) -> None:
        if self._disk.count(f"truncate {self._suffix}"):
            raise self._disk.error(apsw.IOError, "truncate failed")
        super().xTruncate(newsize)
        self._platter.dirty.append((newsize, None))

    def xSync(self, flags: int) -> None:
        if self._disk.count(f"sync {self._suffix}"):
            self._platter.dirty.clear()
            raise self._disk.error(apsw.IOError, "sync failed")
        super().xSync(flags)
        self._platter.sync()


@contextmanager
def faulty_disk() -> Iterator[FaultyDisk]:
    """A faulty disk under every connection that is opened meanwhile."""
    disk = FaultyDisk()
    try:
        yield disk
    finally:
        disk.unregister()
        apsw.set_default_vfs(BASE)
