"""When windows that close were known, against the rule itself in plain Python."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from edge_agent.contract.columns import Strings
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind
from edge_agent.core.features import Windows
from pipelines.arrival import KnownHops
from pipelines.features import LakeWindows
from tests.pipelines.lakes import turbofan

SECOND_US = 1_000_000
TIME = pa.timestamp("us", "UTC")
TUMBLING = FeatureSpec(
    features=[Feature("sensor_2", "mean")], window_rows=128, window_s=1.0, kind=WindowKind.TUMBLING, lateness_s=0.5
)  # fmt: skip
HOPPING = FeatureSpec(features=[Feature("sensor_2", "mean")], window_rows=30, window_s=3.0, every_s=1.0, kind=WindowKind.HOPPING)


@pytest.mark.parametrize("spec", [TUMBLING, HOPPING], ids=["tumbling", "hopping"])
def test_a_window_is_known_when_its_last_reading_and_the_one_that_closes_it_have_arrived(seed: int, spec: FeatureSpec) -> None:
    random, count = np.random.default_rng(seed), 600
    entity = random.integers(0, 3, count)
    names = Strings.of([f"e{i}" for i in entity])
    event_us = np.arange(count) * 50_000 + random.integers(-1_500_000, 1_500_000, count) - 10 * SECOND_US  # out of order, before 1970 too
    arrived_us = random.integers(0, 1_000, count)

    def run(cuts: list[int], entities_max: int = 3) -> list[tuple[str, int, int]]:
        windows, known = Windows(spec), KnownHops(spec, entities_max)
        found = []
        for start, stop in itertools.pairwise(cuts):
            part = slice(start, stop)
            made = windows.push(names[part], event_us[part], {"sensor_2": np.zeros(stop - start)})
            at = known.push(names[part], event_us[part], arrived_us[part], made)
            found += zip(names[part][made.rows].tolist(), made.start_us.tolist(), at.tolist(), strict=True)
        return found

    made = Windows(spec).push(names, event_us, {"sensor_2": np.zeros(count)})
    wanted = []
    for row, start, end in zip(made.rows.tolist(), made.start_us.tolist(), made.end_us.tolist(), strict=True):
        seen = np.arange(count) <= row
        inside = seen & (entity == entity[row]) & (event_us >= start) & (event_us < end)
        wanted.append((f"e{entity[row]}", start, max(int(arrived_us[inside].max()), int(arrived_us[row]))))
    assert len(wanted) > 50
    assert run([0, count]) == wanted
    assert run([0, *sorted(random.integers(0, count, 40).tolist()), count]) == wanted
    assert run(list(range(count + 1))) == wanted


def test_readings_of_another_lane_that_arrive_an_hour_later_make_their_window_known_then() -> None:
    count = 300
    ts = 1_700_000_000 * SECOND_US + np.arange(count) * 10_000
    arrived, late = ts.copy(), int(ts[0]) + 3_600 * SECOND_US
    arrived[100:110] = late
    rows = {"ts": pa.array(ts).cast(TIME), "engine": ["p"] * count, "sensor_2": np.zeros(count), "arrived_at": pa.array(arrived).cast(TIME)}
    table = pa.table({**rows, "device": ["d"] * count, "epoch": ["e"] * count})
    made, _ = LakeWindows(turbofan(), TUMBLING).push(table)
    first, second = made["created_time"].cast(pa.int64()).to_pylist()
    assert (first, second) == (int(ts[150]), late)


def test_memory_is_bounded_by_the_hops_that_can_be_open() -> None:
    known, windows, count = KnownHops(HOPPING, 2), Windows(HOPPING), 5_000
    names = Strings.of([f"e{i % 2}" for i in range(count)])
    event_us = np.arange(count) * 100_000
    known.push(names, event_us, event_us, windows.push(names, event_us, {"sensor_2": np.zeros(count)}))
    assert sum(len(hops.numbers) for hops in known._recent._states.values()) <= 2 * (HOPPING.open_max + HOPPING.overlap)
