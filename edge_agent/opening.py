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
from edge_agent.contract.errors import ContractError
from edge_agent.contract.topics import check_lane, check_name
from edge_agent.core.retention import Age, Place
from edge_agent.sealed import Keys, missing_key, open_stored, stored_header
from edge_agent.store import BLOCK_PAGES_MORE, PAGE_BYTES, PAGE_PAYLOAD_BYTES, SETTLED, TAIL_BLOCKS_MAX, DamagedError, Store

_NUMBERS = ("sequence", "id", "rows", "bytes", "last_ordinal", "first_us", "last_us", "stored_us")
_COUNTS = (
    "SELECT shelf, count(*), count(*) FILTER (WHERE settled = 0), count(*) FILTER (WHERE settled = ?),"
    f" count(*) FILTER (WHERE typeof({' + '.join(_NUMBERS)}) = 'integer'),"  # min and max see no NULL, and a fraction only at the ends
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


def load(store: Store, keys: Keys | None, boot: str, monotonic_us: int) -> Catalogue:
    """The catalogue of an open file, with the count of time that it has seen pass.

    Raises:
        DamagedError: what the file holds does not fit together.
        DiskError: it cannot be read.
        ConfigError: its newest blocks are sealed under a key that is not here.
    """
    try:
        return _load(store, keys, boot, monotonic_us)
    except (ContractError, AttributeError, TypeError, ValueError) as e:  # names that are none, text where numbers should be
        raise DamagedError(f"buffer {store.path} is damaged: {e}") from e


def _load(store: Store, keys: Keys | None, boot: str, monotonic_us: int) -> Catalogue:
    catalogue = Catalogue(store, _epoch(store))
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
    catalogue.next_id = newest[0] + 1
    tail, catalogue.age = _tail(store, catalogue, keys, *newest, boot, monotonic_us)
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
    except (msgspec.MsgspecError, TypeError):  # only history depends on it
        return {}


def check_keys(store: Store, keys: Keys | None, next_id: int) -> None:
    """See to it that every key is here that a block still needs, and note which one seals from `next_id` on.

    `meta` holds a row per change of key: `key N` with the id of the key that seals the blocks from N on, or "".

    Raises:
        ConfigError: one is missing.
    """
    rows = store.execute("SELECT CAST(substr(key, 5) AS INTEGER), value FROM meta WHERE key GLOB 'key [0-9]*' ORDER BY 1")
    for (first, key_id), (end, _) in pairwise([*rows, (_INT_MAX, "")]):
        needed = bool(key_id) and store.execute("SELECT 1 FROM blocks WHERE id >= ? AND id < ? LIMIT 1", (first, end))
        if needed and (keys is None or key_id not in keys):
            raise missing_key(key_id)
    main = keys.main if keys is not None else ""
    if main != (rows[-1][1] if rows else ""):
        with store.transaction():
            store.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"key {next_id}", main))


def _epoch(store: Store) -> str:
    found = store.execute("SELECT value FROM meta WHERE key = 'epoch'")
    if not found:
        if store.execute("SELECT 1 FROM blocks LIMIT 1") or store.execute("SELECT 1 FROM places LIMIT 1"):
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
    store: Store, catalogue: Catalogue, keys: Keys | None, newest_id: int, count_us: int, boot: str, monotonic_us: int
) -> tuple[list[Place], Age]:
    """The blocks that have no place yet, and the age as it goes on from the newest block."""
    header = _newest_header(store, catalogue, newest_id)
    age = Age(count_us, 0) if header is None else Age.resume(count_us, header.boot, header.monotonic_us, header.boot, header.monotonic_us)
    then = header.boot if header is not None else boot
    places = []
    rows = store.execute("SELECT id, block FROM blocks WHERE id > ? ORDER BY id LIMIT ?", (newest_id, 1_000 * TAIL_BLOCKS_MAX))
    for number, stored in rows:
        header, last_ordinal = read_whole(stored, keys)
        if header.epoch != catalogue.epoch:
            raise DamagedError(f"block {header.identity} is not of the epoch {catalogue.epoch}")
        age = Age.resume(age.at(age.monotonic_us), then, age.monotonic_us, header.boot, header.monotonic_us)
        then = header.boot
        shelf = catalogue.shelf(header.lane, header.stream)
        stored_us = age.base_us
        places.append(
            Place(shelf.number, header.sequence, number, header.rows, len(stored), last_ordinal, header.first_us, header.last_us, stored_us)
        )
    return places, Age.resume(age.base_us, then, age.monotonic_us, boot, monotonic_us)


def _newest_header(store: Store, catalogue: Catalogue, number: int) -> BlockHeader | None:
    """The header of the newest block that has a place; None if there is none, or it cannot be read."""
    if number == 0:
        return None
    found = store.execute("SELECT block FROM blocks WHERE id = ?", (number,))
    last = "SELECT shelf, sequence FROM places WHERE shelf = ? AND sequence = (SELECT max(sequence) FROM places WHERE shelf = ?) AND id = ?"
    places = [row for n in catalogue.shelves for row in store.execute(last, (n, n, number))]
    places = places or store.execute("SELECT shelf, sequence FROM places WHERE id = ?", (number,))  # slow: only after a salvage
    if len(places) != 1 or not found:
        raise DamagedError(f"block {number} has {len(places)} places and is there {len(found)} times")
    header, shelf = _peek(found[0][0]), catalogue.shelves[places[0][0]]
    if header is not None and (header.lane, header.stream, header.sequence) != (shelf.lane, shelf.stream, places[0][1]):
        raise DamagedError(f"block {header.identity} lies where {shelf.lane} {places[0][1]} should")
    return header


def _peek(stored: bytes) -> BlockHeader | None:
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
