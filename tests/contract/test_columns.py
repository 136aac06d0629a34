"""The column codec: lossless in every bit, small for sensor data, and never more than a ContractError on foreign bytes."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, Table, concat, decode_columns, encode_columns, take
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stacked import decode_stacked, read_layout
from tests.contract.tables import same, tables

GOLDEN: list[tuple[str, Table, str]] = [
    ("decimals with a gap", {"t": np.array([21.5, 21.4, np.nan])}, "0b0000009197a174a164010102c39020ae010100"),
    (
        "integers that wrap",
        {"n": np.array([1, 2, 3, -(2**63)])},
        "0b0000009197a16ea169000008c290020406ff000000ff000000ff000000ff000000ff000000ff000000ff000000ff",
    ),
    (
        "floats that are no decimals",
        {"x": np.array([0.1 + 0.2, np.inf, -0.0])},
        "0b0000009197a178a172000008c290340000330000330000330000330000330000d3f0003f7f80",
    ),
    (
        "text and a constant",
        {"e": Strings.of(["b", "a", "b"]), "k": np.array([7, 7, 7])},
        "190000009297a165a173000001c292a162a16197a16ba169000101c2900002000e0000",
    ),
]


@pytest.mark.parametrize(("table", "encoded"), [(t, h) for _, t, h in GOLDEN], ids=[name for name, _, _ in GOLDEN])
def test_golden_columns_are_encoded_and_decoded(table: Table, encoded: str) -> None:
    rows = len(next(iter(table.values())))
    assert encode_columns(table, rows).hex() == encoded
    assert same(decode_columns(bytes.fromhex(encoded), rows), table)


@given(tables(), st.integers(1, 100))
def test_how_many_columns_are_encoded_at_once_changes_no_byte(made: tuple[Table, int], cells: int) -> None:
    table, rows = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_agent.contract.columns.CELLS_AT_ONCE", cells)
        pieces = encode_columns(table, rows)
    assert pieces == encode_columns(table, rows)


@given(tables())
def test_every_table_comes_back_bit_for_bit(made: tuple[Table, int]) -> None:
    table, rows = made
    assert same(decode_columns(encode_columns(table, rows), rows), table)


@given(tables(), st.data())
def test_damaged_columns_raise_nothing_but_contract_errors(made: tuple[Table, int], data: st.DataObject) -> None:
    table, rows = made
    damaged = bytearray(encode_columns(table, rows))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    check_decodes_or_refuses(bytes(damaged[:cut] if data.draw(st.booleans()) else damaged), rows)


@given(st.binary(max_size=200), st.integers(1, 50))
def test_foreign_bytes_raise_nothing_but_contract_errors(data: bytes, rows: int) -> None:
    check_decodes_or_refuses(data, rows)


def check_decodes_or_refuses(data: bytes, rows: int) -> None:
    try:
        table = decode_columns(data, rows)
    except ContractError:
        return
    assert all(len(column) == rows for column in table.values())


@given(tables())
def test_one_column_alone_is_what_it_is_among_all(made: tuple[Table, int]) -> None:
    table, rows = made
    for name, column in table.items():
        assert same(decode_columns(encode_columns(table, rows), rows, only=name), {name: column})


def test_wrong_length_and_too_many_columns_are_refused() -> None:
    with pytest.raises(ContractError, match="'t' has 2 rows, the block has 3"):
        encode_columns({"t": np.zeros(2)}, 3)
    with pytest.raises(ContractError, match="at most"):
        encode_columns({str(i): np.zeros(1) for i in range(600)}, 1)


def test_columns_that_take_no_bytes_but_much_memory_are_refused() -> None:
    specs = [[f"c{n}", "i", 0, 2, 0, False, []] for n in range(200)]
    head = msgspec.msgpack.encode(specs)
    data = len(head).to_bytes(4, "little") + head
    assert len(decode_columns(data, 40_000)) == len(decode_stacked([read_layout(data, 40_000)])) == 200
    for read in (decode_columns, read_layout):
        with pytest.raises(ContractError, match="cells fit a block"):
            read(data, 65_536)
    with pytest.raises(ContractError, match="cells fit a block"):
        encode_columns({f"c{n}": np.zeros(65_536) for n in range(200)}, 65_536)


def test_readings_of_a_sensor_take_a_twentieth_of_their_json() -> None:
    rng = np.random.default_rng(1)
    steps = np.round(500 + np.cumsum(rng.integers(-3, 4, 1_000)) / 10, 1)
    table: Table = {"ts": np.arange(1_000) * 3_600_000_000, "engine": Strings.of(["engine-001"] * 1_000), "t": steps}
    json = sum(len(f'{{"ts":{i * 3600},"engine":"engine-001","t":{value}}}') for i, value in enumerate(steps.tolist()))
    assert len(zstandard.compress(encode_columns(table, 1_000))) < json / 20


@given(tables(), st.data())
def test_taking_and_stacking_rows_gives_the_table_again(made: tuple[Table, int], data: st.DataObject) -> None:
    table, rows = made
    cut = data.draw(st.integers(0, rows))
    assert same(concat([take(table, slice(None, cut)), take(table, slice(cut, None))]), table)
