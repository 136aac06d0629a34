"""Ranges: inclusive, NaN passes, the first field out of range is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.validate import validate

CONTRACT = StreamContract(
    stream="room",
    version="1.0.0",
    fields=(
        Field("ts", FieldType.TIMESTAMP, minimum=1_000_000_000),
        Field("room", FieldType.STRING),
        Field("t", FieldType.NUMBER, minimum=-40, maximum=85, unit="Cel"),
        Field("count", FieldType.INTEGER, minimum=0),
        Field("free", FieldType.NUMBER),
    ),
    key=("room", "ts"),
    event_time="ts",
    entity="room",
    topic="sensors/{device}/room",
)


def table(t: list[float], count: list[int] | None = None, ts: list[int] | None = None) -> Table:
    rows = len(t)
    return {
        "ts": np.array(ts or [1_700_000_000_000_000] * rows, np.int64),
        "room": Strings.of(["a"] * rows),
        "t": np.array(t, np.float64),
        "count": np.array(count or [1] * rows, np.int64),
        "free": np.full(rows, 1e300),
    }


def test_the_limits_themselves_are_in_range() -> None:
    ok, rejects = validate(CONTRACT, table([-40, 85, 0], count=[0, 1, 2**62], ts=[1_000_000_000_000_000] * 3))
    assert ok.tolist() == [True] * 3 and rejects == []


def test_a_value_out_of_range_is_named_with_value_unit_and_limits() -> None:
    ok, rejects = validate(CONTRACT, table([20, 85.5, -41, 20]))
    assert ok.tolist() == [True, False, False, True]
    assert [(r.index, r.reason) for r in rejects] == [(1, Reason.OUT_OF_RANGE), (2, Reason.OUT_OF_RANGE)]
    assert rejects[0].detail == "field 't' is 85.5 Cel; -40 to 85 allowed"


def test_one_reject_per_reading_for_the_first_field() -> None:
    ok, rejects = validate(CONTRACT, table([20, 99], count=[-1, -1]))
    assert ok.tolist() == [False, False]
    assert [r.index for r in rejects] == [0, 1]
    assert "'count' is -1; 0 to inf" in rejects[0].detail and "'t'" in rejects[1].detail


def test_a_time_before_its_minimum() -> None:
    ok, rejects = validate(CONTRACT, table([20], ts=[999_999_999_999_999]))
    assert ok.tolist() == [False] and "'ts'" in rejects[0].detail


def test_missing_values_are_in_range() -> None:
    assert validate(CONTRACT, table([np.nan, 3]))[0].all()
    assert validate(CONTRACT, table([np.nan, np.nan]))[0].all()
    assert validate(CONTRACT, table([np.nan, 86]))[0].tolist() == [True, False]


def test_no_rows() -> None:
    ok, rejects = validate(CONTRACT, table([]))
    assert len(ok) == 0 and rejects == []


def test_a_table_that_does_not_fit_the_contract() -> None:
    with pytest.raises(ContractError, match="'t'"):
        validate(CONTRACT, {k: v for k, v in table([1]).items() if k != "t"})
    with pytest.raises(ContractError, match="'t'"):
        validate(CONTRACT, {**table([1]), "t": Strings.of(["warm"])})


@given(st.lists(st.floats() | st.sampled_from([-40.0, 85.0, np.nextafter(85.0, 86.0)]), max_size=20), st.floats(-100, 0), st.floats(0, 100))
def test_as_one_comparison_per_value_would_say(values: list[float], low: float, high: float) -> None:
    fields = tuple(dataclasses.replace(f, minimum=low, maximum=high) if f.name == "t" else f for f in CONTRACT.fields)
    ok, rejects = validate(dataclasses.replace(CONTRACT, fields=fields), table(values))
    want = [not (v < low or v > high) for v in values]
    assert ok.tolist() == want
    assert [r.index for r in rejects] == [i for i, good in enumerate(want) if not good]
