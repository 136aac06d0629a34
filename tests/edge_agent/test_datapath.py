"""How readings are cut into blocks."""

from __future__ import annotations

import random
import string

import msgspec
import numpy as np
import pytest

from edge_agent.contract.block import BLOCK_BYTES_MAX, ROWS_MAX, encode_block
from edge_agent.contract.columns import Strings, Table, take
from edge_agent.datapath import _parts
from tests.edge_agent.test_payload_fuzz import HEADER


def cut(lanes: list[str], table: Table) -> list[list[int]]:
    parts = [order.tolist() for _, order in _parts(Strings.of(lanes), table)]
    assert sorted(row for part in parts for row in part) == list(range(len(lanes)))
    return parts


def test_the_rows_of_each_lane_stay_in_order() -> None:
    assert cut(["b", "a", "b", "b"], {"x": np.zeros(4)}) == [[0, 2, 3], [1]]
    assert cut([], {"x": np.zeros(0)}) == []


@pytest.mark.parametrize(("columns", "rows"), [(1, ROWS_MAX + 1), (510, 3_000)])
def test_many_numbers_are_cut(columns: int, rows: int) -> None:
    parts = cut(["a"] * rows, {f"x{n}": np.zeros(rows) for n in range(columns)})
    assert len(parts) == 2 and 8 * (columns + 2) * len(parts[0]) <= BLOCK_BYTES_MAX


def test_text_that_a_sensor_compressed_is_cut_into_blocks(seed: int) -> None:
    """A sensor may send one text in many fields and compress it; column by column it does not compress."""
    chance, rows = random.Random(seed), 3_000
    texts = Strings.of(["".join(chance.choices(string.ascii_letters + string.digits, k=1_000)) for _ in range(rows)])
    table: Table = {f"s{n}": texts for n in range(8)}
    parts = cut(["a"] * rows, table)
    for part in parts:
        encode_block(msgspec.structs.replace(HEADER, rows=len(part)), take(table, np.array(part)))
    assert len(parts) > 1


def test_one_row_longer_than_a_block_is_alone() -> None:
    assert cut(["a"] * 3, {"s": Strings.of(["x", "y" * BLOCK_BYTES_MAX, "z"])}) == [[0], [1], [2]]
