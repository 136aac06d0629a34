"""Blocks: what one version sealed, every later one reads; damage of any kind is a ContractError."""

from __future__ import annotations

import base64
import secrets
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.block import (
    BLOCK_BYTES_MAX,
    HEADER_BYTES_MAX,
    MAGIC,
    RAW_BYTES_MAX,
    ROWS_MAX,
    BlockHeader,
    FixQuality,
    decode_block,
    encode_block,
    read_header,
)
from edge_agent.contract.columns import Strings, Table, encode_columns
from edge_agent.contract.errors import ContractError
from tests.contract.tables import same, tables

HEADER = BlockHeader(
    device="plane-01",
    epoch="e1",
    lane="atlantic_europe",
    sequence=7,
    stream="turbofan",
    contract_version="1.0.0",
    rows=3,
    first_us=1_700_000_000_000_000,
    last_us=1_700_007_200_000_000,
    fix=FixQuality.UNCERTAIN,
    policy="p" * 8,
    boot="b1",
    monotonic_us=42,
    sealed_us=1_700_007_300_000_000,
    clock_synced=True,
    model="m" * 8,
)
TABLE: Table = {
    "ts": 1_700_000_000_000_000 + np.arange(3) * 3_600_000_000,
    "engine": Strings.of(["a", "b", "a"]),
    "sensor_1": np.array([518.67, np.nan, 0.1 + 0.2]),
}
GOLDEN = (
    "RkxCMfcAAADeABGmZGV2aWNlqHBsYW5lLTAxpWVwb2NoomUxpGxhbmWvYXRsYW50aWNfZXVyb3BlqHNlcXVlbmNlB6ZzdHJlYW2odHVyYm9mYW"
    "6wY29udHJhY3RfdmVyc2lvbqUxLjAuMKRyb3dzA6hmaXJzdF91c88ABgokGB5AAKdsYXN0X3VzzwAGCiXFRYgAo2ZpeKl1bmNlcnRhaW6mcG9s"
    "aWN5qHBwcHBwcHBwpGJvb3SiYjGsbW9ub3RvbmljX3VzKqlzZWFsZWRfdXPPAAYKJcs7aQCsY2xvY2tfc3luY2Vkw6Vtb2RlbKhtbW1tbW1tba"
    "Zmb3JtYXQBKLUv/SBkIQMAMAAAAJOXonRzoWkAAQfCkJemZW5naW5loXMAAAHCkqFhoWKXqHNlbnNvcl8xoXIAAAjCkAAAAIBISDwnJzCtrUgB"
    "ARQAAAwAAAACAI8ANMIAM/UAMygAM1wAMzUAM4D400B/P6kNHZg="
)


def sealed(header: BlockHeader, body: bytes, head: bytes | None = None) -> bytes:
    """A block with any content and a right CRC, as a faulty or hostile device could send it."""
    head = msgspec.msgpack.encode(header) if head is None else head
    block = MAGIC + len(head).to_bytes(4, "little") + head + body
    return block + zlib.crc32(block).to_bytes(4, "little")


def changed(**fields: Any) -> BlockHeader:
    return msgspec.structs.replace(HEADER, **fields)


def test_golden_block_of_format_1_is_read() -> None:
    header, table = decode_block(base64.b64decode(GOLDEN))
    assert header == HEADER
    assert same(table, TABLE)


def test_header_is_written_as_it_always_was() -> None:
    golden, block = base64.b64decode(GOLDEN), encode_block(HEADER, TABLE)
    stop = 8 + int.from_bytes(golden[4:8], "little")
    assert block[:stop] == golden[:stop]
    assert read_header(block) == HEADER
    assert HEADER.identity == ("plane-01", "e1", "atlantic_europe", 7)


@given(tables(), st.integers(1, 2**62), st.sampled_from(FixQuality))
def test_every_block_comes_back(made: tuple[Table, int], sequence: int, fix: FixQuality) -> None:
    table, rows = made
    header = changed(rows=rows, sequence=sequence, fix=fix, model=None)
    read, columns = decode_block(encode_block(header, table))
    assert read == header
    assert same(columns, table)


def test_any_flipped_bit_is_noticed() -> None:
    block = encode_block(HEADER, TABLE)
    for place in range(len(block)):
        damaged = bytearray(block)
        damaged[place] ^= 1 << (place % 8)
        with pytest.raises(ContractError):
            decode_block(bytes(damaged))


@pytest.mark.parametrize("cut", [0, 1, 4, 11, 12, -1])
def test_block_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ContractError):
        decode_block(encode_block(HEADER, TABLE)[:cut])


@given(st.binary(max_size=300))
def test_foreign_bytes_raise_nothing_but_contract_errors(data: bytes) -> None:
    for block in (data, MAGIC + data, sealed(HEADER, data), sealed(HEADER, b"", head=data)):
        with pytest.raises(ContractError):
            decode_block(block)


@given(st.binary(max_size=200), st.integers(1, ROWS_MAX))
def test_well_packed_nonsense_raises_nothing_but_contract_errors(data: bytes, rows: int) -> None:
    try:
        _, table = decode_block(sealed(changed(rows=rows), zstandard.compress(data)))
    except ContractError:
        return
    assert all(len(column) == rows for column in table.values())


def test_unknown_header_fields_are_ignored() -> None:
    head = msgspec.msgpack.encode({**msgspec.to_builtins(HEADER), "later": [1, {"more": 2}]})
    body = zstandard.compress(encode_columns(TABLE, 3))
    assert decode_block(sealed(HEADER, body, head))[0] == HEADER


@pytest.mark.parametrize(
    "fields",
    [
        {"device": "Plane 1"},
        {"device": ""},
        {"lane": "europe_atlantic"},
        {"lane": "../europe"},
        {"stream": "turbo/fan"},
        {"rows": 0},
        {"rows": ROWS_MAX + 1},
        {"sequence": 0},
        {"format": 2},
    ],
)
def test_header_out_of_bounds_is_neither_written_nor_read(fields: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        encode_block(changed(**fields), TABLE)
    with pytest.raises(ContractError):
        decode_block(sealed(changed(**fields), zstandard.compress(encode_columns(TABLE, 3))))


def test_header_may_not_be_huge() -> None:
    with pytest.raises(ContractError, match="block header of"):
        decode_block(sealed(changed(boot="x" * HEADER_BYTES_MAX), b""))


@pytest.mark.parametrize("name", ["", "e\n1", "e1\n", "é", "a b", "x" * 65, "a/b"])
def test_an_epoch_and_a_boot_are_short_words(name: str) -> None:
    for fields in ({"epoch": name}, {"boot": name}):
        with pytest.raises(ContractError, match="must match"):
            encode_block(changed(**fields), TABLE)
        with pytest.raises(ContractError, match="must match"):
            decode_block(sealed(changed(**fields), zstandard.compress(encode_columns(TABLE, 3))))


def test_what_agents_draw_is_an_epoch_and_a_boot() -> None:
    encode_block(changed(epoch=secrets.token_hex(8), boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip()), TABLE)


def test_block_may_not_be_huge() -> None:
    noise: Table = {str(i): np.random.default_rng(i).integers(-(2**62), 2**62, ROWS_MAX) for i in range(17)}
    with pytest.raises(ContractError, match=f"at most {BLOCK_BYTES_MAX}"):
        encode_block(changed(rows=ROWS_MAX), noise)


def test_a_block_that_nobody_could_read_is_not_sealed() -> None:
    long = RAW_BYTES_MAX // 16
    texts: Table = {f"s{i}": Strings.of([str(i) + "x" * long]) for i in range(17)}
    with pytest.raises(ContractError, match=f"raw bytes; at most {RAW_BYTES_MAX}"):
        encode_block(changed(rows=1), texts)


@pytest.mark.parametrize("claimed", [RAW_BYTES_MAX + 1, 2**40, 2**63 - 1])
def test_bomb_is_refused_before_memory_is_taken(claimed: int) -> None:
    # A zstd frame: magic, descriptor (8-byte content size, single segment), the size, one empty last block.
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + claimed.to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(ContractError):
        decode_block(sealed(HEADER, frame))


def test_bomb_without_a_size_is_refused() -> None:
    body = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(RAW_BYTES_MAX + 1))
    with pytest.raises(ContractError):
        decode_block(sealed(HEADER, body))
