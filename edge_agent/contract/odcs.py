"""Reads stream contracts from Open Data Contract Standard 3.1 documents.

One ODCS document describes one stream. Fenceline reads

- `schema[0].name`: the stream name; `schema[0].properties`: the fields, with `logicalType`
  (`string`, `integer`, `number`, `timestamp`), `required`, `unit` and `logicalTypeOptions.minimum|maximum`;
- `primaryKey`/`primaryKeyPosition` on properties: together they name a reading, so a message that
  a broker delivers twice is one reading;
- `customProperties` of the schema: `topic` (MQTT filter with `{device}`; other names in braces are string fields that
  the topic fills, see sensor_topics.py), `encoding` (`json`, `msgpack`, `cbor`, `value`, `sparkplug`), `compression`
  (`none`, `gzip`, `zlib`, `zstd`), `eventTime` (the timestamp field), `entity` (the string field that windows are
  grouped by), `payloadBytesMax` (of a payload, and of what it decompresses to);
- `customProperties` of a property: `unit`, `metric` (its name in Sparkplug, if it is not the field's), `pii` and `piiStep` (privacy.py);
- `slaProperties` and the properties' `quality`: see service.py.

Missing values are allowed in `number` fields only (`required: false`); they become NaN.

A payload that says nothing about a field cannot fill it: with `value` and `sparkplug` all text comes from the topic, the event
time is the only timestamp, and what may be missing from a message must be an optional number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import yaml

from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs_tree import custom_properties, items, number, string, truth
from edge_agent.contract.privacy import PiiKind, off_step, parse_pii
from edge_agent.contract.sensor_topics import FIELD
from edge_agent.contract.service import parse_levels
from edge_agent.contract.stream import (
    FIELDS_MAX,
    PAYLOAD_BYTES_MAX,
    RESERVED,
    SPARKPLUG,
    Compression,
    Encoding,
    Field,
    FieldType,
    StreamContract,
)
from edge_agent.contract.topics import check_name


def parse_contract(document: bytes | str, origin: str = "contract") -> StreamContract:
    """Read an ODCS document.

    Args:
        document: YAML text.
        origin: the file's name, for messages.

    Raises:
        ContractError: the document is not a contract that Fenceline can use; the message says where and why.
    """
    try:
        tree = yaml.safe_load(document)
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date that is none; RecursionError: deep nesting
        raise ContractError(f"{origin}: not YAML: {e}") from e
    try:
        return _from_tree(tree)
    except ContractError as e:
        raise ContractError(f"{origin}: {e}") from e


def _from_tree(tree: Any) -> StreamContract:
    if not isinstance(tree, dict) or tree.get("kind") != "DataContract":
        raise ContractError("not an ODCS document (kind: DataContract is missing)")
    if not str(tree.get("apiVersion", "")).startswith("v3."):
        raise ContractError(f"apiVersion {tree.get('apiVersion')!r} is not ODCS v3.x")
    schemas = tree.get("schema")
    if not isinstance(schemas, list) or len(schemas) != 1 or not isinstance(schemas[0], dict):
        raise ContractError("schema must list exactly one object: one contract, one stream")
    schema = schemas[0]
    custom = custom_properties(schema)
    properties = items(schema, "properties")
    if not 1 <= len(properties) <= FIELDS_MAX:
        raise ContractError(f"schema needs 1 to {FIELDS_MAX} properties, has {len(properties)}")
    fields = tuple(_field(p) for p in properties)
    names = [f.name for f in fields]
    if len(set(names)) != len(names):
        raise ContractError(f"field names repeat: {sorted({n for n in names if names.count(n) > 1})}")
    taken = sorted(RESERVED.intersection(names))
    if taken:
        raise ContractError(f"field names {taken} are kept for the lake; rename them")
    keys = sorted((number(p, "primaryKeyPosition", 0), str(p["name"])) for p in properties if truth(p, "primaryKey"))
    key = tuple(name for _, name in keys)
    if not key:
        raise ContractError("no property has primaryKey: true, so a redelivered message could not be told from a new reading")
    absent = [f.name for f in fields if f.name in key and not f.required]
    if absent:
        raise ContractError(f"fields {absent} are part of the primary key: readings without them would have one name; set required: true")
    contract = StreamContract(
        stream=check_name(string(schema, "name"), "stream"),
        version=string(tree, "version"),
        fields=fields,
        key=key,
        event_time=_named(custom, "eventTime", fields, FieldType.TIMESTAMP),
        entity=_named(custom, "entity", fields, FieldType.STRING),
        topic=string(custom, "topic"),
        encoding=_encoding(custom.get("encoding", "json")),
        payload_bytes_max=_payload_bytes_max(custom),
        compression=_compression(custom.get("compression", "none")),
        levels=parse_levels(tree, properties),
    )
    if not contract.version:
        raise ContractError("version is missing")
    if not contract.topic:
        raise ContractError("customProperties needs topic, the MQTT topic of the sensor messages")
    _check_topic(contract)
    _check_private(contract)
    return contract


def _check_private(contract: StreamContract) -> None:
    """Whether readings keep their names, and their ranges a meaning, when personal fields are treated."""
    for field in contract.private:
        assert field.pii is not None
        if field.pii.kind is not PiiKind.HASH and field.name in (*contract.key, contract.entity):
            raise ContractError(f"field {field.name!r} names readings: pii: hash keeps it usable, {field.pii.kind} does not")
        edges = np.array([field.minimum, field.maximum])
        if field.pii.kind is PiiKind.ROUND and off_step(edges[np.isfinite(edges)], field.pii.step).any():
            raise ContractError(f"field {field.name!r}: minimum and maximum must be multiples of piiStep {field.pii.step:g}")
        if field.pii.kind is PiiKind.ROUND and field.type is FieldType.INTEGER and not np.abs(edges).max() <= 2**53:
            raise ContractError(f"field {field.name!r}: pii: round of integers needs a minimum and a maximum within 2**53")


def _check_topic(contract: StreamContract) -> None:
    """Whether topic and payload together can fill the fields."""
    names = contract.shape.names
    text = {f.name for f in contract.fields if f.type is FieldType.STRING}
    bare = contract.encoding in (Encoding.VALUE, Encoding.SPARKPLUG)
    if contract.encoding is Encoding.VALUE and FIELD in text:
        raise ContractError(f"no string field can be called {FIELD!r} here: the level {{{FIELD}}} says which field a value is")
    strange = set(names) - text - ({FIELD} if contract.encoding is Encoding.VALUE else set())
    if strange:
        raise ContractError(f"topic {contract.topic!r} names {sorted(strange)}, which are no string fields; they are {sorted(text)}")
    if not bare:
        return
    if text - set(names):
        raise ContractError(f"encoding {contract.encoding} carries no text: the topic must name {sorted(text - set(names))} in braces")
    if sum(f.type is FieldType.TIMESTAMP for f in contract.fields) > 1:
        raise ContractError(f"encoding {contract.encoding} has one time per message: {contract.event_time!r} must be the only timestamp")
    values = [f for f in contract.fields if f.type in (FieldType.NUMBER, FieldType.INTEGER)]
    sparkplug = contract.encoding is Encoding.SPARKPLUG
    if not values or (FIELD not in names and not sparkplug and len(values) > 1):
        raise ContractError(
            f"topic {contract.topic!r} does not say which field a value is: name a level {{{FIELD}}}, or have one number field"
        )
    if (sparkplug or len(values) > 1) and any(f.required for f in values):
        missing = sorted(f.name for f in values if f.required)
        raise ContractError(f"encoding {contract.encoding}: a message need not hold {missing}; make them numbers with required: false")
    if sparkplug:
        _check_sparkplug(contract)


def _check_sparkplug(contract: StreamContract) -> None:
    levels = contract.shape.filter.split("/")
    if len(levels) not in (4, 5) or levels[0] != SPARKPLUG or contract.topic.split("/")[2] != "+" or "#" in levels:
        raise ContractError(f"topic {contract.topic!r} must be {SPARKPLUG}/GROUP/+/NODE or {SPARKPLUG}/GROUP/+/NODE/DEVICE for Sparkplug")
    if contract.compression is not Compression.NONE:
        raise ContractError("Sparkplug payloads have no compression")
    metrics = [f.metric or f.name for f in contract.fields]
    if len(set(metrics)) != len(metrics):
        raise ContractError(f"metrics repeat: {sorted({m for m in metrics if metrics.count(m) > 1})}")


def _field(tree: Any) -> Field:
    if not isinstance(tree, dict) or not tree.get("name"):
        raise ContractError(f"property without a name: {tree!r}")
    name = str(tree["name"])
    try:
        kind = FieldType(str(tree.get("logicalType")))
    except ValueError:
        raise ContractError(f"field {name!r}: logicalType {tree.get('logicalType')!r} is none of {', '.join(FieldType)}") from None
    required = truth(tree, "required")
    if not required and kind is not FieldType.NUMBER:
        raise ContractError(f"field {name!r}: only number fields may be optional; set required: true")
    options = tree.get("logicalTypeOptions") or {}
    if not isinstance(options, dict):
        raise ContractError(f"field {name!r}: logicalTypeOptions {options!r} is not a mapping")
    custom = custom_properties(tree)
    low, high = number(options, "minimum", -math.inf), number(options, "maximum", math.inf)
    if not low <= high:
        raise ContractError(f"field {name!r}: minimum {low} is above maximum {high}")
    pii = parse_pii(custom, name, kind, required)
    return Field(name, kind, required, low, high, string(custom, "unit"), string(tree, "description"), string(custom, "metric"), pii)


def _named(custom: dict[str, Any], role: str, fields: tuple[Field, ...], kind: FieldType) -> str:
    name = custom.get(role)
    if not any(f.name == name and f.type is kind for f in fields):
        raise ContractError(f"customProperties.{role} is {name!r}; it must name a required {kind} field")
    return str(name)


def _payload_bytes_max(custom: dict[str, Any]) -> int:
    limit = number(custom, "payloadBytesMax", PAYLOAD_BYTES_MAX)
    if not (1 <= limit <= PAYLOAD_BYTES_MAX and limit.is_integer()):
        raise ContractError(f"payloadBytesMax {limit:g} must be a whole number from 1 to {PAYLOAD_BYTES_MAX}")
    return int(limit)


def _encoding(name: Any) -> Encoding:
    try:
        return Encoding(str(name))
    except ValueError:
        raise ContractError(f"encoding {name!r} is none of {', '.join(Encoding)}") from None


def _compression(name: Any) -> Compression:
    try:
        return Compression(str(name))
    except ValueError:
        raise ContractError(f"compression {name!r} is none of {', '.join(Compression)}") from None
