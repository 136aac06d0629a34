"""Fuzzed MQTT streams, both versions, both directions: good packets of an independent codec and of ours, then bytes flipped, cut, spliced.

The oracle, for every stream:
- nothing but ContractError comes out, and no more than one packet is held;
- however the stream is cut into pieces, the same packets come out, up to the same end;
- what was not changed is read as it was written; what was changed and both codecs accept (MQTT 5), both read alike.

`make test` runs a part of it, `make test-long` a million packets. FENCELINE_RUNS sets another count.
"""

from __future__ import annotations

import os
import random
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from edge_agent.contract.errors import ContractError
from edge_agent.mqtt import cutter, frames, server_frames
from edge_agent.mqtt.wire import Version, sized, write_text
from tests.edge_agent.mqtt.packets import pubacks

PACKETS, PACKETS_LONG = 60_000, 1_000_000
PACKET_BYTES_MAX = 4_096

codec = pytest.importorskip("mqtt5", reason="the independent codec is not installed (pip install mqtt5)")


@dataclass
class Outcome:
    """Everything that a decoder gave, in order, and whether it ended with an error."""

    topics: list[str]
    payloads: list[bytes]
    acks: bytes
    packets: list[Any]
    failed: bool
    held: int


@dataclass
class Stream:
    """Bytes of one direction, how many packets, and what is to come out if nothing is changed."""

    raw: bytes
    count: int
    published: list[tuple[str, bytes]]
    acks: bytes


def decode(make: Callable[[], cutter.Cutter[Any]], pieces: list[bytes], packets_max: int) -> Outcome:
    decoder, total = make(), cutter.Frames[Any]()
    failed = False
    try:
        for piece in pieces:
            got = decoder.feed(piece, packets_max)
            total.extend(got)
            while got.more:
                got = decoder.feed(b"", packets_max)
                total.extend(got)
            assert decoder.held <= max(PACKET_BYTES_MAX, server_frames.CONNECT_BYTES_MAX, frames.wire.CONTROL_BYTES_MAX) + 5
    except ContractError as e:
        assert str(e).startswith("MQTT: ")
        failed = True
    assert len(total.topics) == len(total.payloads) and len(total.acks) <= 4 * len(total.topics)
    assert all(type(t) is str for t in total.topics) and all(len(p) <= PACKET_BYTES_MAX for p in total.payloads)
    return Outcome(total.topics, total.payloads, total.acks, total.packets, failed, decoder.held)


class Maker:
    """Random good packets of one version and direction."""

    def __init__(self, rng: random.Random, version: Version, to_server: bool) -> None:
        self._rng, self._version, self._to_server = rng, version, to_server

    def stream(self) -> Stream:
        rng = self._rng
        stream = Stream(self._first(), 1, [], b"")
        for _ in range(rng.randrange(1, 12)):
            stream.raw += self._publish(stream) if rng.random() < 0.75 else self._control()
            stream.count += 1
        return stream

    def text(self, length_max: int = 12, empty: bool = False) -> str:
        alphabet = "abcdef/äß€𝄞 -_0123456789"
        return "".join(self._rng.choices(alphabet, k=self._rng.randrange(0 if empty else 1, length_max)))

    def _pairs(self) -> list[tuple[str, str]]:
        return [(self.text(), self.text(empty=True)) for _ in range(self._rng.randrange(3))]

    def _maybe(self, value: Any) -> Any:
        return value if self._rng.random() < 0.3 else None

    def _first(self) -> bytes:
        rng = self._rng
        if not self._to_server:
            if self._version == 4:
                return b"\x20\x02" + bytes([rng.randrange(2), 0])
            more = {"server_keep_alive": self._maybe(rng.randrange(65_536)), "reason_str": self._maybe(self.text())}
            return bytes(codec.ConnAckPacket(user_properties=self._pairs(), assigned_client_id=self._maybe(self.text()), **more).write())
        username, password = self._maybe(self.text()), self._maybe(rng.randbytes(6))
        if self._version == 4:
            more = {"username": username, "password": None if password is None or username is None else self.text()}
            return frames.connect(4, self.text(), rng.randrange(65_536), clean=rng.random() < 0.5, **more)
        will = codec.Will(self.text(), payload=rng.randbytes(9), qos=codec.QoS(rng.randrange(3)), user_properties=self._pairs())
        return bytes(
            codec.ConnectPacket(
                self.text(),
                username=username,
                password=password,
                clean_start=rng.random() < 0.5,
                will=self._maybe(will),
                keep_alive=rng.randrange(65_536),
                session_expiry_interval=rng.randrange(2**32),
                authentication_method=self._maybe(self.text()),
                receive_max=rng.randrange(1, 65_536),
                topic_alias_max=rng.randrange(9),
                max_packet_size=self._maybe(rng.randrange(1, 2**32)),
                user_properties=self._pairs(),
            ).write()
        )

    def _publish(self, stream: Stream) -> bytes:
        rng = self._rng
        topic, payload = self.text(), rng.randbytes(rng.choice((0, 5, 90, 200)))
        packet_id = rng.randrange(1, 65_536) if rng.random() < 0.7 else None
        stream.published.append((topic, payload))
        stream.acks += pubacks([] if packet_id is None else [packet_id])
        again = packet_id is not None and rng.random() < 0.2
        if self._version == 4:
            head = 0x30 | (packet_id is not None) << 1 | again << 3 | (rng.random() < 0.2)
            return bytes([head]) + sized(write_text(topic) + (b"" if packet_id is None else struct.pack(">H", packet_id)) + payload)
        return bytes(
            codec.PublishPacket(
                topic,
                payload,
                qos=codec.QoS(packet_id is not None),
                retain=rng.random() < 0.2,
                packet_id=packet_id,
                duplicate=again,
                message_expiry_interval=self._maybe(rng.randrange(2**32)),
                content_type=self._maybe(self.text()),
                response_topic=self._maybe(self.text()),
                correlation_data=self._maybe(rng.randbytes(5)),
                subscription_ids=[] if self._to_server else [rng.randrange(1, 2**28) for _ in range(rng.randrange(2))],
                user_properties=self._pairs(),
            ).write()
        )

    def _control(self) -> bytes:
        rng = self._rng
        if not self._to_server:
            raw = [rng.choice((0, 1, 0x80, 0x87)) for _ in range(rng.randrange(1, 4))]
            if self._version == 4:
                return rng.choice((b"\xd0\x00", b"\x90" + sized(b"\0\1" + bytes(raw)), b"\xb0\x02\0\2"))
            codes = [codec.SubAckReasonCode(code) for code in raw]
            suback = codec.SubAckPacket(rng.randrange(1, 65_536), codes, reason_str=self._maybe(self.text()), user_properties=self._pairs())
            gone = [codec.UnsubAckReasonCode(rng.choice((0, 0x11, 0x80, 0x87))) for _ in raw]
            unsuback = codec.UnsubAckPacket(
                rng.randrange(1, 65_536), gone, reason_str=self._maybe(self.text()), user_properties=self._pairs()
            )
            return bytes(rng.choice((codec.PingRespPacket(), suback, unsuback)).write())
        if self._version == 4:
            filters = b"".join(write_text(self.text()) + bytes([rng.randrange(3)]) for _ in range(rng.randrange(1, 4)))
            return rng.choice((b"\xc0\x00", b"\x82" + sized(b"\0\1" + filters), b"\xa2" + sized(b"\0\1" + write_text(self.text()))))
        wanted = [codec.TopicFilter(self.text(), max_qos=codec.QoS(rng.randrange(3))) for _ in range(rng.randrange(1, 4))]
        subscribe = codec.SubscribePacket(rng.randrange(1, 65_536), wanted, user_properties=self._pairs())
        unsubscribe = codec.UnsubscribePacket(rng.randrange(1, 65_536), [self.text()], user_properties=self._pairs())
        return bytes(rng.choice((codec.PingReqPacket(), subscribe, unsubscribe)).write())


def mutated(rng: random.Random, raw: bytes, other: bytes) -> bytes:
    """Some bytes changed, dropped, doubled or taken from another stream."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not data:
            break
        at, size = rng.randrange(len(data)), rng.choice((1, 1, 2, 8, 40))
        match rng.randrange(7):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + size] = rng.randbytes(size)
            case 2:
                del data[at : at + size]
            case 3:
                data[at:at] = data[at : at + size]
            case 4:
                data[at:] = other[rng.randrange(len(other)) :]
            case 5:
                data[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
            case _:
                data[at:at] = rng.randbytes(size)
    return bytes(data)


def pieces_of(rng: random.Random, raw: bytes) -> list[bytes]:
    edges = [0, *sorted(rng.randrange(len(raw) + 1) for _ in range(rng.randrange(6))), len(raw)]
    return [raw[a:b] for a, b in pairwise(edges)]


def their_publishes(raw: bytes) -> list[tuple[str, bytes]] | None:
    """What the independent codec reads; None if it refuses, or something is left over."""
    out, view = [], memoryview(raw)
    while view:
        try:
            packet, size = codec.read(view)
        except Exception:  # noqa: BLE001 - whatever it raises, it does not accept
            return None
        if isinstance(packet, codec.PublishPacket):
            out.append((packet.topic, packet.payload))
        view = view[size:]
    return out


def fuzz(rng: random.Random, packets: int) -> Counter[str]:
    """Run until so many packets have been made; counts what happened."""
    counts: Counter[str] = Counter()
    other = b"\x30\x05\x00\x01tab"
    while counts["packets"] < packets:
        version: Version = rng.choice((4, 5))
        to_server = rng.random() < 0.6

        def make(version: Version = version, to_server: bool = to_server) -> cutter.Cutter[Any]:
            return server_frames.Decoder(PACKET_BYTES_MAX) if to_server else frames.Decoder(version, PACKET_BYTES_MAX)

        stream = Maker(rng, version, to_server).stream()
        counts["packets"] += stream.count
        change = rng.random() < 0.8
        raw = mutated(rng, stream.raw, other) if change else stream.raw
        other = stream.raw
        whole = decode(make, [raw], 65_536)
        cut = decode(make, pieces_of(rng, raw), rng.choice((1, 2, 5, 65_536)))
        assert whole == cut, f"cut differently, {raw.hex()} of version {version} gives {whole} or {cut}"
        counts["refused" if whole.failed else "read"] += 1
        if not change:
            assert not whole.failed and whole.held == 0, stream.raw.hex()
            assert list(zip(whole.topics, whole.payloads, strict=True)) == stream.published and whole.acks == stream.acks
        elif version == 5 and not whole.failed and whole.held == 0 and b"\xe0" not in raw:
            theirs = their_publishes(raw)
            if theirs is not None:
                counts["read by both"] += 1
                assert list(zip(whole.topics, whole.payloads, strict=True)) == theirs, raw.hex()
    return counts


def test_a_part_of_the_fuzzed_streams(seed: int) -> None:
    counts = fuzz(random.Random(seed), PACKETS)
    assert counts["refused"] > counts["packets"] // 100 and counts["read by both"] > 0, counts


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_a_million_fuzzed_packets(seed: int) -> None:
    packets = int(os.environ.get("FENCELINE_RUNS") or PACKETS_LONG)
    print(dict(fuzz(random.Random(seed), packets)))
