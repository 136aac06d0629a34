"""MQTT 3.1.1 and 5 packets for a server that only takes messages in: bytes in, publishes and packets out, no I/O.

- The first packet is CONNECT; nothing after it is read before the next `feed`, so that nobody publishes before he is let in.
  It says the version, by which everything later is read.
- QoS 2, topic aliases and AUTH are refused (CONNACK says so), and what only a server sends.
- A publish larger than `packet_bytes_max`: on MQTT 5, where CONNACK announced the limit, it ends the connection; on 3.1.1 it is cut
  to that size, or the client would send it for ever.
- Before CONNECT has come, at most CONNECT_BYTES_MAX are held.

>>> decoder = Decoder()
>>> got = decoder.feed(bytes([0x10, 13, 0, 4]) + b"MQTT" + bytes([4, 2, 0, 30, 0, 1]) + b"c" + bytes([0x30, 4, 0, 1]) + b"t5")
>>> got.packets[0].client_id, got.topics, got.more, decoder.feed(b"").topics
('c', [], True, ['t'])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edge_agent.mqtt import cutter, wire
from edge_agent.mqtt.cutter import PACKET_BYTES_MAX
from edge_agent.mqtt.wire import CONNECT, DISCONNECT, PINGREQ, SUBSCRIBE, UNSUBSCRIBE, FrameError, Version, malformed

CONNECT_BYTES_MAX = 8 * 1024
PINGRESP = b"\xd0\x00"

_NOT_AUTHORIZED, _NO_SUBSCRIPTION = 0x87, 0x11
_MESSAGE = {wire.PAYLOAD_FORMAT, wire.MESSAGE_EXPIRY, wire.CONTENT_TYPE, wire.RESPONSE_TOPIC, wire.CORRELATION, wire.USER}
_WILL_PROPERTIES = frozenset(_MESSAGE | {wire.WILL_DELAY})
_CONNECT_PROPERTIES = frozenset(
    (
        *(wire.SESSION_EXPIRY, wire.AUTH_METHOD, wire.AUTH_DATA, wire.PROBLEM_INFORMATION, wire.RESPONSE_INFORMATION),
        *(wire.RECEIVE_MAXIMUM, wire.TOPIC_ALIAS_MAXIMUM, wire.PACKET_MAXIMUM, wire.USER),
    )
)


@dataclass(frozen=True)
class Connect:
    """A client asks to be let in. `will_qos` is None without a will; `keepalive_s` 0 means none."""

    version: Version
    client_id: str
    clean: bool
    keepalive_s: int
    username: str | None = None
    password: bytes | None = field(default=None, repr=False)
    will_qos: int | None = None
    will_retain: bool = False
    session_expiry_s: int = 0
    auth_method: str | None = None


@dataclass(frozen=True)
class Subscribe:
    """A client asks for messages by so many filters."""

    packet_id: int
    filters: int


@dataclass(frozen=True)
class Unsubscribe:
    """A client wants no more messages by so many filters."""

    packet_id: int
    filters: int


@dataclass(frozen=True)
class PingReq:
    """The client lives."""


@dataclass(frozen=True)
class Leave:
    """The client says that it closes, and why (MQTT 5)."""

    code: int


Packet = Connect | Subscribe | Unsubscribe | PingReq | Leave
Frames = cutter.Frames[Packet]


class Decoder(cutter.Cutter[Packet]):
    """Cuts the bytes that a client sends into packets."""

    _FIRST = CONNECT
    _PUBLISH_PROPERTIES = frozenset(_MESSAGE)
    _TOPICS_KNOWN_BYTES_MAX = 64 * 1024  # there may be hundreds of clients, each with a few topics

    def __init__(self, packet_bytes_max: int = PACKET_BYTES_MAX) -> None:
        super().__init__(4, CONNECT_BYTES_MAX)
        self._publish_bytes_max = packet_bytes_max

    @property
    def version(self) -> Version:
        """Of CONNECT; 4 before it has come."""
        return self._version

    def _control(self, head: int, body: bytes, frames: Frames) -> bool:
        kind = head >> 4
        want = 2 if kind in (SUBSCRIBE, UNSUBSCRIBE) else 0
        if kind not in _PARSERS:
            raise FrameError(f"{wire.TYPE_NAMES[kind]} is not for a server that only receives")
        if head & 15 != want:
            raise malformed(kind, f"flags {head & 15:#x}, want {want:#x}")
        packet = _PARSERS[kind](body, self._version)
        frames.packets.append(packet)
        if isinstance(packet, Connect):
            self._version, self._packet_bytes_max = packet.version, self._publish_bytes_max
        return kind in (CONNECT, DISCONNECT)

    def _cut(self, data: bytes, at: int, head: int, start: int) -> tuple[bytes, bytes, bytes] | None:
        if not self._connected and head >> 4 != CONNECT:
            raise FrameError(f"stream begins {data[at : at + 16]!r}, not with CONNECT")
        if self._version == 5 or not self._connected:
            raise malformed(head >> 4, f"larger than {self._packet_bytes_max} bytes", wire.TOO_LARGE)
        return super()._cut(data, at, head, start)


def connack(
    version: Version, code: int = 0, *, receive_max: int = 0, packet_bytes_max: int = 0, client_id: str = "", keepalive_s: int | None = None
) -> bytes:
    """CONNACK; on MQTT 5 an acceptance says what there is not, and these limits. `client_id` is what was given to a client without one.

    There never is a session from before.
    """
    if version == 4 or code:
        return b"\x20" + wire.sized(bytes([0, code]) + (b"\0" if version == 5 else b""))
    none = (wire.RETAIN_AVAILABLE, wire.WILDCARD_AVAILABLE, wire.SUBSCRIPTION_IDS_AVAILABLE, wire.SHARED_AVAILABLE)
    properties = bytes([wire.SESSION_EXPIRY]) + bytes(4) + bytes([wire.QOS_MAXIMUM, 1]) + b"".join(bytes([p, 0]) for p in none)
    properties += bytes([wire.RECEIVE_MAXIMUM]) + receive_max.to_bytes(2) + bytes([wire.PACKET_MAXIMUM]) + packet_bytes_max.to_bytes(4)
    if client_id:
        properties += bytes([wire.ASSIGNED_CLIENT]) + wire.write_text(client_id)
    if keepalive_s is not None:
        properties += bytes([wire.SERVER_KEEPALIVE]) + keepalive_s.to_bytes(2)
    return b"\x20" + wire.sized(b"\0\0" + wire.sized(properties))


def suback(version: Version, packet: Subscribe) -> bytes:
    """SUBACK that refuses every filter."""
    codes = bytes([wire.REFUSED if version == 4 else _NOT_AUTHORIZED]) * packet.filters
    return b"\x90" + wire.sized(packet.packet_id.to_bytes(2) + (b"\0" if version == 5 else b"") + codes)


def unsuback(version: Version, packet: Unsubscribe) -> bytes:
    """UNSUBACK; there was no subscription."""
    codes = b"\0" + bytes([_NO_SUBSCRIPTION]) * packet.filters if version == 5 else b""
    return b"\xb0" + wire.sized(packet.packet_id.to_bytes(2) + codes)


def _connect(body: bytes, _version: Version) -> Connect:
    protocol, at = wire.read_text(body, 0, CONNECT)
    if (protocol, body[at : at + 1]) not in (("MQTT", b"\4"), ("MQTT", b"\5")):
        if protocol not in ("MQTT", "MQIsdp"):
            raise malformed(CONNECT, f"protocol {protocol[:32]!r}")
        raise FrameError(f"protocol version {body[at : at + 1].hex()} is not spoken here", wire.UNSUPPORTED_VERSION)
    version: Version = 4 if body[at] == 4 else 5
    if len(body) < at + 4:
        raise malformed(CONNECT, f"{len(body)} bytes long")
    flags, keepalive_s = body[at + 1], int.from_bytes(body[at + 2 : at + 4])
    _check_flags(flags, version)
    at += 4
    found: dict[int, int | str] = {}
    if version == 5:
        found, at = _connect_properties(body, at)
    client_id, at = wire.read_text(body, at, CONNECT)
    if flags & 0x04:
        at = _will(body, at, version)
    username, password = None, None
    if flags & 0x80:
        username, at = wire.read_text(body, at, CONNECT)
    if flags & 0x40:
        password, at = wire.read_binary(body, at, CONNECT)
    if at != len(body):
        raise malformed(CONNECT, f"{len(body) - at} bytes after its end")
    method, expiry = found.get(wire.AUTH_METHOD), found.get(wire.SESSION_EXPIRY, 0)
    return Connect(
        version=version,
        client_id=client_id,
        clean=bool(flags & 0x02),
        keepalive_s=keepalive_s,
        username=username,
        password=password,
        will_qos=flags >> 3 & 3 if flags & 0x04 else None,
        will_retain=bool(flags & 0x20),
        session_expiry_s=expiry if isinstance(expiry, int) else 0,
        auth_method=method if isinstance(method, str) else None,
    )


def _check_flags(flags: int, version: Version) -> None:
    if flags & 0x01:
        raise malformed(CONNECT, "the reserved flag is set")
    if flags & 0x18 == 0x18 or (flags & 0x38 and not flags & 0x04):
        raise malformed(CONNECT, f"flags {flags:#04x}: a will of QoS 3, or none with QoS or retain")
    if version == 4 and flags & 0xC0 == 0x40:
        raise malformed(CONNECT, "a password without a user name")


def _connect_properties(body: bytes, at: int) -> tuple[dict[int, int | str], int]:
    raw, at = wire.section(body, at, CONNECT)
    found = wire.read_properties(raw, CONNECT, _CONNECT_PROPERTIES)
    flags = [found.get(wire.PROBLEM_INFORMATION, 0), found.get(wire.RESPONSE_INFORMATION, 0)]
    zero = [found.get(wire.RECEIVE_MAXIMUM, 1), found.get(wire.PACKET_MAXIMUM, 1)]
    if 0 in zero or any(flag not in (0, 1) for flag in flags) or (wire.AUTH_DATA in found and wire.AUTH_METHOD not in found):
        raise malformed(CONNECT, f"properties {raw[:64].hex()}", wire.PROTOCOL_ERROR)
    return found, at


def _will(body: bytes, at: int, version: Version) -> int:
    """Check the will, which is not kept; returns where it ends."""
    if version == 5:
        raw, at = wire.section(body, at, CONNECT)
        wire.read_properties(raw, CONNECT, _WILL_PROPERTIES)
    topic, at = wire.read_text(body, at, CONNECT)
    if not topic or "+" in topic or "#" in topic:
        raise malformed(CONNECT, f"will topic {topic[:64]!r}", wire.TOPIC_INVALID)
    return wire.read_binary(body, at, CONNECT)[1]


def _subscribe(body: bytes, version: Version) -> Subscribe:
    packet_id, at = _packet_id(body, SUBSCRIBE)
    if version == 5:
        raw, at = wire.section(body, at, SUBSCRIBE)
        wire.read_properties(raw, SUBSCRIBE, frozenset((wire.SUBSCRIPTION, wire.USER)))
    options_max = 0x2E if version == 5 else 0x02  # no local, as published, retain handling 0 to 2; QoS 0 to 2
    filters = 0
    while at < len(body):
        _, at = _filter(body, at, SUBSCRIBE)
        options = body[at] if at < len(body) else 0xFF
        if options & 0x03 == 0x03 or options > options_max:
            raise malformed(SUBSCRIBE, "options of a filter are missing or unknown")
        at, filters = at + 1, filters + 1
    return Subscribe(packet_id, _some(filters, SUBSCRIBE))


def _unsubscribe(body: bytes, version: Version) -> Unsubscribe:
    packet_id, at = _packet_id(body, UNSUBSCRIBE)
    if version == 5:
        raw, at = wire.section(body, at, UNSUBSCRIBE)
        wire.read_properties(raw, UNSUBSCRIBE, frozenset((wire.USER,)))
    filters = 0
    while at < len(body):
        _, at = _filter(body, at, UNSUBSCRIBE)
        filters += 1
    return Unsubscribe(packet_id, _some(filters, UNSUBSCRIBE))


def _packet_id(body: bytes, kind: int) -> tuple[int, int]:
    packet_id = int.from_bytes(body[:2])
    if len(body) < 2 or packet_id == 0:
        raise malformed(kind, "packet id 0 or none", wire.PROTOCOL_ERROR)
    return packet_id, 2


def _filter(body: bytes, at: int, kind: int) -> tuple[str, int]:
    text, at = wire.read_text(body, at, kind)
    if not text:
        raise malformed(kind, "an empty filter", wire.PROTOCOL_ERROR)
    return text, at


def _some(filters: int, kind: int) -> int:
    if not filters:
        raise malformed(kind, "no filter", wire.PROTOCOL_ERROR)
    return filters


def _pingreq(body: bytes, version: Version) -> PingReq:
    if body:
        raise malformed(PINGREQ, f"{len(body)} bytes long")
    return PingReq()


def _disconnect(body: bytes, version: Version) -> Leave:
    if version == 4 and body:
        raise malformed(DISCONNECT, f"{len(body)} bytes long")
    if len(body) < 2:
        return Leave(body[0] if body else 0)
    raw, stop = wire.section(body, 1, DISCONNECT)
    if stop != len(body):
        raise malformed(DISCONNECT, f"properties of {len(raw)} bytes in {len(body) - 1}")
    wire.read_properties(raw, DISCONNECT, frozenset((wire.SESSION_EXPIRY, wire.REASON, wire.USER)))
    return Leave(body[0])


_PARSERS: dict[int, Callable[[bytes, Version], Packet]] = {
    CONNECT: _connect,
    SUBSCRIBE: _subscribe,
    UNSUBSCRIBE: _unsubscribe,
    PINGREQ: _pingreq,
    DISCONNECT: _disconnect,
}
