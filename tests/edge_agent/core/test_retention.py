"""What goes first, how age counts, when it will be full; and the rows of the ledger."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.core.ledger import Loss, coalesce, loss_table, read_losses
from edge_agent.core.retention import Age, FillForecast, Place, choose, portion


def place(number: int, size: int = 10, shelf: int = 1) -> Place:
    return Place(shelf, number, number, 1, size, 0, 0, 0, 0)


def test_the_lowest_priority_goes_first_and_then_the_oldest_across_shelves() -> None:
    pumps = [iter([place(3), place(8)]), iter([place(1, shelf=2), place(9, shelf=2)])]
    shelves: dict[int, list[Iterable[Place]]] = {0: [*pumps], -1: [[place(7, shelf=3)]], 5: [[place(2)]]}
    assert [p.id for p in choose(shelves, 35)] == [7, 1, 3, 8]


def test_no_more_is_read_than_is_given_up() -> None:
    def endless():  # type: ignore[no-untyped-def]
        number = 0
        while True:
            yield place(number := number + 1)

    assert len(choose({0: [endless()]}, 1_000)) == 100


def test_if_there_is_too_little_all_of_it_goes() -> None:
    assert [p.id for p in choose({0: [iter([place(1)])], 1: [iter([])]}, 1_000)] == [1]


@given(st.integers(0, 2**40), st.integers(65_536, 2**40))
def test_a_portion_covers_the_lack_and_little_more(lack: int, limit: int) -> None:
    assert lack < portion(lack, limit) <= lack + limit // 16


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=20))
def test_age_never_goes_back(times: list[int]) -> None:
    age, count = Age(1_000, times[0]), 0
    for now in times:
        assert age.at(now) >= 1_000
    for now in sorted(times):
        assert age.at(now) >= count
        count = age.at(now)


def test_time_between_two_boots_counts_nothing() -> None:
    assert Age.resume(100, "a", 5_000, "a", 9_000).at(9_500) == 4_600
    assert Age.resume(100, "a", 5_000, "b", 70).at(90) == 120
    assert Age.resume(100, "a", 5_000, "a", 4_000).at(4_000) == 100  # a monotonic clock that went back: not ours to judge


def test_a_steady_fill_is_forecast() -> None:
    forecast = FillForecast()
    assert forecast.time_to_full_s(1_000) is None
    for second in range(600):
        forecast.observe(1_000 * second, float(second))
    assert forecast.time_to_full_s(1_599_000) == pytest.approx(1_000, rel=1e-6)
    assert forecast.time_to_full_s(1_000) == 0.0


def test_a_buffer_that_drains_or_stands_still_is_never_full() -> None:
    forecast = FillForecast()
    for second in range(100):
        forecast.observe(10**9 - 1_000 * second, float(second))
    assert forecast.time_to_full_s(2**40) is None
    still = FillForecast()
    for second in range(100):
        still.observe(5, float(second))
        still.observe(5, float(second))  # the same moment twice
    assert still.time_to_full_s(10) is None


def loss(first: int, last: int, stream: str = "pump", reason: str = "evicted_full", readings: float = math.nan) -> Loss:
    return Loss(1, stream, "e", "europe", first, last, last - first + 1, readings, 5.0, 6.0, reason, "")


def test_neighbours_become_one_row_and_others_stay_apart() -> None:
    rows = coalesce([loss(3, 3), loss(1, 2), loss(5, 6), loss(4, 4, "alarm"), loss(7, 7, reason="damaged")])
    spans = sorted((r.of_stream, r.first_sequence, r.last_sequence, r.reason == "damaged") for r in rows)
    assert spans == [("alarm", 4, 4, False), ("pump", 1, 3, False), ("pump", 5, 6, False), ("pump", 7, 7, True)]


@given(st.sets(st.integers(1, 3_000), max_size=300), st.integers(1, 50))
def test_counts_stay_exact_however_rows_are_joined(sequences: set[int], rows_max: int) -> None:
    rows = coalesce([loss(n, n, readings=2.0) for n in sequences], rows_max)
    assert len(rows) <= rows_max
    assert sum(r.blocks for r in rows) == len(sequences)
    assert sum(r.readings for r in rows) == 2.0 * len(sequences)
    assert all(any(r.first_sequence <= n <= r.last_sequence for r in rows) for n in sequences)


def test_names_that_are_lost_twice_count_once_and_never_cover_for_others() -> None:
    assert [(r.first_sequence, r.last_sequence, r.blocks) for r in coalesce([loss(1, 5), loss(1, 5), loss(3, 7)])] == [(1, 7, 7)]
    (row,) = coalesce([loss(1, 3), loss(3, 3), loss(5, 5)], rows_max=1)
    assert (row.first_sequence, row.last_sequence, row.blocks) == (1, 5, 4)


def test_a_table_gives_its_rows_back() -> None:
    rows = [loss(1, 2, readings=8.0), loss(9, 2**50, "alarm", "damaged")]
    found = read_losses(loss_table(rows))
    assert str(found) == str(rows)  # NaN is not equal to itself
