"""Position messages and zone files come from outside too: nothing in them may end an agent."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError
from edge_agent.core.zones import parse_zones
from edge_agent.position import read_position

NESTED = b'{"ts":1,"lat":2,"lon":3,"more":' + b"[" * 30_000 + b"]" * 30_000 + b"}"


@given(st.binary(max_size=100))
@example(NESTED)
@example(b'{"ts":"\xff","lat":2,"lon":3}')
@example(b'{"ts":1e400,"lat":2,"lon":3}')
@example(b'{"ts":-1,"lat":2,"lon":3}')
def test_payload_that_is_no_position_is_a_contract_error(payload: bytes) -> None:
    with pytest.raises(ContractError):
        read_position(payload)


@given(st.binary(max_size=100))
@example(NESTED)
@example(b'{"type":"FeatureCollection","features":["\xff"]}')
@example(b'{"type":"FeatureCollection","features":[{"properties":{"zone":1,"endpoints":2},"geometry":{"type":"Polygon","coordinates":3}}]}')
def test_document_that_is_no_zone_policy_is_a_contract_error(document: bytes) -> None:
    with pytest.raises(ContractError):
        parse_zones(document)
