"""Decoding: exactly the bad payloads are rejected, with a reason and the field and value in words."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import Encoding, Field, FieldType, StreamContract
from edge_agent.core.decode import EVENT_S_END, PIECE_ROWS, Decoded, Decoder

PUMP = StreamContract(
    stream="pump",
    version="1.0.0",
    fields=(
        Field("ts", FieldType.TIMESTAMP),
        Field("class", FieldType.STRING),  # a Python keyword on purpose
        Field("cycle", FieldType.INTEGER),
        Field("flow l/min", FieldType.NUMBER),  # not an identifier on purpose
        Field("spare", FieldType.NUMBER, required=False),
    ),
    key=("class", "ts"),
    event_time="ts",
    entity="class",
    topic="sensors/{device}/pump",
    payload_bytes_max=4_096,
)
GOOD: dict[str, Any] = {"ts": 1_700_000_000.25, "class": "p-1", "cycle": 3, "flow l/min": 21.5, "spare": 1}
ENCODERS: dict[Encoding, Callable[[Any], bytes]] = {
    Encoding.JSON: lambda tree: json.dumps(tree).encode(),
    Encoding.MSGPACK: msgspec.msgpack.encode,
    Encoding.CBOR: cbor2.dumps,
}
STRUCTURED = [Encoding.JSON, Encoding.MSGPACK, Encoding.CBOR]
everywhere = pytest.mark.parametrize("encoding", STRUCTURED)


def reading(**changes: Any) -> dict[str, Any]:
    merged = {**GOOD, **{"flow l/min" if k == "flow" else "class" if k == "class_" else k: v for k, v in changes.items()}}
    return {k: v for k, v in merged.items() if v is not ...}


def decode(payloads: list[bytes], encoding: Encoding = Encoding.JSON) -> Decoded:
    return Decoder(dataclasses.replace(PUMP, encoding=encoding)).decode(payloads)


def rows(decoded: Decoded) -> list[dict[str, Any]]:
    columns = {name: column.tolist() for name, column in decoded.table.items()}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


@everywhere
def test_good_readings_become_columns(encoding: Encoding) -> None:
    encode = ENCODERS[encoding]
    got = decode([encode(reading(cycle=n, flow=n / 4, more={"kept": "out"})) for n in range(3)], encoding)
    assert got.rejects == [] and got.rows.tolist() == [0, 1, 2]
    assert list(got.table) == ["ts", "class", "cycle", "flow l/min", "spare"]
    assert got.table["ts"].tolist() == [1_700_000_000_250_000] * 3
    assert got.table["class"].tolist() == ["p-1"] * 3 and isinstance(got.table["class"], Strings)
    assert got.table["cycle"].tolist() == [0, 1, 2]
    assert got.table["flow l/min"].tolist() == [0, 0.25, 0.5]
    kinds = [c.dtype for c in got.table.values() if isinstance(c, np.ndarray)]
    assert kinds == [np.int64, np.int64, np.float64, np.float64]


@everywhere
def test_a_missing_or_null_optional_number_is_nan(encoding: Encoding) -> None:
    got = decode([ENCODERS[encoding](r) for r in (reading(spare=...), reading(spare=None), reading(spare=2))], encoding)
    assert got.rejects == []
    assert [value != value for value in got.table["spare"].tolist()] == [True, True, False]


@everywhere
def test_an_empty_batch(encoding: Encoding) -> None:
    got = decode([], encoding)
    assert got.rejects == [] and len(got.rows) == 0
    assert [len(column) for column in got.table.values()] == [0] * 5


BAD_TREES: list[tuple[dict[str, Any], Reason, str]] = [
    (reading(ts=...), Reason.MISSING_FIELD, "field 'ts' is missing"),
    (reading(flow=...), Reason.MISSING_FIELD, "field 'flow l/min' is missing"),
    (reading(flow="21.5"), Reason.WRONG_TYPE, "field 'flow l/min' is"),
    (reading(flow=None), Reason.WRONG_TYPE, "Expected `float`, got `"),
    (reading(flow=True), Reason.WRONG_TYPE, "got `bool`"),
    (reading(spare=[1]), Reason.WRONG_TYPE, "got `array`"),
    (reading(cycle=1.5), Reason.WRONG_TYPE, "field 'cycle' is 1.5: Expected `int`, got `float`"),
    (reading(class_=7), Reason.WRONG_TYPE, "field 'class' is 7"),
    (reading(class_="x" * 1_025), Reason.OVERSIZE, "(10"),
    (reading(cycle=2**63), Reason.OUT_OF_RANGE, "field 'cycle' is 9223372036854775808"),
    (reading(ts=-0.5), Reason.OUT_OF_RANGE, "field 'ts' is -0.5: not in 1970 to 2200"),
    (reading(ts=1_700_000_000_000), Reason.OUT_OF_RANGE, "field 'ts' is 1700000000000.0"),
    (reading(ts=EVENT_S_END), Reason.OUT_OF_RANGE, "not in 1970 to 2200"),
    (reading(ts="2026-01-01T00:00:00Z"), Reason.WRONG_TYPE, "field 'ts' is"),
]


@everywhere
@pytest.mark.parametrize(("tree", "reason", "words"), BAD_TREES, ids=[b[2] + f" {b[1]}" for b in BAD_TREES])
def test_a_bad_reading_is_rejected_and_its_neighbours_are_not(encoding: Encoding, tree: dict[str, Any], reason: Reason, words: str) -> None:
    encode = ENCODERS[encoding]
    got = decode([encode(reading(cycle=1)), encode(tree), encode(reading(cycle=2))], encoding)
    assert got.table["cycle"].tolist() == [1, 2] and got.rows.tolist() == [0, 2]
    assert [(r.index, r.reason) for r in got.rejects] == [(1, reason)]
    assert words in got.rejects[0].detail


MALFORMED_JSON = [
    b"",
    b"{",
    b"not json",
    b"\xff\xfe",
    b'{"ts":1,"class":"p","cycle":1,"flow l/min":1}x',
    b"1],[2",
    b"NaN",
    b"[" * 4_000,
    json.dumps(GOOD).encode()[:-1],
    json.dumps(GOOD).encode() + b"," + json.dumps(GOOD).encode(),
    json.dumps(reading(flow=float("nan"))).encode(),
    json.dumps(reading(flow=float("inf"))).encode(),
    json.dumps(reading(class_="\ud800")).encode(),
    json.dumps(reading(extra=...)).encode().replace(b"p-1", b"\xed\xa0\x80"),
    json.dumps(GOOD).encode()[:-1] + b',"deep":' + b"[" * 1_900,
]


@pytest.mark.parametrize("bad", MALFORMED_JSON, ids=lambda b: b[:20].decode("latin-1"))
def test_broken_json_reaches_nobody_else(bad: bytes) -> None:
    good = json.dumps(GOOD).encode()
    got = decode([good, bad, bad, good])
    assert got.rows.tolist() == [0, 3]
    assert [r.index for r in got.rejects] == [1, 2]
    assert all(r.reason in (Reason.MALFORMED, Reason.WRONG_TYPE) for r in got.rejects)
    assert all(0 < len(r.detail) <= 300 for r in got.rejects)


def test_two_halves_are_not_one_reading() -> None:
    whole = json.dumps(GOOD).encode()
    got = decode([whole[:20], whole[20:], whole + b"," + whole])
    assert len(got.rows) == 0 and [r.index for r in got.rejects] == [0, 1, 2]


@pytest.mark.parametrize("literal", [b"1e400", b"-1e400", b"1" * 400])
def test_a_number_too_large_for_a_float_is_out_of_range(literal: bytes) -> None:
    got = decode([json.dumps(GOOD).encode().replace(b"21.5", literal)])
    assert [r.reason for r in got.rejects] == [Reason.OUT_OF_RANGE]


def test_a_byte_order_mark_and_an_array_are_not_readings() -> None:
    got = decode([b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"[1]", b"null"])
    assert [r.reason for r in got.rejects] == [Reason.MALFORMED, Reason.WRONG_TYPE, Reason.WRONG_TYPE]


@pytest.mark.parametrize("encoding", [Encoding.MSGPACK, Encoding.CBOR])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["ts", "flow l/min", "spare"])
def test_binary_nan_and_infinities_are_out_of_range(encoding: Encoding, value: float, name: str) -> None:
    encode = ENCODERS[encoding]
    got = decode([encode(GOOD), encode({**GOOD, name: value}), encode(reading(spare=...))], encoding)
    assert got.rows.tolist() == [0, 2]
    assert [(r.index, r.reason) for r in got.rejects] == [(1, Reason.OUT_OF_RANGE)]
    assert name in got.rejects[0].detail and str(value) in got.rejects[0].detail


@pytest.mark.parametrize(
    ("encoding", "bad"),
    [
        (Encoding.MSGPACK, b"\xc1"),
        (Encoding.MSGPACK, msgspec.msgpack.encode(GOOD) + b"\0"),
        (Encoding.MSGPACK, b"\x91" * 4_000),
        (Encoding.CBOR, b"\xff"),
        (Encoding.CBOR, cbor2.dumps(GOOD) + b"\0"),
        (Encoding.CBOR, cbor2.dumps(GOOD)[:-1]),
        (Encoding.CBOR, b"\x81" * 4_000),
        (Encoding.CBOR, b"\x9b" + b"\xff" * 8),
        (Encoding.CBOR, b"\x5b\x00\x00\x7f" + b"\xff" * 5),
        (Encoding.CBOR, b"\xd8\x1c\x81\xd8\x1d\x00"),
        (Encoding.CBOR, b"\xa1\x81\x01\x02"),
        (Encoding.CBOR, b"\xa1\x62ts\xc4\x82\x1b\x7f" + b"\xff" * 7 + b"\x01"),
        (Encoding.CBOR, b"\xa1\x62ts\xc2\x59\x0f\x00" + b"\xff" * 0xF00),
    ],
)
def test_broken_binary_payloads_reach_nobody_else(encoding: Encoding, bad: bytes) -> None:
    good = ENCODERS[encoding](GOOD)
    got = decode([good, bad, good], encoding)
    assert got.rows.tolist() == [0, 2] and [r.index for r in got.rejects] == [1]


@everywhere
def test_a_payload_over_the_limit_is_not_even_decoded(encoding: Encoding) -> None:
    encode = ENCODERS[encoding]
    got = decode([encode(reading(pad="x" * 5_000)), encode(GOOD), b"\xc1"], encoding)
    assert got.rows.tolist() == [1]
    assert [r.index for r in got.rejects] == [0, 2] and got.rejects[0].reason is Reason.OVERSIZE
    assert "at most 4096" in got.rejects[0].detail


def test_a_batch_of_nothing_but_rejects() -> None:
    got = decode([b"x"] * 5_000)
    assert len(got.rejects) == 5_000 and len(got.rows) == 0 and len(got.table["cycle"]) == 0


def test_a_batch_of_several_pieces_is_one_batch() -> None:
    sent = [json.dumps(reading(cycle=n, class_=f"p-{n % 7}")).encode() for n in range(2 * PIECE_ROWS + 3)]
    bad = [0, PIECE_ROWS - 1, PIECE_ROWS, 2 * PIECE_ROWS + 2]
    for n in bad:
        sent[n] = b"x"
    got, good = decode(sent), [n for n in range(len(sent)) if n not in bad]
    assert [r.index for r in got.rejects] == bad
    assert got.rows.tolist() == got.table["cycle"].tolist() == good
    assert got.table["class"].tolist() == [f"p-{n % 7}" for n in good]


@given(st.floats(0, EVENT_S_END, exclude_max=True))
def test_event_times_are_rounded_exactly(seconds: float) -> None:
    got = decode([json.dumps(reading(ts=seconds)).encode()]).table["ts"].tolist()[0]
    assert abs(Fraction(got) - Fraction(seconds) * 1_000_000) <= Fraction(1, 2)


@given(st.integers(0, int(EVENT_S_END) * 1_000_000 - 1))
def test_microseconds_of_our_time_survive_as_decimal_seconds(micros: int) -> None:
    micros %= 4_000_000_000 * 1_000_000  # up to 2096 a float of seconds still tells microseconds apart
    got = decode([b'{"ts":%d.%06d,"class":"p","cycle":1,"flow l/min":1}' % divmod(micros, 1_000_000)])
    assert got.table["ts"].tolist() == [micros]


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda v: st.lists(v, max_size=3), max_leaves=5
)
trees = st.one_of(
    st.fixed_dictionaries({}, optional=dict.fromkeys(GOOD, json_values)),
    st.builds(lambda name, value: {**GOOD, name: value}, st.sampled_from(sorted(GOOD)), json_values),
    st.just(GOOD),
)


@given(st.sampled_from(STRUCTURED), st.lists(trees, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_batch_gives_what_its_payloads_give_alone(encoding: Encoding, sent: list[dict[str, Any]]) -> None:
    payloads = []
    for tree in sent:
        try:
            payloads.append(ENCODERS[encoding](tree))
        except (OverflowError, UnicodeEncodeError):  # MessagePack ends at 64 bits
            payloads.append(b"\xc1")
    got = decode(payloads, encoding)
    assert sorted([*got.rows.tolist(), *(r.index for r in got.rejects)]) == list(range(len(payloads)))
    alone = [decode([payload], encoding) for payload in payloads]
    assert repr(rows(got)) == repr([row for one in alone for row in rows(one)])
    assert [(r.reason, r.detail) for r in got.rejects] == [(r.reason, r.detail) for one in alone for r in one.rejects]


@given(st.sampled_from(STRUCTURED), st.lists(st.binary(max_size=40), max_size=6))
@settings(max_examples=300, deadline=None)
def test_fuzzed_payloads_never_raise(encoding: Encoding, payloads: list[bytes]) -> None:
    got = decode(payloads, encoding)
    assert len(got.rows) + len(got.rejects) == len(payloads)
    assert all(r.detail.encode() for r in got.rejects)


@given(st.sampled_from([Encoding.MSGPACK, Encoding.CBOR, Encoding.JSON]), st.integers(0, 200), st.integers(1, 255))
@settings(max_examples=300, deadline=None)
def test_a_flipped_byte_never_raises(encoding: Encoding, place: int, flip: int) -> None:
    raw = bytearray(ENCODERS[encoding](GOOD))
    raw[place % len(raw)] ^= flip
    got = decode([bytes(raw)], encoding)
    assert len(got.rows) + len(got.rejects) == 1
