"""Topics with named levels, and contracts whose topic and payload cannot fill their fields."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.sensor_topics import parse_shape
from edge_agent.contract.stream import Compression, Encoding


def tree(**custom: str) -> dict[str, Any]:
    properties = {"topic": "plant/{pump}/{field}", "encoding": "value", "eventTime": "at", "entity": "pump", **custom}
    return {
        "apiVersion": "v3.1.0",
        "kind": "DataContract",
        "version": "1.0.0",
        "schema": [
            {
                "name": "pump",
                "customProperties": [{"property": k, "value": v} for k, v in properties.items()],
                "properties": [
                    {"name": "at", "logicalType": "timestamp", "required": True, "primaryKey": True},
                    {"name": "pump", "logicalType": "string", "required": True},
                    {"name": "flow", "logicalType": "number", "customProperties": [{"property": "metric", "value": "Pump/Flow"}]},
                    {"name": "level", "logicalType": "number"},
                ],
            }
        ],
    }


def test_names_levels_and_filter() -> None:
    shape = parse_shape("site-{device}/{pump}/+/{field}")
    assert (shape.filter, shape.names, shape.levels) == ("site-{device}/+/+/+", ("pump", "field"), (1, 3))
    assert shape.values("site-1/p-1/x/flow") == ("p-1", "flow")


@pytest.mark.parametrize(
    "topic", ["", "a/{b", "a/b}", "a/x{b}", "a/{b}{c}", "a/{}", "a/{b}/{b}", "a/#/b", "a+/b", "a/b#", "a\0", "x" * 70_000]
)
def test_topics_that_are_none(topic: str) -> None:
    with pytest.raises(ContractError):
        parse_shape(topic)


levels = st.lists(st.sampled_from(["a", "b", "", "$x"]), min_size=1, max_size=4)
filters = st.builds(
    lambda some, end: "/".join([*some, *end]),
    st.lists(st.sampled_from(["a", "+", "b", ""]), min_size=1, max_size=4),
    st.sampled_from([[], ["#"]]),
)


@given(filters, levels.map("/".join))
def test_filters_match_as_paho_says(wanted: str, topic: str) -> None:
    if wanted and topic:
        assert parse_shape(wanted).matches(topic) == topic_matches_sub(wanted, topic)


def test_a_value_contract() -> None:
    contract = parse_contract(yaml.safe_dump(tree(compression="zstd")))
    assert (contract.encoding, contract.compression) == (Encoding.VALUE, Compression.ZSTD)
    assert contract.shape.filter == "plant/+/+"
    assert contract.field("flow").metric == "Pump/Flow"


SPARKPLUG = {"encoding": "sparkplug", "topic": "spBv1.0/g/+/n/{pump}"}


@pytest.mark.parametrize(
    ("custom", "change", "words"),
    [
        ({"topic": "plant/{engine}/{field}"}, None, "no string fields"),
        ({"topic": "plant/x/{field}"}, None, "must name ['pump'] in braces"),
        ({"topic": "plant/{pump}/x"}, None, "does not say which field"),
        ({"encoding": "json", "topic": "plant/{pump}/{field}"}, None, "no string fields"),
        ({"compression": "rar"}, None, "none of none, gzip"),
        ({}, {"name": "flow", "logicalType": "number", "required": True}, "required: false"),
        ({}, {"name": "flow", "logicalType": "integer", "required": True}, "required: false"),
        ({}, {"name": "flow", "logicalType": "timestamp", "required": True}, "only timestamp"),
        ({}, {"name": "field", "logicalType": "string", "required": True}, "can be called 'field'"),
        ({**SPARKPLUG, "topic": "spBv1.0/g/DDATA/n/{pump}"}, None, "must be spBv1.0/GROUP/+/NODE"),
        ({**SPARKPLUG, "topic": "spBv1.0/{pump}/+/#"}, None, "must be spBv1.0/GROUP/+/NODE"),
        ({**SPARKPLUG, "topic": "plant/{pump}"}, None, "must be spBv1.0/GROUP/+/NODE"),
        ({**SPARKPLUG, "compression": "gzip"}, None, "no compression"),
        (SPARKPLUG, {"name": "flow", "logicalType": "integer", "required": True}, "required: false"),
        (SPARKPLUG, {"name": "Pump/Flow", "logicalType": "number"}, None),
        (SPARKPLUG, {"name": "flow", "logicalType": "number", "customProperties": [{"property": "metric", "value": "level"}]}, "repeat"),
    ],
)
def test_what_topic_and_payload_cannot_fill_is_refused(custom: dict[str, str], change: dict[str, Any] | None, words: str | None) -> None:
    document = copy.deepcopy(tree(**custom))
    if change is not None:
        document["schema"][0]["properties"][2] = change
    if words is None:
        assert parse_contract(yaml.safe_dump(document)).encoding is Encoding.SPARKPLUG
        return
    with pytest.raises(ContractError) as caught:
        parse_contract(yaml.safe_dump(document))
    assert words in str(caught.value)


def test_a_sparkplug_device_needs_the_births_of_its_node_too() -> None:
    assert parse_contract(yaml.safe_dump(tree(**SPARKPLUG))).filters == ("spBv1.0/g/+/n/+", "spBv1.0/g/+/n")
    assert parse_contract(yaml.safe_dump(tree(**SPARKPLUG | {"topic": "spBv1.0/g/+/{pump}"}))).filters == ("spBv1.0/g/+/+",)
    assert parse_contract(yaml.safe_dump(tree())).filters == ("plant/+/+",)
