"""CBOR: numbers are read, other tags stay tags, and no payload costs more than its size."""

from __future__ import annotations

import math
import time
from typing import Any

import cbor2
import pytest
from cbor2 import CBORTag

from edge_agent.core.cbor import read_cbor

PATTERN = CBORTag(35, "(?i)" + "[a-\uffff]" * 6_000)  # cbor2 compiles it for minutes


def shared(levels: int) -> bytes:
    """A list whose last item, as text, is 2**levels ones: each names the one before it twice (tags 28 and 29)."""
    doubled = b"".join(b"\xd8\x1c\x82" + 2 * (b"\xd8\x1d" + cbor2.dumps(i)) for i in range(levels))
    return b"\x98" + bytes([levels + 1]) + b"\xd8\x1c\x81\x01" + doubled


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (2**64 - 1, 2**64 - 1),
        (CBORTag(2, b"\x01\x00"), 256),
        (CBORTag(3, b"\x01\x00"), -257),
        (-(10**30), -1e30),
        (CBORTag(2, b"\xff" * 40_000), math.inf),
        (CBORTag(4, [-2, 27315]), 273.15),
        (CBORTag(4, [10**18, 1]), math.inf),
        (CBORTag(5, [-1, 3]), 1.5),
        (CBORTag(55799, {"t": 1}), {"t": 1}),
        (CBORTag(0, "2026-11-30"), CBORTag(0, "2026-11-30")),
        (CBORTag(30, [1, 0]), CBORTag(30, [1, 0])),
        (PATTERN, PATTERN),
        (CBORTag(256, ["long", CBORTag(25, 0)]), CBORTag(256, ["long", CBORTag(25, 0)])),
    ],
)
def test_only_tags_of_numbers_are_read(sent: Any, read: Any) -> None:
    assert read_cbor(cbor2.dumps({"x": sent})) == {"x": read}


@pytest.mark.parametrize("bad", [CBORTag(4, [1]), CBORTag(4, ["1", "2"]), CBORTag(5, [2_000, 1]), CBORTag(2, "12"), CBORTag(4, 7)])
def test_a_number_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(cbor2.CBORError):
        read_cbor(cbor2.dumps({"x": bad}))


def test_a_value_named_many_times_is_not_many_values() -> None:
    assert len(repr(read_cbor(shared(18)))) < 2_000


def test_keys_that_would_have_one_hash_have_not() -> None:
    """The CPU time of so many bignums as keys, beside that of as many as values."""
    numbers = [cbor2.dumps((2**61 - 1) * (16 + i)) for i in range(4_000)]
    seconds = []
    for head, items in ((b"\xb9", [n + b"\x00" for n in numbers]), (b"\x99", numbers)):
        started = time.process_time()
        read_cbor(head + len(numbers).to_bytes(2, "big") + b"".join(items))
        seconds.append(time.process_time() - started)
    assert seconds[0] < 5 * seconds[1] + 0.02


def test_nesting_is_bounded_in_tags_too() -> None:
    with pytest.raises(cbor2.CBORError, match="depth"):
        read_cbor(b"\xd8\x23" * 65 + b"\x00")
