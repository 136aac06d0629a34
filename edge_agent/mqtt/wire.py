"""MQTT's alphabet, the same in both directions: packet types, lengths, texts, MQTT 5 properties. No I/O.

- Whatever is malformed is a FrameError; it carries the reason code that MQTT 5 has for it.
- Lengths are checked before anything is copied; texts are UTF-8 without U+0000.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from edge_agent.contract.errors import ContractError

Version = Literal[4, 5]

LENGTH_MAX = 268_435_455
TEXT_BYTES_MAX = 65_535
CONTROL_BYTES_MAX = 64 * 1024

CONNECT, CONNACK, PUBLISH, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 8, 9, 10, 11, 12, 13, 14
TYPE_NAMES = (
    *("reserved type 0", "CONNECT", "CONNACK", "PUBLISH", "PUBACK", "PUBREC", "PUBREL", "PUBCOMP"),
    *("SUBSCRIBE", "SUBACK", "UNSUBSCRIBE", "UNSUBACK", "PINGREQ", "PINGRESP", "DISCONNECT", "AUTH"),
)

# Reason codes of MQTT 5.
REFUSED = 0x80
"""Reason codes from here on are refusals."""
MALFORMED, PROTOCOL_ERROR, UNSUPPORTED_VERSION, TOPIC_INVALID = 0x81, 0x82, 0x84, 0x90
TOPIC_ALIAS_INVALID, TOO_LARGE, QOS_NOT_SUPPORTED = 0x94, 0x95, 0x9B

# Properties of MQTT 5 (table 2-4 of the standard), and how each is written.
PAYLOAD_FORMAT, MESSAGE_EXPIRY, CONTENT_TYPE, RESPONSE_TOPIC, CORRELATION = 0x01, 0x02, 0x03, 0x08, 0x09
SUBSCRIPTION, SESSION_EXPIRY, ASSIGNED_CLIENT, SERVER_KEEPALIVE, AUTH_METHOD, AUTH_DATA = 0x0B, 0x11, 0x12, 0x13, 0x15, 0x16
PROBLEM_INFORMATION, WILL_DELAY, RESPONSE_INFORMATION, SERVER_REFERENCE, REASON = 0x17, 0x18, 0x19, 0x1C, 0x1F
RECEIVE_MAXIMUM, TOPIC_ALIAS_MAXIMUM, TOPIC_ALIAS, QOS_MAXIMUM, RETAIN_AVAILABLE, USER = 0x21, 0x22, 0x23, 0x24, 0x25, 0x26
PACKET_MAXIMUM, WILDCARD_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE = 0x27, 0x28, 0x29, 0x2A
_BYTE, _TWO, _FOUR, _VARINT, _TEXT, _BINARY, _PAIR = range(7)
_FLAGS = (PAYLOAD_FORMAT, PROBLEM_INFORMATION, RESPONSE_INFORMATION, QOS_MAXIMUM, RETAIN_AVAILABLE)
_FORMS = {
    **dict.fromkeys((*_FLAGS, WILDCARD_AVAILABLE, SUBSCRIPTION_IDS_AVAILABLE, SHARED_AVAILABLE), _BYTE),
    **dict.fromkeys((SERVER_KEEPALIVE, RECEIVE_MAXIMUM, TOPIC_ALIAS_MAXIMUM, TOPIC_ALIAS), _TWO),
    **dict.fromkeys((MESSAGE_EXPIRY, SESSION_EXPIRY, WILL_DELAY, PACKET_MAXIMUM), _FOUR),
    SUBSCRIPTION: _VARINT,
    **dict.fromkeys((CONTENT_TYPE, RESPONSE_TOPIC, ASSIGNED_CLIENT, AUTH_METHOD, 0x1A, SERVER_REFERENCE, REASON), _TEXT),
    **dict.fromkeys((CORRELATION, AUTH_DATA), _BINARY),
    USER: _PAIR,
}
_REPEATABLE = frozenset((USER, SUBSCRIPTION))
ALL_PROPERTIES = frozenset(_FORMS)


class FrameError(ContractError):
    """A packet that ends the connection; `code` is MQTT 5's reason for it."""

    def __init__(self, message: str, code: int = PROTOCOL_ERROR) -> None:
        super().__init__(f"MQTT: {message}")
        self.code = code


def malformed(kind: int, why: str, code: int = MALFORMED) -> FrameError:
    """The error for a packet of type `kind`."""
    return FrameError(f"malformed {TYPE_NAMES[kind]}: {why}", code)


def read_length(data: bytes, at: int, stop: int) -> tuple[int, int]:
    """A variable byte integer that must end before `stop`, and where it ends."""
    size, shift = 0, 0
    for position in range(at, min(at + 4, stop)):
        byte = data[position]
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return size, position + 1
    raise FrameError(f"variable byte integer {data[at : min(at + 4, stop)].hex()} does not end", MALFORMED)


def read_text(data: bytes, at: int, kind: int) -> tuple[str, int]:
    """A text with its length before it, and where it ends."""
    raw, at = read_binary(data, at, kind)
    return decode_text(raw, kind), at


def read_binary(data: bytes, at: int, kind: int) -> tuple[bytes, int]:
    """Bytes with their length before them, and where they end."""
    start = at + 2
    stop = start + int.from_bytes(data[at:start])
    if max(start, stop) > len(data):
        raise malformed(kind, "a field is cut off")
    return data[start:stop], stop


def decode_text(text: bytes, kind: int) -> str:
    """UTF-8 without U+0000."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError as e:
        raise malformed(kind, f"text is not UTF-8: {text[:32]!r}") from e
    if "\0" in decoded:
        raise malformed(kind, f"text holds U+0000: {text[:32]!r}")
    return decoded


def section(body: bytes, at: int, kind: int) -> tuple[bytes, int]:
    """The properties whose length stands at `at`, and where they end."""
    size, start = read_length(body, at, len(body))
    if start + size > len(body):
        raise malformed(kind, f"properties of {size} bytes reach past the packet")
    return body[start : start + size], start + size


def read_properties(raw: bytes, kind: int, allowed: Collection[int]) -> dict[int, int | str]:
    """Numbers and texts by identifier; those that may repeat, and binary ones, are checked only."""
    found: dict[int, int | str] = {}
    at, end = 0, len(raw)
    while at < end:
        key = raw[at]
        if key not in allowed or key in found:
            code = TOPIC_ALIAS_INVALID if key == TOPIC_ALIAS else PROTOCOL_ERROR
            raise malformed(kind, f"property {key:#04x} {'twice' if key in found else 'is not allowed here'}", code)
        value, at = _read_value(raw, at + 1, _FORMS[key], kind)
        if key not in _REPEATABLE:
            found[key] = value
    return found


def _read_value(raw: bytes, at: int, form: int, kind: int) -> tuple[int | str, int]:
    if form == _VARINT:
        return read_length(raw, at, len(raw))
    if form in (_BYTE, _TWO, _FOUR):
        stop = at + (1, 2, 4)[form]
        if stop > len(raw):
            raise malformed(kind, "a property is cut off")
        return int.from_bytes(raw[at:stop]), stop
    if form == _BINARY:
        _, at = read_binary(raw, at, kind)
        return "", at
    text, at = read_text(raw, at, kind)
    if form == _PAIR:
        text, at = read_text(raw, at, kind)
    return text, at


def write_text(text: str) -> bytes:
    """A text with its length before it."""
    try:
        raw = text.encode()
    except UnicodeEncodeError as e:
        raise ContractError(f"MQTT: {text!r} is not UTF-8") from e
    if len(raw) > TEXT_BYTES_MAX or b"\0" in raw:
        raise ContractError(f"MQTT: text of {len(raw)} bytes; at most {TEXT_BYTES_MAX}, without U+0000")
    return len(raw).to_bytes(2) + raw


def sized(body: bytes) -> bytes:
    """`body` with its length before it, as a variable byte integer."""
    if len(body) > LENGTH_MAX:
        raise ContractError(f"MQTT: packet of {len(body)} bytes; at most {LENGTH_MAX}")
    size, length = len(body), bytearray()
    while True:
        size, low = size >> 7, size & 127
        length.append(low | (128 if size else 0))
        if not size:
            return bytes(length) + body
