"""What the data path makes of one batch before it is stored."""

from __future__ import annotations

import random
import string

import msgspec
import numpy as np
import pytest

from edge_agent.contract.block import ROWS_MAX, encode_block
from edge_agent.contract.columns import Strings, Table, take
from edge_agent.datapath import _parts
from tests.contract.tables import HEADER


def sealed(table: Table, rows: int) -> int:
    """The bytes of a block."""
    return len(encode_block(msgspec.structs.replace(HEADER, rows=rows), table))


def wide(rng: random.Random, characters: int) -> str:
    """Text that takes four bytes a character and cannot be compressed below twenty bits."""
    return "".join(map(chr, rng.choices(range(0x10000, 0x110000), k=characters)))


@pytest.mark.parametrize(
    ("rows", "columns", "characters", "parts"),
    [(4_096, 63, 0, 2), (ROWS_MAX, 3, 0, 2), (4_096, 8, 1_000, 5), (200, 1, 16_000, 4), (30, 1, 300_000, 7)],
)
def test_every_part_fits_a_block_and_no_row_is_left_out(rows: int, columns: int, characters: int, parts: int, seed: int) -> None:
    rng = random.Random(seed)
    table: Table = {f"c{n}": np.frombuffer(rng.randbytes(8 * rows), np.float64) for n in range(columns)}
    if characters:
        table["text"] = Strings.of([wide(rng, characters) for _ in range(rows)])
    lanes = Strings.of(["eu" if rng.random() < 0.9 else "us" for _ in range(rows)])
    made = list(_parts(lanes, table))
    assert sorted(row for _, order in made for row in order.tolist()) == list(range(rows))
    assert all(set(lanes[order].tolist()) == {lanes.values[code]} for code, order in made)
    assert len(made) <= parts
    for _, order in made:
        sealed(take(table, order), len(order))  # or it raises


def test_the_rows_of_each_lane_stay_in_order() -> None:
    def cut(lanes: list[str]) -> list[list[int]]:
        return [order.tolist() for _, order in _parts(Strings.of(lanes), {"x": np.zeros(len(lanes))})]

    assert cut(["b", "a", "b", "b"]) == [[0, 2, 3], [1]]
    assert cut([]) == []


def test_text_that_a_sensor_compressed_is_cut_into_blocks(seed: int) -> None:
    """A sensor may send one text in many fields and compress it; column by column it does not compress."""
    chance, rows = random.Random(seed), 3_000
    texts = Strings.of(["".join(chance.choices(string.ascii_letters + string.digits, k=1_000)) for _ in range(rows)])
    table: Table = {f"s{n}": texts for n in range(8)}
    made = [order for _, order in _parts(Strings.of(["a"] * rows), table)]
    assert len(made) > 1 and sum(map(len, made)) == rows
    for order in made:
        sealed(take(table, order), len(order))  # or it raises
