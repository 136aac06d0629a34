"""Stream contracts: what a sensor message must look like (Open Data Contract Standard 3.1).

One ODCS document describes one stream. Fenceline reads

- `schema[0].name`: the stream name; `schema[0].properties`: the fields, with `logicalType`
  (`string`, `integer`, `number`, `timestamp`), `required`, `unit` and `logicalTypeOptions.minimum|maximum`;
- `primaryKey`/`primaryKeyPosition` on properties: together they name a reading, so a message that
  a broker delivers twice is one reading;
- `customProperties` of the schema: `topic` (MQTT filter with `{device}`; other names in braces are string fields that
  the topic fills, see sensor_topics.py), `encoding` (`json`, `msgpack`, `cbor`, `value`, `sparkplug`), `compression`
  (`none`, `gzip`, `zlib`, `zstd`), `eventTime` (the timestamp field), `entity` (the string field that windows are
  grouped by), `payloadBytesMax` (of a payload, and of what it decompresses to);
- `customProperties` of a property: `unit`, `metric` (its name in Sparkplug, if it is not the field's).

Missing values are allowed in `number` fields only (`required: false`); they become NaN.

A payload that says nothing about a field cannot fill it: with `value` and `sparkplug` all text comes from the topic, the event
time is the only timestamp, and what may be missing from a message must be an optional number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import yaml

from edge_agent.contract.errors import ContractError
from edge_agent.contract.sensor_topics import FIELD, Shape, parse_shape
from edge_agent.contract.topics import check_name

FIELDS_MAX = 512
PAYLOAD_BYTES_MAX = 64 * 1024
SPARKPLUG = "spBv1.0"
"""The first level of Sparkplug B topics."""

# Columns that blocks and the lake add to a stream's fields.
_IDENTITY = ("device", "epoch", "lane", "sequence", "row", "ordinal")
_CAPTURE = ("contract_version", "model", "policy", "fix", "region")
_CLOCK = ("boot", "monotonic_us", "clock_synced", "clock_shift_us", "sealed_at", "arrived_at")
_PLACE = ("latitude", "longitude")
_PARTITION = ("event_date",)
RESERVED = frozenset(("score", *_IDENTITY, *_CAPTURE, *_CLOCK, *_PLACE, *_PARTITION))


class FieldType(StrEnum):
    """The logical types of ODCS that a reading may hold."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    TIMESTAMP = "timestamp"


class Encoding(StrEnum):
    """How a sensor encodes a reading."""

    JSON = "json"
    MSGPACK = "msgpack"
    CBOR = "cbor"
    VALUE = "value"  # a bare number; the topic says of what
    SPARKPLUG = "sparkplug"  # Sparkplug B


class Compression(StrEnum):
    """How a sensor compresses a payload."""

    NONE = "none"
    GZIP = "gzip"
    ZLIB = "zlib"
    ZSTD = "zstd"


@dataclass(frozen=True)
class Field:
    """One field of a reading. `minimum` and `maximum` are inclusive, in `unit`; `metric` is its name in Sparkplug."""

    name: str
    type: FieldType
    required: bool = True
    minimum: float = -math.inf
    maximum: float = math.inf
    unit: str = ""
    description: str = ""
    metric: str = ""


@dataclass(frozen=True)
class StreamContract:
    """A checked stream contract; `key` are the names of the fields that identify a reading."""

    stream: str
    version: str
    fields: tuple[Field, ...]
    key: tuple[str, ...]
    event_time: str
    entity: str
    topic: str
    encoding: Encoding = Encoding.JSON
    payload_bytes_max: int = PAYLOAD_BYTES_MAX
    compression: Compression = Compression.NONE

    @property
    def shape(self) -> Shape:
        """The topic's filter and named levels."""
        return parse_shape(self.topic)

    @property
    def filters(self) -> tuple[str, ...]:
        """What an agent must be subscribed to: in Sparkplug also the births and deaths of the node that a device is on."""
        whole = self.shape.filter
        node = "/".join(whole.split("/")[:4])
        return (whole, node) if self.encoding is Encoding.SPARKPLUG and node != whole else (whole,)

    def field(self, name: str) -> Field:
        """The field called `name`, or ContractError."""
        for field in self.fields:
            if field.name == name:
                return field
        raise ContractError(f"stream {self.stream!r} has no field {name!r}")


QUARANTINE = StreamContract(
    stream="quarantine",
    version="1",
    fields=(
        Field("captured_at", FieldType.TIMESTAMP, description="when the agent took the payload from the broker"),
        Field("topic", FieldType.STRING),
        Field("reason", FieldType.STRING, description="a contract.errors.Reason"),
        Field("detail", FieldType.STRING, description="what was wrong, with the value and the limit"),
        Field("payload", FieldType.STRING, description="the payload; `base64:…` if it is not UTF-8"),
    ),
    key=(),
    event_time="captured_at",
    entity="topic",
    topic="",
)
"""The stream that every agent has: rejected payloads, each with its reason."""

LOSSES = StreamContract(
    stream="losses",
    version="1",
    fields=(
        Field("lost_at", FieldType.TIMESTAMP, description="when the agent gave the blocks up, or found them damaged"),
        Field("of_stream", FieldType.STRING, description="the stream that lost readings"),
        Field("of_epoch", FieldType.STRING, description="with of_lane and the sequences: the names of the blocks"),
        Field("of_lane", FieldType.STRING),
        Field("first_sequence", FieldType.INTEGER),
        Field("last_sequence", FieldType.INTEGER, description="inclusive"),
        Field("blocks", FieldType.INTEGER, description="how many blocks of that range are gone"),
        Field("readings", FieldType.NUMBER, required=False, description="how many readings they held; missing: not known"),
        Field("first_at", FieldType.NUMBER, required=False, unit="us", description="the earliest event time among them"),
        Field("last_at", FieldType.NUMBER, required=False, unit="us", description="the latest event time among them"),
        Field("reason", FieldType.STRING, description="a contract.errors.Reason"),
        Field("detail", FieldType.STRING),
    ),
    key=("of_epoch", "of_lane", "first_sequence", "lost_at"),
    event_time="lost_at",
    entity="of_stream",
    topic="",
)
"""The loss ledger: what the device gave up or found damaged, block by block, so that nothing is lost unsaid."""

AGENT_STREAMS = (QUARANTINE, LOSSES)
"""The streams that every agent has, without a contract file."""


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
    custom = _custom(schema)
    properties = _list(schema, "properties")
    if not 1 <= len(properties) <= FIELDS_MAX:
        raise ContractError(f"schema needs 1 to {FIELDS_MAX} properties, has {len(properties)}")
    fields = tuple(_field(p) for p in properties)
    names = [f.name for f in fields]
    if len(set(names)) != len(names):
        raise ContractError(f"field names repeat: {sorted({n for n in names if names.count(n) > 1})}")
    taken = sorted(RESERVED.intersection(names))
    if taken:
        raise ContractError(f"field names {taken} are kept for the lake; rename them")
    keys = sorted((_number(p, "primaryKeyPosition", 0), str(p["name"])) for p in properties if p.get("primaryKey"))
    key = tuple(name for _, name in keys)
    if not key:
        raise ContractError("no property has primaryKey: true, so a redelivered message could not be told from a new reading")
    contract = StreamContract(
        stream=check_name(str(schema.get("name", "")), "stream"),
        version=str(tree.get("version", "")),
        fields=fields,
        key=key,
        event_time=_named(custom, "eventTime", fields, FieldType.TIMESTAMP),
        entity=_named(custom, "entity", fields, FieldType.STRING),
        topic=str(custom.get("topic") or ""),
        encoding=_encoding(custom.get("encoding", "json")),
        payload_bytes_max=_payload_bytes_max(custom),
        compression=_compression(custom.get("compression", "none")),
    )
    if not contract.version:
        raise ContractError("version is missing")
    if not contract.topic:
        raise ContractError("customProperties needs topic, the MQTT topic of the sensor messages")
    _check_topic(contract)
    return contract


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
    required = bool(tree.get("required", False))
    if not required and kind is not FieldType.NUMBER:
        raise ContractError(f"field {name!r}: only number fields may be optional; set required: true")
    options = tree.get("logicalTypeOptions") or {}
    if not isinstance(options, dict):
        raise ContractError(f"field {name!r}: logicalTypeOptions {options!r} is not a mapping")
    custom = _custom(tree)
    low, high = _number(options, "minimum", -math.inf), _number(options, "maximum", math.inf)
    if not low <= high:
        raise ContractError(f"field {name!r}: minimum {low} is above maximum {high}")
    unit, metric = str(custom.get("unit", "")), str(custom.get("metric", ""))
    return Field(name, kind, required, low, high, unit, str(tree.get("description", "")), metric)


def _named(custom: dict[str, Any], role: str, fields: tuple[Field, ...], kind: FieldType) -> str:
    name = custom.get(role)
    if not any(f.name == name and f.type is kind for f in fields):
        raise ContractError(f"customProperties.{role} is {name!r}; it must name a required {kind} field")
    return str(name)


def _list(tree: dict[Any, Any], name: str) -> list[Any]:
    items = tree.get(name) or []
    if not isinstance(items, list):
        raise ContractError(f"{name} {items!r} is not a list")
    return items


def _custom(tree: dict[Any, Any]) -> dict[str, Any]:
    items = _list(tree, "customProperties")
    return {str(p.get("property")): p.get("value") for p in items if isinstance(p, dict)}


def _number(tree: dict[Any, Any], name: str, default: float) -> float:
    value = tree.get(name, default)
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ContractError(f"{name} {value!r} is not a number") from None


def _payload_bytes_max(custom: dict[str, Any]) -> int:
    limit = _number(custom, "payloadBytesMax", PAYLOAD_BYTES_MAX)
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
