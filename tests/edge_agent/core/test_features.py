"""Window features: the definition in plain Python, and equal bits however the readings are cut and mixed."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, take
from edge_agent.contract.errors import BundleError, ContractError
from edge_agent.contract.feature_spec import AGGREGATES, Feature, FeatureSpec, WindowKind, check_spec
from edge_agent.core import closing, features, trailing
from edge_agent.core.features import Made, Windows, entities_max
from edge_agent.core.functions import Function
from tests.edge_agent.core import window_oracle as oracle

ALL = (*AGGREGATES, "quantile(0.5)", "quantile(0.95)", "quantile(0)", "quantile(1)")
HOUR_US = 3_600_000_000
BOTH = [Feature(f, a) for f in ("t", "p") for a in ALL]
SPEC = FeatureSpec(features=BOTH, window_rows=5, window_s=4 * 3600.0)
TUMBLING = FeatureSpec(features=BOTH, window_rows=8, window_s=3 * 3600.0, kind=WindowKind.TUMBLING, lateness_s=1800.0)
HOPPING = FeatureSpec(features=BOTH, window_rows=9, window_s=6 * 3600.0, kind=WindowKind.HOPPING, every_s=2 * 3600.0, lateness_s=600.0)
SPECS = (SPEC, TUMBLING, HOPPING)
FEW = settings(max_examples=int(os.environ.get("FENCELINE_RUNS") or 25))
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s.kind))
Table = dict[str, Any]


def readings(seed: int, rows: int, entities: int = 3) -> tuple[Strings, np.ndarray, Table]:
    """Readings of some entities: late ones, equal times, gaps, missing values, zeros of both signs."""
    random = np.random.default_rng(seed)
    entity = Strings.of([f"e{i}" for i in random.integers(0, entities, rows)])
    steps = random.choice(
        [0, HOUR_US // 8, HOUR_US // 2, HOUR_US, -HOUR_US // 2, -3 * HOUR_US, 9 * HOUR_US], rows, p=[0.15, 0.3, 0.2, 0.15, 0.1, 0.05, 0.05]
    )
    t = np.where(random.random(rows) < 0.1, np.nan, random.normal(500, 20, rows))
    p = random.choice([-1.5, -0.0, 0.0, 0.25, 3.0], rows)
    return entity, np.cumsum(steps) - 5 * HOUR_US, {"t": t, "p": p}


def by_oracle(
    spec: FeatureSpec, entity: Strings, event_us: np.ndarray, table: Table, fields: tuple[str, ...] = ("t", "p")
) -> list[oracle.Membership]:
    names = entity.tolist()
    return [
        oracle.membership(spec, [oracle.Reading(i, names[i], int(event_us[i]), float(table[field][i])) for i in range(len(names))])
        for field in fields
    ]


def cut(windows: Windows, cuts: list[int], entity: Strings, event_us: np.ndarray, table: Table) -> Made:
    parts, start = [], 0
    for size in [*cuts, len(entity) - sum(cuts)]:
        part = slice(start, start + size)
        parts.append((start, windows.push(entity[part], event_us[part], take(table, part))))
        start += size
    return Made.together(parts)


def bits(made: Made) -> dict[str, bytes]:
    features = np.where(np.isnan(made.features), np.nan, made.features)  # a NaN has no sign that anybody sees
    return {"features": features.tobytes()} | {n: getattr(made, n).tobytes() for n in ("rows", "start_us", "end_us", "late", "overfull")}


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), rows=st.integers(0, 60))
def test_windows_and_features_are_those_of_the_definition_in_every_bit(spec: FeatureSpec, seed: int, rows: int) -> None:
    entity, event_us, table = readings(seed, rows)
    made = Windows(spec).push(entity, event_us, table)
    by_field = by_oracle(spec, entity, event_us, table)
    assert made.late.tolist() == by_field[0].late
    assert made.overfull.tolist() == by_field[0].overfull
    assert made.rows.tolist() == [w.done for w in by_field[0].windows]
    assert made.start_us.tolist() == [w.start_us for w in by_field[0].windows]
    assert (made.end_us - made.start_us == spec.window_us).all()
    want = np.array([[oracle.value(a, w.readings) for w in f.windows] for f in by_field for a in ALL]).T.reshape(-1, len(BOTH))
    # `last` of a trailing window is the reading's own
    np.testing.assert_array_equal(made.features, want)
    assert bits(made)["features"] == np.where(np.isnan(want), np.nan, want).tobytes()


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 40))
def test_features_are_near_those_of_rational_arithmetic(spec: FeatureSpec, seed: int, rows: int) -> None:
    entity, event_us, table = readings(seed, rows)
    made = Windows(spec).push(entity, event_us, table)
    want = [[oracle.exact(a, w.readings) for w in f.windows] for f in by_oracle(spec, entity, event_us, table) for a in ALL]
    np.testing.assert_allclose(made.features, np.array(want).T.reshape(-1, len(BOTH)), rtol=1e-9, atol=1e-9)


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 20), max_size=10))
def test_any_cut_into_batches_gives_the_same_bits(spec: FeatureSpec, seed: int, cuts: list[int]) -> None:
    entity, event_us, table = readings(seed, sum(cuts) + 7)
    whole = Windows(spec)
    assert bits(cut(Windows(spec), cuts, entity, event_us, table)) == bits(whole.push(entity, event_us, table))


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 60))
def test_any_mixture_of_entities_gives_the_same_bits(spec: FeatureSpec, seed: int, rows: int) -> None:
    """Each entity's readings in the order seen, with those of others anywhere between them."""
    entity, event_us, table = readings(seed, rows)
    mixed = Windows(spec).push(entity, event_us, table)
    names = np.array(entity.tolist())
    for name in entity.values:
        alone = np.flatnonzero(names == name)
        made = Windows(spec).push(entity[alone], event_us[alone], take(table, alone))
        mine = names[mixed.rows] == name
        assert made.features.tobytes() == np.ascontiguousarray(mixed.features[mine]).tobytes()
        assert alone[made.rows].tolist() == mixed.rows[mine].tolist()
        assert alone[made.late].tolist() == [row for row in mixed.late.tolist() if names[row] == name]


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 60), restart=st.integers(0, 60))
def test_a_restart_with_the_history_of_the_buffer_changes_no_bit(spec: FeatureSpec, seed: int, rows: int, restart: int) -> None:
    entity, event_us, table = readings(seed, rows)
    whole = Windows(spec).push(entity, event_us, table)
    restarted, first = Windows(spec), slice(0, restart)
    restarted.warm(entity[first], event_us[first], take(table, first))
    rest = slice(restart, None)
    made = restarted.push(entity[rest], event_us[rest], take(table, rest))
    assert made.features.tobytes() == np.ascontiguousarray(whole.features[whole.rows >= restart]).tobytes()


@pytest.mark.parametrize("spec", [TUMBLING, HOPPING], ids=lambda s: str(s.kind))
@FEW
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 60))
def test_the_order_of_arrival_within_the_lateness_changes_nothing(spec: FeatureSpec, seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    event_us = np.cumsum(random.integers(1, HOUR_US, rows))
    arrival = np.argsort(event_us + random.integers(0, spec.lateness_us, rows), kind="stable")
    table = {"t": random.normal(size=rows), "p": random.normal(size=rows)}
    roomy = FeatureSpec(**{f: getattr(spec, f) for f in spec.__struct_fields__} | {"window_rows": 999})
    sent, arrived = Windows(roomy), Windows(roomy)
    end, entity = np.array([10**15]), Strings.of(["e"] * (rows + 1))  # closes all
    last = {"t": np.zeros(1), "p": np.zeros(1)}
    in_order = sent.push(entity, np.concatenate([event_us, end]), {f: np.concatenate([table[f], last[f]]) for f in table})
    mixed = arrived.push(entity, np.concatenate([event_us[arrival], end]), {f: np.concatenate([table[f][arrival], last[f]]) for f in table})
    assert arrived.late == 0
    assert in_order.features.tobytes() == mixed.features.tobytes()
    assert in_order.start_us.tolist() == mixed.start_us.tolist()


@EVERY_SPEC
def test_long_runs_and_small_pieces_give_the_same_bits(spec: FeatureSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worked on at once, and whether windows are copied or looked at where they lie, changes nothing."""
    entity, event_us, table = readings(3, 400, entities=1)
    event_us = np.arange(400) * HOUR_US // 2 + np.where(np.arange(400) == 200, 30 * HOUR_US, 0)
    table["t"][:100] = 7.25
    whole = bits(Windows(spec).push(entity, event_us, table))
    by_field = by_oracle(spec, entity, event_us, table)
    want = np.array([[oracle.value(a, w.readings) for w in f.windows] for f in by_field for a in ALL]).T
    assert whole["features"] == np.where(np.isnan(want), np.nan, want).tobytes()
    for cells, share in ((30, 0.0), (7 * 5 * 2, 0.5), (1 << 20, 2.0)):
        monkeypatch.setattr(trailing, "CELLS_MAX", cells)
        monkeypatch.setattr(trailing, "RUN_CELLS_MAX", cells // 5)
        monkeypatch.setattr(trailing, "PIECE_ROWS_MIN", cells + 1)
        monkeypatch.setattr(trailing, "PIECE_CELLS_MAX", 1)
        monkeypatch.setattr(closing, "CELLS_MAX", cells)
        monkeypatch.setattr(trailing, "RUN_SHARE_MIN", share)
        assert bits(Windows(spec).push(entity, event_us, table)) == whole


@pytest.mark.parametrize("rows", [219, 220, 221])
def test_a_run_that_leaves_one_window_for_the_last_piece_gives_the_same_bits(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over the steps of a single window would be made pairwise, from eight steps on."""
    spec = FeatureSpec(features=[Feature("t", a) for a in ALL], window_rows=20, window_s=10.0**9)
    entity, event_us = Strings.of(["a"] * rows), np.cumsum(np.random.default_rng(rows).integers(1, HOUR_US, rows))
    table = {"t": np.random.default_rng(4).normal(500, 20, rows)}
    readings = [oracle.Reading(i, "a", us, x) for i, (us, x) in enumerate(zip(event_us.tolist(), table["t"].tolist(), strict=True))]
    want = [[oracle.value(a, w.readings) for a in ALL] for w in oracle.membership(spec, readings).windows]
    monkeypatch.setattr(trailing, "RUN_CELLS_MAX", 10)
    assert Windows(spec).push(entity, event_us, table).features.tobytes() == np.array(want).tobytes()


def test_late_readings_are_counted_and_named() -> None:
    spec = FeatureSpec(features=[Feature("t", "count")], window_rows=9, window_s=10.0, kind=WindowKind.TUMBLING, lateness_s=5.0)
    windows = Windows(spec)
    event_s = np.array([1, 14, 9, 15, 9, 3])  # 9 is in time while the watermark is 9, and late when it is 10
    made = windows.push(Strings.of(["a"] * 6), event_s * 1_000_000, {"t": np.ones(6)})
    assert (made.features.tolist(), made.rows.tolist(), made.end_us.tolist()) == ([[2.0]], [3], [10_000_000])
    assert made.late.tolist() == [4, 5]
    assert windows.late == 2


def test_a_hop_that_is_full_takes_no_more_and_says_so() -> None:
    spec = FeatureSpec(features=[Feature("t", "max")], window_rows=2, window_s=10.0, kind=WindowKind.TUMBLING)
    windows = Windows(spec)
    made = windows.push(Strings.of(["a"] * 5), np.array([5, 2, 1, 8, 10]) * 1_000_000, {"t": np.array([1.0, 2.0, 9.0, 9.0, 0.0])})
    assert made.features.tolist() == [[2.0]]
    assert made.overfull.tolist() == [2, 3]
    assert windows.overfull == 2


@FEW
@given(seed=st.integers(0, 2**32), limit=st.integers(1, 6), cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_same_entities_are_forgotten_however_readings_are_cut(seed: int, limit: int, cuts: list[int]) -> None:
    entity, event_us, table = readings(seed, sum(cuts), entities=8)
    for spec in SPECS:
        made = []
        for batches in ([], cuts, [1] * sum(cuts)):
            windows = Windows(spec)
            windows._kind.recent.limit = limit
            made.append((bits(cut(windows, batches, entity, event_us, table)), windows.forgotten))
        assert made[0] == made[1] == made[2]


def test_memory_is_bounded_by_the_spec() -> None:
    assert entities_max(SPEC) == 10_000
    wide = FeatureSpec(features=[Feature("t", "max")], window_rows=60_000, window_s=60.0, kind=WindowKind.TUMBLING, lateness_s=120.0)
    check_spec(wide)
    assert 0 < entities_max(wide) * 60_000 * 3 <= features.HELD_VALUES_MAX
    windows = Windows(wide)
    for i in range(40):
        windows.push(Strings.of([f"e{i}"] * 10), np.arange(10), {"t": np.zeros(10)})
    assert len(windows._kind.recent) == windows.entities_max < 40
    assert windows.forgotten == 10 * (40 - windows.entities_max)


def test_times_from_the_far_past_and_future_do_no_harm() -> None:
    far = np.array([0, -(2**63), 2**63 - 1, 1, 2**62])
    for spec in (TUMBLING, HOPPING):
        made = Windows(spec).push(Strings.of(["a"] * 5), far, {"t": np.ones(5), "p": np.ones(5)})
        assert made.late.tolist() == [1, 3]


def crest(values: np.ndarray) -> np.ndarray:
    return np.abs(values).max(axis=1) / np.sqrt((values * values).mean(axis=1))


@EVERY_SPEC
@FEW
@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 20), max_size=5))
def test_a_function_of_the_users_own_gives_the_same_bits_for_any_cut(spec: FeatureSpec, seed: int, cuts: list[int]) -> None:
    entity, event_us, table = readings(seed, sum(cuts) + 9)
    own = with_function(spec)
    functions = {"crest": Function("crest", "a" * 64, crest)}
    whole = Windows(own, functions).push(entity, event_us, table)
    assert bits(cut(Windows(own, functions), cuts, entity, event_us, table)) == bits(whole)
    for window, found in zip(by_oracle(spec, entity, event_us, table, ("t",))[0].windows, whole.features[:, 0].tolist(), strict=True):
        values = np.array([r.x for r in window.readings if not np.isnan(r.x)])
        want = crest(np.stack([values, values]))[0] if len(values) else np.nan
        assert found == want or (np.isnan(found) and np.isnan(want))


def with_function(spec: FeatureSpec) -> FeatureSpec:
    fields = {f: getattr(spec, f) for f in spec.__struct_fields__}
    return FeatureSpec(**fields | {"features": [Feature("t", "crest")], "functions": {"crest": "a" * 64}})


@pytest.mark.parametrize(
    ("functions", "message"),
    [({}, "not installed here"), ({"crest": Function("crest", "b" * 64, crest)}, "another version here: module bbbb")],
)
def test_a_function_that_is_not_here_or_another_one_is_refused(functions: dict[str, Function], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Windows(with_function(SPEC), functions)


@pytest.mark.parametrize("call", [lambda v: v, lambda v: 1.0, lambda v: v.nothing, lambda v: ["x"] * len(v)])
def test_a_function_that_fails_or_gives_anything_else_is_named(call: Any) -> None:
    with pytest.raises(ContractError, match="'crest'"):
        Windows(with_function(SPEC), {"crest": Function("crest", "a" * 64, call)}).push(Strings.of(["a"]), np.array([1]), {"t": np.ones(1)})


def test_a_name_that_the_dictionary_holds_twice_is_one_entity() -> None:
    twice = Strings(np.array([0, 1, 2, 1], np.int32), ("a", "b", "a"))
    once = Strings.of(twice.tolist())
    event_us, table = np.arange(4), {"t": np.arange(4.0), "p": np.arange(4.0)}
    assert bits(Windows(SPEC).push(twice, event_us, table)) == bits(Windows(SPEC).push(once, event_us, table))


def test_a_field_the_stream_lacks_is_named() -> None:
    with pytest.raises(ContractError, match="'p' is not a numeric column"):
        Windows(SPEC).push(Strings.of(["a"]), np.array([1]), {"t": np.array([1.0])})
