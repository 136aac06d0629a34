"""Stream contracts: what Fenceline reads of an ODCS document, and how it refuses the rest."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import FIELDS_MAX, PAYLOAD_BYTES_MAX, Encoding, Field, FieldType, StreamContract

TREE: dict[str, Any] = {
    "apiVersion": "v3.1.0",
    "kind": "DataContract",
    "id": "x",
    "version": "2.1.0",
    "status": "active",
    "schema": [
        {
            "name": "pump",
            "customProperties": [
                {"property": "topic", "value": "sensors/{device}/pump"},
                {"property": "encoding", "value": "cbor"},
                {"property": "eventTime", "value": "at"},
                {"property": "entity", "value": "unit"},
            ],
            "properties": [
                {"name": "at", "logicalType": "timestamp", "required": True, "primaryKey": True, "primaryKeyPosition": 2},
                {"name": "unit", "logicalType": "string", "required": True, "primaryKey": True, "primaryKeyPosition": 1},
                {"name": "rounds", "logicalType": "integer", "required": True, "logicalTypeOptions": {"minimum": 0}},
                {
                    "name": "flow",
                    "logicalType": "number",
                    "logicalTypeOptions": {"minimum": -1.5, "maximum": 20},
                    "customProperties": [{"property": "unit", "value": "l/s"}],
                    "description": "through the outlet",
                },
            ],
        }
    ],
}
CONTRACT = StreamContract(
    stream="pump",
    version="2.1.0",
    fields=(
        Field("at", FieldType.TIMESTAMP),
        Field("unit", FieldType.STRING),
        Field("rounds", FieldType.INTEGER, minimum=0.0),
        Field("flow", FieldType.NUMBER, required=False, minimum=-1.5, maximum=20.0, unit="l/s", description="through the outlet"),
    ),
    key=("unit", "at"),
    event_time="at",
    entity="unit",
    topic="sensors/{device}/pump",
    encoding=Encoding.CBOR,
    payload_bytes_max=PAYLOAD_BYTES_MAX,
)

Change = Callable[[dict[str, Any]], object]


def custom(name: str, value: object) -> Change:
    return lambda tree: tree["schema"][0]["customProperties"].append({"property": name, "value": value})


def prop(index: int, **changes: object) -> Change:
    return lambda tree: tree["schema"][0]["properties"][index].update(changes)


def changed(change: Change) -> str:
    tree = copy.deepcopy(TREE)
    change(tree)
    return yaml.safe_dump(tree)


def test_golden_document_is_read() -> None:
    assert parse_contract(yaml.safe_dump(TREE)) == CONTRACT
    assert CONTRACT.field("flow").maximum == 20.0
    assert CONTRACT.field("rounds").maximum == math.inf
    with pytest.raises(ContractError, match="no field 'pressure'"):
        CONTRACT.field("pressure")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(kind="DataProduct"), "not an ODCS document"),
        (lambda t: t.update(apiVersion="v2.2.2"), "not ODCS v3"),
        (lambda t: t.update(version=""), "version is missing"),
        (lambda t: t.update(version=None), "version is missing"),
        (lambda t: t.update(schema=[]), "exactly one object"),
        (lambda t: t.update(schema=t["schema"] * 2), "exactly one object"),
        (lambda t: t["schema"][0].update(name="Pump 1"), "stream 'Pump 1' must match"),
        (lambda t: t["schema"][0].update(properties={}), "0"),
        (lambda t: t["schema"][0].update(properties="all"), "'all' is not a list"),
        (lambda t: t["schema"][0].update(customProperties=7), "7 is not a list"),
        (lambda t: t["schema"][0].update(properties=t["schema"][0]["properties"] * FIELDS_MAX), f"1 to {FIELDS_MAX}"),
        (prop(0, name="unit"), r"repeat: \['unit'\]"),
        (prop(2, name="score"), "score"),
        (prop(2, name=""), "without a name"),
        (prop(2, logicalType="date"), "'date' is none of string, integer, number, timestamp"),
        (prop(2, required=False), "only number fields may be optional"),
        (prop(3, required="false"), "required 'false' is not true or false"),
        (prop(3, primaryKey="no"), "primaryKey 'no' is not true or false"),
        (prop(3, primaryKey=True, required=False), r"\['flow'\] are part of the primary key"),
        (prop(3, logicalTypeOptions={"minimum": 5, "maximum": 4}), "minimum 5.0 is above maximum 4.0"),
        (prop(3, logicalTypeOptions={"minimum": float("nan")}), "above"),
        (prop(3, logicalTypeOptions={"minimum": "low"}), "minimum 'low' is not a number"),
        (prop(3, logicalTypeOptions=[1]), "not a mapping"),
        (prop(0, primaryKeyPosition=None), "primaryKeyPosition None is not a number"),
        (lambda t: [p.pop("primaryKey", None) for p in t["schema"][0]["properties"]], "no property has primaryKey"),
        (custom("eventTime", "unit"), "eventTime is 'unit'; it must name a required timestamp"),
        (custom("entity", None), "entity is None"),
        (custom("topic", ""), "needs topic"),
        (custom("encoding", "xml"), "'xml' is none of json, msgpack, cbor"),
        (custom("payloadBytesMax", 0), "payloadBytesMax 0"),
        (custom("payloadBytesMax", PAYLOAD_BYTES_MAX + 1), "payloadBytesMax"),
    ],
)
def test_contract_that_cannot_be_used_says_where_and_why(change: Change, message: str) -> None:
    with pytest.raises(ContractError, match=rf"pump\.yaml: .*{message}"):
        parse_contract(changed(change), "pump.yaml")


def test_what_has_no_value_is_not_there() -> None:
    flow = parse_contract(changed(prop(3, description=None, customProperties=[{"property": "unit"}, {"property": "metric"}]))).field("flow")
    assert (flow.unit, flow.description, flow.metric) == ("", "", "")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container and key inside a document."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in list(items) for place in [(tree, key), *places(value)]]


@given(st.integers(0, 10_000), VALUES)
def test_one_wrong_value_anywhere_raises_nothing_but_contract_errors(place: int, value: Any) -> None:
    tree = copy.deepcopy(TREE)
    found = places(tree)
    container, key = found[place % len(found)]
    container[key] = value
    check_reads_or_refuses(yaml.safe_dump(tree))


@given(st.binary(max_size=100) | st.text(max_size=100))
@example("when: 2024-13-45")
@example("[" * 5_000)
@example(b"\xff\xfe")
@example("!!python/object/apply:os.getcwd []")
@example("a: &a [*a]")
def test_foreign_text_raises_nothing_but_contract_errors(document: bytes | str) -> None:
    with pytest.raises(ContractError):
        parse_contract(document)


def check_reads_or_refuses(document: str) -> None:
    try:
        contract = parse_contract(document)
    except ContractError:
        return
    assert all(f.minimum <= f.maximum for f in contract.fields)
    assert set(contract.key) <= {f.name for f in contract.fields}
