"""CBOR (RFC 8949) as a hostile sensor may send it: what is read costs time and memory in proportion to the payload.

- Of tags, those of numbers are read: 2 and 3 (bignums; beyond 64 bits they are float64, rounded), 4 and 5 (decimal and binary fractions);
  and 55799, which says that it is CBOR. Every other tag stays what it is, a tag with its content.
- Left to itself, cbor2 makes patterns of tag 35 and compiles them (minutes, for one payload), and lets tags 28, 29 and 256 name one value
  many times over (so that 200 bytes are gigabytes as text). Numbers beyond 64 bits, as keys, can be made to have one hash.

>>> import cbor2
>>> read_cbor(cbor2.dumps({"t": cbor2.CBORTag(4, [-1, 215]), "p": cbor2.CBORTag(35, "a+")}))
{'t': 21.5, 'p': CBORTag(35, 'a+')}
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import cbor2

DEPTH_MAX = 64
_INTEGER_BYTES = 8

_Read = Callable[[Any, bool], Any]


class _Tags(dict[int, _Read]):
    """How the content of each tag is read."""

    def __missing__(self, tag: int) -> _Read:
        return lambda content, _: cbor2.CBORTag(tag, content)


def _bignum(content: Any) -> int | float:
    value = int.from_bytes(content, "big")
    if len(content) <= _INTEGER_BYTES:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _decimal(content: Any) -> float:
    exponent, mantissa = content
    return float(f"{mantissa:d}e{exponent:d}")


def _binary(content: Any) -> float:
    exponent, mantissa = content
    return math.ldexp(mantissa, exponent)


_TAGS = _Tags(
    {
        2: lambda content, _: _bignum(content),
        3: lambda content, _: -1 - _bignum(content),
        4: lambda content, _: _decimal(content),
        5: lambda content, _: _binary(content),
        55799: lambda content, _: content,
    }
)


def read_cbor(payload: bytes) -> Any:
    """The one value that a payload holds.

    Raises:
        cbor2.CBORError: it is not CBOR, or nested deeper than DEPTH_MAX.
        ValueError: bytes follow it.
    """
    stream = io.BytesIO(payload)
    tree = cbor2.CBORDecoder(stream, max_depth=DEPTH_MAX, read_size=1, semantic_decoders=_TAGS).decode()
    if stream.tell() != len(payload):
        raise ValueError(f"{len(payload) - stream.tell()} bytes too many")
    return tree
