"""Many blocks decoded at once are what each of them is by itself, bit for bit; what one by one is refused is refused in a stack."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, Table, decode_columns, encode_columns
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stacked import decode_stacked, read_layout

FLOATS = st.one_of(
    st.floats(allow_nan=True),
    st.integers(-(10**6), 10**6).map(lambda k: k / 100),
    st.sampled_from([0.0, -0.0, np.nan, 1e300, 21.5]),
)
INTEGERS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3))


@st.composite
def tables(draw: st.DrawFn) -> tuple[Table, int]:
    rows = draw(st.integers(1, 12))
    # Blocks of few forms, so that parts of several blocks lie in one matrix; and of many.
    values = draw(st.sampled_from([FLOATS, st.just(21.5), st.sampled_from([1.25, np.nan]), st.just(np.nan)]))
    numbers = np.array(draw(st.lists(values, min_size=rows, max_size=rows)), np.float64)
    counts = np.array(draw(st.lists(INTEGERS, min_size=rows, max_size=rows)), np.int64)
    texts = draw(st.lists(st.sampled_from(["a", "b", "", "ü"]), min_size=rows, max_size=rows))
    return {
        "t": np.arange(rows, dtype=np.int64) * 1_000,
        "x": numbers,
        "y": numbers[::-1].copy(),
        "n": counts,
        "s": Strings.of(texts),
    }, rows


def same(stacked: Table, tables: list[Table]) -> bool:
    for name, column in stacked.items():
        parts = [table[name] for table in tables]
        if isinstance(column, Strings):
            if column.tolist() != [text for part in parts for text in part.tolist()]:
                return False
        elif (column.view(np.int64) != np.concatenate(parts).view(np.int64)).any():  # type: ignore[arg-type]
            return False
    return True


@given(st.lists(tables(), min_size=1, max_size=9))
def test_a_stack_is_its_blocks_one_after_the_other(found: list[tuple[Table, int]]) -> None:
    data = [(encode_columns(table, rows), rows) for table, rows in found]
    stack = decode_stacked([read_layout(block, rows) for block, rows in data])
    assert same(stack, [decode_columns(block, rows) for block, rows in data])
    assert same(stack, [table for table, _ in found])


@given(st.lists(tables(), min_size=2, max_size=4), st.data())
def test_what_one_block_may_not_say_a_stack_may_not_say_either(found: list[tuple[Table, int]], data: st.DataObject) -> None:
    """A damaged stack is refused, or is what its blocks are: nothing is read that one by one would be refused."""
    blocks = [(bytearray(encode_columns(table, rows)), rows) for table, rows in found]
    block, _ = blocks[data.draw(st.integers(0, len(blocks) - 1))]
    block[data.draw(st.integers(0, len(block) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        stack = decode_stacked([read_layout(bytes(block), rows) for block, rows in blocks])
    except ContractError:
        return
    assert same(stack, [decode_columns(bytes(block), rows) for block, rows in blocks])


def test_blocks_of_other_columns_are_not_stacked() -> None:
    whole = np.arange(3, dtype=np.int64)
    layouts = [read_layout(encode_columns(table, 3), 3) for table in ({"a": whole}, {"b": whole}, {"a": whole / 2})]
    for other in layouts[1:]:
        with pytest.raises(ContractError, match="several shapes"):
            decode_stacked([layouts[0], other])


@pytest.mark.parametrize(
    "spec",
    [
        ("a", "i", 0, 0, 9, False, []),
        ("a", "i", 0, 3, 1, False, []),
        ("a", "d", 10, 0, 1, False, []),
        ("a", "i", -1, 0, 1, False, []),
        ("a", "x", 0, 0, 1, False, []),
        ("a", "di", 0, 0, 1, False, []),
        ("a", "i", 0, 0, 1, True, []),
        ("a", "i", 2**63, 0, 1, False, []),
        ("a", "i", 0, 0, 2, False, []),
        ("a", "s", 0, 0, 1, False, ["x"]),
    ],
)
def test_a_form_that_there_is_not_is_refused(spec: tuple[object, ...]) -> None:
    head = msgspec.msgpack.encode([spec])
    data = len(head).to_bytes(4, "little") + head + b"\x02\x04\x06"
    with pytest.raises(ContractError):
        decode_stacked([read_layout(data, 3)] * 2)
