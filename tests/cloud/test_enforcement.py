"""Contracts are enforced again in the cloud: against an oracle that looks at every row by itself, in plain Python."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.enforcement import check, violations
from cloud.stacks import Block, Stack, stacked
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.privacy import Pii, PiiKind, is_hashed
from edge_agent.contract.stream import QUARANTINE, Field, FieldType, StreamContract
from edge_agent.core.privacy import Pseudonyms, Treatment
from tests.cloud.blocks import block, contract

NAME = "pii:01234567:" + "ab" * 16
FIELDS = (
    Field("ts", FieldType.TIMESTAMP, minimum=10, maximum=4e9),
    Field("who", FieldType.STRING, pii=Pii(PiiKind.HASH)),
    Field("note", FieldType.STRING, pii=Pii(PiiKind.DROP)),
    Field("place", FieldType.STRING),
    Field("count", FieldType.INTEGER, minimum=-5, maximum=5, pii=Pii(PiiKind.ROUND, 5)),
    Field("flow", FieldType.NUMBER, minimum=0, maximum=1.5, unit="l/s"),
    Field("free", FieldType.NUMBER, required=False),
    Field("coarse", FieldType.NUMBER, required=False, pii=Pii(PiiKind.ROUND, 0.1)),
    Field("gone", FieldType.NUMBER, required=False, pii=Pii(PiiKind.DROP)),
)
CONTRACT = StreamContract("pump", "1.0.0", FIELDS, ("ts", "who"), "ts", "who", "t")

ROW = st.fixed_dictionaries(
    {
        "ts": st.sampled_from([10_000_000, 9_999_999, 0, -1, 4_000_000_000_000_000, 4_000_000_000_000_001, 2**62]),
        "who": st.sampled_from([NAME, NAME, "jane", "", NAME + "0"]),
        "note": st.sampled_from(["", "", "x"]),
        "place": st.sampled_from(["a", "", "x" * 1_024, "x" * 1_025]),
        "count": st.sampled_from([-5, 0, 5, 1, 10, -(2**63)]),
        "flow": st.sampled_from([0.0, 1.5, 0.7, 1.5000001, -0.1, math.nan, math.inf]),
        "free": st.sampled_from([0.0, math.nan, 1e300, -math.inf]),
        "coarse": st.sampled_from([0.3, 0.30000000000000004, math.nan, 12.0]),
        "gone": st.sampled_from([math.nan, math.nan, 1.0]),
    }
)


def oracle(row: dict[str, Any]) -> tuple[Reason, str] | None:
    """The first rule that one row breaks."""
    for name, ok, reason in (
        ("ts", 10 <= row["ts"] / 1e6 <= 4e9, Reason.OUT_OF_RANGE),
        ("who", is_hashed(row["who"]), Reason.NOT_PRIVATE),
        ("note", row["note"] == "", Reason.NOT_PRIVATE),
        ("place", len(row["place"]) <= 1_024, Reason.OVERSIZE),
        ("count", -5 <= row["count"] <= 5, Reason.OUT_OF_RANGE),
        ("count", row["count"] % 5 == 0, Reason.NOT_PRIVATE),
        ("flow", not math.isnan(row["flow"]), Reason.MISSING_FIELD),
        ("flow", 0 <= row["flow"] <= 1.5, Reason.OUT_OF_RANGE),
        ("free", not math.isinf(row["free"]), Reason.OUT_OF_RANGE),
        ("coarse", math.isnan(row["coarse"]) or row["coarse"] == round(row["coarse"], 1), Reason.NOT_PRIVATE),
        ("gone", math.isnan(row["gone"]), Reason.NOT_PRIVATE),
    ):
        if not ok:
            return reason, name
    return None


def columns(rows: list[dict[str, Any]]) -> Table:
    kinds = {FieldType.INTEGER: np.int64, FieldType.TIMESTAMP: np.int64, FieldType.NUMBER: np.float64}
    return {
        f.name: Strings.of([r[f.name] for r in rows]) if f.type is FieldType.STRING else np.array([r[f.name] for r in rows], kinds[f.type])
        for f in FIELDS
    }


@settings(max_examples=60)
@given(st.lists(st.lists(ROW, min_size=1, max_size=6), min_size=1, max_size=7))
def test_exactly_the_rows_that_break_a_rule_are_found_with_the_first_rule_they_break(batches: list[list[dict[str, Any]]]) -> None:
    blocks: list[Block] = [(block(i + 1, rows=len(rows))[0], columns(rows)) for i, rows in enumerate(batches)]
    (stack,) = stacked(blocks)
    found = violations(CONTRACT, stack)
    for place, rows in enumerate(batches):
        wanted = {i: said for i, row in enumerate(rows) if (said := oracle(row)) is not None}
        hit = found.get(place)
        broken = [] if hit is None else [hit.rules[b] for b in hit.broken.tolist()]
        rows_hit = [] if hit is None else hit.rows.tolist()
        got = dict(zip(rows_hit, [(rule.reason, rule.field) for rule in broken], strict=True))
        assert got == wanted


def test_other_units_under_the_same_version_condemn_every_row() -> None:
    metric = replace(contract(), fields=tuple(replace(f, unit="bar") if f.name == "pressure" else f for f in contract().fields))
    header, table = block(1)
    assert metric.units and not contract().units
    for units, bad in (("", 0), (metric.units, 0), ("deadbeef", 3), ("u" * 15_000, 3)):
        hit = violations(metric, Stack([msgspec.structs.replace(header, units=units)], table)).get(0)
        assert (0 if hit is None else len(hit.rows)) == bad
        assert hit is None or hit.texts("reason").tolist() == [Reason.WRONG_UNIT] * 3
        assert hit is None or len(hit.rules[0].detail) < 300, "each row gets it, and a header may say a lot"


def test_what_the_device_treats_passes_here() -> None:
    row = {"ts": 10_000_000, "who": "jane", "note": "x", "place": "p", "count": 3, "flow": 1.0, "free": 1.0, "coarse": 0.12, "gone": 5.0}
    table = columns([row])
    assert len(check(CONTRACT, table).rows) == 1
    assert len(check(CONTRACT, Treatment(CONTRACT, Pseudonyms(bytes(32))).table(table)).rows) == 0


@pytest.mark.parametrize("stream", [QUARANTINE])
def test_the_streams_of_the_agent_have_no_rules(stream: StreamContract) -> None:
    assert violations(stream, Stack([block(1)[0]], {ORDINAL: np.arange(3)})) == {}
