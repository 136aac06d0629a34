"""Tables for property tests, a header for blocks of them, and a comparison by bits."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from edge_agent.contract.block import BlockHeader, FixQuality
from edge_agent.contract.columns import Column, Strings, Table

HEADER = BlockHeader(
    device="plane-01",
    epoch="e",
    lane="nowhere",
    sequence=1,
    stream="x",
    contract_version="1",
    rows=1,
    first_us=0,
    last_us=0,
    fix=FixQuality.NONE,
    policy="",
    boot="b",
    monotonic_us=0,
    sealed_us=0,
    clock_synced=True,
)
NAMES = st.text(min_size=1, max_size=8)
SENSOR_VALUES = st.one_of(
    st.floats(width=64),
    st.integers(-(2**53), 2**53).map(float),
    st.tuples(st.integers(-(10**6), 10**6), st.integers(0, 9)).map(lambda t: t[0] / 10.0 ** t[1]),
    st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 5e-324, 1.7976931348623157e308]),
)


@st.composite
def columns(draw: st.DrawFn, rows: int) -> Column:
    kind = draw(st.sampled_from(["decimal", "float", "bits", "int", "text"]))
    if kind == "decimal":
        scale = 10.0 ** draw(st.integers(0, 4))
        values = draw(npst.arrays(np.int64, rows, elements=st.integers(-(10**7), 10**7))) / scale
        values[draw(npst.arrays(np.bool_, rows))] = np.nan
        return values
    if kind == "float":
        return draw(npst.arrays(np.float64, rows, elements=SENSOR_VALUES))
    if kind == "bits":  # every NaN there is
        return draw(npst.arrays(np.int64, rows, elements=st.integers(-(2**63), 2**63 - 1))).view(np.float64)
    if kind == "int":
        return draw(npst.arrays(np.int64, rows, elements=st.integers(-(2**63), 2**63 - 1)))
    return Strings.of(draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), min_size=rows, max_size=rows)))


@st.composite
def tables(draw: st.DrawFn, rows_max: int = 40) -> tuple[Table, int]:
    rows = draw(st.integers(1, rows_max))
    names = draw(st.lists(NAMES, unique=True, max_size=5))
    return {name: draw(columns(rows)) for name in names}, rows


def same(one: Table, other: Table) -> bool:
    """Equal in every bit, except that the many NaNs of a decimal column are one."""
    return list(one) == list(other) and all(_same_column(one[n], other[n]) for n in one)


def _same_column(one: Column, other: Column) -> bool:
    if isinstance(one, Strings) or isinstance(other, Strings):
        return one.tolist() == other.tolist()
    return one.dtype == other.dtype and one.view(np.int64).tolist() == other.view(np.int64).tolist()
