"""Named topic levels, single-value topics and compressed payloads."""

from __future__ import annotations

import dataclasses
import gzip
import json
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import Compression, Encoding, Field, FieldType, StreamContract
from edge_agent.core.decode import Decoded, Decoder
from edge_agent.core.inflate import BATCH_BYTES_MAX, RATIO_MAX
from edge_agent.core.single_values import STEP_US, ValueDecoder

NOW_US = 1_700_000_000_000_000
PUMP = StreamContract(
    stream="pump",
    version="1.0.0",
    fields=(
        Field("at", FieldType.TIMESTAMP),
        Field("pump", FieldType.STRING),
        Field("temperature", FieldType.NUMBER, required=False),
        Field("flow", FieldType.NUMBER, required=False),
    ),
    key=("pump", "at"),
    event_time="at",
    entity="pump",
    topic="plant/{pump}/{field}",
    encoding=Encoding.VALUE,
    payload_bytes_max=4_096,
)
TEMPERATURE = dataclasses.replace(PUMP, topic="plant/{pump}/temperature", fields=(*PUMP.fields[:2], Field("temperature", FieldType.NUMBER)))
COUNTER = dataclasses.replace(PUMP, topic="plant/{pump}/count", fields=(*PUMP.fields[:2], Field("count", FieldType.INTEGER)))
NAMED = dataclasses.replace(
    PUMP, topic="plant/{pump}/json", encoding=Encoding.JSON, fields=(*PUMP.fields[:2], Field("flow", FieldType.NUMBER))
)
COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.NONE: bytes,
    Compression.GZIP: gzip.compress,
    Compression.ZLIB: zlib.compress,
    Compression.ZSTD: zstandard.ZstdCompressor().compress,
}
compressed = pytest.mark.parametrize("compression", [c for c in Compression if c is not Compression.NONE])


def values(*messages: tuple[str, bytes], contract: StreamContract = PUMP) -> Decoded:
    return ValueDecoder(contract).decode([p for _, p in messages], [t for t, _ in messages], NOW_US)


def reasons(decoded: Decoded) -> list[tuple[int, Reason]]:
    return [(r.index, r.reason) for r in decoded.rejects]


def test_one_message_is_one_reading_of_the_field_that_the_topic_names() -> None:
    got = values(("plant/p-1/temperature", b"21.5"), ("plant/p-2/flow", b" 3\n"), ("plant/p-1/flow", b"-1e-3"))
    assert got.rejects == [] and got.rows.tolist() == [0, 1, 2]
    assert got.table["pump"].tolist() == ["p-1", "p-2", "p-1"]
    assert repr(got.table["temperature"].tolist()) == "[21.5, nan, nan]"
    assert repr(got.table["flow"].tolist()) == "[nan, 3.0, -0.001]"
    assert got.table["at"].tolist() == [NOW_US, NOW_US + 1, NOW_US + 2]


def test_true_and_false_are_one_and_zero() -> None:
    got = values(("plant/p-1/flow", b"true"), ("plant/p-1/flow", b"false"))
    assert got.table["flow"].tolist() == [1.0, 0.0]


def test_a_topic_of_one_field_needs_no_name_of_it() -> None:
    assert values(("plant/p-1/temperature", b"21.5"), contract=TEMPERATURE).table["temperature"].tolist() == [21.5]
    got = values(("plant/p-1/count", b"9223372036854775807"), ("plant/p-1/count", b"1.5"), ("plant/p-1/count", b"2"), contract=COUNTER)
    assert got.table["count"].tolist() == [2**63 - 1, 2] and reasons(got) == [(1, Reason.WRONG_TYPE)]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"twenty", Reason.MALFORMED),
        (b"NaN", Reason.MALFORMED),
        (b"Infinity", Reason.MALFORMED),
        (b"1e400", Reason.OUT_OF_RANGE),
        (b"1 2", Reason.MALFORMED),
        (b"1,2", Reason.MALFORMED),
        (b"\xff\xfe", Reason.MALFORMED),
        (b"null", Reason.WRONG_TYPE),
        (b'"21.5"', Reason.WRONG_TYPE),
        (b"[21.5]", Reason.WRONG_TYPE),
        (b'{"value":21.5}', Reason.WRONG_TYPE),
        (b"[" * 4_000, Reason.WRONG_TYPE),
        (b"1" * 5_000, Reason.OVERSIZE),
    ],
)
def test_what_is_no_number_is_refused_and_its_neighbours_are_not(payload: bytes, reason: Reason) -> None:
    got = values(("plant/p-1/flow", b"1"), ("plant/p-1/flow", payload), ("plant/p-1/flow", b"2"))
    assert got.table["flow"].tolist() == [1.0, 2.0] and got.rows.tolist() == [0, 2]
    assert reasons(got) in ([(1, reason)], [(1, Reason.MALFORMED)])
    assert 0 < len(got.rejects[0].detail) <= 300


@pytest.mark.parametrize(
    ("topic", "reason"),
    [
        ("plant/p-1/humidity", Reason.UNKNOWN_TOPIC),
        ("plant/p-1/at", Reason.UNKNOWN_TOPIC),
        ("plant//flow", Reason.MISSING_FIELD),
        ("plant/p-1/", Reason.MISSING_FIELD),
        ("plant/p-1", Reason.UNKNOWN_TOPIC),
        ("plant/p-1/flow/x", Reason.UNKNOWN_TOPIC),
        ("plant/+/flow", Reason.UNKNOWN_TOPIC),
        ("plant/p\0/flow", Reason.UNKNOWN_TOPIC),
        ("plant/#", Reason.UNKNOWN_TOPIC),
        (f"plant/{'x' * 1_025}/flow", Reason.OVERSIZE),
        (f"plant/{'x' * 60_000}/flow", Reason.OVERSIZE),
    ],
)
def test_a_topic_that_says_too_little_or_too_much(topic: str, reason: Reason) -> None:
    got = values(("plant/p-1/flow", b"1"), (topic, b"2"), ("plant/../flow", b"3"))
    assert reasons(got) == [(1, reason)] and len(got.rejects[0].detail) <= 300
    assert got.table["pump"].tolist() == ["p-1", ".."]  # a name like any other: it goes into a column, never into a path


def test_event_times_never_repeat_though_batches_arrive_at_once() -> None:
    decoder = ValueDecoder(PUMP)
    times = [decoder.decode([b"1"] * 100, ["plant/p-1/flow"] * 100, NOW_US + 10 * n).table["at"] for n in range(5)]
    joined = np.concatenate([np.asarray(t) for t in times])
    assert np.all(np.diff(joined) > 0) and joined[-1] < NOW_US + 1_000


def test_a_clock_that_was_set_back_is_believed() -> None:
    decoder = ValueDecoder(PUMP)
    decoder.decode([b"1"], ["plant/p-1/flow"], NOW_US)
    assert decoder.decode([b"1"], ["plant/p-1/flow"], NOW_US - STEP_US).table["at"].tolist() == [NOW_US - STEP_US]


@pytest.mark.parametrize("encoding", [Encoding.JSON, Encoding.MSGPACK, Encoding.CBOR])
def test_a_level_fills_a_field_whatever_the_payload_says(encoding: Encoding) -> None:
    import cbor2
    import msgspec

    encode = {Encoding.JSON: msgspec.json.encode, Encoding.MSGPACK: msgspec.msgpack.encode, Encoding.CBOR: cbor2.dumps}[encoding]
    sent = [encode({"at": 5, "flow": 1}), encode({"at": 6, "flow": 2, "pump": 7}), encode({"at": 7})]
    topics = ["plant/p-1/json", "plant/p-2/json", "plant/p-3/json"]
    got = Decoder(dataclasses.replace(NAMED, encoding=encoding)).decode(sent, topics)
    assert list(got.table) == ["at", "pump", "flow"]
    assert got.table["pump"].tolist() == ["p-1", "p-2"] and got.table["flow"].tolist() == [1.0, 2.0]
    assert reasons(got) == [(2, Reason.MISSING_FIELD)]


@compressed
def test_compressed_payloads(compression: Compression) -> None:
    pack = COMPRESS[compression]
    contract = dataclasses.replace(NAMED, compression=compression)
    good = pack(json.dumps({"at": 5, "flow": 1.5}).encode())
    bad = {
        pack(b"not json"): Reason.MALFORMED,
        pack(json.dumps({"at": 5, "flow": "x"}).encode()): Reason.WRONG_TYPE,
        good[:-1]: Reason.MALFORMED,
        good + b"x": Reason.MALFORMED,
        b"": Reason.MALFORMED,
        b'{"at": 5, "flow": 1.5}': Reason.MALFORMED,
        pack(b" " * 4_097): Reason.OVERSIZE,
        pack(b"\0" * 4_000_000): Reason.OVERSIZE,
    }
    sent = [good, *bad, good]
    got = Decoder(contract).decode(sent, ["plant/p-1/json"] * len(sent))
    assert got.rows.tolist() == [0, len(sent) - 1] and got.table["flow"].tolist() == [1.5, 1.5]
    assert [r.reason for r in got.rejects] == list(bad.values())
    assert "'flow' is \"x\"" in got.rejects[1].detail


@compressed
def test_compressed_numbers(compression: Compression) -> None:
    contract = dataclasses.replace(TEMPERATURE, compression=compression)
    got = values(("plant/p-1/temperature", COMPRESS[compression](b"21.5")), contract=contract)
    assert got.table["temperature"].tolist() == [21.5]


def test_a_zstd_frame_that_hides_its_size_or_asks_for_a_huge_window_is_refused() -> None:
    streamed = zstandard.ZstdCompressor().compressobj()
    bomb = streamed.compress(b"\0" * 10_000_000) + streamed.flush()
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters.from_level(19, window_log=27)).compressobj()
    huge = wide.compress(b"{}") + wide.flush()
    hidden = zstandard.ZstdCompressor().compressobj()
    good = hidden.compress(b'{"at": 5, "flow": 1}') + hidden.flush()
    contract = dataclasses.replace(NAMED, compression=Compression.ZSTD)
    got = Decoder(contract).decode([bomb, huge, good, bomb[:-3]], ["plant/p-1/json"] * 4)
    assert got.rows.tolist() == [2]
    assert [r.reason for r in got.rejects] == [Reason.OVERSIZE, Reason.MALFORMED, Reason.OVERSIZE]


def test_a_batch_of_well_sized_bombs_is_cut_short() -> None:
    contract = dataclasses.replace(NAMED, compression=Compression.GZIP, payload_bytes_max=64 * 1_024)
    payload = gzip.compress(json.dumps({"at": 5, "flow": 1.5, "pad": "x" * 65_000}).encode())
    fit = BATCH_BYTES_MAX // len(gzip.decompress(payload))
    decoder = Decoder(contract)
    for _ in range(2):
        got = decoder.decode([payload] * (fit + 3), ["plant/p-1/json"] * (fit + 3))
        assert len(got.rows) == fit and [r.reason for r in got.rejects] == [Reason.OVERSIZE] * 3
        assert "one batch" in got.rejects[0].detail


def test_a_batch_of_many_large_readings_is_no_bomb() -> None:
    contract = dataclasses.replace(NAMED, compression=Compression.GZIP, payload_bytes_max=64 * 1_024)
    waveform = np.random.default_rng(1).integers(0, 4, 30_000).tolist()  # a sensor that sends more than its contract names
    plain = json.dumps({"at": 5, "flow": 1.5, "waveform": waveform}, separators=(",", ":")).encode()
    payload, count = gzip.compress(plain), 2 * BATCH_BYTES_MAX // len(plain)
    assert 5 < len(plain) / len(payload) < RATIO_MAX
    got = Decoder(contract).decode([payload] * count, ["plant/p-1/json"] * count)
    assert (len(got.rows), got.rejects) == (count, [])


def test_payloads_that_do_not_decode_give_the_batch_no_new_room() -> None:
    contract = dataclasses.replace(NAMED, compression=Compression.GZIP, payload_bytes_max=64 * 1_024)
    plain = json.dumps({"at": 5, "flow": 1.5, "pad": "x" * 65_000}).encode()
    good, bad = gzip.compress(plain), gzip.compress(b"not json")
    fit = BATCH_BYTES_MAX // len(plain)
    payloads = [good, bad] * (2 * fit)
    got = Decoder(contract).decode(payloads, ["plant/p-1/json"] * len(payloads))
    assert len(got.rows) <= fit
    assert {r.reason for r in got.rejects} == {Reason.MALFORMED, Reason.OVERSIZE}


@given(st.lists(st.tuples(st.sampled_from(["temperature", "flow"]), st.floats(allow_nan=False, allow_infinity=False)), max_size=20))
def test_every_number_comes_back_bit_for_bit(sent: list[tuple[str, float]]) -> None:
    got = values(*((f"plant/p/{field}", repr(number).encode()) for field, number in sent))
    assert got.rejects == []
    for i, (field, number) in enumerate(sent):
        assert repr(got.table[field].tolist()[i]) == repr(number)
