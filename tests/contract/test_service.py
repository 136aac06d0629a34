"""Service levels of a contract: read exactly, or refused."""

from __future__ import annotations

from typing import Any

import pytest

from edge_agent.contract.errors import ContractError
from edge_agent.contract.service import NO_LEVELS, NullLimit, parse_levels


def document(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"slaProperties": list(entries)}


def test_times_and_shares_are_read_in_their_units() -> None:
    found = parse_levels(
        document(
            {"property": "freshness", "value": 5, "unit": "min"},
            {"property": "latency", "value": 250, "unit": "ms"},
            {"property": "frequency", "value": "2", "unit": "h"},
            {"property": "completeness", "value": 99.5, "unit": "percent"},
            {"property": "retention", "value": 3, "unit": "y"},
        ),
        [
            {
                "name": "flow",
                "quality": [{"metric": "nullValues", "mustBeLessThan": 5, "unit": "percent"}, {"type": "text", "description": "x"}],
            }
        ],
    )
    assert (found.freshness_s, found.latency_s, found.frequency_s, found.completeness) == (300.0, 0.25, 7_200.0, 0.995)
    assert found.nulls == (NullLimit("flow", 5, True, True),)
    assert found.nulls[0].broken(5, 100) and not found.nulls[0].broken(4, 100)
    assert parse_levels({}, []) == NO_LEVELS


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"property": "freshness", "value": 5, "unit": "m"}, "one of ms, s, min, h, d"),
        ({"property": "freshness", "value": 0, "unit": "s"}, "above 0"),
        ({"property": "freshness", "value": "soon", "unit": "s"}, "not a number"),
        ({"property": "completeness", "value": 0.99}, "unit: percent"),
        ({"property": "completeness", "value": 101, "unit": "percent"}, "at most 100"),
        ({"value": 1}, "has no property"),
    ],
)
def test_a_promise_that_cannot_be_watched_is_refused(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        parse_levels(document(entry), [])


@pytest.mark.parametrize("rule", [{"metric": "rowCount", "mustBe": 1}, {"metric": "nullValues", "mustBe": 2}, {"metric": "nullValues"}])
def test_a_quality_rule_that_is_not_checked_is_refused(rule: dict[str, Any]) -> None:
    with pytest.raises(ContractError, match="quality"):
        parse_levels({}, [{"name": "flow", "quality": [rule]}])
