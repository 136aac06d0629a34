"""What lies in quarantine: payloads that devices refused, and rows that ingest took out of blocks.

| origin | lies in | holds |
| --- | --- | --- |
| `device` | the stream `quarantine` | the payload, as far as it may be stored, its topic and what was wrong |
| `ingest` | the quarantine of each stream (`cloud.quarantine`) | the values, and the rule that they broke |

- A row's name is `DEVICE/EPOCH/LANE/SEQUENCE/ROW`, the same that it has everywhere.
- What was released is marked in `<root>/_quarantine/<lane>/_released`, a Delta table; nothing is taken away.
- The stream of a refused payload is the one whose topic it came on; it has none if no contract listens there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cloud.enforcement import broken_fields
from cloud.evolution import order
from cloud.lake import Lake
from cloud.quarantine import CheckedLake, quarantine_contract, rows_of
from cloud.roots import ALL, may_see
from cloud.rows import Contracts, schema
from cloud.tables import is_table, open_table, read_table, text_field
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.sensor_topics import parse_shape
from edge_agent.contract.stream import QUARANTINE, StreamContract

RELEASED = "_released"
NAME = ("device", "epoch", "sequence", "row")
_NUMBER = re.compile(r"[0-9]{1,19}")


class Origin(StrEnum):
    """Who took a row out."""

    DEVICE = "device"
    INGEST = "ingest"


class RowName(NamedTuple):
    """The name of a reading."""

    device: str
    epoch: str
    lane: str
    sequence: int
    row: int

    def __str__(self) -> str:
        return "/".join(map(str, self))


@dataclass(frozen=True)
class Selection:
    """Which rows are meant; what is not said may be anything."""

    stream: str | None = None
    device: str | None = None
    reason: str | None = None
    name: RowName | None = None
    zones: tuple[str, ...] = (ALL,)
    """Those that the caller may see, of `cloud.viewers.rights`."""

    def meets(self, lane: str) -> bool:
        """Whether rows of a lane may be meant."""
        return may_see(lane, self.zones) and (self.name is None or self.name.lane == lane)


@dataclass(frozen=True)
class Shelf:
    """Quarantined rows of one stream and lane; `table` has the columns of their table in the lake, and `released`."""

    origin: Origin
    stream: str
    lane: str
    table: pa.Table

    @property
    def reasons(self) -> pa.ChunkedArray:
        return self.table["reason" if self.origin is Origin.DEVICE else "violation"]

    @property
    def details(self) -> list[str]:
        """What was wrong, in words."""
        if self.origin is Origin.DEVICE:
            return self.table["detail"].to_pylist()
        pairs = zip(self.table["violation_field"].to_pylist(), self.table["violation_detail"].to_pylist(), strict=True)
        return [f"field {field!r}: {detail}" if field else detail for field, detail in pairs]

    @property
    def names(self) -> list[RowName]:
        columns = (self.table[name].to_pylist() for name in NAME)
        return [RowName(device, epoch, self.lane, sequence, row) for device, epoch, sequence, row in zip(*columns, strict=True)]


def parse_name(text: str) -> RowName:
    """The inverse of `str` of a name.

    Raises:
        ConfigError: it is none.
    """
    parts = text.split("/")
    if len(parts) != 5 or not all(_NUMBER.fullmatch(number) and int(number) < 2**63 for number in parts[3:]):
        raise ConfigError(f"{text!r} names no row; DEVICE/EPOCH/LANE/SEQUENCE/ROW does, as fenceline quarantine show prints it")
    return RowName(parts[0], parts[1], parts[2], int(parts[3]), int(parts[4]))


def shelves(lake: CheckedLake, wanted: Selection) -> Iterator[Shelf]:
    """What is meant, by origin, stream and lane.

    Raises:
        UnavailableError: a table does not read.
    """
    for lane in lake.lake.lanes(QUARANTINE.stream):
        yield from _refused_payloads(lake, lane, wanted)
    for stream in lake.held.streams():
        for lane in lake.held.lanes(stream):
            if wanted.stream in (None, stream) and wanted.meets(lane):
                table = read_table(lake.held.table(stream, lane), filter=_filter(wanted, "violation"))
                if table.num_rows:
                    yield Shelf(Origin.INGEST, stream, lane, _marked(lake.held, lane, table))


def _refused_payloads(lake: CheckedLake, lane: str, wanted: Selection) -> Iterator[Shelf]:
    if not wanted.meets(lane):
        return
    table = read_table(lake.lake.table(QUARANTINE.stream, lane), filter=_filter(wanted, "reason"))
    if not table.num_rows:
        return
    table = _marked(lake.held, lane, table)
    topics = table.select(["device", "topic"]).group_by(["device", "topic"]).aggregate([])
    owner = {
        (device, topic): stream_of(lake.lake.contracts, device, topic)
        for device, topic in zip(topics["device"].to_pylist(), topics["topic"].to_pylist(), strict=True)
    }
    streams = np.array([owner[pair] for pair in zip(table["device"].to_pylist(), table["topic"].to_pylist(), strict=True)])
    for stream in sorted(set(streams.tolist())):
        if wanted.stream in (None, stream):
            yield Shelf(Origin.DEVICE, stream, lane, table.filter(pa.array(streams == stream)))


def stream_of(contracts: Contracts, device: str, topic: str) -> str:
    """The stream that a topic of a device's sensors belongs to; empty if there is none."""
    for contract in contracts.listed:
        if topic_of(contract, device) == topic or parse_shape(topic_of(contract, device)).matches(topic):
            return contract.stream
    return ""


def topic_of(contract: StreamContract, device: str) -> str:
    """The topic of a stream's messages on one device."""
    return contract.topic.replace("{device}", device)


def marks(held: Lake, lane: str) -> DeltaTable | None:
    """The table of what was released in a lane; None before the first time."""
    root = held.roots.of(lane)
    return open_table(root.path(lane, RELEASED), root) if is_table(root, lane, RELEASED) else None


def _filter(wanted: Selection, reason: str) -> pc.Expression | None:
    terms = []
    if wanted.device is not None:
        terms.append(text_field("device") == wanted.device)
    if wanted.reason is not None:
        terms.append(text_field(reason) == wanted.reason)
    if wanted.name is not None:
        terms += [text_field(name) == getattr(wanted.name, name) for name in NAME[:2]]
        terms += [pc.field(name) == getattr(wanted.name, name) for name in NAME[2:]]
    whole = None
    for term in terms:
        whole = term if whole is None else whole & term
    return whole


def _marked(held: Lake, lane: str, table: pa.Table) -> pa.Table:
    """The rows with a column `released`: the time of it, or null."""
    found = marks(held, lane)
    if found is None:
        return table.append_column("released", pa.nulls(table.num_rows, pa.timestamp("us", "UTC")))
    told = read_table(found, columns=[*NAME, "released_at"]).group_by(list(NAME)).aggregate([("released_at", "min")])
    place = pa.table({**{name: table[name] for name in NAME}, "place": pa.array(np.arange(table.num_rows))})
    joined = place.join(told, keys=list(NAME), join_type="left outer").sort_by("place")
    return table.append_column("released", joined["released_at_min"])


def listing(lake: CheckedLake, zones: tuple[str, ...] = (ALL,)) -> list[dict[str, Any]]:
    """How many rows of `zones` lie where, and why: by origin, stream, device, lane and reason.

    Keys of each: origin, stream, device, lane, reason, rows, released, first_at, last_at (when they came to the lake), detail (of one).
    """
    groups = []
    for shelf in shelves(lake, Selection(zones=zones)):
        facts = pa.table(
            {
                "device": shelf.table["device"],
                "reason": shelf.reasons,
                "at": shelf.table["arrived_at"],
                "released": shelf.table["released"],
                "detail": pa.array(shelf.details, pa.string()),
            }
        )
        found = facts.group_by(["device", "reason"]).aggregate(
            [("at", "min"), ("at", "max"), ("at", "count"), ("released", "count"), ("detail", "min")]
        )
        for row in found.sort_by([("device", "ascending"), ("reason", "ascending")]).to_pylist():
            groups.append(
                {
                    "origin": shelf.origin.value,
                    "stream": shelf.stream,
                    "device": row["device"],
                    "lane": shelf.lane,
                    "reason": row["reason"],
                    "rows": row["at_count"],
                    "released": row["released_count"],
                    "first_at": row["at_min"],
                    "last_at": row["at_max"],
                    "detail": row["detail_min"],
                }
            )
    return groups


def describe(lake: CheckedLake, shelf: Shelf, limit: int) -> list[dict[str, Any]]:
    """The first rows of a shelf, for people and machines.

    Keys of each: name, origin, stream, reason, detail, at, released_at; of a refused payload topic and payload; of a row values and
    broken: what the newest contract allows in the fields that break it, by field.
    """
    part = replace(shelf, table=shelf.table.slice(0, limit))
    contract, details = newest(lake.lake.contracts, shelf.stream), part.details
    rows = []
    for i, name in enumerate(part.names):
        row: dict[str, Any] = {
            "name": str(name),
            "origin": shelf.origin.value,
            "stream": shelf.stream,
            "reason": part.reasons[i].as_py(),
            "detail": details[i],
            "at": part.table["arrived_at"][i].as_py(),
            "released_at": part.table["released"][i].as_py(),
        }
        if shelf.origin is Origin.DEVICE:
            row |= {key: part.table[key][i].as_py() for key in ("topic", "payload")}
        elif contract is not None:
            row |= _values(contract, part.table.slice(i, 1))
        rows.append(row)
    return rows


def _values(contract: StreamContract, row: pa.Table) -> dict[str, Any]:
    """The fields of a row, and what is allowed in those that it breaks. A field that had another type then is only shown."""
    held = schema(quarantine_contract(contract))
    fields = [f for f in contract.fields if f.name in row.column_names]
    alike = replace(contract, fields=tuple(f for f in fields if row.schema.field(f.name).type == held.field(f.name).type))
    return {"values": {f.name: row[f.name][0].as_py() for f in fields}, "broken": broken_fields(alike, rows_of(row, alike))}


def newest(contracts: Contracts, stream: str) -> StreamContract | None:
    """The contract of a stream with the highest version; None if there is none."""
    found = [c for c in contracts.listed if c.stream == stream]
    return max(found, key=lambda c: order(c.version), default=None)
