"""Opening a buffer's file: make its catalogue, and notice what does not fit together.

- One pass over `places` and the headers of at most a few dozen blocks: a gigabyte of backlog opens in well under a second.
- A lane must hold as many blocks as its numbers say, every name must be one, every number in its bounds. If not, the file is
  damaged as a whole and is salvaged (edge_agent.salvage); a damaged block alone is found when it is read.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np

from edge_agent.catalogue import Catalogue, Shelf
from edge_agent.contract.block import ORDINAL, BlockHeader, decode_block
from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.contract.topics import check_lane, check_name
from edge_agent.core.retention import Age, Place
from edge_agent.sealed import KEY_ID_BYTES, SEALED_MAGIC, Keys, missing_key, open_stored, sealed_under, stored_header
from edge_agent.slots import HEAD_BYTES, HEADS, HELD, PLACED, Slots, read_placed, stored_blocks, unfill
from edge_agent.store import BLOCK_PAGES_MORE, PAGE_BYTES, PAGE_PAYLOAD_BYTES, SETTLED, TAIL_BLOCKS_MAX, DamagedError, Store

_NUMBERS = ("sequence", "id", "rows", "bytes", "last_ordinal", "first_us", "last_us", "stored_us")
_COUNTS = (
    "SELECT shelf, count(*), count(*) FILTER (WHERE settled = 0), count(*) FILTER (WHERE settled = ?),"
    f" count(*) FILTER (WHERE typeof({' + '.join(_NUMBERS)} + slot) = 'integer'),"  # min and max see no NULL
    " coalesce(sum(bytes) FILTER (WHERE settled = 0), 0), coalesce(sum(rows) FILTER (WHERE settled = 0), 0),"
    " min(sequence) FILTER (WHERE settled = 0), min(sequence) FILTER (WHERE settled <> 0),"
    f" {', '.join(f'min({n}), max({n})' for n in _NUMBERS)},"
    f" coalesce(sum((bytes / {PAGE_PAYLOAD_BYTES} + {BLOCK_PAGES_MORE}) * {PAGE_BYTES}) FILTER (WHERE settled <> 0), 0)"
    " FROM places GROUP BY shelf"
)
GAPS = "gaps"  # a key of `meta`: where ordinals went on after a salvage
_EPOCH = re.compile(r"[0-9a-f]{16}")
_INT_MAX = 2**62
Row = tuple[Any, ...]


def load(store: Store, keys: Keys | None, boot: str, monotonic_us: int, slots_bytes_max: int) -> Catalogue:
    """The catalogue of an open file, with the count of time that it has seen pass.

    Raises:
        DamagedError: what the file holds does not fit together.
        DiskError: it cannot be read.
        ConfigError: its newest blocks are sealed under a key that is not here.
    """
    try:
        return _load(Catalogue(store, _epoch(store), Slots(slots_bytes_max)), keys, boot, monotonic_us)
    except (ContractError, AttributeError, TypeError, ValueError) as e:  # names that are none, text where numbers should be
        raise DamagedError(f"buffer {store.path} is damaged: {e}") from e


def _load(catalogue: Catalogue, keys: Keys | None, boot: str, monotonic_us: int) -> Catalogue:
    store = catalogue.store
    for number, lane, stream in store.execute("SELECT shelf, lane, stream FROM shelves"):
        catalogue.add_shelf(Shelf(_number(number, 1), check_lane(lane), check_name(stream, "stream")))
    counts, newest = Counter[str](), (0, 0)  # id and age count of the newest block that has a place
    for row in store.execute(_COUNTS, (SETTLED,)):
        shelf, blocks, shelf_newest = _count_shelf(catalogue, row)
        counts[shelf.lane] += blocks
        newest = max(newest, shelf_newest)
    for stream, ordinal in store.execute("SELECT stream, next_ordinal FROM streams"):
        name = check_name(stream, "stream")
        catalogue.ordinals[name] = max(catalogue.ordinals.get(name, 0), _number(ordinal))
    catalogue.gaps = _gaps(store)
    stored = {check_lane(lane): (_number(last), _number(gone)) for lane, last, gone in store.execute("SELECT * FROM lanes")}
    for lane, (last, gone) in stored.items():
        catalogue.sequences[lane] = max(catalogue.sequences.get(lane, 0), last)
        catalogue.gone[lane] = gone
    placed = max(newest[0], read_placed(store.execute("SELECT value FROM meta WHERE key = ?", (PLACED,))))
    catalogue.next_id = placed + 1
    tail, catalogue.age = _tail(catalogue, keys, placed, newest, boot, monotonic_us)
    catalogue.put_tail(tail)
    counts.update(catalogue.shelves[p.shelf].lane for p in tail)
    for lane in catalogue.sequences.keys() | counts.keys():
        if catalogue.sequences.get(lane, 0) - catalogue.gone[lane] != counts[lane]:
            raise DamagedError(
                f"lane {lane!r} holds {counts[lane]} blocks; {catalogue.sequences.get(lane, 0)} were stored, {catalogue.gone[lane]} left"
            )
    return catalogue


def _gaps(store: Store) -> dict[str, tuple[int, int]]:
    found = store.execute("SELECT value FROM meta WHERE key = ?", (GAPS,))
    try:
        return msgspec.msgpack.decode(found[0][0], type=dict[str, tuple[int, int]]) if found else {}
    except (*UNREADABLE, TypeError):  # only history depends on it
        return {}


def check_keys(catalogue: Catalogue, keys: Keys | None) -> None:
    """See to it that every key is here that a block still needs, and note which one seals from the next id on.

    `meta` holds a row per change of key: `key N` with the id of the key that seals the blocks from N on, or "".

    Raises:
        ConfigError: one is missing.
    """
    store = catalogue.store
    rows = store.execute("SELECT CAST(substr(key, 5) AS INTEGER), value FROM meta WHERE key GLOB 'key [0-9]*' ORDER BY 1")
    for (first, key_id), (end, _) in pairwise([*rows, (_INT_MAX, "")]):
        missing = bool(key_id) and (keys is None or key_id not in keys)
        if missing and (
            store.execute("SELECT 1 FROM blocks WHERE id >= ? AND id < ? LIMIT 1", (first, end)) or _sealed_slots(catalogue, key_id)
        ):
            raise missing_key(key_id)
    main = keys.main if keys is not None else ""
    if main != (rows[-1][1] if rows else ""):
        with store.transaction():
            store.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"key {catalogue.next_id}", main))


def _sealed_slots(catalogue: Catalogue, key_id: str) -> bool:
    """Whether a slot holds a block under this key."""
    query = "SELECT slot, substr(block, ?, ?) FROM slots"
    starts = catalogue.store.execute(query, (HEAD_BYTES + 1, len(SEALED_MAGIC) + KEY_ID_BYTES))
    free = catalogue.slots.free()
    return any(sealed_under(start) == key_id and slot not in free for slot, start in starts)


def _epoch(store: Store) -> str:
    found = store.execute("SELECT value FROM meta WHERE key = 'epoch'")
    if not found:
        if any(store.execute(f"SELECT 1 FROM {table} LIMIT 1") for table in ("blocks", "slots", "places")):
            raise DamagedError("the buffer holds blocks, but not its epoch")
        with store.transaction():
            store.execute("INSERT INTO meta VALUES ('epoch', ?)", (secrets.token_hex(8),))
        return _epoch(store)
    epoch = str(found[0][0])
    if not _EPOCH.fullmatch(epoch):
        raise DamagedError(f"epoch {epoch!r} is none")
    return epoch


def _count_shelf(catalogue: Catalogue, row: Row) -> tuple[Shelf, int, tuple[int, int]]:
    """The shelf of a row of _COUNTS, how many places it has, and id and age count of its newest."""
    number, blocks, waiting, settled, numbers, size, rows, first_waiting, first_settled, *bounds, settled_bytes = row
    shelf = catalogue.shelves.get(number)
    if shelf is None or waiting + settled != blocks or numbers != blocks:
        raise DamagedError(f"shelf {number}: {blocks} places, {waiting} waiting, {settled} settled, {numbers} of nothing but numbers")
    for name, low, high in zip(_NUMBERS, bounds[::2], bounds[1::2], strict=True):
        _number(low, 1 if name in ("sequence", "id", "rows", "bytes") else -_INT_MAX)
        _number(high)
    highest = dict(zip(_NUMBERS, bounds[1::2], strict=True))
    shelf.waiting, shelf.waiting_bytes, shelf.waiting_rows = waiting, size, rows
    shelf.first_waiting = first_waiting or highest["sequence"] + 1
    shelf.first_settled, shelf.settled_bytes = first_settled, settled_bytes
    catalogue.sequences[shelf.lane] = max(catalogue.sequences.get(shelf.lane, 0), highest["sequence"])
    catalogue.ordinals[shelf.stream] = max(catalogue.ordinals.get(shelf.stream, 0), highest["last_ordinal"] + 1)
    return shelf, blocks, (highest["id"], highest["stored_us"])


def _tail(
    catalogue: Catalogue, keys: Keys | None, placed: int, newest: tuple[int, int], boot: str, monotonic_us: int
) -> tuple[list[Place], Age]:
    """The blocks beyond `placed`, which have no place yet, and the age as it goes on from the newest block that has one."""
    newest_id, count_us = newest
    header = _newest_header(catalogue, newest_id)
    age = Age(count_us, 0) if header is None else Age.resume(count_us, header.boot, header.monotonic_us, header.boot, header.monotonic_us)
    then = header.boot if header is not None else boot
    places = []
    rows = catalogue.store.execute("SELECT id, block FROM blocks WHERE id > ? ORDER BY id LIMIT ?", (placed, 1_000 * TAIL_BLOCKS_MAX))
    unplaced = [(number, stored, 0) for number, stored in rows] + _tail_slots(catalogue, placed)
    for number, stored, slot in sorted(unplaced):
        header, last_ordinal = read_whole(stored, keys)
        if header.epoch != catalogue.epoch:
            raise DamagedError(f"block {header.identity} is not of the epoch {catalogue.epoch}")
        age = Age.resume(age.at(age.monotonic_us), then, age.monotonic_us, header.boot, header.monotonic_us)
        then = header.boot
        shelf = catalogue.shelf(header.lane, header.stream)
        size, span = len(stored), (header.first_us, header.last_us)
        places.append(Place(shelf.number, header.sequence, number, header.rows, size, last_ordinal, *span, age.base_us, slot=slot))
    return places, Age.resume(age.base_us, then, age.monotonic_us, boot, monotonic_us)


def _tail_slots(catalogue: Catalogue, placed: int) -> list[tuple[int, bytes, int]]:
    """Number, stored bytes and slot of the blocks beyond `placed` that are in slots."""
    store, tail = catalogue.store, []
    for slot, number in catalogue.slots.load(store.execute(HEADS), store.execute(HELD)):
        if number is None or number > placed:
            found = store.execute("SELECT block FROM slots WHERE slot = ?", (slot,))
            if not found:
                raise DamagedError(f"slot {slot} is there, but not where its number leads")
            blob = found[0][0]
            if number is not None:
                tail.append((number, unfill(blob)[1], slot))
                catalogue.slots.hold(slot)
            elif not _is_missed(catalogue, _peek(blob[HEAD_BYTES:])):
                raise DamagedError(f"slot {slot}: its head is damaged, and nobody would miss its block")
    return tail


def _is_missed(catalogue: Catalogue, header: BlockHeader | None) -> bool:
    """Whether the lane will be found to lack this block, should it not be stale."""
    return header is not None and header.sequence <= catalogue.sequences.get(header.lane, 0)


def _newest_header(catalogue: Catalogue, number: int) -> BlockHeader | None:
    """The header of the newest block that has a place; None if there is none, or it cannot be read."""
    if number == 0:
        return None
    places = catalogue.numbered(number)
    found = stored_blocks(catalogue.store.execute, places)
    if len(places) != 1 or not found:
        raise DamagedError(f"block {number} has {len(places)} places and is there {len(found)} times")
    header, shelf = _peek(found[number]), catalogue.shelves[places[0].shelf]
    if header is not None and (header.lane, header.stream, header.sequence) != (shelf.lane, shelf.stream, places[0].sequence):
        raise DamagedError(f"block {header.identity} lies where {shelf.lane} {places[0].sequence} should")
    return header


def _peek(stored: Any) -> BlockHeader | None:
    try:
        return stored_header(stored)
    except ContractError:  # it is damaged, and will be found so when it is read
        return None


def read_whole(stored: bytes, keys: Keys | None) -> tuple[BlockHeader, int]:
    """The header of a stored block, and the highest ordinal among its readings.

    Raises:
        ContractError: it is not whole.
        ConfigError: it is sealed under a key that is not here.
    """
    header, table = decode_block(open_stored(stored, keys), only=ORDINAL)
    ordinals = table.get(ORDINAL)
    if not isinstance(ordinals, np.ndarray):
        raise ContractError("a stored block has no ordinals")
    return header, int(ordinals.max())


def _number(value: object, least: int = -_INT_MAX) -> int:
    if not isinstance(value, int) or not least <= value <= _INT_MAX:
        raise DamagedError(f"{value!r} stands where a number should")
    return value
