"""Window features: the definition, and equal bits however the readings are cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.bundle import AGGREGATES, Feature, FeatureSpec
from edge_agent.contract.columns import Strings, take
from edge_agent.contract.errors import ContractError
from edge_agent.core import features
from edge_agent.core.features import Windows

HOUR_US = 3_600_000_000
SPEC = FeatureSpec(features=[Feature(f, a) for f in ("t", "p") for a in AGGREGATES], window_rows=5, window_s=4 * 3600.0)


def readings(seed: int, rows: int) -> tuple[Strings, np.ndarray, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    entity = Strings.of([f"e{i}" for i in random.integers(0, 3, rows)])
    event_us = np.cumsum(random.integers(-HOUR_US // 2, 2 * HOUR_US, rows))
    t = np.where(random.random(rows) < 0.1, np.nan, random.normal(500, 20, rows))
    return entity, event_us, {"t": t, "p": random.normal(size=rows).round(2)}


def by_definition(entity: list[str], event_us: np.ndarray, values: np.ndarray, row: int) -> list[float]:
    """The features of one reading of one field, straight from the words of FeatureSpec."""
    seen = [j for j in range(row + 1) if entity[j] == entity[row]][-SPEC.window_rows :]
    inside = [j for j in seen if event_us[row] - SPEC.window_s * 1e6 < event_us[j] <= event_us[row]]
    kept = [j for j in inside if not np.isnan(values[j])]
    x, hours = values[kept], (event_us[kept] - event_us[row]) / HOUR_US
    if not kept:
        return [values[row], np.nan, np.nan, np.nan, np.nan, np.nan, 0.0]
    spread = ((hours - hours.mean()) ** 2).sum()
    slope = ((x - x.mean()) * (hours - hours.mean())).sum() / spread if spread else 0.0
    return [values[row], x.mean(), x.std(), x.min(), x.max(), slope, float(len(kept))]


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_features_follow_their_definition(seed: int, rows: int) -> None:
    entity, event_us, table = readings(seed, rows)
    found = Windows(SPEC).push(entity, event_us, table)
    names = entity.tolist()
    for row in range(rows):
        want = by_definition(names, event_us, table["t"], row) + by_definition(names, event_us, table["p"], row)
        np.testing.assert_allclose(found[row], want, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 20), min_size=1, max_size=10))
def test_any_cut_into_batches_and_a_restart_give_the_same_bits(seed: int, cuts: list[int]) -> None:
    rows = sum(cuts)
    entity, event_us, table = readings(seed, rows)
    whole = Windows(SPEC).push(entity, event_us, table)
    windows, parts, start = Windows(SPEC), [], 0
    for cut in cuts:
        part = slice(start, start + cut)
        parts.append(windows.push(entity[part], event_us[part], take(table, part)))
        start += cut
        restarted = Windows(SPEC)
        restarted.warm(entity[:start], event_us[:start], take(table, slice(0, start)))
        windows = restarted
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def one_addition_at_a_time(entity: list[str], event_us: np.ndarray, values: np.ndarray, row: int, spec: FeatureSpec) -> list[float]:
    """Mean, standard deviation and slope of one reading in plain Python floats, oldest reading first."""
    seen = [j for j in range(row + 1) if entity[j] == entity[row]][-spec.window_rows :]
    inside = [j for j in seen if 0 <= event_us[row] - event_us[j] < spec.window_s * 1e6 and not np.isnan(values[j])]
    x = [float(values[j]) for j in inside]
    hours = [float(-(event_us[row] - event_us[j]) / 3_600e6) for j in inside]
    if not x:
        return [np.nan] * 3
    mean, hours_mean = added(x) / len(x), added(hours) / len(x)
    spread = added([(h - hours_mean) * (h - hours_mean) for h in hours])
    together = added([(v - mean) * (h - hours_mean) for v, h in zip(x, hours, strict=True)])
    return [mean, math.sqrt(added([(v - mean) * (v - mean) for v in x]) / len(x)), together / spread if spread else 0.0]


def added(numbers: list[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number
    return total


@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1, 2, 9, 33, 130]), st.lists(st.integers(1, 30), min_size=1, max_size=4))
def test_sums_are_made_one_addition_at_a_time_from_the_oldest(seed: int, rows: int, window_rows: int, cuts: list[int]) -> None:
    entity, event_us, table = readings(seed, rows)
    spec = FeatureSpec(features=[Feature("t", a) for a in ("mean", "std", "slope")], window_rows=window_rows, window_s=1e9)
    windows, found, start = Windows(spec), [], 0
    for cut in [*cuts, rows]:
        part = slice(start, start + cut)
        found.append(windows.push(entity[part], event_us[part], take(table, part)))
        start += cut
    names = entity.tolist()
    want = np.array([one_addition_at_a_time(names, event_us, table["t"], row, spec) for row in range(rows)])
    assert np.concatenate(found).tobytes() == want.tobytes()


def test_minus_zeros_add_up_to_zero() -> None:
    spec = FeatureSpec(features=[Feature("t", "mean")], window_rows=3, window_s=10.0)
    found = Windows(spec).push(Strings.of(["a"] * 2), np.array([0, 1]), {"t": np.array([-0.0, -0.0])})
    assert not np.signbit(found).any()


def test_a_name_that_the_dictionary_holds_twice_is_one_entity() -> None:
    twice = Strings(np.array([0, 1, 2, 1], np.int32), ("a", "b", "a"))
    once = Strings.of(twice.tolist())
    event_us, table = np.arange(4), {"t": np.arange(4.0), "p": np.arange(4.0)}
    assert Windows(SPEC).push(twice, event_us, table).tobytes() == Windows(SPEC).push(once, event_us, table).tobytes()


def test_a_batch_worked_on_in_parts_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    entity, event_us, table = readings(3, 50)
    whole = Windows(SPEC).push(entity, event_us, table)
    monkeypatch.setattr(features, "CELLS_MAX", 7 * SPEC.window_rows * 2)
    assert Windows(SPEC).push(entity, event_us, table).tobytes() == whole.tobytes()


def test_a_field_the_stream_lacks_is_named() -> None:
    with pytest.raises(ContractError, match="'p' is not a numeric column"):
        Windows(SPEC).push(Strings.of(["a"]), np.array([1]), {"t": np.array([1.0])})
