"""Receipts: what the lake has committed, so that the device may forget it.

A set of sequences is kept as "all up to `cumulative`" plus sorted, disjoint ranges above it.

>>> settled = SequenceSet(); [settled.add(n) for n in (1, 2, 5)]; settled.cumulative, settled.ranges
[True, True, True]
(2, [(5, 5)])
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError

RANGES_MAX = 1_000
LANES_MAX = 256
SEQUENCE_MAX = 2**62
MESSAGE_RANGES_MAX = 4_096
"""Ranges in one message, of all its lanes; beyond that, and beyond LANES_MAX, there are several."""
MESSAGE_BYTES_MAX = 256 * 1024
"""What a message is at most, with the longest names and numbers: brokers refuse large ones, or end the connection that brings them."""


class SequenceSet:
    """A set of positive integers that is mostly a prefix of them."""

    def __init__(self, cumulative: int = 0, ranges: list[tuple[int, int]] | None = None) -> None:
        self.cumulative = cumulative
        self.ranges: list[tuple[int, int]] = list(ranges or [])

    def __contains__(self, n: int) -> bool:
        if n <= self.cumulative:
            return True
        i = bisect.bisect_right(self.ranges, (n, float("inf"))) - 1
        return i >= 0 and self.ranges[i][0] <= n <= self.ranges[i][1]

    def add(self, n: int) -> bool:
        """Add `n`; False if it was already there."""
        if n in self:
            return False
        i = bisect.bisect_right(self.ranges, (n, n))
        first = last = n
        if i < len(self.ranges) and self.ranges[i][0] == n + 1:
            last = self.ranges.pop(i)[1]
        if i > 0 and self.ranges[i - 1][1] == n - 1:
            first = self.ranges.pop(i - 1)[0]
            i -= 1
        if first == self.cumulative + 1:
            self.cumulative = last
        else:
            self.ranges.insert(i, (first, last))
        return True

    def add_range(self, first: int, last: int) -> None:
        """Add all from `first` to `last`, however many they are."""
        first = max(first, self.cumulative + 1)
        if first > last:
            return
        i = bisect.bisect_left(self.ranges, first - 1, key=lambda pair: pair[1])
        j = bisect.bisect_right(self.ranges, last + 1, key=lambda pair: pair[0])
        if i < j:  # those that it meets or touches become one
            first, last = min(first, self.ranges[i][0]), max(last, self.ranges[j - 1][1])
        if first == self.cumulative + 1:
            self.cumulative, self.ranges = last, self.ranges[j:]
        else:
            self.ranges[i:j] = [(first, last)]

    def add_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Add all numbers of many ranges, in any order: few one by one, many in one way through them and those that are there."""
        if len(ranges) < len(self.ranges) // 8:
            for first, last in ranges:
                self.add_range(first, last)
            return
        before, self.ranges = self.ranges, []
        for first, last in sorted([*before, *ranges]):
            if first > last:
                continue
            if first <= self.cumulative + 1:
                self.cumulative = max(self.cumulative, last)
            elif self.ranges and first <= self.ranges[-1][1] + 1:
                self.ranges[-1] = self.ranges[-1][0], max(self.ranges[-1][1], last)
            else:
                self.ranges.append((first, last))


class LaneReceipt(msgspec.Struct, frozen=True, kw_only=True):
    """The settled sequences of one lane; ranges are inclusive, at most RANGES_MAX of the lowest."""

    lane: str
    cumulative: int
    ranges: list[tuple[int, int]] = []

    def settles(self) -> SequenceSet:
        return SequenceSet(self.cumulative, self.ranges)


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What the lake holds of one device's buffer (`epoch`)."""

    device: str
    epoch: str
    lanes: list[LaneReceipt]


def messages(receipt: Receipt) -> Iterator[Receipt]:
    """The receipt in as many as it needs to keep within what one message may hold."""
    lanes: list[LaneReceipt] = []
    ranges = 0
    for lane in receipt.lanes:
        if len(lanes) == LANES_MAX or ranges + len(lane.ranges) > MESSAGE_RANGES_MAX:
            yield Receipt(device=receipt.device, epoch=receipt.epoch, lanes=lanes)
            lanes, ranges = [], 0
        lanes.append(lane)
        ranges += len(lane.ranges)
    yield Receipt(device=receipt.device, epoch=receipt.epoch, lanes=lanes)


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Receipt).decode


def encode_receipt(receipt: Receipt) -> bytes:
    return _encode(receipt)


def decode_receipt(data: bytes) -> Receipt:
    """Parse a receipt.

    Raises:
        ContractError: it is not one, or passes a limit.
    """
    try:
        receipt = _decode(data)
    except UNREADABLE as e:
        raise ContractError(f"receipt: {e}") from e
    if len(receipt.lanes) > LANES_MAX:
        raise ContractError(f"receipt names {len(receipt.lanes)} lanes; at most {LANES_MAX}")
    for lane in receipt.lanes:
        edges = [lane.cumulative, *(edge for pair in lane.ranges for edge in pair)]
        if lane.cumulative < 0 or len(lane.ranges) > RANGES_MAX or edges != sorted(edges) or edges[-1] > SEQUENCE_MAX:
            raise ContractError(f"receipt for lane {lane.lane!r}: ranges must rise, at most {RANGES_MAX}, to {SEQUENCE_MAX} at most")
    return receipt
