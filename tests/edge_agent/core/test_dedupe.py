"""Redelivered readings are told from new ones, within a batch and over many."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import secrets
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.dedupe import RecentKeys, hash_keys

CONTRACT = StreamContract(
    stream="room",
    version="1.0.0",
    fields=(Field("ts", FieldType.TIMESTAMP), Field("room", FieldType.STRING), Field("t", FieldType.NUMBER)),
    key=("room", "ts"),
    event_time="ts",
    entity="room",
    topic="sensors/{device}/room",
)
Key = tuple[str, int]


def table(keys: list[Key], values: list[float] | None = None) -> Table:
    return {
        "ts": np.array([ts for _, ts in keys], np.int64),
        "room": Strings.of([room for room, _ in keys]),
        "t": np.array(values or [0.0] * len(keys), np.float64),
    }


def test_only_the_key_counts() -> None:
    recent = RecentKeys(10)
    recent.remember(CONTRACT, table([("a", 1), ("b", 1)], [5.0, 6.0]))
    asked = table([("a", 1), ("a", 2), ("b", 1), ("b", 3)], [7.0, 8.0, 9.0, 1.0])
    assert recent.remember(CONTRACT, asked).tolist() == [False, True, False, True]


def test_a_reading_twice_in_one_batch_is_fresh_once() -> None:
    assert RecentKeys(10).remember(CONTRACT, table([("a", 1), ("b", 1), ("a", 1)])).tolist() == [True, True, False]


def test_the_oldest_keys_are_forgotten_first() -> None:
    recent = RecentKeys(3)
    recent.remember(CONTRACT, table([("a", n) for n in range(3)]))
    recent.remember(CONTRACT, table([("a", 3)]))
    assert copy.deepcopy(recent).remember(CONTRACT, table([("a", n) for n in range(5)])).tolist() == [True, False, False, False, True]
    recent.remember(CONTRACT, table([("a", n) for n in range(10, 20)]))
    assert recent.remember(CONTRACT, table([("a", n) for n in range(15, 20)])).tolist() == [True, True, False, False, False]
    assert len(recent) == 3


def test_whatever_chains_the_keys_share_each_is_told_from_all_others() -> None:
    limit, keys = 50, [[("a", n) for n in range(start, start + 37)] for start in range(0, 3_700, 37)]
    recent = RecentKeys(limit)  # 64 chains for 50 keys
    for before, batch in itertools.pairwise(keys):
        recent.remember(CONTRACT, table(before))
        remembered = [key for key in before if copy.deepcopy(recent).remember(CONTRACT, table([key])).tolist() == [False]]
        assert remembered == before
        assert copy.deepcopy(recent).remember(CONTRACT, table(batch)).all()


def test_other_streams_do_not_collide() -> None:
    recent = RecentKeys(10)
    recent.remember(CONTRACT, table([("a", 1)]))
    assert recent.remember(dataclasses.replace(CONTRACT, stream="hall"), table([("a", 1)])).all()


def test_the_dictionary_of_a_column_does_not_matter() -> None:
    one = table([("a", 1), ("b", 1)])
    other = {**one, "room": Strings(np.array([2, 0], np.int32), ("b", "unused", "a"))}
    assert hash_keys(CONTRACT, one).tolist() == hash_keys(CONTRACT, other).tolist()


def test_keys_of_numbers() -> None:
    contract = dataclasses.replace(CONTRACT, key=("t",))
    hashes = hash_keys(contract, table([("a", n) for n in range(4)], [0.0, -0.0, 1.5, -1.5]))
    assert hashes[0] == hashes[1] and len(set(hashes.tolist())) == 3


def test_the_order_of_key_fields_counts() -> None:
    contract = dataclasses.replace(CONTRACT, fields=(*CONTRACT.fields, Field("n", FieldType.INTEGER)), key=("ts", "n"))
    rows = {**table([("a", 1), ("a", 2)]), "n": np.array([2, 1], np.int64)}
    assert len(set(hash_keys(contract, rows).tolist())) == 2


def test_hashes_are_the_same_in_every_process() -> None:
    program = (
        "from tests.edge_agent.core.test_dedupe import CONTRACT, hash_keys, table;"
        "print(hash_keys(CONTRACT, table([('a', 1), ('ä', -2**63)])).tolist())"
    )
    outputs = {subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert outputs == {f"{hash_keys(CONTRACT, table([('a', 1), ('ä', -(2**63))])).tolist()}\n"}


def unmixed(word: int) -> int:
    """The word that splitmix64 makes this one of."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        word ^= (word >> shift) ^ (word >> 2 * shift)
        word = word * pow(factor, -1, 2**64) % 2**64
    return (word - 0x9E3779B97F4A7C15) % 2**64


def forged(victim: Key) -> Key:
    """A reading of another room at a time in range, whose key would have the same hash if there were no secret."""
    wanted = unmixed(hash_keys(CONTRACT, table([victim])).tolist()[0])
    rooms = [f"evil-{n}" for n in range(20_000)]
    zero = unmixed(0)  # the word that becomes 0: what is left is the room's part of the hash
    parts = hash_keys(CONTRACT, table([(room, zero - 2**64 * (zero >= 2**63)) for room in rooms])).tolist()
    times = [unmixed(unmixed(part) ^ wanted) for part in parts]
    return next((room, time) for room, time in zip(rooms, times, strict=True) if time < 7_258_118_400_000_000)


def test_nobody_can_compute_a_reading_that_passes_for_another_ones() -> None:
    victim = ("a", 1_800_000_000_000_000)
    evil = forged(victim)
    assert hash_keys(CONTRACT, table([evil])).tolist() == hash_keys(CONTRACT, table([victim])).tolist()
    recent = RecentKeys(10, secrets.randbits(64))
    assert recent.remember(CONTRACT, table([evil])).all() and recent.remember(CONTRACT, table([victim])).all()


def test_no_collisions_among_a_million_neighbours() -> None:
    rows = 50_000
    rooms = Strings(np.repeat(np.arange(20, dtype=np.int32), rows), tuple(f"room-{n}" for n in range(20)))
    keys: Table = {"ts": np.tile(np.arange(rows, dtype=np.int64) * 1_000_000, 20), "room": rooms}
    assert len(np.unique(hash_keys(CONTRACT, keys))) == 20 * rows


def test_a_table_without_the_key_is_refused() -> None:
    with pytest.raises(ContractError, match="'room'"):
        RecentKeys(1).remember(CONTRACT, {"ts": np.array([1], np.int64)})


def test_no_rows() -> None:
    recent = RecentKeys(5)
    assert len(recent.remember(CONTRACT, table([]))) == 0
    assert len(recent) == 0


@given(st.integers(1, 8), st.lists(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6)), max_size=6), max_size=12))
@settings(max_examples=300, deadline=None)
def test_like_a_plain_ordered_set(limit: int, batches: list[list[Key]]) -> None:
    recent, model = RecentKeys(limit), OrderedDict[Key, None]()
    for batch in batches:
        seen = set(model)
        want = [key not in seen and key not in batch[:i] for i, key in enumerate(batch)]
        assert recent.remember(CONTRACT, table(batch)).tolist() == want
        for key, fresh in zip(batch, want, strict=True):
            if fresh:
                model[key] = None
        while len(model) > limit:
            model.popitem(last=False)
        assert len(recent) == len(model)
