"""Personal fields: treated on the device, and nowhere to be read in what it stores."""

from __future__ import annotations

import hashlib
import hmac
import json

import cbor2
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.privacy import is_hashed, off_step, to_step
from edge_agent.contract.stream import StreamContract
from edge_agent.core.privacy import WITHHELD, Pseudonyms, Treatment
from edge_agent.core.rejects import REDACTED, Reject

KEY = bytes(range(32))
RIDES = """
apiVersion: v3.1.0
kind: DataContract
version: 1.0.0
schema:
  - name: rides
    customProperties:
      - {property: topic, value: "TOPIC"}
      - {property: encoding, value: ENCODING}
      - {property: eventTime, value: ts}
      - {property: entity, value: driver}
    properties:
      - {name: ts, logicalType: timestamp, required: true, primaryKey: true}
      - {name: driver, logicalType: string, required: true, primaryKey: true, customProperties: [{property: pii, value: hash}]}
      - {name: note, logicalType: string, required: true, customProperties: [{property: pii, value: drop}]}
      - {name: pulse, logicalType: number, customProperties: [{property: pii, value: drop}]}
      - name: weight
        logicalType: number
        logicalTypeOptions: {minimum: 0, maximum: 300}
        customProperties: [{property: pii, value: round}, {property: piiStep, value: 0.5}]
      - name: born
        logicalType: integer
        required: true
        logicalTypeOptions: {minimum: 1900, maximum: 2100}
        customProperties: [{property: pii, value: round}, {property: piiStep, value: 10}]
      - {name: speed, logicalType: number, logicalTypeOptions: {minimum: 0, maximum: 90}}
"""


def rides(encoding: str = "json", topic: str = "sensors/{device}/rides") -> StreamContract:
    return parse_contract(RIDES.replace("ENCODING", encoding).replace("TOPIC", topic))


def treatment(contract: StreamContract | None = None) -> Treatment:
    return Treatment(contract or rides(), Pseudonyms(KEY))


def test_readings_keep_names_that_compare_and_lose_what_is_personal() -> None:
    table: Table = {
        "ts": np.array([1, 2, 3]),
        "driver": Strings.of(["jane", "joe", "jane"]),
        "note": Strings.of(["a", "b", "c"]),
        "pulse": np.array([71.0, np.nan, 90.0]),
        "weight": np.array([70.26, 70.25, np.nan]),
        "born": np.array([1984, 1985, 1995]),
        "speed": np.array([1.1, 2.2, 3.3]),
    }
    found = treatment().table(table)
    name = f"pii:{hashlib.sha256(b'fenceline pii key' + KEY).hexdigest()[:8]}:{hmac.new(KEY, b'jane', 'sha256').hexdigest()[:32]}"
    assert isinstance(found["driver"], Strings) and isinstance(found["note"], Strings)
    assert found["driver"].tolist()[0] == found["driver"].tolist()[2] == name != found["driver"].tolist()[1]
    assert all(map(is_hashed, found["driver"].tolist())) and found["note"].tolist() == ["", "", ""]
    assert np.isnan(found["pulse"]).all() and found["weight"].tolist()[:2] == [70.5, 70.0]  # ties go to the even one
    assert found["born"].tolist() == [1980, 1980, 2000] and found["born"].dtype == np.int64
    assert found["speed"] is table["speed"]


def test_long_texts_have_names_and_are_not_remembered() -> None:
    names = Pseudonyms(KEY)
    assert names.of("x" * 1_000) == names.of("x" * 1_000) != names.of("x" * 999)
    names.of("jane")
    assert list(names._known) == ["jane"]


def test_another_key_gives_another_name_that_says_so() -> None:
    one, other = Pseudonyms(KEY).of("jane"), Pseudonyms(bytes(32)).of("jane")
    assert is_hashed(one) and is_hashed(other) and one.split(":")[1] != other.split(":")[1] and one[13:] != other[13:]


@given(st.lists(st.floats(allow_nan=True, allow_infinity=False)), st.sampled_from([0.1, 0.5, 0.25, 3.0, 1 / 3, 1000.0, 0.007]))
def test_rounding_again_changes_nothing_and_moves_by_half_a_step_at_most(values: list[float], step: float) -> None:
    given_, once = np.array(values, np.float64), to_step(np.array(values, np.float64), step)
    assert not off_step(once, step).any() and np.array_equal(to_step(once, step), once, equal_nan=True)
    near = np.abs(given_) < 1e6
    assert (np.abs(once - given_)[near] <= step / 2 * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [("json", lambda tree: json.dumps(tree).encode()), ("msgpack", msgspec.msgpack.encode), ("cbor", cbor2.dumps)],
)
def test_a_rejected_payload_is_kept_without_what_is_personal(encoding: str, encode) -> None:  # type: ignore[no-untyped-def]
    sent = {"ts": 5, "driver": "jane", "note": "secret", "pulse": 71, "weight": 70.3, "born": 1984, "speed": 400, "friend": "secret"}
    kept = treatment(rides(encoding)).payload(encode(sent))
    assert kept.startswith(REDACTED.encode())
    tree = json.loads(kept[len(REDACTED) :])
    assert tree == {
        "ts": 5,
        "driver": Pseudonyms(KEY).of("jane"),
        "note": "",
        "weight": 70.5,
        "born": 1980,
        "speed": 400,
    }


@pytest.mark.parametrize("payload", [b'{"driver": "jane"', b'["jane"]', b"\xff jane", b'{"driver":"jane","note":"' + b"x" * 70_000 + b'"}'])
def test_a_payload_that_cannot_be_parted_is_not_kept(payload: bytes) -> None:
    assert treatment().payload(payload) == WITHHELD


def test_wrong_types_in_personal_fields_are_left_out() -> None:
    kept = treatment().payload(b'{"driver": 7, "note": {"a": "jane"}, "weight": "jane", "born": "jane", "speed": {"x": "jane"}}')
    assert json.loads(kept[len(REDACTED) :]) == {}


def test_the_words_of_a_reject_are_kept_only_where_they_quote_no_personal_value() -> None:
    found = treatment()
    assert found.detail(Reject(0, Reason.OUT_OF_RANGE, "field 'speed' is 400", "speed")) == "field 'speed' is 400"
    assert "jane" not in found.detail(Reject(0, Reason.WRONG_TYPE, "field 'pulse' is 'jane'", "pulse"))
    assert "jane" not in found.detail(Reject(0, Reason.MALFORMED, "jane"))


def test_a_personal_level_is_not_shown_in_topics() -> None:
    found = treatment(rides(topic="taxis/{driver}/rides"))
    assert found.topic_is_personal and found.topic("taxis/jane/rides") == "taxis/+/rides"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("{property: pii, value: hash}", "{property: pii, value: drop}"), "hash keeps it usable"),
        (("{property: pii, value: hash}", "{property: pii, value: mask}"), "none of drop, hash, round"),
        (("value: 0.5", "value: -1"), "needs piiStep"),
        (("value: 0.5", "value: 0.7"), "multiples of piiStep"),
        (("value: 10}", "value: 0.5}"), "whole number"),
        (("logicalTypeOptions: {minimum: 1900, maximum: 2100}", "description: x"), "a minimum and a maximum"),
        (("{name: pulse, logicalType: number,", "{name: pulse, logicalType: number, required: true,"), "optional numbers"),
    ],
)
def test_tags_that_do_not_fit_are_refused(change: tuple[str, str], words: str) -> None:
    text = RIDES.replace("ENCODING", "json").replace("TOPIC", "t")
    assert change[0] in text
    with pytest.raises(ContractError, match=words):
        parse_contract(text.replace(*change))
