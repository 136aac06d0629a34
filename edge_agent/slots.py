"""Slots: rows that small blocks use again and again, so that a commit writes little more than the block itself.

- A new row takes pages from the free list or from the file's end: then a commit writes page 1, a page of that list and an inner page of the
  table beside the block's own. A row that is overwritten by one of the very same size keeps its pages, and nothing else is written.
  So slots have a few fixed sizes, such as fill whole pages: behind a head with id and size comes what is stored, then zeros.
- A block that leaves frees its slot in memory only. What the slot held stays there until another block comes: it is stale, and told from
  what counts by its id. A block that counts has a place with that slot, or an id beyond all that were ever given places (`read_placed`).
- What slots take is bounded, and none are made while many blocks of a stream wait: a slot pays when it is used again. Larger blocks, and
  those of an outage, have rows of their own in the table `blocks`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

from edge_agent.contract.errors import ContractError
from edge_agent.core.retention import Place
from edge_agent.sealed import is_stored_block
from edge_agent.store import PAGE_BYTES, PAGE_PAYLOAD_BYTES, DamagedError

SLOTS_BYTES_MAX = 8 * 1024 * 1024
SLOTS_SHARE = 16  # of the buffer's limit, at most this part
OVERFLOW_PAGES_MAX = 15  # of a slot: beyond that, what is written beside a block hardly counts
WAITING_MAX = 512  # of a shelf: some six seconds at the default flush
PLACED = "placed"  # a key of `meta`: the highest id that was given a place
HEAD_BYTES = 16  # of a blob: id (8 bytes), bytes stored (4), CRC-32 of both (4), big-endian
HEADS = f"SELECT slot, length(block), substr(block, 1, {HEAD_BYTES}) FROM slots ORDER BY slot"
HELD = "SELECT slot, id FROM places WHERE slot <> 0"
PUT = "INSERT INTO slots VALUES (?, ?) ON CONFLICT (slot) DO UPDATE SET block = excluded.block"

_HEAD = struct.Struct(">QI")
_RECORD_BYTES = 4  # of a row beside the blob
_LEAF_BYTES = PAGE_BYTES - 35 - _RECORD_BYTES  # of a blob in its leaf; the format of https://sqlite.org/fileformat2.html, section 1.6
_SLOTS_MAX = SLOTS_BYTES_MAX // PAGE_BYTES

# The numbers are a parameter: statements with numbers of their own would each stay in the cache of statements, some 20 KB each.
_ROWS = "SELECT id, block FROM blocks WHERE id IN (SELECT value FROM json_each(?))"
_SLOTS = "SELECT slot, block FROM slots WHERE slot IN (SELECT value FROM json_each(?))"

Read = Callable[[str, tuple[Any, ...]], list[tuple[Any, ...]]]


def slots_limit(bytes_max: int) -> int:
    """What the slots of a buffer of `bytes_max` may take."""
    return min(SLOTS_BYTES_MAX, bytes_max // SLOTS_SHARE)


class Slots:
    """Which slots there are, and which are free. Changed inside transactions of the store; if one fails, made anew from the file."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._pages = bytearray(_SLOTS_MAX + 1)  # by slot; 0: there is none
        self._free: dict[int, list[int]] = {}  # by pages
        self._gone: list[int] = []  # no slots any more, and their rows are still there
        self.bytes = self.free_bytes = 0

    def load(self, rows: Iterable[tuple[Any, ...]], held: Iterable[tuple[Any, ...]]) -> list[tuple[int, int | None]]:
        """Take in the slots of a file.

        Args:
            rows: what HEADS gives: slot, size of its blob, and the head of that.
            held: what HELD gives: slot and id of each block that has a place with a slot.

        Returns:
            The free slots, as far as places know, each with the id of the block that it holds or held; None: its head is damaged.

        Raises:
            DamagedError: they do not fit together.
        """
        numbers: dict[int, int | None] = {}
        for slot, size, head in rows:
            overflow, rest = divmod(size - _LEAF_BYTES, PAGE_PAYLOAD_BYTES) if isinstance(size, int) else (0, 1)
            if not 1 <= slot <= _SLOTS_MAX or rest or not 0 <= overflow <= OVERFLOW_PAGES_MAX:
                raise DamagedError(f"slot {slot} is of {size} bytes")
            self._resize(slot, overflow + 1)
            numbers[slot] = _read_head(head)[0] if _is_head(head) else None
        for slot, number in held:
            if slot not in numbers or numbers[slot] not in (number, None):
                raise DamagedError(f"block {number} is not in slot {slot}, or not alone")
            del numbers[slot]
        for slot in reversed(numbers):
            self.release(slot)
        return list(numbers.items())

    def hold(self, slot: int) -> None:
        """A free slot holds a block after all."""
        self._free[self._pages[slot]].remove(slot)
        self.free_bytes -= self._pages[slot] * PAGE_BYTES

    def free(self) -> set[int]:
        """Those that hold nothing that counts."""
        return {slot for slots in self._free.values() for slot in slots}

    def take(self, size: int, waiting: int) -> int:
        """A slot for `size` bytes of a shelf on which `waiting` blocks wait; 0: there is none, and a row in `blocks` is wanted.

        `give_back` must follow in the same transaction, before the slot is written.
        """
        pages = _pages(size)
        if pages > OVERFLOW_PAGES_MAX + 1:
            return 0
        if self._free.get(pages):
            return self._pop(pages)
        room = self._bytes_max - pages * PAGE_BYTES
        if waiting > WAITING_MAX or self.bytes - self.free_bytes > room:
            return 0
        while self.bytes > room:  # blocks have become larger or smaller: the size that most are free of gives way
            self._drop(max(self._free, key=lambda n: len(self._free[n])))
        slot = self._gone.pop() if self._gone else self._pages.index(0, 1)
        self._resize(slot, pages)
        return slot

    def release(self, slot: int) -> None:
        """The block that it held has left."""
        pages = self._pages[slot]
        self._free.setdefault(pages, []).append(slot)
        self.free_bytes += pages * PAGE_BYTES

    def give_back(self, bytes_max: int | None = None) -> list[int]:
        """Free slots beyond `bytes_max`, or the limit, as after it was lowered: they are no slots any more, and their rows must go."""
        limit = self._bytes_max if bytes_max is None else bytes_max
        for pages, slots in self._free.items():
            while slots and self.bytes > limit:
                self._drop(pages)
        gone, self._gone = self._gone, []
        return gone

    def _drop(self, pages: int) -> None:
        """A free slot of so many pages is none any more."""
        slot = self._pop(pages)
        self._resize(slot, 0)
        self._gone.append(slot)

    def _pop(self, pages: int) -> int:
        self.free_bytes -= pages * PAGE_BYTES
        return self._free[pages].pop()

    def _resize(self, slot: int, pages: int) -> None:
        self.bytes += (pages - self._pages[slot]) * PAGE_BYTES
        self._pages[slot] = pages


def fill(number: int, stored: bytes) -> bytes:
    """The blob of a slot that holds the block `number`, as it is stored."""
    head = _HEAD.pack(number, len(stored))
    size = _LEAF_BYTES + (_pages(len(stored)) - 1) * PAGE_PAYLOAD_BYTES
    return b"".join([head, zlib.crc32(head).to_bytes(4, "big"), stored]).ljust(size, b"\0")


def unfill(blob: object) -> tuple[int, bytes]:
    """The number and the stored bytes of the block that a slot holds, or held.

    Raises:
        ContractError: it is no blob of a slot, or its head is damaged.
    """
    if not isinstance(blob, bytes) or not _is_head(blob):
        raise ContractError("a slot's head is damaged")
    number, size = _read_head(blob)
    return number, blob[HEAD_BYTES : HEAD_BYTES + size]


def stored_blocks(read: Read, places: Iterable[Place]) -> dict[int, Any]:
    """What is stored as the blocks of these places, by id; what has left is missing, or is another block's."""
    rows, slots = [], {}
    for place in places:
        if place.slot:
            slots[place.slot] = place
        else:
            rows.append(place.id)
    found = dict(read(_ROWS, (json.dumps(rows),))) if rows else {}
    for slot, blob in read(_SLOTS, (json.dumps(list(slots)),)) if slots else ():
        place = slots[slot]
        found[place.id] = blob[HEAD_BYTES : HEAD_BYTES + place.bytes] if isinstance(blob, bytes) else blob
    return found


def blocks_in_slots(read: Callable[[str], Iterable[tuple[Any, ...]]]) -> Iterator[tuple[int, bytes]]:
    """Id and stored bytes of every block that counts: those with a place, and those that are too new for one.

    Raises:
        ContractError: which those are cannot be said.
    """
    places = {slot: (number, size) for slot, number, size in read("SELECT slot, id, bytes FROM places WHERE slot <> 0")}
    placed = read_placed(list(read(f"SELECT value FROM meta WHERE key = '{PLACED}'")))
    newest = [number for (number,) in read("SELECT max(id) FROM places") if number is not None]
    for number in chain(newest, *places.values()):
        if not isinstance(number, int):
            raise ContractError(f"{number!r} stands in a place where a number should")
    placed = max(placed, *newest, 0)
    for slot, blob in read("SELECT slot, block FROM slots"):
        try:
            number, stored = unfill(blob)
        except ContractError:  # its place knows what the head should say
            number, size = places.get(slot, (placed, 0))
            stored = blob[HEAD_BYTES : HEAD_BYTES + size] if isinstance(blob, bytes) else b""
        if slot in places or number > placed:
            yield number, stored


def carved_block(row: int, blob: bytes) -> tuple[int, bytes] | None:
    """Id and stored bytes of a block that was found in a row's blob, of `blocks` or of `slots`; None: it holds none."""
    if is_stored_block(blob):
        return row, blob
    try:
        number, stored = unfill(blob)
    except ContractError:
        return None
    return (number, stored) if is_stored_block(stored) else None


def placed_value(number: int) -> str:
    """The value of `meta`'s row PLACED: with a checksum, because it tells what counts from what is stale."""
    return f"{number} {zlib.crc32(str(number).encode()):08x}"


def read_placed(rows: list[tuple[Any, ...]]) -> int:
    """The number in `meta`'s row PLACED; 0 if there is none yet.

    Raises:
        ContractError: it is damaged.
    """
    if not rows:
        return 0
    number = str(rows[0][0]).partition(" ")[0]
    if not number.isdecimal() or placed_value(int(number)) != rows[0][0]:
        raise ContractError(f"{rows[0][0]!r} is not the number of the last block that was given a place")
    return int(number)


def _is_head(head: object) -> bool:
    if not isinstance(head, bytes) or len(head) < HEAD_BYTES:
        return False
    return zlib.crc32(head[: _HEAD.size]) == int.from_bytes(head[_HEAD.size : HEAD_BYTES], "big")


def _read_head(blob: bytes) -> tuple[int, int]:
    number, size = _HEAD.unpack_from(blob)
    return number, size


def _pages(size: int) -> int:
    """Pages of a slot for a block of `size` bytes: a leaf, and overflow pages."""
    return 1 + max(0, -(-(HEAD_BYTES + size - _LEAF_BYTES) // PAGE_PAYLOAD_BYTES))
