"""Sparkplug B: readings from births and data, and what is refused when nobody can know what it means."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.contract.stream import Encoding, Field, FieldType, StreamContract
from edge_agent.core import sparkplug_nodes
from edge_agent.core.decode import Decoded
from edge_agent.core.sparkplug import Metric, number_of, parse_address, read_payload
from edge_agent.core.sparkplug_nodes import METRICS_MAX, NODES_MAX, Nodes, restore
from edge_agent.core.sparkplug_rows import SparkplugDecoder
from tests.edge_agent import sparkplug_sender
from tests.edge_agent.sparkplug_sender import BOOLEAN, DOUBLE, FLOAT, INT8, INT32, INT64, STRING, UINT32, UINT64, EdgeNode, Message, encode

MOTOR = StreamContract(
    stream="motor",
    version="1.0.0",
    fields=(
        Field("at", FieldType.TIMESTAMP),
        Field("motor", FieldType.STRING),
        Field("speed", FieldType.NUMBER, required=False, metric="Motor/Speed"),
        Field("running", FieldType.NUMBER, required=False),
        Field("count", FieldType.NUMBER, required=False),
    ),
    key=("motor", "at"),
    event_time="at",
    entity="motor",
    topic="spBv1.0/plant/+/edge-7/{motor}",
    encoding=Encoding.SPARKPLUG,
)
METRICS = [("Motor/Speed", 11, DOUBLE), ("running", 12, BOOLEAN), ("count", 13, INT32), ("Serial", 14, STRING)]


def born() -> tuple[SparkplugDecoder, EdgeNode]:
    """A decoder that has heard the births of a node and of motor m-1."""
    node, decoder = EdgeNode(), SparkplugDecoder(MOTOR, Nodes())
    decoder.nodes.hear(*node.nbirth(), 65_536)
    assert decode(decoder, node.dbirth("m-1", METRICS)).rejects == []
    return decoder, node


def decode(decoder: SparkplugDecoder, *messages: Message) -> Decoded:
    return decoder.decode([p for _, p in messages], [t for t, _ in messages])


def rows(decoded: Decoded) -> list[tuple[Any, ...]]:
    return list(zip(*(decoded.table[f.name].tolist() for f in MOTOR.fields), strict=True))


def reasons(decoded: Decoded) -> list[Reason]:
    return [r.reason for r in decoded.rejects]


def test_data_by_alias_becomes_readings_with_gaps_where_nothing_was_reported() -> None:
    decoder, node = born()
    got = decode(
        decoder, node.data("m-1", Motor__Speed=1450.5, running=True), node.data("m-1", count=-3), node.data("m-1", Motor__Speed=None)
    )
    us = node.now_ms * 1_000
    assert got.rejects == [] and got.rows.tolist() == [0, 1, 2]
    assert repr(rows(got)) == repr(
        [(us - 2_000_000, "m-1", 1450.5, 1.0, np.nan), (us - 1_000_000, "m-1", np.nan, np.nan, -3.0), (us, "m-1", np.nan, np.nan, np.nan)]
    ).replace("np.float64(nan)", "nan")


def test_a_birth_is_a_reading_of_the_present_values() -> None:
    node, decoder = EdgeNode(), SparkplugDecoder(MOTOR, Nodes())
    decoder.nodes.hear(*node.nbirth(), 65_536)
    got = decode(decoder, node.dbirth("m-2", METRICS, {"Motor/Speed": 7.25, "Serial": "x-9"}))
    assert rows(got)[0][1:3] == ("m-2", 7.25) and got.rejects == []


def test_metrics_of_different_times_in_one_message_are_different_readings() -> None:
    decoder, node = born()
    old = [{"alias": 11, "timestamp": node.now_ms - 5_000 + n, "is_historical": True, "value": n / 4} for n in range(3)]
    old.append({"alias": 12, "timestamp": node.now_ms - 5_000, "as_type": BOOLEAN, "value": False})
    node.skip()
    got = decode(decoder, (node.topic("DDATA", "m-1"), encode(node.now_ms, node.sequence, old)))
    assert got.rows.tolist() == [0, 0, 0]
    assert [r[2] for r in rows(got)] == [0.0, 0.25, 0.5] and rows(got)[0][3] == 0.0
    assert np.diff(got.table["at"]).tolist() == [1_000, 1_000]


def test_data_before_any_birth_waits_in_quarantine() -> None:
    node = EdgeNode(types={"m-1": METRICS})
    got = decode(SparkplugDecoder(MOTOR, Nodes()), node.data("m-1", running=True), node.data("m-1", by_name=True, running=True))
    assert reasons(got) == [Reason.NO_BIRTH] * 2 and "no birth of 'plant/edge-7/m-1'" not in got.rejects[0].detail
    assert "plant/edge-7/m-1" in got.rejects[0].detail


def test_a_device_birth_alone_is_enough_to_read_its_data() -> None:
    node, decoder = EdgeNode(), SparkplugDecoder(MOTOR, Nodes())
    node.nbirth()  # before we listened
    got = decode(decoder, node.dbirth("m-1", METRICS), node.data("m-1", Motor__Speed=2.0))
    assert [r[2] for r in rows(got)][1:] == [2.0]


@pytest.mark.parametrize("death", ["ndeath", "ddeath", "nbirth"])
def test_after_a_death_or_a_birth_of_its_node_a_device_must_be_born_again(death: str) -> None:
    decoder, node = born()
    decoder.nodes.hear(*getattr(node, death)(*(["m-1"] if death == "ddeath" else [])), 65_536)
    if death == "ndeath":
        node.nbirth()  # lost
    got = decode(decoder, node.data("m-1", running=True), node.dbirth("m-1", METRICS), node.data("m-1", running=True))
    assert reasons(got) == [Reason.NO_BIRTH] and got.rows.tolist() == [1, 2]


def test_the_late_will_of_an_earlier_session_kills_nobody() -> None:
    decoder, node = born()
    decoder.nodes.hear(*node.nbirth(), 65_536)
    decode(decoder, node.dbirth("m-1", METRICS))
    decoder.nodes.hear(*node.ndeath(session=1), 65_536)
    assert decode(decoder, node.data("m-1", running=True)).rejects == []
    decoder.nodes.hear(*node.ndeath(), 65_536)
    assert reasons(decode(decoder, node.data("m-1", running=True))) == [Reason.NO_BIRTH]


def test_after_a_gap_aliases_wait_for_a_rebirth_and_names_do_not() -> None:
    decoder, node = born()
    node.skip()
    got = decode(decoder, node.data("m-1", running=True), node.data("m-1", by_name=True, running=True), node.data("m-1", count=1))
    assert reasons(got) == [Reason.SEQUENCE_GAP] * 2 and got.rows.tolist() == [1]
    (gap,) = decoder.nodes.gaps
    assert "plant/edge-7: message 2 expected, 3 came" in gap
    assert reasons(decode(decoder, node.dbirth("m-1", METRICS), node.data("m-1", running=True))) == []


def test_numbers_wrap_without_a_gap_and_many_messages_pass() -> None:
    decoder, node = born()
    got = decode(decoder, *(node.data("m-1", count=n) for n in range(1_000)))
    assert got.rejects == [] and decoder.nodes.gaps == []
    assert got.table["count"].tolist() == list(range(1_000))


def test_messages_delivered_again_are_no_gap() -> None:
    decoder, node = born()
    sent = [node.data("m-1", count=n) for n in range(5)]
    decode(decoder, *sent)
    got = decode(decoder, *sent[2:], node.data("m-1", count=5))
    assert got.rejects == [] and decoder.nodes.gaps == []
    assert got.table["count"].tolist() == [2, 3, 4, 5]


def test_a_session_delivered_again_as_a_whole_ends_where_it_ended() -> None:
    node, nodes = EdgeNode(), Nodes()
    decoder = SparkplugDecoder(MOTOR, nodes)
    first = [node.dbirth("m-1", METRICS), node.data("m-1", count=1)]
    birth = node.nbirth()
    second = [node.dbirth("m-1", [("count", 11, INT32)]), node.data("m-1", count=2)]
    for _ in range(2):
        decode(decoder, *first)
        nodes.hear(*birth, 65_536)
        got = decode(decoder, *second)
        assert [r[4] for r in rows(got)][1:] == [2.0]
    late = decode(decoder, first[1])  # alias 13 of the first session came again, after the births of the second
    assert reasons(late) == [Reason.NO_BIRTH]


def test_a_birth_that_cannot_be_read_ends_the_one_before_it() -> None:
    decoder, node = born()
    node.skip()
    twice = encode(node.now_ms, node.sequence, [{"name": "a", "alias": 1, "datatype": DOUBLE}] * 2)
    got = decode(decoder, (node.topic("DBIRTH", "m-1"), twice), node.data("m-1", running=True))
    assert reasons(got) == [Reason.MALFORMED, Reason.NO_BIRTH]


BAD_DATA = [
    ([{"alias": 99, "value": 1.0}], Reason.NO_BIRTH, "alias 99"),
    ([{"value": 1.0}], Reason.NO_BIRTH, "alias None"),
    ([{"alias": 11, "value": float("nan")}], Reason.OUT_OF_RANGE, "'Motor/Speed': nan"),
    ([{"alias": 11, "value": float("inf")}], Reason.OUT_OF_RANGE, "inf"),
    ([{"alias": 11, "value": 3, "as_type": INT32}], Reason.WRONG_TYPE, "datatype 10"),
    ([{"alias": 11, "value": "fast", "as_type": STRING}], Reason.WRONG_TYPE, "no plain number"),
    ([{"alias": 11}], Reason.WRONG_TYPE, "no plain number"),
    ([{"name": "running", "datatype": STRING, "value": "on"}], Reason.WRONG_TYPE, "String"),
    ([{"alias": 11, "value": 1.0}, {"alias": 11, "value": 2.0}], Reason.MALFORMED, "two values"),
    ([{"alias": 11, "value": 1.0, "timestamp": 2**63}], Reason.OUT_OF_RANGE, "2200"),
    ([{"name": "count", "datatype": UINT64, "value": 2**53 + 1}], Reason.OUT_OF_RANGE, "digits"),
    ([{"name": "count", "datatype": INT8, "value": 300}], Reason.OUT_OF_RANGE, "8 bits"),
]


@pytest.mark.parametrize(("metrics", "reason", "words"), BAD_DATA, ids=[b[2] for b in BAD_DATA])
def test_bad_data_is_refused_as_a_whole(metrics: list[dict[str, Any]], reason: Reason, words: str) -> None:
    decoder, node = born()
    node.skip()
    bad = (node.topic("DDATA", "m-1"), encode(node.now_ms, node.sequence, [{"alias": 12, "as_type": BOOLEAN, "value": True}, *metrics]))
    got = decode(decoder, bad, node.data("m-1", running=False))
    assert reasons(got) == [reason] and words in got.rejects[0].detail
    assert got.rows.tolist() == [1]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (encode(None, 2, []), Reason.MISSING_FIELD),
        (encode(1_700_000_000_000, None, []), Reason.MALFORMED),
        (encode(1_700_000_000_000, 256, []), Reason.MALFORMED),
        (encode(2**63, 2, []), Reason.OUT_OF_RANGE),
        (b"\x0a\x01x", Reason.MALFORMED),
        (b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", Reason.MALFORMED),
        (b"\x12\x03\x0a\x01\xff", Reason.MALFORMED),
        (b"\x0b\x0c", Reason.MALFORMED),
        (b"\x00\x00", Reason.MALFORMED),
        (b"\xff" * 11, Reason.MALFORMED),
        (b"x" * 70_000, Reason.OVERSIZE),
    ],
)
def test_payloads_that_are_none(payload: bytes, reason: Reason) -> None:
    decoder, node = born()
    assert reasons(decode(decoder, (node.topic("DDATA", "m-1"), payload))) == [reason]


@pytest.mark.parametrize(
    "topic",
    [
        "spBv1.0/plant/DCMD/edge-7/m-1",
        "spBv1.0/plant/DDATA/edge-7/",
        "spBv1.0/plant/NDATA/edge-7/m-1",
        "spBv1.0/plant/DDATA/edge-7",
        "spBv1.0/STATE/host",
        "spAv1.0/plant/DDATA/edge-7/m-1",
        "",
    ],
)
def test_topics_of_no_node_or_device(topic: str) -> None:
    with pytest.raises(PayloadError) as caught:
        parse_address(topic)
    assert caught.value.reason is Reason.UNKNOWN_TOPIC


@pytest.mark.parametrize(
    ("datatype", "field", "raw", "value"),
    [
        (INT8, 10, 255, -1.0),
        (INT8, 10, 2**32 - 1, -1.0),
        (INT8, 10, 127, 127.0),
        (2, 10, 2**32 - 300, -300.0),
        (INT32, 10, 2**32 - 5, -5.0),
        (INT64, 11, 2**64 - 5, -5.0),
        (INT32, 11, 2**64 - 5, -5.0),
        (UINT32, 11, 2**32 - 1, 4294967295.0),
        (UINT64, 11, 2**63, float(2**63)),
        (13, 11, 1_700_000_000_123, 1_700_000_000_123.0),
        (BOOLEAN, 14, 1, 1.0),
        (FLOAT, 12, 0.5, 0.5),
    ],
)
def test_numbers_of_every_datatype(datatype: int, field: int, raw: float, value: float) -> None:
    assert number_of(Metric(field=field, value=raw), datatype) == value


def test_a_mostly_empty_message_in_a_wide_stream_is_refused() -> None:
    fields = tuple(Field(f"f{n}", FieldType.NUMBER, required=False) for n in range(500))
    wide = StreamContract("wide", "1", (*MOTOR.fields[:2], *fields), ("motor", "at"), "at", "motor", MOTOR.topic, Encoding.SPARKPLUG)
    node, decoder = EdgeNode(), SparkplugDecoder(wide, Nodes())
    decode(decoder, node.dbirth("m-1", [("f0", 1, FLOAT)]))
    node.skip()
    metrics = [{"alias": 1, "timestamp": n, "as_type": FLOAT, "value": 1.0} for n in range(3_000)]
    got = decode(decoder, (node.topic("DDATA", "m-1"), encode(node.now_ms, node.sequence, metrics)), node.data("m-1", f0=1.0))
    assert reasons(got) == [Reason.OVERSIZE] and len(got.rows) == 1


def test_nodes_and_metrics_have_a_limit() -> None:
    nodes = Nodes()
    for n in range(NODES_MAX):
        nodes.hear(*EdgeNode(node=f"n{n}").nbirth(), 65_536)
    with pytest.raises(PayloadError, match="at most") as caught:
        nodes.hear(*EdgeNode(node="one-more").nbirth(), 65_536)
    assert caught.value.reason is Reason.OVERSIZE
    big, refused = EdgeNode(node="n1"), 0
    nodes.hear(*big.nbirth(), 65_536)
    for device in range(METRICS_MAX // 2_000 + 5):
        try:
            nodes.hear(*big.dbirth(f"d{device}", [(f"m{n}", n, DOUBLE) for n in range(2_000)]), 65_536)
        except PayloadError:
            refused += 1
    assert 1 < refused < 10
    assert sum(n.metrics for n in nodes.state.values()) <= METRICS_MAX


def test_the_state_survives_as_bytes() -> None:
    decoder, node = born()
    decode(decoder, node.data("m-1", count=1))
    births, counters = sparkplug_nodes.births(decoder.nodes), sparkplug_nodes.counters(decoder.nodes)
    again = SparkplugDecoder(MOTOR, restore(births, counters))
    assert again.nodes.state == decoder.nodes.state
    assert decode(again, node.data("m-1", count=2)).rejects == []
    node.skip()
    late = SparkplugDecoder(MOTOR, restore(births, counters))
    assert reasons(decode(late, node.data("m-1", count=3))) == [Reason.SEQUENCE_GAP]


def ours(data: bytes) -> Any:
    payload = read_payload(data)
    return (
        payload.timestamp_ms,
        payload.sequence,
        [(m.name, m.alias, m.timestamp_ms, m.datatype, m.null, m.field, repr(m.value)) for m in payload.metrics],
    )


def theirs(data: bytes) -> Any:
    message = sparkplug_sender.Payload.FromString(data)

    def get(of: Any, name: str) -> Any:
        return getattr(of, name) if of.HasField(name) else None

    metrics = []
    for m in message.metrics:
        chosen = m.WhichOneof("value")
        number = m.DESCRIPTOR.fields_by_name[chosen].number if chosen else 0
        value = getattr(m, chosen) if chosen and number < 15 else None
        value = int(value) if isinstance(value, bool) else value
        metrics.append((get(m, "name"), get(m, "alias"), get(m, "timestamp"), get(m, "datatype"), m.is_null, number, repr(value)))
    return get(message, "timestamp"), get(message, "seq"), metrics


metric_fields = st.fixed_dictionaries(
    {},
    optional={
        "name": st.text(max_size=8),
        "alias": st.integers(0, 2**64 - 1),
        "timestamp": st.integers(0, 2**64 - 1),
        "datatype": st.integers(0, 2**32 - 1),
        "is_null": st.booleans(),
        "properties": st.binary(max_size=5),
        "int_value": st.integers(0, 2**32 - 1),
        "long_value": st.integers(0, 2**64 - 1),
        "float_value": st.floats(width=32),
        "double_value": st.floats(),
        "boolean_value": st.booleans(),
        "bytes_value": st.binary(max_size=5),
    },
)
payloads = st.builds(
    encode, st.none() | st.integers(0, 2**64 - 1), st.none() | st.integers(0, 2**64 - 1), st.lists(metric_fields, max_size=3)
)


@given(payloads)
@settings(max_examples=200)
def test_our_reader_agrees_with_googles(data: bytes) -> None:
    assert ours(data) == theirs(data)


@given(payloads, st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), max_size=3), st.integers(0, 300))
@settings(max_examples=300)
@example(b"\x12\x02\x70\x02", [], 4)
def test_what_our_reader_accepts_of_broken_bytes_google_reads_alike(data: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(data)
    for at, byte in changes:
        if raw:
            raw[at % len(raw)] = byte
    broken = bytes(raw[:cut]) if cut < 50 else bytes(raw)
    try:
        got = ours(broken)
    except PayloadError as e:
        assert e.reason is Reason.MALFORMED
        return
    try:
        assert got == theirs(broken)
    except DecodeError as e:
        # Of what we skip, Google also checks the inside: text that is not UTF-8.
        assert "utf" in str(e).lower() or any(m[5] == 15 for m in got[2]), (broken, e)
