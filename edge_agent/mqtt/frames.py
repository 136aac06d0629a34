"""MQTT 3.1.1 and 5 packets for a client that receives: bytes in, publishes and packets out, no I/O.

- Publishes are cut in bulk from a large piece of the byte stream, as parallel lists; their PUBACKs come ready made (cutter.py).
- Only what a receiving client may get is accepted: the first packet is CONNACK; no QoS 2 (we ask for QoS 1), no
  topic alias (we offer none), no AUTH. Anything else, and any malformed packet, is a ContractError: the connection
  is of no more use, and the decoder must not be fed again.
- A publish larger than `packet_bytes_max` is not an error, or the broker would send it for ever: it is cut to that size, the
  rest skipped unread, and the reader's own limit or decoder refuses it. MQTT 5's Maximum Packet Size is
  not announced, because a broker then drops silently.

>>> decoder = Decoder(4)
>>> decoder.feed(bytes([0x20, 2, 0, 0, 0x32, 9, 0, 1]) + b"t" + bytes([0, 7]) + b"21.").packets
[ConnAck(session_present=False, code=0, reason='', keepalive_s=None)]
>>> frames = decoder.feed(b"5"); frames.topics, frames.payloads, frames.acks
(['t'], [b'21.5'], b'@\\x02\\x00\\x07')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.contract.errors import ContractError
from edge_agent.mqtt import cutter, wire
from edge_agent.mqtt.cutter import PACKET_BYTES_MAX, TOPICS_KNOWN_BYTES_MAX
from edge_agent.mqtt.wire import REFUSED, FrameError, Version, malformed

__all__ = ["PACKET_BYTES_MAX", "REFUSED", "TOPICS_KNOWN_BYTES_MAX", "Decoder", "FrameError", "Frames", "Version"]

SESSION_EXPIRY_S_MAX = 0xFFFF_FFFF
RECEIVE_MAX = 65_535

PINGREQ = b"\xc0\x00"
_NO_SUBSCRIPTION = 0x11

# MQTT 5 properties that a client may meet.
_CONNACK_PROPERTIES = wire.ALL_PROPERTIES - {
    *(wire.PAYLOAD_FORMAT, wire.MESSAGE_EXPIRY, wire.CONTENT_TYPE, wire.RESPONSE_TOPIC, wire.CORRELATION, wire.SUBSCRIPTION),
    *(wire.PROBLEM_INFORMATION, wire.WILL_DELAY, wire.RESPONSE_INFORMATION, wire.TOPIC_ALIAS),
}
_SUBACK_PROPERTIES = frozenset((wire.REASON, wire.USER))
_DISCONNECT_PROPERTIES = frozenset((wire.SESSION_EXPIRY, wire.SERVER_REFERENCE, wire.REASON, wire.USER))

_CONNACK_WORDS_4 = {
    1: "unacceptable protocol version",
    2: "client id rejected",
    3: "server unavailable",
    4: "bad user name or password",
    5: "not authorized",
}
_WORDS_5 = {
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client id rejected",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8A: "banned",
    0x8B: "server shutting down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x94: "topic alias invalid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
    0xA1: "subscription identifiers not supported",
    0xA2: "wildcard subscriptions not supported",
}


@dataclass(frozen=True)
class ConnAck:
    """The broker's answer to CONNECT; `code` 0 accepts. `keepalive_s` overrides ours if given (MQTT 5)."""

    session_present: bool
    code: int
    reason: str = ""
    keepalive_s: int | None = None


@dataclass(frozen=True)
class SubAck:
    """One code per filter: the granted QoS, or REFUSED and above."""

    packet_id: int
    codes: tuple[int, ...]
    reason: str = ""


@dataclass(frozen=True)
class UnsubAck:
    """One code per filter with MQTT 5, REFUSED and above: it is still subscribed; none with 3.1.1, which cannot refuse."""

    packet_id: int
    codes: tuple[int, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class PingResp:
    """The broker lives."""


@dataclass(frozen=True)
class Disconnect:
    """The broker says why it will close (MQTT 5 only)."""

    code: int
    reason: str = ""


Packet = ConnAck | SubAck | UnsubAck | PingResp | Disconnect


Frames = cutter.Frames[Packet]


class Decoder(cutter.Cutter[Packet]):
    """Cuts the bytes that a server sends into packets."""

    _FIRST = wire.CONNACK
    _PUBLISH_PROPERTIES = frozenset(
        (wire.PAYLOAD_FORMAT, wire.MESSAGE_EXPIRY, wire.CONTENT_TYPE, wire.RESPONSE_TOPIC, wire.CORRELATION, wire.SUBSCRIPTION, wire.USER)
    )

    def __init__(self, version: Version, packet_bytes_max: int = PACKET_BYTES_MAX) -> None:
        super().__init__(version, packet_bytes_max)

    def _control(self, head: int, body: bytes, frames: Frames) -> bool:
        kind = head >> 4
        if kind not in _PARSERS or (kind, self._version) == (wire.DISCONNECT, 4):
            raise FrameError(f"{wire.TYPE_NAMES[kind]} is not for a client that only receives")
        if head & 15:
            raise malformed(kind, f"flags {head & 15:#x}, want 0")
        frames.packets.append(_PARSERS[kind](body, self._version))
        return False


def connect(
    version: Version,
    client_id: str,
    keepalive_s: int,
    *,
    username: str | None = None,
    password: str | None = None,
    clean: bool = False,
    session_expiry_s: int = 0,
) -> bytes:
    """CONNECT. With `clean=False` the broker keeps the session (MQTT 5: for `session_expiry_s` after the connection ended).

    Raises:
        ContractError: a text or number does not fit its field.
    """
    if password is not None and username is None:
        raise ContractError("MQTT: a password needs a user name")
    if not 0 <= keepalive_s <= 0xFFFF or not 0 <= session_expiry_s <= SESSION_EXPIRY_S_MAX:
        raise ContractError(f"MQTT: keepalive {keepalive_s} s or session expiry {session_expiry_s} s is out of bounds (65535, 2**32 - 1)")
    flags = (username is not None) << 7 | (password is not None) << 6 | clean << 1
    body = wire.write_text("MQTT") + bytes([version, flags]) + keepalive_s.to_bytes(2)
    if version == 5:
        expiry = bytes([wire.SESSION_EXPIRY]) + session_expiry_s.to_bytes(4) if session_expiry_s else b""
        body += wire.sized(expiry + bytes([wire.RECEIVE_MAXIMUM]) + RECEIVE_MAX.to_bytes(2))
    texts = [client_id, *(t for t in (username, password) if t is not None)]
    return b"\x10" + wire.sized(body + b"".join(map(wire.write_text, texts)))


def subscribe(version: Version, packet_id: int, topic_filter: str, qos: int = 1) -> bytes:
    """SUBSCRIBE to one filter.

    Raises:
        ContractError: the filter is empty or too long.
    """
    if not topic_filter or not 1 <= packet_id <= 0xFFFF:
        raise ContractError(f"MQTT: cannot subscribe to {topic_filter!r} with packet id {packet_id}")
    properties = b"\0" if version == 5 else b""
    return b"\x82" + wire.sized(packet_id.to_bytes(2) + properties + wire.write_text(topic_filter) + bytes([qos]))


def unsubscribe(version: Version, packet_id: int, topic_filters: list[str]) -> bytes:
    """UNSUBSCRIBE from some filters.

    Raises:
        ContractError: there is none, or one is empty or too long.
    """
    if not topic_filters or not all(topic_filters) or not 1 <= packet_id <= 0xFFFF:
        raise ContractError(f"MQTT: cannot unsubscribe from {topic_filters!r} with packet id {packet_id}")
    properties = b"\0" if version == 5 else b""
    return b"\xa2" + wire.sized(packet_id.to_bytes(2) + properties + b"".join(map(wire.write_text, topic_filters)))


def disconnect(version: Version, code: int = 0) -> bytes:
    """DISCONNECT; MQTT 3.1.1 has no code."""
    return b"\xe0\x00" if version == 4 or code == 0 else bytes([0xE0, 1, code])


def refusal(packet: ConnAck | SubAck | UnsubAck | Disconnect, version: Version) -> str:
    """Why the broker said no, in words; empty if it did not."""
    code = max(packet.codes, default=0) if isinstance(packet, (SubAck, UnsubAck)) else packet.code
    if version == 4 and isinstance(packet, ConnAck):
        words = _CONNACK_WORDS_4.get(code, "unknown return code") if code else ""
    else:
        words = _WORDS_5.get(code, "unknown reason code") if code >= REFUSED else ""
    if not words:
        return ""
    return f"{words} (code {code:#04x}{', ' + packet.reason if packet.reason else ''})"


def _connack(body: bytes, version: Version) -> ConnAck:
    if len(body) < 2 or (version == 4 and len(body) > 2) or body[0] > 1:
        # A 3.1.1 broker answers an MQTT 5 client with two bytes, code 1; that is not malformed.
        raise malformed(wire.CONNACK, f"body {body[:8].hex()}")
    if body[0] and body[1]:
        raise malformed(wire.CONNACK, "session present in a refusal")
    if version == 4 or len(body) == 2:
        if version == 5 and not body[1]:
            raise malformed(wire.CONNACK, "no property length")
        return ConnAck(bool(body[0]), body[1] if version == 4 else max(body[1], REFUSED | 4))
    if 0 < body[1] < REFUSED:
        raise malformed(wire.CONNACK, f"reason code {body[1]:#04x}")
    found = _all_properties(body, 2, wire.CONNACK, _CONNACK_PROPERTIES)
    keepalive = found.get(wire.SERVER_KEEPALIVE)
    return ConnAck(bool(body[0]), body[1], str(found.get(wire.REASON, "")), keepalive if isinstance(keepalive, int) else None)


def _suback(body: bytes, version: Version) -> SubAck:
    if len(body) < 3 + (version == 5):
        raise malformed(wire.SUBACK, f"{len(body)} bytes long")
    packet_id, codes, reason = _answers(body, version, wire.SUBACK)
    if not codes or any(2 < code < REFUSED for code in codes):
        raise malformed(wire.SUBACK, f"codes {bytes(codes).hex() or 'missing'}")
    return SubAck(packet_id, codes, reason)


def _unsuback(body: bytes, version: Version) -> UnsubAck:
    if len(body) < 4 if version == 5 else len(body) != 2:
        raise malformed(wire.UNSUBACK, f"{len(body)} bytes long")
    packet_id, codes, reason = _answers(body, version, wire.UNSUBACK)
    if (version == 5 and not codes) or any(code < REFUSED and code not in (0, _NO_SUBSCRIPTION) for code in codes):
        raise malformed(wire.UNSUBACK, f"codes {bytes(codes).hex() or 'missing'}")
    return UnsubAck(packet_id, codes, reason)


def _answers(body: bytes, version: Version, kind: int) -> tuple[int, tuple[int, ...], str]:
    """Packet id, codes and reason of SUBACK or UNSUBACK."""
    start, reason = 2, ""
    if version == 5:
        raw, start = wire.section(body, 2, kind)
        reason = str(wire.read_properties(raw, kind, _SUBACK_PROPERTIES).get(wire.REASON, ""))
    return int.from_bytes(body[:2]), tuple(body[start:]), reason


def _pingresp(body: bytes, version: Version) -> PingResp:
    if body:
        raise malformed(wire.PINGRESP, f"{len(body)} bytes long")
    return PingResp()


def _disconnect(body: bytes, version: Version) -> Disconnect:
    if len(body) < 2:
        return Disconnect(body[0] if body else 0)
    return Disconnect(body[0], str(_all_properties(body, 1, wire.DISCONNECT, _DISCONNECT_PROPERTIES).get(wire.REASON, "")))


_PARSERS: dict[int, Callable[[bytes, Version], Packet]] = {
    wire.CONNACK: _connack,
    wire.SUBACK: _suback,
    wire.UNSUBACK: _unsuback,
    wire.PINGRESP: _pingresp,
    wire.DISCONNECT: _disconnect,
}


def _all_properties(body: bytes, at: int, kind: int, allowed: frozenset[int]) -> dict[int, int | str]:
    """The properties that begin at `at` and end the packet."""
    raw, stop = wire.section(body, at, kind)
    if stop != len(body):
        raise malformed(kind, f"properties of {len(raw)} bytes in {len(body) - at}")
    return wire.read_properties(raw, kind, allowed)
