"""Readings seen before: brokers deliver at least once.

- A reading is named by the key of its contract. Keys are hashed to 64 bits, whole columns at a time: text by
  BLAKE2b (once per distinct value), then mixed with the bits of numbers by splitmix64 (Steele et al., 2014).
- The hash begins with `secret`, which no sensor knows: both steps can be undone, so a sensor could otherwise compute a reading of its own
  whose key hashes to that of another's next one, which would then be dropped as seen.
- The newest `limit` keys are remembered. Two different readings collide with a chance of limit / 2**64 each.
- `remember` asks and tells in one. So what is remembered must be stored next, or the process end without it.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import Column, Ints, Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import StreamContract

Hashes = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

NEVER = np.int64(-1)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_LAST_SHIFT = np.uint64(31)


class RecentKeys:
    """The keys of the newest `limit` readings, of any streams. `secret`: 64 random bits.

    Arrays of one size from the start, chained by the low bits of the keys as LZ77 chains what it has seen: a link that leads to a key
    older than the ring holds ends its chain, so nothing is ever taken out. A set of as many Python integers takes five times the memory,
    and to make room for new ones it is copied whole now and then: holes of megabytes in the heap.
    """

    def __init__(self, limit: int, secret: int = 0) -> None:
        if limit < 1:
            raise ValueError(f"limit {limit} of remembered keys; at least 1")
        self.limit, self._secret = limit, secret
        self._written = 0  # keys ever written; number n lies in slot n % limit
        self._ring = np.zeros(limit, np.uint64)
        self._before = np.full(limit, NEVER)  # of each slot: the number of the key before it in its chain
        self._newest = np.full(1 << (limit - 1).bit_length(), NEVER)  # of each chain: the number of its newest key

    def __len__(self) -> int:
        return min(self._written, self.limit)

    def remember(self, contract: StreamContract, table: Table) -> Mask:
        """Remember the keys of these rows, forgetting the oldest beyond the limit.

        Returns True for each row (rows,) whose key was neither remembered nor that of an earlier row.

        Raises:
            ContractError: the table lacks a field of the key.
        """
        keys = hash_keys(contract, table, self._secret)
        chains = (keys & np.uint64(len(self._newest) - 1)).astype(np.int64)
        fresh = self._fresh(keys, chains)
        self._write(keys[fresh][-self.limit :], chains[fresh][-self.limit :])
        return fresh

    def _fresh(self, keys: Hashes, chains: Ints) -> Mask:
        fresh = np.ones(len(keys), np.bool_)
        if len(set(keys.tolist())) < len(keys):  # rare: one more sorting is saved
            fresh[:] = False
            fresh[np.unique(keys, return_index=True)[1]] = True
        oldest = max(0, self._written - self.limit)
        numbers = self._newest[chains]
        rows = np.flatnonzero(numbers >= oldest)
        while len(rows):  # one link of all chains at a time
            slots = numbers[rows] % self.limit
            fresh[rows[self._ring[slots] == keys[rows]]] = False
            numbers[rows] = self._before[slots]
            rows = rows[numbers[rows] >= oldest]
        return fresh

    def _write(self, keys: Hashes, chains: Ints) -> None:
        numbers = np.arange(self._written, self._written + len(keys))
        before = self._newest[chains]
        order = np.argsort(chains, kind="stable")
        again = np.flatnonzero(np.diff(chains[order]) == 0)  # two of one chain in this batch: the later one follows the earlier
        before[order[again + 1]] = numbers[order[again]]
        slots = numbers % self.limit
        self._ring[slots], self._before[slots] = keys, before
        self._newest[chains] = numbers  # of several in one chain NumPy keeps the last
        self._written += len(keys)


def hash_keys(contract: StreamContract, table: Table, secret: int = 0) -> Hashes:
    """A 64-bit hash (rows,) of stream, key and secret, the same on every machine and in every process.

    Raises:
        ContractError: the table lacks a field of the key.
    """
    rows = len(next(iter(table.values()), ()))
    hashes = np.full(rows, _hash_text(contract.stream) ^ secret, np.uint64)
    for name in contract.key:
        if name not in table:
            raise ContractError(f"table lacks {name!r}, part of the key of stream {contract.stream!r}")
        hashes = _splitmix(hashes ^ _splitmix(_words(table[name])))
    return hashes


def _words(column: Column) -> Hashes:
    """Each value as 64 bits; equal values give equal bits."""
    if isinstance(column, Strings):
        return np.array([_hash_text(v) for v in column.values], np.uint64)[column.codes]
    if column.dtype == np.int64:
        return column.view(np.uint64)
    return (np.ascontiguousarray(column) + 0.0).view(np.uint64)  # -0.0 + 0.0 is 0.0


def _hash_text(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _splitmix(words: Hashes) -> Hashes:
    words = words + _GOLDEN
    for shift, factor in _MIX:
        words = (words ^ (words >> shift)) * factor
    return words ^ (words >> _LAST_SHIFT)
