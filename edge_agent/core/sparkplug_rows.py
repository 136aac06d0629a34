"""Sparkplug messages as readings of one stream.

- A metric fills the field that names it (`metric`, or the field's own name); others are passed over. Text comes from the topic.
- A message gives one reading for each time that its metrics have, in the order of first appearance. Sparkplug reports by
  exception: a metric that is not there has not changed, and its field is missing (NaN) in that reading, not filled in.
- A birth holds the present values of all metrics, so it gives readings too. Deaths give none.
- Integers become float64 only if that is exact; Boolean is 0 or 1, DateTime milliseconds since 1970.
- A message that is mostly empty cells (many times, a wide contract, few metrics) is refused beyond CELLS_PER_BYTE.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.columns import Floats, Table
from edge_agent.contract.errors import PayloadError, Reason
from edge_agent.contract.stream import PAYLOAD_BYTES_MAX, FieldType, StreamContract
from edge_agent.core.decode import Decoded
from edge_agent.core.rejects import reject, shown
from edge_agent.core.sparkplug import number_of
from edge_agent.core.sparkplug_nodes import Heard, Nodes
from edge_agent.core.topic_levels import TopicLevels

CELLS_PER_BYTE = 4


@dataclass(frozen=True)
class Row:
    """One reading: its time and the values by place."""

    time_ms: int
    values: dict[int, float]


class SparkplugDecoder:
    """Decodes the messages of one stream; `nodes` is shared by all streams of the agent."""

    def __init__(self, contract: StreamContract, nodes: Nodes) -> None:
        self.contract, self.nodes = contract, nodes
        self._levels = TopicLevels(contract)
        self._fields = [f for f in contract.fields if f.type is FieldType.NUMBER]
        self._place = {f.metric or f.name: place for place, f in enumerate(self._fields)}

    def decode(self, payloads: list[bytes], topics: Sequence[str], received_us: int = 0) -> Decoded:
        """Decode a batch; never raises on account of a payload or a topic."""
        heard = [hear(self.nodes, topic, payload) for topic, payload in zip(topics, payloads, strict=True)]
        return self.rows(heard, topics, [len(p) for p in payloads])

    def rows(self, heard: Sequence[Heard | PayloadError], topics: Sequence[str], sizes: Sequence[int]) -> Decoded:
        """The readings in messages of this stream that the nodes have heard; `sizes` in bytes."""
        rejects = self._levels.rejects(topics)
        refused = {r.index for r in rejects}
        rows: list[Row] = []
        places: list[int] = []
        for i, message in enumerate(heard):
            if i in refused:
                continue
            try:
                if isinstance(message, PayloadError):
                    raise message
                found = self._rows(message, sizes[i])
            except PayloadError as e:
                rejects.append(reject(i, e.reason, str(e)))
                continue
            rows += found
            places += [i] * len(found)
        return Decoded(self._table(rows, topics, places), np.array(places, np.intp), sorted(rejects, key=lambda r: r.index))

    def _rows(self, heard: Heard, size: int) -> list[Row]:
        if size > self.contract.payload_bytes_max:
            raise PayloadError(Reason.OVERSIZE, f"payload of {size} bytes; at most {self.contract.payload_bytes_max}")
        rows: dict[int, dict[int, float]] = {}
        for sample in heard.samples:
            place = self._place.get(sample.name)
            if place is None:
                continue
            try:
                value = number_of(sample.metric, sample.datatype)
            except PayloadError as e:
                raise PayloadError(e.reason, f"metric {shown(sample.name)!r}: {e}") from e
            row = rows.setdefault(sample.time_ms, {})
            if place in row:
                raise PayloadError(Reason.MALFORMED, f"metric {shown(sample.name)!r} has two values at {sample.time_ms} ms")
            row[place] = np.nan if value is None else value
        if len(rows) > 1 and len(rows) * len(self._fields) > CELLS_PER_BYTE * size:
            cells = f"{len(rows)} readings of {len(self._fields)} fields"
            raise PayloadError(Reason.OVERSIZE, f"{cells} in {size} bytes; at most {CELLS_PER_BYTE} values per byte")
        return [Row(time_ms, values) for time_ms, values in rows.items()]

    def _table(self, rows: list[Row], topics: Sequence[str], places: list[int]) -> Table:
        matrix: Floats = np.full((len(self._fields), len(rows)), np.nan)
        for i, row in enumerate(rows):
            for place, value in row.values.items():
                matrix[place, i] = value
        said: Table = dict(self._levels.columns(topics, np.array(places, np.intp)))
        said |= {f.name: matrix[place] for place, f in enumerate(self._fields)}
        said[self.contract.event_time] = np.array([row.time_ms * 1_000 for row in rows], np.int64)
        return {f.name: said[f.name] for f in self.contract.fields}


def hear(nodes: Nodes, topic: str, payload: bytes) -> Heard | PayloadError:
    """What the nodes make of a message, or why nothing."""
    try:
        return nodes.hear(topic, payload, PAYLOAD_BYTES_MAX)
    except PayloadError as e:
        return e
