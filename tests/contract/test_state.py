"""Desired and reported state: golden documents in both directions, and nothing but ContractErrors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.state import BundleRef, Desired, Phase, Reported, ZonesRef, decode_desired, decode_reported, encode_state

REF = BundleRef(target="bundles/m/3.bundle", model="m", model_version="3", sha256="ab")
REF_JSON = b'{"target":"bundles/m/3.bundle","model":"m","model_version":"3","sha256":"ab"}'
ZONES = ZonesRef(target="zones/zones.geojson", version=2, sha256="cd")
ZONES_JSON = b'{"target":"zones/zones.geojson","version":2,"sha256":"cd"}'
DESIRED = [
    (b'{"version":1,"bundle":null,"zones":null}', Desired(version=1)),
    (b'{"version":4,"bundle":' + REF_JSON + b',"zones":' + ZONES_JSON + b"}", Desired(version=4, bundle=REF, zones=ZONES)),
]
REPORTED = [
    (
        b'{"device":"d","agent_version":"0.1.0","desired_version":4,"phase":"rolled_back","active":' + REF_JSON + b',"reason":"probation",'
        b'"detail":"NaN","at_us":5,"epoch":"e","zone":"europe","blocks_waiting":2,"readings_stored":9,"policy":"cd"}',
        Reported(
            device="d",
            agent_version="0.1.0",
            desired_version=4,
            phase=Phase.ROLLED_BACK,
            active=REF,
            reason=Reason.PROBATION,
            detail="NaN",
            at_us=5,
            epoch="e",
            zone="europe",
            blocks_waiting=2,
            readings_stored=9,
            policy="cd",
        ),
    ),
]

refs = st.none() | st.builds(BundleRef)
reports = st.builds(
    Reported,
    device=st.text(),
    agent_version=st.text(),
    desired_version=st.integers(0, 2**63 - 1),
    phase=st.sampled_from(Phase),
    active=refs,
    reason=st.none() | st.sampled_from(Reason),
    detail=st.text(),
    at_us=st.integers(0, 2**63 - 1),
)


@pytest.mark.parametrize(("document", "desired"), DESIRED)
def test_golden_desired_documents_are_written_and_read(document: bytes, desired: Desired) -> None:
    assert encode_state(desired) == document
    assert decode_desired(document) == desired


@pytest.mark.parametrize(("document", "reported"), REPORTED)
def test_golden_reported_documents_start_as_they_always_did_and_are_read(document: bytes, reported: Reported) -> None:
    assert encode_state(reported).startswith(document[:-1])
    assert decode_reported(document) == reported


@given(st.builds(Desired, version=st.integers(0, 2**63 - 1), bundle=refs))
def test_every_desired_document_comes_back(desired: Desired) -> None:
    assert decode_desired(encode_state(desired)) == desired


@given(reports)
def test_every_reported_document_comes_back(reported: Reported) -> None:
    assert decode_reported(encode_state(reported)) == reported


def test_report_of_an_old_agent_needs_only_what_was_always_there() -> None:
    short = b'{"device":"d","agent_version":"0","desired_version":1,"phase":"idle","new_field":1}'
    assert decode_reported(short) == Reported(device="d", agent_version="0", desired_version=1, phase=Phase.IDLE)


@pytest.mark.parametrize("decode", [decode_desired, decode_reported])
@given(data=st.binary(max_size=200))
@example(data=b"")
@example(data=b"\xff")
@example(data=b'{"version":"1"}')
@example(data=b'{"device":"\xff","agent_version":"0","desired_version":1,"phase":"idle"}')
@example(data=b'{"phase":"dancing"}')
@example(data=b'{"later":' + b"[" * 50_000)
def test_foreign_bytes_raise_nothing_but_contract_errors(decode: Callable[[bytes], object], data: bytes) -> None:
    with pytest.raises(ContractError):
        decode(data)
