"""Stream contracts: what a sensor message must look like, as types. `contract.odcs` reads them from ODCS documents.

- A field has a type, a range and a unit; `key` fields together name a reading; `entity` is what windows are grouped by.
- A field may be tagged as personal (`pii`): what is stored of it is decided on the device, see `contract.privacy`.
- `levels` is what the stream promises to its readers: fresh, complete, in time; see `contract.service`.
- QUARANTINE and LOSSES are streams that every agent has, without a contract file.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from edge_agent.contract.errors import ContractError
from edge_agent.contract.privacy import Pii
from edge_agent.contract.sensor_topics import Shape, parse_shape
from edge_agent.contract.service import NO_LEVELS, ServiceLevels

FIELDS_MAX = 512
PAYLOAD_BYTES_MAX = 64 * 1024
UNITS_CHARACTERS = 8
SPARKPLUG = "spBv1.0"
"""The first level of Sparkplug B topics."""

# Columns that blocks and the lake add to a stream's fields.
_IDENTITY = ("device", "epoch", "lane", "sequence", "row", "ordinal")
_CAPTURE = ("contract_version", "model", "policy", "fix", "region")
_VIOLATION = ("violation", "violation_field", "violation_detail", "block_rows", "quarantined_at")
_CLOCK = ("boot", "monotonic_us", "clock_synced", "clock_shift_us", "sealed_at", "arrived_at")
_PLACE = ("latitude", "longitude")
_PARTITION = ("event_date",)
RESERVED = frozenset(("score", *_IDENTITY, *_CAPTURE, *_CLOCK, *_PLACE, *_PARTITION, *_VIOLATION))


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
    """One field of a reading. `minimum` and `maximum` are inclusive, in `unit`; `metric` is its name in Sparkplug; `pii`: personal."""

    name: str
    type: FieldType
    required: bool = True
    minimum: float = -math.inf
    maximum: float = math.inf
    unit: str = ""
    description: str = ""
    metric: str = ""
    pii: Pii | None = None


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
    levels: ServiceLevels = NO_LEVELS

    @cached_property
    def units(self) -> str:
        """Names the units of all fields: blocks carry it, so that a device with other units under the same version is found out."""
        said = "\n".join(f"{f.name}={f.unit}" for f in self.fields if f.unit)
        return hashlib.sha256(said.encode()).hexdigest()[:UNITS_CHARACTERS] if said else ""

    @property
    def private(self) -> tuple[Field, ...]:
        """The fields that are personal."""
        return tuple(f for f in self.fields if f.pii is not None)

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
        Field("payload", FieldType.STRING, description="the payload as text; core.rejects says how"),
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
