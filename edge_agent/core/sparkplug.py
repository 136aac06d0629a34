"""Sparkplug B on the wire: topics, and the protobuf message `org.eclipse.tahu.protobuf.Payload`.

- Only what readings need is read: times, sequence, and each metric's name, alias, time, datatype and plain value. Data sets, templates,
  properties and bodies are skipped, not interpreted.
- Hand-written on purpose: the whole of it is six kinds of fields without recursion, and the agent stays free of a large library.
  Every step takes at least one byte of a payload of limited size, so no input can make it loop or grow. What is cut off, has
  an unknown wire type or a field of the wrong one is malformed. tests/ compare it with Google's own decoder.

Payload: 1 timestamp, 2 metrics, 3 seq, 4 uuid, 5 body. Metric: 1 name, 2 alias, 3 timestamp, 4 datatype, 5 is_historical,
6 is_transient, 7 is_null, 8 metadata, 9 properties, 10 int, 11 long, 12 float, 13 double, 14 boolean, 15 string, 16 bytes,
17 dataset, 18 template, 19 extension.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.contract.stream import SPARKPLUG
from edge_agent.core.rejects import shown

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_INT, _LONG, _FLOAT, _DOUBLE, _BOOLEAN = 10, 11, 12, 13, 14
_VALUES = range(10, 20)
_UINT32 = 0xFFFFFFFF
_WIRE = {1: _BYTES, 2: _VARINT, 3: _VARINT, 4: _VARINT, 7: _VARINT, _INT: _VARINT, _LONG: _VARINT, _FLOAT: _FIXED32, _DOUBLE: _FIXED64}
_WIRE |= {_BOOLEAN: _VARINT}
_PAYLOAD_WIRE = {1: _VARINT, 2: _BYTES, 3: _VARINT}

_BITS = {1: 8, 2: 16, 3: 32, 4: 64}  # Int8 … Int64
_UNSIGNED = {5: 8, 6: 16, 7: 32, 8: 64, 13: 64}  # UInt8 … UInt64, DateTime (ms)
_FLOATS = {9: _FLOAT, 10: _DOUBLE}
_BOOL_TYPE = 11
_NOT_A_NUMBER = {12: "String", 14: "Text", 15: "UUID", 16: "DataSet", 17: "Bytes", 18: "File", 19: "Template"}


class Kind(StrEnum):
    """The message types that tell about edge nodes and devices."""

    NBIRTH = "NBIRTH"
    DBIRTH = "DBIRTH"
    NDATA = "NDATA"
    DDATA = "DDATA"
    NDEATH = "NDEATH"
    DDEATH = "DDEATH"


@dataclass(frozen=True)
class Address:
    """Where a message comes from; `device` is empty for the edge node itself."""

    kind: Kind
    group: str
    node: str
    device: str


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric as sent. `value` is a plain number (bits of an integer are not yet signed), or None for anything else."""

    name: str | None = None
    alias: int | None = None
    timestamp_ms: int | None = None
    datatype: int | None = None
    null: bool = False
    field: int = 0
    value: int | float | None = None


@dataclass(frozen=True)
class Payload:
    """A payload as sent."""

    timestamp_ms: int | None
    sequence: int | None
    metrics: list[Metric]


def is_sparkplug(topic: str) -> bool:
    return topic.startswith(f"{SPARKPLUG}/")


def parse_address(topic: str) -> Address:
    """The source of a message.

    Raises:
        PayloadError: the topic is none of a node's or device's birth, data or death.
    """
    parts = topic.split("/")
    if len(parts) in (4, 5) and parts[0] == SPARKPLUG and parts[2] in Kind.__members__ and all(parts):
        kind = Kind(parts[2])
        if kind[0] == ("N" if len(parts) == 4 else "D"):
            return Address(kind, parts[1], parts[3], parts[4] if len(parts) == 5 else "")
    raise PayloadError(Reason.UNKNOWN_TOPIC, f"topic {shown(topic)!r} is no birth, data or death of a Sparkplug node or device")


def read_payload(data: bytes) -> Payload:
    """Decode a payload.

    Raises:
        PayloadError: the bytes are not one.
    """
    timestamp_ms = sequence = None
    metrics: list[Metric] = []
    for number, value, start, end in _fields(data, 0, len(data), _PAYLOAD_WIRE):
        if number == 1:
            timestamp_ms = value
        elif number == 2:
            metrics.append(_metric(data, start, end))
        elif number == 3:
            sequence = value
    return Payload(timestamp_ms, sequence, metrics)


def number_of(metric: Metric, datatype: int | None) -> float | None:
    """The value of a metric as float64; None if it is null.

    Raises:
        PayloadError: it is no number, not of its datatype, or no float64 equals it.
    """
    if metric.null:
        return None
    value, kind = metric.value, datatype or 0
    if kind in _NOT_A_NUMBER or value is None:
        raise PayloadError(Reason.WRONG_TYPE, f"its value is {_NOT_A_NUMBER.get(kind, 'no plain number')}")
    if kind in _FLOATS and metric.field == _FLOATS[kind]:
        if value != value or value in (float("inf"), float("-inf")):
            raise PayloadError(Reason.OUT_OF_RANGE, f"{value!r} is not a finite number")
        return float(value)
    if kind == _BOOL_TYPE and metric.field == _BOOLEAN:
        return float(value)
    if (kind in _BITS or kind in _UNSIGNED) and metric.field in (_INT, _LONG):
        return _exact(_integer(int(value), kind, 32 if metric.field == _INT else 64))
    raise PayloadError(Reason.WRONG_TYPE, f"a value in field {metric.field} does not belong to datatype {kind}")


def _integer(raw: int, kind: int, width: int) -> int:
    """Sign an integer: senders extend a negative Int8 to the width of its field, or leave it at 8 bits."""
    bits = _BITS.get(kind) or _UNSIGNED[kind]
    value = raw
    if kind in _BITS and raw >> (bits - 1):
        at = bits if raw < 1 << bits else width
        value = raw - (1 << at)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind in _BITS else (0, (1 << bits) - 1)
    if not low <= value <= high:
        raise PayloadError(Reason.OUT_OF_RANGE, f"{raw} does not fit an integer of {bits} bits")
    return value


def _exact(value: int) -> float:
    if int(float(value)) != value:
        raise PayloadError(Reason.OUT_OF_RANGE, f"{value} has more digits than a float64 holds")
    return float(value)


def _metric(data: bytes, start: int, end: int) -> Metric:
    name: str | None = None
    numbers: dict[int, int] = {}
    field, value = 0, 0
    for number, got, first, last in _fields(data, start, end, _WIRE):
        if number in _VALUES:
            field, value = number, got
        elif number == 1:
            try:
                name = data[first:last].decode()
            except UnicodeDecodeError as e:
                raise _malformed(f"the name of a metric is not UTF-8: {e}") from e
        else:
            numbers[number] = got
    datatype = numbers.get(4)
    return Metric(
        name=name,
        alias=numbers.get(2),
        timestamp_ms=numbers.get(3),
        datatype=None if datatype is None else datatype & _UINT32,
        null=bool(numbers.get(7)),
        field=field,
        value=_plain(field, value),
    )


def _plain(field: int, bits: int) -> int | float | None:
    """The value of a plain field; None for a text, a data set and the like."""
    if field == _FLOAT:
        return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])
    if field == _DOUBLE:
        return float(struct.unpack("<d", bits.to_bytes(8, "little"))[0])
    if field == _BOOLEAN:
        return int(bool(bits))
    if field == _INT:
        return bits & _UINT32
    return bits if field == _LONG else None


def _fields(data: bytes, at: int, end: int, wires: dict[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Of each field its number, its value if that is an integer or bits, and where its bytes start and stop."""
    while at < end:
        key, at = _varint(data, at, end)
        number, wire, value = key >> 3, key & 7, 0
        if not 1 <= number < 1 << 29 or wires.get(number, wire) != wire:
            raise _malformed(f"field {number} has wire type {wire}")
        start = at
        if wire == _VARINT:
            value, at = _varint(data, at, end)
        elif wire == _BYTES:
            size, start = _varint(data, at, end)
            at = start + size
        elif wire in (_FIXED32, _FIXED64):
            at += 4 if wire == _FIXED32 else 8
            value = int.from_bytes(data[start:at], "little")
        else:
            raise _malformed(f"field {number} has wire type {wire}")
        if at > end:
            raise _malformed("it is cut off")
        yield number, value, start, at


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            raise _malformed("it is cut off")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, at
    raise _malformed("a number has more than 10 bytes")


def _malformed(why: str) -> PayloadError:
    return PayloadError(Reason.MALFORMED, f"not a Sparkplug B payload: {why}")
