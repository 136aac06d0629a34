"""Finds blocks in the pages of a SQLite file whose tables cannot be followed any more. Pure: bytes in, bytes out.

- Every page that looks like the leaf of a table is read, in the file and in its write-ahead log, whatever points to it. A record
  whose last column is a blob gives that blob.
- Behind what the log holds now lie pages of its earlier rounds, which are in the file already, often older than there; and at its end those
  of a commit that was cut off. So overflow pages are taken from what is current in the log, then from the file. Only the records of
  pages that are not current themselves look at all of the log.
- Nothing found is trusted: a block carries its own CRC, and the caller checks it. Blocks that were deleted may come up too, and a blob
  comes in two versions where the log and the file differ.

The format is that of https://sqlite.org/fileformat2.html, sections 1.5, 1.6, 2.1 and 4.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import overload

_LEAF = 0x0D
_HEADER_BYTES = 100
_LOG_HEADER_BYTES = 32
_FRAME_HEADER_BYTES = 24


class Patched:
    """The bytes of `view`, but for some of its blocks of `block_bytes`: those are zeros, and what lies under them is not touched."""

    def __init__(self, view: memoryview, blocks: Set[int], block_bytes: int) -> None:
        self._view, self._blocks, self._block_bytes = view, blocks, block_bytes

    def __len__(self) -> int:
        return len(self._view)

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, int):
            return 0 if key // self._block_bytes in self._blocks else self._view[key]
        start, stop, _ = key.indices(len(self))
        parts = []
        while start < stop:
            block = start // self._block_bytes
            end = min(stop, (block + 1) * self._block_bytes)
            parts.append(bytes(end - start) if block in self._blocks else bytes(self._view[start:end]))
            start = end
        return b"".join(parts)


Buffer = bytes | memoryview | Patched


def page_bytes_of(file: Buffer, default: int) -> int:
    """The page size that the file's header gives, if it is one."""
    size = int.from_bytes(file[16:18], "big")
    size = 65_536 if size == 1 else size
    return size if bytes(file[:6]) == b"SQLite" and 512 <= size <= 65_536 and size & (size - 1) == 0 else default


def carve(file: Buffer, log: Buffer, page_bytes: int, blob_bytes_max: int) -> Iterator[tuple[int, bytes]]:
    """Row id and blob of every record found; a blob may come up more than once, and may be damaged."""
    frames = list(_frames(log, page_bytes))
    every = {number: start for number, start, _ in frames}
    current = {number: start for number, start, is_current in frames if is_current} or every
    reader = _Pages(file, log, page_bytes)
    for start in range(0, len(file) - page_bytes + 1, page_bytes):
        if file[start] == _LEAF or start == 0:  # most pages are none: a call for each would cost more than all else
            yield from reader.leaf(file, start, start // page_bytes + 1, current, blob_bytes_max)
    for number, start, is_current in frames:
        yield from reader.leaf(log, start, number, current if is_current else every, blob_bytes_max)


def _frames(log: Buffer, page_bytes: int) -> Iterator[tuple[int, int, bool]]:
    """Page number and place of every page in a log, and whether it is current: of the log's last round, and committed."""
    step = page_bytes + _FRAME_HEADER_BYTES
    starts = range(_LOG_HEADER_BYTES, len(log) - step + 1, step)
    salts = log[16:20], log[20:24]  # one is enough: the other may be damaged
    of_round = {start for start in starts if log[start + 8 : start + 12] == salts[0] or log[start + 12 : start + 16] == salts[1]}
    committed = max((start for start in of_round if any(log[start + 4 : start + 8])), default=0)
    for start in starts:
        yield int.from_bytes(log[start : start + 4], "big"), start + _FRAME_HEADER_BYTES, start in of_round and start <= committed


class _Pages:
    def __init__(self, file: Buffer, log: Buffer, page_bytes: int) -> None:
        self._file, self._log, self._page_bytes = file, log, page_bytes

    def leaf(self, source: Buffer, start: int, number: int, logged: Mapping[int, int], blob_bytes_max: int) -> Iterator[tuple[int, bytes]]:
        """The records of a page, if it is a leaf. `logged`: where pages lie in the log, by number."""
        page = bytes(source[start : start + self._page_bytes])
        head = _HEADER_BYTES if number == 1 else 0
        if page[head] != _LEAF:
            return
        cells = min(int.from_bytes(page[head + 3 : head + 5], "big"), self._page_bytes // 4)
        for i in range(cells):
            at = head + 8 + 2 * i
            cell = int.from_bytes(page[at : at + 2], "big")
            if head + 8 <= cell < self._page_bytes - 3:
                yield from self._record(page, cell, logged, blob_bytes_max)

    def _record(self, page: bytes, at: int, logged: Mapping[int, int], blob_bytes_max: int) -> Iterator[tuple[int, bytes]]:
        size, at = _varint(page, at)
        row_id, at = _varint(page, at)
        if not 4 <= size <= blob_bytes_max + 4_096:
            return
        local = self._local(size)
        payload, pointer = page[at : at + local], page[at + local : at + local + 4]
        for whole in (payload,) if local == size else self._versions(payload, pointer, size, logged):
            blob = _last_blob(whole)
            if blob is not None:
                yield row_id, blob

    def _local(self, size: int) -> int:
        """How many bytes of a record are in its leaf."""
        usable = self._page_bytes
        if size <= usable - 35:
            return size
        least = (usable - 12) * 32 // 255 - 23
        wanted = least + (size - least) % (usable - 4)
        return wanted if wanted <= usable - 35 else least

    def _versions(self, payload: bytes, pointer: bytes, size: int, logged: Mapping[int, int]) -> Iterator[bytes]:
        """A record with its overflow pages: those in `logged` from the log; and if there are any, all of them from the file too."""
        found, from_log = self._follow(payload, pointer, size, logged)
        if found is not None:
            yield found
        if from_log and (found := self._follow(payload, pointer, size, {})[0]) is not None:
            yield found

    def _follow(self, payload: bytes, pointer: bytes | memoryview, size: int, logged: Mapping[int, int]) -> tuple[bytes | None, int]:
        """A whole record, None if its pages lead nowhere; and how many of them are from the log."""
        file, page_bytes, from_log = self._file, self._page_bytes, 0
        parts: list[bytes | memoryview] = [payload]
        last, missing = len(file) - page_bytes, size - len(payload)
        while missing > 0:
            number = int.from_bytes(pointer, "big")
            if number in logged:
                source, start, from_log = self._log, logged[number], from_log + 1
            else:
                source, start = file, (number - 1) * page_bytes
                if not 0 <= start <= last:
                    return None, from_log
            parts.append(source[start + 4 : start + min(missing + 4, page_bytes)])
            missing -= page_bytes - 4
            pointer = source[start : start + 4]
        return b"".join(parts), from_log


def _last_blob(record: bytes) -> bytes | None:
    """The last column of a record, if it is a blob that ends with the record."""
    head, at = _varint(record, 0)
    kind = 0
    while at < min(head, len(record)):
        kind, at = _varint(record, at)
    size = (kind - 12) // 2
    return record[len(record) - size :] if kind >= 12 and kind % 2 == 0 and 0 < size <= len(record) - head else None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        byte = data[at + i] if at + i < len(data) else 0
        value = (value << 7) | (byte & 0x7F)
        if byte < 0x80:
            return value, at + i + 1
    last = data[at + 8] if at + 8 < len(data) else 0
    return (value << 8) | last, at + 9
