"""The marks beside a buffer's file: which names it has given out, so that a file that was cut off or lost is noticed.

SQLite cannot know that the end of its log is gone, or that the file was longer: what is left is a sound, older database. Blocks that
were acknowledged would be missing without a word, and their names given to others, which the lake would take for copies.

- After each commit the epoch and the numbers of each lane are written into a small file of its own, in two slots that take turns, each
  with a CRC. It is never synced: it costs no write to the flash worth mentioning, survives kill -9, and after a power cut is
  at most older than the database, which says nothing. Only a mark that is ahead of the database tells of damage.
- A mark that cannot be written or read is left out; the buffer does not depend on it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE

log = logging.getLogger(__name__)

SLOT_BYTES = 32 * 1024
_HEAD_BYTES = 8  # length, CRC-32


class Marked(msgspec.Struct, frozen=True, array_like=True):
    """What was given out: of each lane the first sequence that waited and the last one given; `turn` counts the marks."""

    turn: int
    epoch: str
    lanes: dict[str, tuple[int, int]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Marked).decode


class Marks:
    """The marks of the buffer at `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}.marks")
        self._file: int | None = None
        self._turn = 0
        self._last: tuple[str, dict[str, int]] | None = None
        self._failed = False

    def read(self) -> Marked | None:
        """The newest mark; None if there is none that can be read."""
        try:
            data = self._path.read_bytes()
        except OSError:
            return None
        found = [mark for start in (0, SLOT_BYTES) if (mark := _parse(data[start : start + SLOT_BYTES])) is not None]
        newest = max(found, key=lambda mark: mark.turn, default=None)
        self._turn = newest.turn if newest is not None else 0
        return newest

    def write(self, epoch: str, first: dict[str, int], last: dict[str, int]) -> None:
        """Note what was given out, if that has changed. `first` and `last` are by lane."""
        if (epoch, last) == self._last:
            return
        body = _encode(Marked(self._turn + 1, epoch, {lane: (first.get(lane, number + 1), number) for lane, number in last.items()}))
        if len(body) > SLOT_BYTES - _HEAD_BYTES:
            return  # hundreds of lanes; what was noted last stays true
        head = len(body).to_bytes(4, "little") + zlib.crc32(body).to_bytes(4, "little")
        try:
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.pwrite(self._file, head + body, SLOT_BYTES * ((self._turn + 1) % 2))
        except OSError as e:
            if not self._failed:
                log.warning("buffer mark not written path=%s error=%s", self._path, e)
            self._failed = True
            self.close()
            return
        self._turn, self._last, self._failed = self._turn + 1, (epoch, dict(last)), False

    def close(self) -> None:
        """Close the file; the next `write` opens it again, by its name."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # there is nothing in it that was not written
                os.close(self._file)
        self._file, self._last = None, None


def _parse(slot: bytes) -> Marked | None:
    size = int.from_bytes(slot[:4], "little")
    body = slot[_HEAD_BYTES : _HEAD_BYTES + size]
    if not size or len(body) != size or zlib.crc32(body) != int.from_bytes(slot[4:8], "little"):
        return None
    try:
        return _decode(body)
    except UNREADABLE:
        return None
