"""The join's engine against a brute-force oracle in plain Python, whole, in pieces and in partitions."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st

from pipelines.asof import AT, CREATED, KEY, Labels, Rule, candidates, join, prune

RUNS, RUNS_LONG = 150, int(os.environ.get("FENCELINE_RUNS") or 20_000)
FAR = 2**55  # microseconds; times so far apart that key and time do not fit one number


@dataclass(frozen=True)
class Row:
    key: tuple[str | None, int | None]
    at: int | None
    created: int | None
    values: tuple[float | None, str | None]


@dataclass(frozen=True)
class Case:
    rows: list[Row]
    labels: list[tuple[tuple[str | None, int | None], int | None]]
    ttl: int
    known_by: bool
    keys: int  # how many of the two key columns the view has
    cuts: list[int]


def oracle(case: Case, key: tuple[Any, ...], at: int | None) -> tuple[Any, Any]:
    """What a label gets, straight from the rules."""
    if at is None or None in key[: case.keys]:
        return (None, None)
    visible = [
        row
        for row in case.rows
        if row.key[: case.keys] == key[: case.keys]
        and row.at is not None
        and row.at <= at
        and (not case.known_by or (row.created is not None and row.created <= at))
    ]
    if not visible:
        return (None, None)
    least = -(2**62)

    def content(row: Row) -> list[tuple[int, Any]]:
        return [(0, 0) if value is None else (1, value) for value in row.values]

    best = max(visible, key=lambda row: (row.at, least if row.created is None else row.created, content(row)))
    assert best.at is not None
    return best.values if not case.ttl or at - best.at <= case.ttl else (None, None)


few = st.integers(0, 12)
times = st.one_of(st.none(), few, few, few)
keys = st.tuples(st.sampled_from(["a", "b", "c", None]), st.sampled_from([1, 2, None]))
values = st.tuples(st.one_of(st.none(), st.sampled_from([0.5, 1.5])), st.sampled_from([None, "x", "y"]))
rows = st.builds(Row, keys, times, times, values)


@st.composite
def cases(draw: Any) -> Case:
    drawn = draw(st.lists(rows, max_size=30))
    scale = draw(st.sampled_from([1, 1, FAR]))
    return Case(
        rows=[Row(r.key, _far(r.at, scale), _far(r.created, scale), r.values) for r in drawn],
        labels=[(key, _far(at, scale)) for key, at in draw(st.lists(st.tuples(keys, times), max_size=20))],
        ttl=draw(st.sampled_from([0, 0, 1, 3])) * scale,
        known_by=draw(st.booleans()),
        keys=draw(st.integers(0, 2)),
        cuts=draw(st.lists(st.integers(0, 30), max_size=3)),
    )


def _far(time: int | None, scale: int) -> int | None:
    return None if time is None else (time - 6) * scale


def frame(found: list[Row], case: Case) -> pl.DataFrame:
    columns = {f"k{i}": pl.Series([r.key[i] for r in found], dtype=(pl.String, pl.Int64)[i]) for i in range(case.keys)}
    columns |= {AT: pl.Series([r.at for r in found], dtype=pl.Int64), CREATED: pl.Series([r.created for r in found], dtype=pl.Int64)}
    columns |= {
        "v": pl.Series([r.values[0] for r in found], dtype=pl.Float64),
        "w": pl.Series([r.values[1] for r in found], dtype=pl.String),
    }
    return pl.DataFrame(columns)


def check(case: Case) -> None:
    rule = Rule(case.ttl, case.known_by)
    asked = {f"k{i}": pl.Series([key[i] for key, _ in case.labels], dtype=(pl.String, pl.Int64)[i]) for i in range(case.keys)}
    labels = Labels.of(pl.DataFrame(asked), pl.Series([at for _, at in case.labels], dtype=pl.Int64))
    expected = [oracle(case, key, at) for key, at in case.labels]
    whole = candidates(frame(case.rows, case), labels, rule)
    assert join(whole, labels, rule).rows() == expected

    cuts = [0, *sorted(min(cut, len(case.rows)) for cut in case.cuts), len(case.rows)]
    pieces = [prune(candidates(frame(case.rows[first:last], case), labels, rule), labels, rule) for first, last in pairwise(cuts)]
    assert all(piece.height <= len(case.labels) for piece in pieces)
    left = pl.concat(pieces[::-1])
    assert join(left, labels, rule).rows() == expected

    for parts in (1, 2, 3):
        got: dict[int, Any] = {}
        for number in range(parts):
            mine = labels.part(number, parts)
            found = join(left.filter(pl.col(KEY) % parts == number), mine, rule)
            got |= dict(zip(np.sort(mine.rows).tolist(), found.rows(), strict=True))
        assert [got[i] for i in range(len(case.labels))] == expected


def prove(runs: int, seed: int) -> None:
    @hypothesis_seed(seed)
    @settings(max_examples=runs, database=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def holds(case: Case) -> None:
        check(case)

    holds()


def test_join_equals_the_oracle_whole_in_pieces_and_in_partitions(seed: int) -> None:
    prove(RUNS, seed)


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_join_equals_the_oracle_many_times(seed: int) -> None:
    prove(RUNS_LONG, seed)


def test_pruned_rows_are_at_most_one_per_label(seed: int) -> None:
    random = np.random.default_rng(seed)
    n = 50_000
    features = pl.DataFrame({"k0": random.integers(0, 50, n), AT: random.integers(0, 10**9, n), "v": random.random(n)})
    labels = Labels.of(pl.DataFrame({"k0": random.integers(0, 60, 300)}), pl.Series(random.integers(0, 10**9, 300)))
    whole = candidates(features, labels, Rule())
    left = pl.concat([prune(candidates(piece, labels, Rule()), labels, Rule()) for piece in features.iter_slices(7_000)])
    assert prune(left, labels, Rule()).height <= 300
    assert join(left, labels, Rule()).equals(join(whole, labels, Rule()))


def test_features_of_any_name_are_told_apart_when_times_are_equal() -> None:
    features = pl.DataFrame({"k0": ["a", "a"], AT: [5, 5], "place": [2.0, 1.0], "compared": [1, 2], "row": [1, 2]})
    labels = Labels.of(pl.DataFrame({"k0": ["a"]}), pl.Series([9]))
    assert join(candidates(features, labels, Rule()), labels, Rule()).rows() == [(2.0, 1, 1)]


@pytest.mark.parametrize(("ttl", "expected"), [(0, [1.0]), (2**63 - 1, [None]), (2**62, [None])])
def test_age_beyond_any_ttl_is_told(ttl: int, expected: list[float | None]) -> None:
    """The label is 1.5 * 2**63 younger than the row: more than an int64 holds."""
    features = pl.DataFrame({"k0": ["a"], AT: [-(2**63) + 1], "v": [1.0]})
    labels, rule = Labels.of(pl.DataFrame({"k0": ["a"]}), pl.Series([2**62])), Rule(ttl)
    assert join(candidates(features, labels, rule), labels, rule)["v"].to_list() == expected


def test_late_backfill_is_seen_from_its_created_time_on() -> None:
    """A value for 10 that arrived at 50 hides nothing from a label at 30, and is the newest for one at 60."""
    features = pl.DataFrame({"k0": ["a", "a"], AT: [5, 10], CREATED: [5, 50], "v": [1.0, 2.0]})
    labels = Labels.of(pl.DataFrame({"k0": ["a", "a", "a"]}), pl.Series([30, 60, 49]))
    for known_by, expected in ((True, [1.0, 2.0, 1.0]), (False, [2.0, 2.0, 2.0])):
        rule = Rule(known_by=known_by)
        assert join(candidates(features, labels, rule), labels, rule)["v"].to_list() == expected
