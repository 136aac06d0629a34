"""Receipts: a set of settled sequences, and its document."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError
from edge_agent.contract.receipt import LANES_MAX, RANGES_MAX, LaneReceipt, Receipt, SequenceSet, decode_receipt, encode_receipt

GOLDEN = [
    (b'{"device":"plane-01","epoch":"e1","lanes":[]}', Receipt(device="plane-01", epoch="e1", lanes=[])),
    (
        b'{"device":"plane-01","epoch":"e1","lanes":[{"lane":"europe","cumulative":7,"ranges":[[9,9],[12,20]]}]}',
        Receipt(device="plane-01", epoch="e1", lanes=[LaneReceipt(lane="europe", cumulative=7, ranges=[(9, 9), (12, 20)])]),
    ),
]

sequences = st.lists(st.integers(1, 60))


def filled(numbers: list[int]) -> SequenceSet:
    settled = SequenceSet()
    for n in numbers:
        settled.add(n)
    return settled


@pytest.mark.parametrize(("document", "receipt"), GOLDEN)
def test_golden_receipts_are_written_and_read(document: bytes, receipt: Receipt) -> None:
    assert encode_receipt(receipt) == document
    assert decode_receipt(document) == receipt


@given(sequences)
def test_sequence_set_behaves_like_a_set(numbers: list[int]) -> None:
    settled, model = SequenceSet(), set[int]()
    for n in numbers:
        assert settled.add(n) is (n not in model)
        model.add(n)
        assert {m for m in range(1, 65) if m in settled} == model


@given(sequences)
def test_sequence_set_is_kept_as_short_as_can_be(numbers: list[int]) -> None:
    settled = filled(numbers)
    last = settled.cumulative
    for first, end in settled.ranges:
        assert first > last + 1, "ranges are apart, and not next to what is cumulative"
        assert end >= first
        last = end


@given(sequences, st.lists(st.tuples(st.integers(-3, 60), st.integers(-3, 12))), sequences)
def test_ranges_are_added_as_their_numbers_would_be(before: list[int], ranges: list[tuple[int, int]], after: list[int]) -> None:
    settled, model = filled(before), filled(before)
    for first, more in ranges:
        settled.add_range(first, first + more)
        for n in range(max(1, first), first + more + 1):
            model.add(n)
    for n in after:
        assert settled.add(n) is model.add(n)
    assert (settled.cumulative, settled.ranges) == (model.cumulative, model.ranges)


@given(sequences, st.lists(st.tuples(st.integers(-3, 60), st.integers(-3, 12)), max_size=40))
@example([], [(1, 2**61)])
@example([1, 3, 5, 7, 9], [(2, 2)])
def test_many_ranges_at_once_are_added_as_one_by_one(before: list[int], ranges: list[tuple[int, int]]) -> None:
    settled, model = filled(before), filled(before)
    settled.add_ranges([(first, first + more) for first, more in ranges])
    for first, more in ranges:
        model.add_range(first, first + more)
    assert (settled.cumulative, settled.ranges) == (model.cumulative, model.ranges)


def test_a_range_of_any_length_is_added_at_once() -> None:
    settled = filled([1, 3, 9])
    settled.add_range(5, 2**61)
    assert (settled.cumulative, settled.ranges) == (1, [(3, 3), (5, 2**61)])
    settled.add_range(2, 4)
    assert (settled.cumulative, settled.ranges) == (2**61, [])


@given(sequences)
def test_set_survives_the_receipt(numbers: list[int]) -> None:
    settled = filled(numbers)
    lane = LaneReceipt(lane="europe", cumulative=settled.cumulative, ranges=settled.ranges)
    read = decode_receipt(encode_receipt(Receipt(device="d", epoch="e", lanes=[lane]))).lanes[0].settles()
    assert (read.cumulative, read.ranges) == (settled.cumulative, settled.ranges)


@given(st.binary(max_size=200))
@example(b"")
@example(b"null")
@example(b'{"device":"\xff","epoch":"e","lanes":[]}')
@example(b'{"device":"d","epoch":"e","lanes":[],"later":' + b"[" * 50_000)
def test_foreign_bytes_raise_nothing_but_contract_errors(data: bytes) -> None:
    with pytest.raises(ContractError):
        decode_receipt(data)


@pytest.mark.parametrize(
    "lane",
    [
        LaneReceipt(lane="l", cumulative=-1),
        LaneReceipt(lane="l", cumulative=5, ranges=[(3, 4)]),
        LaneReceipt(lane="l", cumulative=1, ranges=[(9, 8)]),
        LaneReceipt(lane="l", cumulative=1, ranges=[(8, 9), (3, 4)]),
        LaneReceipt(lane="l", cumulative=0, ranges=[(3 * i + 2, 3 * i + 2) for i in range(RANGES_MAX + 1)]),
    ],
    ids=["negative", "below", "backwards", "out of order", "too many"],
)
def test_ranges_that_do_not_rise_or_are_too_many_are_refused(lane: LaneReceipt) -> None:
    with pytest.raises(ContractError, match="ranges must rise"):
        decode_receipt(encode_receipt(Receipt(device="d", epoch="e", lanes=[lane])))


def test_receipt_for_too_many_lanes_is_refused() -> None:
    lanes = [LaneReceipt(lane=f"l{i}", cumulative=1) for i in range(LANES_MAX + 1)]
    with pytest.raises(ContractError, match="at most"):
        decode_receipt(encode_receipt(Receipt(device="d", epoch="e", lanes=lanes)))


def test_unknown_fields_are_ignored() -> None:
    document = GOLDEN[1][0].replace(b'"epoch"', b'"later":{"a":[1]},"epoch"')
    assert decode_receipt(document) == GOLDEN[1][1]
