"""Stacks: blocks that are handled together are the blocks that came, each once."""

from __future__ import annotations

import msgspec
import numpy as np

from cloud.stacks import Block, Stack, stacked
from edge_agent.contract.columns import Strings
from tests.cloud.blocks import block


def seen(stacks: list[Stack]) -> list[tuple[object, ...]]:
    """Every reading: name of its block, and its values."""
    return [
        (*header.identity, header.contract_version, *row)
        for stack in stacks
        for header, table in stack.blocks()
        for row in zip(*(column.tolist() for column in table.values()), strict=True)
    ]


def blocks() -> list[Block]:
    found = [block(n, device=device, rows=rows) for n, rows in ((1, 3), (2, 1), (3, 5)) for device in ("d1", "d2")]
    for number, (_, table) in enumerate(found):
        table["pressure"] = np.arange(len(table["count"]), dtype=np.float64)
        table["pump"] = Strings.of([f"p{(number + i) % 4}" for i in range(len(table["count"]))])
    return found


def test_blocks_of_one_table_and_version_are_one_stack_and_come_out_as_they_went_in() -> None:
    (stack,) = stacked(blocks())
    assert [header.identity for header in stack.headers] == [header.identity for header, _ in blocks()]
    assert stack.counts.tolist() == [3, 3, 1, 1, 5, 5] and stack.starts.tolist() == [0, 3, 6, 7, 8, 13]
    assert seen([stack]) == [row for header, table in blocks() for row in seen([Stack([header], table)])]
    assert set(stack.block(2)[1]["pump"].values) == set(blocks()[2][1]["pump"].tolist())  # type: ignore[union-attr]


def test_other_lanes_versions_and_columns_are_stacks_of_their_own() -> None:
    (header, table), *others = blocks()
    other_lane = msgspec.structs.replace(header, lane="canada"), table
    other_version = msgspec.structs.replace(header, sequence=9, contract_version="1.1.0"), table
    unscored = msgspec.structs.replace(header, sequence=10), {name: column for name, column in table.items() if name != "score"}
    assert [len(stack.headers) for stack in stacked([(header, table), other_lane, other_version, unscored, *others])] == [6, 1, 1, 1]


def test_a_block_that_comes_twice_is_there_once_in_whatever_it_comes() -> None:
    (stack,) = stacked(blocks())
    once = seen(stacked([stack]))
    assert seen(stacked([stack, *blocks(), stack])) == once
    assert seen(stacked([blocks()[0], stack, stack])) == once


def test_some_blocks_of_a_stack() -> None:
    (stack,) = stacked(blocks())
    assert stack.only(lambda header: True) is stack
    assert stack.only(lambda header: False) is None
    some = stack.only(lambda header: header.device == "d2")
    assert some is not None and seen([some]) == [row for row in seen([stack]) if row[0] == "d2"]
