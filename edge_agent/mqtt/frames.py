"""MQTT 3.1.1 and 5 packets for a client that receives: bytes in, publishes and packets out, no I/O.

- Publishes are cut in bulk from a large piece of the byte stream, as parallel lists; their PUBACKs come ready made.
  However the stream is cut into pieces, the same packets come out.
- Only what a receiving client may get is accepted: the first packet is CONNACK; no QoS 2 (we ask for QoS 1), no
  topic alias (we offer none), no AUTH. Anything else, and any malformed packet, is a ContractError: the connection
  is of no more use, and the decoder must not be fed again.
- A publish larger than `packet_bytes_max` is not an error, or the broker would send it for ever: it is cut to that size, the
  rest skipped unread, and the reader's own limit or decoder refuses it. MQTT 5's Maximum Packet Size is
  not announced, because a broker then drops silently.
- Memory held: at most one piece, one packet and their copies.

>>> decoder = Decoder(4)
>>> decoder.feed(bytes([0x20, 2, 0, 0, 0x32, 9, 0, 1]) + b"t" + bytes([0, 7]) + b"21.").packets
[ConnAck(session_present=False, code=0, reason='', keepalive_s=None)]
>>> frames = decoder.feed(b"5"); frames.topics, frames.payloads, frames.acks
(['t'], [b'21.5'], b'@\\x02\\x00\\x07')
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal

from edge_agent.contract.errors import ContractError

Version = Literal[4, 5]

PACKET_BYTES_MAX = 1024 * 1024
CONTROL_BYTES_MAX = 64 * 1024
LENGTH_MAX = 268_435_455
TEXT_BYTES_MAX = 65_535
TOPICS_KNOWN_BYTES_MAX = 1024 * 1024
PROPERTIES_KNOWN_MAX = 256
SESSION_EXPIRY_S_MAX = 0xFFFF_FFFF
RECEIVE_MAX = 65_535
REFUSED = 0x80
"""Reason codes from here on are refusals."""

PINGREQ = b"\xc0\x00"
_PUBACK = b"\x40\x02"

_CONNACK_TYPE, _PUBLISH_TYPE, _SUBACK_TYPE, _PINGRESP_TYPE, _DISCONNECT_TYPE = 2, 3, 9, 13, 14
_TYPE_NAMES = (
    *("reserved type 0", "CONNECT", "CONNACK", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP"),
    *("SUBSCRIBE", "SUBACK", "UNSUBSCRIBE", "UNSUBACK", "PINGREQ", "PINGRESP", "DISCONNECT", "AUTH"),
)

# MQTT 5 properties: how each is written, and where a client may meet it (tables 2-4 of the standard).
_BYTE, _TWO, _FOUR, _VARINT, _TEXT, _BINARY, _PAIR = range(7)
_SESSION_EXPIRY, _SERVER_KEEPALIVE, _REASON, _RECEIVE_MAXIMUM, _TOPIC_ALIAS, _USER = 0x11, 0x13, 0x1F, 0x21, 0x23, 0x26
_SUBSCRIPTION = 0x0B
_KINDS = {
    **dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), _BYTE),
    **dict.fromkeys((_SERVER_KEEPALIVE, _RECEIVE_MAXIMUM, 0x22, _TOPIC_ALIAS), _TWO),
    **dict.fromkeys((0x02, _SESSION_EXPIRY, 0x18, 0x27), _FOUR),
    _SUBSCRIPTION: _VARINT,
    **dict.fromkeys((0x03, 0x08, 0x12, 0x15, 0x1A, 0x1C, _REASON), _TEXT),
    **dict.fromkeys((0x09, 0x16), _BINARY),
    _USER: _PAIR,
}
_REPEATABLE = frozenset((_USER, _SUBSCRIPTION))
_ALLOWED = {
    _PUBLISH_TYPE: frozenset((0x01, 0x02, 0x03, 0x08, 0x09, _SUBSCRIPTION, _USER)),
    _CONNACK_TYPE: frozenset(_KINDS) - {0x01, 0x02, 0x03, 0x08, 0x09, _SUBSCRIPTION, 0x17, 0x18, 0x19, _TOPIC_ALIAS},
    _SUBACK_TYPE: frozenset((_REASON, _USER)),
    _DISCONNECT_TYPE: frozenset((_SESSION_EXPIRY, 0x1C, _REASON, _USER)),
}

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
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x9B: "QoS not supported",
    0x9C: "use another server",
    0x9D: "server moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA0: "maximum connect time",
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
class PingResp:
    """The broker lives."""


@dataclass(frozen=True)
class Disconnect:
    """The broker says why it will close (MQTT 5 only)."""

    code: int
    reason: str = ""


Packet = ConnAck | SubAck | PingResp | Disconnect


@dataclass
class Frames:
    """What one piece of the stream held: publish i is `topics[i]`, `payloads[i]`; `acks` are the PUBACKs of those with QoS 1, in order.

    `more`: whole packets may be left over; feed `b""` to get them.
    """

    topics: list[str] = field(default_factory=list)
    payloads: list[bytes] = field(default_factory=list)
    acks: bytes = b""
    packets: list[Packet] = field(default_factory=list)
    more: bool = False


class Decoder:
    """Cuts the bytes of one connection into packets."""

    def __init__(self, version: Version, packet_bytes_max: int = PACKET_BYTES_MAX) -> None:
        self._version = version
        self._packet_bytes_max = packet_bytes_max
        self._pieces: list[bytes] = []
        self._held = 0  # bytes in `_pieces`
        self._need = 2  # bytes from which on a look at `_pieces` is worth it
        self._skip = 0  # bytes left of a publish that was cut
        self._connected = False
        self._topics_known: dict[bytes, str] = {}
        self._topics_bytes = 0
        self._properties_known: set[bytes] = set()

    def feed(self, data: bytes, packets_max: int = 65_536) -> Frames:
        """Take the next piece of the stream; gives at most `packets_max` packets.

        Raises:
            ContractError: a packet is malformed or not for a receiving client.
        """
        if self._skip and data:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            data = data[skipped:]
        if data:
            self._pieces.append(data)
            self._held += len(data)
        if self._held < self._need:
            return Frames()
        whole = b"".join(self._pieces)
        frames = Frames()
        done = self._scan(whole, packets_max, frames)
        rest = whole[done:]
        self._pieces, self._held = [rest] if rest else [], len(rest)
        return frames

    def _scan(self, data: bytes, packets_max: int, frames: Frames) -> int:
        """Fill `frames`; returns where the first packet begins that is not yet whole. Written for speed: one pass, few calls."""
        topics, payloads, ids = list[bytes](), frames.payloads, list[bytes]()
        size_max, five = self._packet_bytes_max, self._version == 5
        at, end = 0, len(data)
        for _ in repeat(None, packets_max):
            start = at + 2
            if start > end:
                self._need = 2
                break
            head, size = data[at], data[at + 1]
            if size > 127:
                if start == end:
                    self._need = 3
                    break
                size += (data[start] - 1) << 7
                if data[start] > 127:
                    size, start = _long_length(data, at + 1)
                    if start == 0:
                        self._need = end - at + 1
                        break
                else:
                    start += 1
            stop = start + size
            if size > size_max:  # rare: take its beginning, skip the rest
                cut = self._cut(data, at, head, start)
                if cut is None:
                    break
                topic, id_, payload = cut
                topics.append(topic)
                payloads.append(payload)
                if id_:
                    ids.append(id_)
                at = min(stop, end)
                self._skip = stop - at
                continue
            if stop > end:
                if not self._connected and head != 0x20:  # not to wait for the rest of what is not MQTT
                    raise ContractError(f"MQTT: stream begins {data[at : at + 16]!r}, not with CONNACK")
                self._need = stop - at
                break
            if head & 0xF6 == 0x32:  # PUBLISH, QoS 1, DUP and RETAIN or not
                if size < 5:
                    raise _malformed(_PUBLISH_TYPE, f"{size} bytes long")
                name = start + 2
                name_end = name + (data[start] << 8 | data[start + 1])
                body = name_end + 2
                if body > stop:
                    raise _malformed(_PUBLISH_TYPE, f"topic of {name_end - name} bytes in a packet of {size}")
                ids.append(data[name_end:body])
            elif head & 0xFE == 0x30:  # QoS 0, RETAIN or not
                if size < 3:
                    raise _malformed(_PUBLISH_TYPE, f"{size} bytes long")
                name = start + 2
                name_end = body = name + (data[start] << 8 | data[start + 1])
                if body > stop:
                    raise _malformed(_PUBLISH_TYPE, f"topic of {name_end - name} bytes in a packet of {size}")
            else:
                self._control(head, data[start:stop], frames)
                at = stop
                continue
            if five:
                if body == stop:
                    raise _malformed(_PUBLISH_TYPE, "no property length")
                body = self._publish_properties(data, body, stop) if data[body] else body + 1
            topics.append(data[name:name_end])
            payloads.append(data[body:stop])
            at = stop
        else:
            frames.more = at < end
            self._need = 0
        frames.topics = self._topics(topics)
        if b"\0\0" in ids:
            raise _malformed(_PUBLISH_TYPE, "packet id 0")
        if ids:
            frames.acks = _PUBACK + _PUBACK.join(ids)
        return at

    def _topics(self, topics: list[bytes]) -> list[str]:
        """As text, checked once per distinct topic; equal topics are one object."""
        if topics and not self._connected:
            raise ContractError("MQTT: PUBLISH before CONNACK")
        new = set(topics).difference(self._topics_known)
        self._topics_bytes += sum(len(topic) + 200 for topic in new)  # 200: what an entry costs besides
        if self._topics_bytes > TOPICS_KNOWN_BYTES_MAX:
            self._topics_known.clear()
            self._topics_bytes, new = 0, set(topics)
        self._topics_known.update((topic, _topic(topic, self._version)) for topic in new)
        return list(map(self._topics_known.__getitem__, topics))

    def _publish_properties(self, data: bytes, at: int, stop: int) -> int:
        """Check the properties that begin at `at`; returns where the payload begins."""
        size, start = _length(data, at, stop)
        end = start + size
        if end > stop:
            raise _malformed(_PUBLISH_TYPE, f"properties of {size} bytes reach past the packet")
        raw = data[start:end]
        if raw not in self._properties_known:
            _read_properties(raw, _PUBLISH_TYPE)
            if len(self._properties_known) >= PROPERTIES_KNOWN_MAX:
                self._properties_known.clear()
            if size <= 256:
                self._properties_known.add(raw)
        return end

    def _cut(self, data: bytes, at: int, head: int, start: int) -> tuple[bytes, bytes, bytes] | None:
        """Topic, packet id and the beginning of the payload of a publish that is too large; None if more bytes are needed."""
        if head & 0xF6 != 0x32 and head & 0xFE != 0x30:
            raise _malformed(head >> 4, f"larger than {self._packet_bytes_max} bytes")
        stop = start + self._packet_bytes_max
        if stop > len(data):
            self._need = stop - at
            return None
        name_end = start + 2 + int.from_bytes(data[start : start + 2])
        body = name_end + (2 if head & 0x02 else 0)
        if body > stop:
            raise _malformed(_PUBLISH_TYPE, f"topic reaches past the first {self._packet_bytes_max} bytes")
        payload = b""
        if self._version == 4:
            payload = data[body:stop]
        else:
            size, properties = _length(data, body, stop)
            if properties + size <= stop:  # or the properties alone are too large: then nothing of the payload is in reach
                payload = data[self._publish_properties(data, body, stop) : stop]
        return data[start + 2 : name_end], data[name_end:body], payload

    def _control(self, head: int, body: bytes, frames: Frames) -> None:
        kind = head >> 4
        if kind == _PUBLISH_TYPE:
            raise _malformed(kind, f"flags {head & 15:#x} (QoS 2 was not asked for, QoS 3 and DUP with QoS 0 do not exist)")
        if kind not in (_CONNACK_TYPE, _SUBACK_TYPE, _PINGRESP_TYPE) and (kind, self._version) != (_DISCONNECT_TYPE, 5):
            raise ContractError(f"MQTT: {_TYPE_NAMES[kind]} is not for a client that only receives")
        if head & 15:
            raise _malformed(kind, f"flags {head & 15:#x}, want 0")
        if len(body) > CONTROL_BYTES_MAX:
            raise _malformed(kind, f"{len(body)} bytes; at most {CONTROL_BYTES_MAX}")
        if self._connected == (kind == _CONNACK_TYPE):
            raise ContractError(f"MQTT: {_TYPE_NAMES[kind]} {'twice' if self._connected else 'before CONNACK'}")
        if frames.payloads and not self._connected:
            raise ContractError("MQTT: PUBLISH before CONNACK")
        self._connected = True
        frames.packets.append(_PARSERS[kind](body, self._version))


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
    body = _text("MQTT") + bytes([version, flags]) + keepalive_s.to_bytes(2)
    if version == 5:
        expiry = bytes([_SESSION_EXPIRY]) + session_expiry_s.to_bytes(4) if session_expiry_s else b""
        body += _sized(expiry + bytes([_RECEIVE_MAXIMUM]) + RECEIVE_MAX.to_bytes(2))
    texts = [client_id, *(t for t in (username, password) if t is not None)]
    return b"\x10" + _sized(body + b"".join(map(_text, texts)))


def subscribe(version: Version, packet_id: int, topic_filter: str, qos: int = 1) -> bytes:
    """SUBSCRIBE to one filter.

    Raises:
        ContractError: the filter is empty or too long.
    """
    if not topic_filter or not 1 <= packet_id <= 0xFFFF:
        raise ContractError(f"MQTT: cannot subscribe to {topic_filter!r} with packet id {packet_id}")
    properties = b"\0" if version == 5 else b""
    return b"\x82" + _sized(packet_id.to_bytes(2) + properties + _text(topic_filter) + bytes([qos]))


def disconnect(version: Version, code: int = 0) -> bytes:
    """DISCONNECT; MQTT 3.1.1 has no code."""
    return b"\xe0\x00" if version == 4 or code == 0 else bytes([0xE0, 1, code])


def pubacks(packet_ids: Iterable[int]) -> bytes:
    """PUBACKs of success, the same in both versions."""
    return b"".join(_PUBACK + packet_id.to_bytes(2) for packet_id in packet_ids)


def refusal(packet: ConnAck | SubAck | Disconnect, version: Version) -> str:
    """Why the broker said no, in words; empty if it did not."""
    code = max(packet.codes, default=REFUSED) if isinstance(packet, SubAck) else packet.code
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
        raise _malformed(_CONNACK_TYPE, f"body {body[:8].hex()}")
    if body[0] and body[1]:
        raise _malformed(_CONNACK_TYPE, "session present in a refusal")
    if version == 4 or len(body) == 2:
        if version == 5 and not body[1]:
            raise _malformed(_CONNACK_TYPE, "no property length")
        return ConnAck(bool(body[0]), body[1] if version == 4 else max(body[1], REFUSED | 4))
    if 0 < body[1] < REFUSED:
        raise _malformed(_CONNACK_TYPE, f"reason code {body[1]:#04x}")
    found = _all_properties(body, 2, _CONNACK_TYPE)
    keepalive = found.get(_SERVER_KEEPALIVE)
    return ConnAck(bool(body[0]), body[1], str(found.get(_REASON, "")), keepalive if isinstance(keepalive, int) else None)


def _suback(body: bytes, version: Version) -> SubAck:
    if len(body) < 3 + (version == 5):
        raise _malformed(_SUBACK_TYPE, f"{len(body)} bytes long")
    start, reason = 2, ""
    if version == 5:
        size, first = _length(body, 2, len(body))
        start = first + size
        reason = str(_read_properties(body[first:start], _SUBACK_TYPE).get(_REASON, ""))
    codes = tuple(body[start:])
    if not codes or any(2 < code < REFUSED for code in codes):
        raise _malformed(_SUBACK_TYPE, f"codes {body[start:].hex() or 'missing'}")
    return SubAck(int.from_bytes(body[:2]), codes, reason)


def _pingresp(body: bytes, version: Version) -> PingResp:
    if body:
        raise _malformed(_PINGRESP_TYPE, f"{len(body)} bytes long")
    return PingResp()


def _disconnect(body: bytes, version: Version) -> Disconnect:
    if len(body) < 2:
        return Disconnect(body[0] if body else 0)
    return Disconnect(body[0], str(_all_properties(body, 1, _DISCONNECT_TYPE).get(_REASON, "")))


_PARSERS: dict[int, Callable[[bytes, Version], Packet]] = {
    _CONNACK_TYPE: _connack,
    _SUBACK_TYPE: _suback,
    _PINGRESP_TYPE: _pingresp,
    _DISCONNECT_TYPE: _disconnect,
}


def _all_properties(body: bytes, at: int, kind: int) -> dict[int, int | str]:
    """The properties that begin at `at` and end the packet."""
    size, start = _length(body, at, len(body))
    if start + size != len(body):
        raise _malformed(kind, f"properties of {size} bytes in {len(body) - start}")
    return _read_properties(body[start:], kind)


def _read_properties(raw: bytes, kind: int) -> dict[int, int | str]:
    """Numbers and texts by identifier; those that may repeat, and binary ones, are checked only."""
    found: dict[int, int | str] = {}
    at, end = 0, len(raw)
    while at < end:
        key = raw[at]
        if key not in _ALLOWED[kind] or key in found:
            raise _malformed(kind, f"property {key:#04x} {'twice' if key in found else 'is not allowed here'}")
        value, at = _read_value(raw, at + 1, _KINDS[key], kind)
        if key not in _REPEATABLE:
            found[key] = value
    return found


def _read_value(raw: bytes, at: int, form: int, kind: int) -> tuple[int | str, int]:
    if form == _VARINT:
        value, stop = _length(raw, at, len(raw))
        return value, stop
    if form in (_BYTE, _TWO, _FOUR):
        stop = at + (1, 2, 4)[form]
        if stop > len(raw):
            raise _malformed(kind, "a property is cut off")
        return int.from_bytes(raw[at:stop]), stop
    text = b""
    for _ in range(2 if form == _PAIR else 1):
        start = at + 2
        at = start + int.from_bytes(raw[at:start])
        if max(start, at) > len(raw):
            raise _malformed(kind, "a property is cut off")
        text = raw[start:at]
        if form != _BINARY:
            _decode_text(text, kind)
    return ("" if form == _BINARY else text.decode()), at


def _decode_text(text: bytes, kind: int) -> str:
    try:
        decoded = text.decode()
    except UnicodeDecodeError as e:
        raise _malformed(kind, f"text is not UTF-8: {text[:32]!r}") from e
    if "\0" in decoded:
        raise _malformed(kind, f"text holds U+0000: {text[:32]!r}")
    return decoded


def _topic(topic: bytes, version: Version) -> str:
    if not topic:
        alias = " (a topic alias, which was not offered)" if version == 5 else ""
        raise _malformed(_PUBLISH_TYPE, f"empty topic{alias}")
    if b"+" in topic or b"#" in topic:
        raise _malformed(_PUBLISH_TYPE, f"wildcard in topic {topic[:64]!r}")
    return _decode_text(topic, _PUBLISH_TYPE)


def _length(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """A variable byte integer that must end before `stop`, and where it ends."""
    size, shift = 0, 0
    for position in range(at, min(at + 4, stop)):
        byte = data[position]
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return size, position + 1
    raise ContractError(f"MQTT: variable byte integer {data[at : min(at + 4, stop)].hex()} does not end")


def _long_length(data: bytes, at: int) -> tuple[int, int]:
    """The remaining length at `at` and where it ends; (0, 0) if bytes are still missing."""
    if len(data) < at + 4 and all(byte > 127 for byte in data[at:]):
        return 0, 0
    return _length(data, at, len(data))


def _malformed(kind: int, why: str) -> ContractError:
    return ContractError(f"MQTT: malformed {_TYPE_NAMES[kind]}: {why}")


def _text(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError as e:
        raise ContractError(f"MQTT: {text!r} is not UTF-8") from e
    if len(raw) > TEXT_BYTES_MAX or b"\0" in raw:
        raise ContractError(f"MQTT: text of {len(raw)} bytes; at most {TEXT_BYTES_MAX}, without U+0000")
    return len(raw).to_bytes(2) + raw


def _sized(body: bytes) -> bytes:
    if len(body) > LENGTH_MAX:
        raise ContractError(f"MQTT: packet of {len(body)} bytes; at most {LENGTH_MAX}")
    size, length = len(body), bytearray()
    while True:
        size, low = size >> 7, size & 127
        length.append(low | (128 if size else 0))
        if not size:
            return bytes(length) + body
