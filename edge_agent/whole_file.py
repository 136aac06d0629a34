"""Files that are read whole and replaced whole: a power cut leaves the old one or the new one.

replace_whole(path, data)
if stamp(path) != before: ...
with mapped(path) as view: ...
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from edge_agent.core.carve import Patched

LOOK_BYTES = 1 << 20


def replace_whole(path: Path, data: bytes) -> None:
    """Put a file with `data` in the place of the one at `path`; on return it is on the disk.

    Raises:
        OSError: the disk does not take it; the old file is as it was.
    """
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def stamp(path: Path | None) -> tuple[int, int, int]:
    """What is another one once the file has been replaced or written; zeros while it is not there: who reads it then says what is wrong."""
    with contextlib.suppress(OSError):
        if path is not None:
            found = path.stat()
            return found.st_mtime_ns, found.st_size, found.st_ino
    return 0, 0, 0


def sync(path: Path) -> None:
    """See to it that a file, or the names in a directory, survive a power cut.

    Raises:
        OSError: the disk failed.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def keep_owner(made: Path, before: Path) -> None:
    """Give a file to the owner of another: what root has made (`sudo edge-agent fsck --repair`), the agent must be able to open.

    No link is followed: whose directory it is could have put one there, to a file of root's.

    Raises:
        OSError: the disk failed.
    """
    if os.geteuid() == 0:
        owner = before.stat()
        os.chown(made, owner.st_uid, owner.st_gid, follow_symlinks=False)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[bytes | memoryview | Patched]:
    """The bytes of a file, read as they are needed; none if it is not there.

    What the disk does not give back (a bad sector) is zeros: to touch it in a mapping would end the process.

    Raises:
        OSError: it cannot be read.
    """
    if not path.exists() or path.stat().st_size == 0:
        yield b""
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
        bad = _bad_pages(file.fileno(), len(view))
        yield Patched(view, bad, mmap.PAGESIZE) if bad else view


def _bad_pages(handle: int, size: int) -> set[int]:
    """The pages of a file that the disk does not give back."""
    bad = set[int]()
    for start in range(0, size, LOOK_BYTES):
        end = min(size, start + LOOK_BYTES)
        if not _reads(handle, start, end):
            pages = range(start, end, mmap.PAGESIZE)
            bad |= {page // mmap.PAGESIZE for page in pages if not _reads(handle, page, min(end, page + mmap.PAGESIZE))}
    return bad


def _reads(handle: int, start: int, end: int) -> bool:
    """Whether all bytes between are given; up to a bad one, those before it are."""
    try:
        return len(os.pread(handle, end - start, start)) == end - start
    except OSError as e:
        if e.errno != errno.EIO:
            raise
        return False
