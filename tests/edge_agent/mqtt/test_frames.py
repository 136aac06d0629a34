"""Frames: any cut of the stream gives the same packets, any bytes give packets or ContractError, and an independent codec agrees."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError
from edge_agent.mqtt import frames, server_frames
from edge_agent.mqtt.frames import ConnAck, Decoder, Disconnect, Frames, PingResp, SubAck, UnsubAck, Version, connect
from tests.edge_agent.mqtt.packets import pubacks

CONNACK = {4: b"\x20\x02\x00\x00", 5: b"\x20\x03\x00\x00\x00"}
VERSIONS: list[Version] = [4, 5]

versions = st.sampled_from(VERSIONS)
topics = st.text(st.characters(exclude_characters="+#\0", exclude_categories=["Cs"]), min_size=1, max_size=20)
messages = st.tuples(topics, st.binary(max_size=300), st.none() | st.integers(1, 65_535), st.booleans())


def packet(head: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([head, *length, size]) + body


def publish(
    version: int, topic: str | bytes, payload: bytes, packet_id: int | None = 1, retain: bool = False, properties: bytes = b""
) -> bytes:
    raw = topic.encode() if isinstance(topic, str) else topic
    identifier = b"" if packet_id is None else struct.pack(">H", packet_id)
    extra = bytes([len(properties)]) + properties if version == 5 else b""
    return packet(0x30 | (packet_id is not None) << 1 | retain, struct.pack(">H", len(raw)) + raw + identifier + extra + payload)


def connected(version: Version, packet_bytes_max: int = frames.PACKET_BYTES_MAX) -> Decoder:
    decoder = Decoder(version, packet_bytes_max)
    decoder.feed(CONNACK[version])
    return decoder


def drain(decoder: Decoder, pieces: list[bytes], packets_max: int = 65_536) -> Frames:
    """Everything that the pieces give, as one."""
    total = Frames()
    for piece in pieces:
        data = piece
        while True:
            got = decoder.feed(data, packets_max)
            total.topics += got.topics
            total.payloads += got.payloads
            total.acks += got.acks
            total.packets += got.packets
            if not got.more:
                break
            data = b""
    return total


@given(versions, st.lists(messages, max_size=12), st.lists(st.integers(0, 4_000), max_size=12), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_any_cut_of_the_stream_gives_the_same_packets(
    version: Version, sent: list[tuple[str, bytes, int | None, bool]], cuts: list[int], packets_max: int
) -> None:
    stream = b"".join([publish(version, *message) for message in sent] + [b"\xd0\x00"])
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    got = drain(connected(version), pieces, packets_max)
    assert got.topics == [topic for topic, *_ in sent]
    assert got.payloads == [payload for _, payload, *_ in sent]
    assert got.acks == pubacks(i for _, _, i, _ in sent if i is not None)
    assert got.packets == [PingResp()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("size", [0, 1, 120, 127, 128, 16_383, 16_384, 70_000, 2_097_152])
def test_byte_by_byte_at_every_width_of_the_length(version: Version, size: int) -> None:
    raw = publish(version, "t", b"x" * size)
    step = 1 if size < 1_000 else 997
    got = drain(connected(version, 4_000_000), [raw[:1], *(raw[i : i + step] for i in range(1, len(raw), step))])
    assert got.payloads == [b"x" * size] and got.acks == pubacks([1])


@given(versions, st.booleans(), st.lists(st.binary(max_size=60), max_size=6))
@settings(max_examples=300, deadline=None)
@example(5, True, [b"\x32\x80\x80\x80\x80\x01"])
@example(4, True, [b"\x30\xff\xff\xff\x7f"])
def test_fuzzed_bytes_give_packets_or_a_contract_error(version: Version, after_connack: bool, pieces: list[bytes]) -> None:
    decoder = connected(version) if after_connack else Decoder(version)
    try:
        drain(decoder, pieces)
    except ContractError as e:
        assert str(e).startswith("MQTT: ")


@given(versions, st.lists(messages, min_size=1, max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_gives_packets_or_a_contract_error(
    version: Version, sent: list[tuple[str, bytes, int | None, bool]], data: st.DataObject
) -> None:
    stream = bytearray(b"".join(publish(version, *message) for message in sent))
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        got = drain(connected(version), [bytes(stream)])
    except ContractError:
        return
    assert len(got.topics) == len(got.payloads) and len(got.acks) <= 4 * len(got.topics)


MALFORMED: list[tuple[str, Version, bytes, str]] = [
    ("qos 2", 4, packet(0x34, b"\0\1t\0\1"), "QoS 2"),
    ("qos 3", 4, packet(0x36, b"\0\1t\0\1"), "QoS 3"),
    ("dup with qos 0", 4, packet(0x38, b"\0\1t"), "DUP"),
    ("topic past the packet", 4, packet(0x32, b"\0\x09t\0\1"), "topic of 9 bytes"),
    ("too short", 4, packet(0x32, b"\0\1t"), "3 bytes long"),
    ("too short, qos 0", 4, packet(0x30, b"\0"), "1 bytes long"),
    ("empty topic", 4, packet(0x32, b"\0\0\0\1x"), "empty topic"),
    ("wildcard", 4, publish(4, "a/+/b", b""), "wildcard"),
    ("topic not UTF-8", 4, publish(4, b"\xff\xfe", b""), "UTF-8"),
    ("topic with surrogate", 4, publish(4, b"\xed\xa0\x80", b""), "UTF-8"),
    ("topic with NUL", 4, publish(4, "a\0b", b""), "U+0000"),
    ("packet id 0", 4, publish(4, "t", b"", 0), "packet id 0"),
    ("endless length", 4, b"\x32\x80\x80\x80\x80\x01", "does not end"),
    ("connack twice", 4, CONNACK[4], "CONNACK twice"),
    ("connect from the broker", 4, packet(0x10, b""), "CONNECT is not for"),
    ("puback from the broker", 4, packet(0x40, b"\0\1"), "PUBACK is not for"),
    ("disconnect in 3.1.1", 4, b"\xe0\x00", "DISCONNECT is not for"),
    ("auth", 5, b"\xf0\x00", "AUTH is not for"),
    ("pingresp with a body", 4, packet(0xD0, b"x"), "1 bytes long"),
    ("pingresp with flags", 4, b"\xd1\x00", "flags"),
    ("suback without codes", 4, packet(0x90, b"\0\1"), "2 bytes long"),
    ("suback of QoS 3", 4, packet(0x90, b"\0\1\3"), "codes 03"),
    ("unsuback with a code in 3.1.1", 4, packet(0xB0, b"\0\2\0"), "3 bytes long"),
    ("unsuback without codes", 5, packet(0xB0, b"\0\2\0"), "3 bytes long"),
    ("unsuback of QoS 1", 5, packet(0xB0, b"\0\2\0\1"), "codes 01"),
    ("oversize control packet", 4, packet(0x90, b"\0\1" + b"\0" * 70_000), "at most 65536"),
    ("topic alias", 5, publish(5, "t", b"", properties=b"\x23\0\1"), "property 0x23"),
    ("topic alias, no topic", 5, publish(5, "", b"", properties=b"\x23\0\1"), "property 0x23"),
    ("unknown property", 5, publish(5, "t", b"", properties=b"\x7f\0"), "property 0x7f"),
    ("property twice", 5, publish(5, "t", b"", properties=b"\1\1\1\1"), "property 0x01 twice"),
    ("property cut off", 5, publish(5, "t", b"", properties=b"\x02\0\0"), "cut off"),
    ("text property cut off", 5, publish(5, "t", b"", properties=b"\x03\0\x09a"), "cut off"),
    ("text property not UTF-8", 5, publish(5, "t", b"", properties=b"\x03\0\1\xff"), "UTF-8"),
    ("properties past the packet", 5, packet(0x32, b"\0\1t\0\1\x09"), "reach past"),
    ("no property length", 5, packet(0x32, b"\0\1t\0\1"), "no property length"),
]


@pytest.mark.parametrize(("version", "raw", "words"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_a_malformed_packet_is_a_contract_error(version: Version, raw: bytes, words: str) -> None:
    with pytest.raises(ContractError) as caught:
        drain(connected(version), [raw])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("version", "raw"),
    [(4, publish(4, "t", b"")), (4, b"\xd0\x00"), (4, publish(4, "t", b"") + CONNACK[4]), (5, b"\xe0\x00"), (4, b"HTTP/1.1 400 Bad")],
)
def test_a_stream_that_does_not_begin_with_connack_is_refused(version: Version, raw: bytes) -> None:
    with pytest.raises(ContractError):
        Decoder(version).feed(raw)


CONNACKS: list[tuple[Version, bytes, ConnAck, str]] = [
    (4, b"\0\0", ConnAck(False, 0), ""),
    (4, b"\1\0", ConnAck(True, 0), ""),
    (4, b"\0\5", ConnAck(False, 5), "not authorized (code 0x05)"),
    (4, b"\0\x77", ConnAck(False, 0x77), "unknown return code (code 0x77)"),
    (5, b"\1\0\0", ConnAck(True, 0), ""),
    (5, b"\0\x87\x06\x1f\0\3abc", ConnAck(False, 0x87, "abc"), "not authorized (code 0x87, abc)"),
    (5, b"\0\0\x06\x13\0\x0a\x21\0\x14", ConnAck(False, 0, keepalive_s=10), ""),
    (5, b"\0\1", ConnAck(False, 0x84), "unsupported protocol version (code 0x84)"),  # from a broker that only knows 3.1.1
]


@pytest.mark.parametrize(("version", "body", "want", "words"), CONNACKS)
def test_connack(version: Version, body: bytes, want: ConnAck, words: str) -> None:
    got = Decoder(version).feed(packet(0x20, body)).packets
    assert got == [want]
    assert frames.refusal(want, version) == words


@pytest.mark.parametrize(
    ("version", "body"), [(4, b"\0"), (4, b"\2\0"), (4, b"\1\5"), (4, b"\0\0\0"), (5, b"\0\0"), (5, b"\0\1\0"), (5, b"\0\0\3\x23\0\1")]
)
def test_a_malformed_connack_is_refused(version: Version, body: bytes) -> None:
    with pytest.raises(ContractError, match="CONNACK"):
        Decoder(version).feed(packet(0x20, body))


def test_suback_and_disconnect_say_why() -> None:
    got = connected(5).feed(packet(0x90, b"\0\1\x06\x1f\0\3abc\x87") + packet(0xE0, b"\x8e\x05\x1f\0\2hi") + b"\xe0\x00").packets
    assert got == [SubAck(1, (0x87,), "abc"), Disconnect(0x8E, "hi"), Disconnect(0)]
    words = [frames.refusal(p, 5) for p in got if not isinstance(p, PingResp)]
    assert words == ["not authorized (code 0x87, abc)", "session taken over (code 0x8e, hi)", ""]
    assert frames.refusal(SubAck(1, (0x80,)), 4) == "unspecified error (code 0x80)"
    assert frames.refusal(SubAck(1, (1,)), 4) == ""
    assert connected(4).feed(packet(0xB0, b"\0\2")).packets == [UnsubAck(2)]
    assert frames.refusal(UnsubAck(2), 4) == frames.refusal(UnsubAck(2, (0, 0x11)), 5) == ""
    assert frames.refusal(UnsubAck(2, (0, 0x87)), 5) == "not authorized (code 0x87)"


@given(versions, st.integers(1_025, 5_000), st.lists(st.integers(0, 9_000), max_size=8), st.booleans())
@settings(max_examples=100, deadline=None)
def test_an_oversize_publish_is_cut_and_the_stream_goes_on(version: Version, size: int, cuts: list[int], qos_0: bool) -> None:
    big = b"b" * size
    stream = publish(version, "big", big, None if qos_0 else 7) + publish(version, "small", b"s", 8)
    edges = [0, *sorted(min(c, len(stream)) for c in cuts), len(stream)]
    got = drain(connected(version, 1_024), [stream[a:b] for a, b in pairwise(edges)])
    assert got.topics == ["big", "small"] and got.payloads[1] == b"s"
    assert 1_000 <= len(got.payloads[0]) <= 1_024 and big.startswith(got.payloads[0])
    assert got.acks == pubacks([8] if qos_0 else [7, 8])


def test_an_endless_publish_holds_no_memory() -> None:
    decoder = connected(4, 2_048)
    drain(decoder, [b"\x32\xff\xff\xff\x7f\0\1t\0\1"])  # 256 MB announced
    for _ in range(1_000):
        drain(decoder, [b"x" * 100_000])
    assert decoder._held <= 2_048


def test_properties_alone_over_the_limit_leave_an_empty_payload() -> None:
    pair = b"\x26\0\1k" + struct.pack(">H", 2_000) + b"v" * 2_000
    raw = packet(0x32, b"\0\1t\0\1" + b"\xd6\x0f" + pair + b"payload")
    assert len(pair) == 2_006
    got = drain(connected(5, 1_024), [raw, b"\xd0\x00"])
    assert got.payloads == [b""] and got.packets == [PingResp()]


def test_many_topics_are_forgotten_again() -> None:
    decoder = connected(4)
    for n in range(200):
        got = decoder.feed(b"".join(publish(4, f"{n}/{m}/" + "x" * 1_000, b"") for m in range(10)))
        assert got.topics[3].startswith(f"{n}/3/")
    assert sum(map(len, decoder._topics_known)) <= frames.TOPICS_KNOWN_BYTES_MAX


def test_known_topics_cost_a_client_no_more_than_their_limit() -> None:
    """Long topics in one piece, wide in memory; each in a piece of its own; short ones."""
    for topics in (
        [[f"{n}\U0001f600" + "x" * 60_000 for n in range(4)]],
        [[f"{n}\U0001f600" + "x" * 10_000] for n in range(20)],
        [[f"{n}/t" for n in range(5_000)]],
    ):
        decoder = server_frames.Decoder()
        decoder.feed(connect(4, "c", 30))
        tracemalloc.start()
        try:
            for piece in topics:
                assert decoder.feed(b"".join(publish(4, topic, b"") for topic in piece)).topics == piece
            assert tracemalloc.get_traced_memory()[0] < 150_000
        finally:
            tracemalloc.stop()


def test_a_packet_in_many_small_pieces_costs_little_more_than_its_bytes() -> None:
    decoder = connected(4)
    raw = publish(4, "t", b"x" * 200_000)
    tracemalloc.start()
    try:
        for at in range(0, 150_000, 2):
            decoder.feed(raw[at : at + 2])
        assert decoder.held == 150_000 and tracemalloc.get_traced_memory()[0] < 250_000
    finally:
        tracemalloc.stop()
    assert decoder.feed(raw[150_000:]).payloads == [b"x" * 200_000]


def test_equal_topics_are_one_object() -> None:
    got = connected(4).feed(publish(4, "a/b", b"1") + publish(4, "a/b", b"2"))
    assert got.topics[0] is got.topics[1]


def test_what_does_not_fit_a_field_is_refused() -> None:
    with pytest.raises(ContractError, match="user name"):
        frames.connect(4, "c", 30, password="p")
    with pytest.raises(ContractError, match="keepalive 70000"):
        frames.connect(4, "c", 70_000)
    with pytest.raises(ContractError, match="at most 65535"):
        frames.connect(4, "c" * 70_000, 30)
    with pytest.raises(ContractError, match="UTF-8"):
        frames.connect(4, "\ud800", 30)
    with pytest.raises(ContractError, match="cannot subscribe"):
        frames.subscribe(4, 1, "")
    with pytest.raises(ContractError, match="cannot unsubscribe"):
        frames.unsubscribe(4, 1, [])


def test_connect_in_3_1_1_byte_by_byte() -> None:
    want = b"\x10\x17\x00\x04MQTT\x04\xc0\x00\x1e\x00\x02id\x00\x01u\x00\x04\xc3\xa4pw"
    assert frames.connect(4, "id", 30, username="u", password="äpw") == want
    assert frames.connect(4, "id", 30, clean=True) == b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x1e\x00\x02id"
    assert frames.subscribe(4, 1, "a/#") == b"\x82\x08\x00\x01\x00\x03a/#\x01"
    assert frames.unsubscribe(4, 2, ["a/#", "b"]) == b"\xa2\x0a\x00\x02\x00\x03a/#\x00\x01b"


class TestAgainstAnIndependentCodec:
    """PyPI `mqtt5`, MQTT 5 only, written in Rust by others."""

    @pytest.fixture
    def codec(self) -> Any:
        return pytest.importorskip("mqtt5", reason="the independent codec is not installed (pip install mqtt5)")

    def test_it_reads_our_packets(self, codec: Any) -> None:
        raw = frames.connect(5, "agent-ä", 30, username="u", password="p", session_expiry_s=3_600)
        got, size = codec.read(memoryview(raw))
        assert size == len(raw)
        assert (got.client_id, got.username, got.password, got.keep_alive) == ("agent-ä", "u", b"p", 30)
        assert (got.clean_start, got.session_expiry_interval, got.receive_max, got.topic_alias_max) == (False, 3_600, 65_535, 0)
        assert got.max_packet_size is None and got.will is None
        got, _ = codec.read(memoryview(frames.subscribe(5, 9, "sensors/x/#")))
        assert (got.packet_id, got.topic_filters[0].pattern, got.topic_filters[0].max_qos) == (9, "sensors/x/#", codec.QoS.AT_LEAST_ONCE)
        got, _ = codec.read(memoryview(frames.unsubscribe(5, 10, ["a/#", "b"])))
        assert (got.packet_id, got.patterns) == (10, ["a/#", "b"])
        got, _ = codec.read(memoryview(pubacks([513])))
        assert (got.packet_id, got.reason_code) == (513, codec.PubAckReasonCode.SUCCESS)
        assert isinstance(codec.read(memoryview(frames.PINGREQ))[0], codec.PingReqPacket)
        assert codec.read(memoryview(frames.disconnect(5)))[0].reason_code == codec.DisconnectReasonCode.NORMAL_DISCONNECTION
        assert codec.read(memoryview(frames.disconnect(5, 0x82)))[0].reason_code == codec.DisconnectReasonCode.PROTOCOL_ERROR

    @given(
        st.lists(messages, min_size=1, max_size=5),
        st.none() | st.integers(0, 2**32 - 1),
        st.none() | topics,
        st.none() | st.binary(max_size=20),
        st.lists(st.tuples(topics, topics), max_size=3),
        st.lists(st.integers(1, 268_435_455), max_size=3),
    )
    @settings(max_examples=100, deadline=None)
    def test_we_read_its_publishes(
        self,
        sent: list[tuple[str, bytes, int | None, bool]],
        expiry: int | None,
        content_type: str | None,
        correlation: bytes | None,
        users: list[tuple[str, str]],
        subscriptions: list[int],
    ) -> None:
        codec = pytest.importorskip("mqtt5", reason="the independent codec is not installed (pip install mqtt5)")
        extras = {"message_expiry_interval": expiry, "content_type": content_type, "correlation_data": correlation}
        raw = b"".join(
            codec.PublishPacket(
                topic,
                payload,
                qos=codec.QoS.AT_MOST_ONCE if identifier is None else codec.QoS.AT_LEAST_ONCE,
                retain=retain,
                packet_id=identifier,
                user_properties=users,
                subscription_ids=subscriptions,
                **extras,
            ).write()
            for topic, payload, identifier, retain in sent
        )
        got = drain(connected(5), [raw[: len(raw) // 2], raw[len(raw) // 2 :]])
        assert list(zip(got.topics, got.payloads, strict=True)) == [(topic, payload) for topic, payload, *_ in sent]
        assert got.acks == pubacks(i for _, _, i, _ in sent if i is not None)

    def test_we_read_its_answers(self, codec: Any) -> None:
        answers = [
            codec.ConnAckPacket(
                session_present=True,
                session_expiry_interval=5,
                assigned_client_id="x",
                server_keep_alive=20,
                response_info="r",
                server_reference="s",
                reason_str="welcome",
                receive_max=10,
                topic_alias_max=3,
                max_qos=codec.QoS.AT_LEAST_ONCE,
                retain_available=False,
                max_packet_size=1_000,
                wildcard_subscription_available=False,
                user_properties=[("a", "b"), ("a", "c")],
            ),
            codec.SubAckPacket(1, [codec.SubAckReasonCode.GRANTED_QOS_AT_LEAST_ONCE], reason_str="ok", user_properties=[("a", "b")]),
            codec.UnsubAckPacket(
                2, [codec.UnsubAckReasonCode.SUCCESS, codec.UnsubAckReasonCode.NO_SUBSCRIPTION_EXISTED], reason_str="gone"
            ),
            codec.PingRespPacket(),
            codec.DisconnectPacket(reason_code=codec.DisconnectReasonCode.SERVER_SHUTTING_DOWN, reason_str="bye", server_reference="s"),
        ]
        got = drain(Decoder(5), [a.write() for a in answers]).packets
        assert got == [
            ConnAck(True, 0, "welcome", 20),
            SubAck(1, (1,), "ok"),
            UnsubAck(2, (0, 0x11), "gone"),
            PingResp(),
            Disconnect(0x8B, "bye"),
        ]
