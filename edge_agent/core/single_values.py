"""Single-value topics: `plant/p-1/temperature` → `21.5`.

- The payload is one JSON number, in the contract's compression; `true` and `false` count as 1 and 0. Anything else is a reject.
- One message is one reading. The topic fills its text and says which field the number is; the other fields are missing (NaN).
- The payload has no time, so event time is when the message arrived, and every reading has a time of its own: messages
  of one batch follow each other by a microsecond, and a batch begins after the one before it, as long as that is less than
  STEP_US ahead. (A clock that was set back further is believed.)
- So a message that the broker delivers again cannot be told from a new one, and the DUP flag only says that the broker
  sent it before, not that it was stored: it becomes a second reading. Nothing is lost; after a crash or a lost
  connection, what was not acknowledged may be there twice, with two times. See docs/decisions/0010.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import Column, Floats, Ints, Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.sensor_topics import FIELD
from edge_agent.contract.stream import FieldType, StreamContract
from edge_agent.core.decode import Decoded, Payloads, reason_of
from edge_agent.core.rejects import Reject, reject, shown
from edge_agent.core.topic_levels import TopicLevels

STEP_US = 1_000_000

_INTEGER = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class ValueDecoder:
    """Decodes the messages of one stream whose payloads are bare numbers."""

    def __init__(self, contract: StreamContract) -> None:
        self.contract = contract
        self._levels = TopicLevels(contract)
        self._values = [f for f in contract.fields if f.type in (FieldType.NUMBER, FieldType.INTEGER)]
        self._place = {f.name: place for place, f in enumerate(self._values)}
        self._integer = self._values[0].type is FieldType.INTEGER  # then it is the only one
        decode = msgspec.json.Decoder(_INTEGER | bool if self._integer else float | bool).decode
        self._payloads = Payloads(contract, decode, _explain)
        self._last_us = -STEP_US

    def decode(self, payloads: list[bytes], topics: Sequence[str], received_us: int) -> Decoded:
        """Decode a batch that arrived at `received_us`; never raises on account of a payload or a topic."""
        rejects = self._levels.rejects(topics)
        refused = {r.index for r in rejects}
        foreign = self._foreign(topics, refused)
        self._payloads.begin(payloads)
        values, rows, bad = self._payloads.decode(payloads, refused.union(r.index for r in foreign))
        said: dict[str, Any] = dict(self._levels.columns(topics, rows))
        fields = said.pop(FIELD).tolist() if FIELD in said else [self._values[0].name] * len(rows)
        said |= self._columns(values, fields)
        said[self.contract.event_time] = self._times(len(rows), received_us)
        table: Table = {f.name: said[f.name] for f in self.contract.fields}
        return Decoded(table, rows, sorted([*rejects, *foreign, *bad], key=lambda r: r.index))

    def _foreign(self, topics: Sequence[str], refused: set[int]) -> list[Reject]:
        """Messages whose topic names a field that the contract does not have."""
        if FIELD not in self._levels.names:
            return []
        rows = np.array([i for i in range(len(topics)) if i not in refused], np.intp)
        column = self._levels.columns(topics, rows)[FIELD]
        strange = {code: name for code, name in enumerate(column.values) if name not in self._place}
        if not strange:
            return []
        found = zip(rows.tolist(), column.codes.tolist(), strict=True)
        return [
            reject(i, Reason.UNKNOWN_TOPIC, f"stream {self.contract.stream} has no field {shown(strange[c])!r}")
            for i, c in found
            if c in strange
        ]

    def _columns(self, values: list[Any], fields: list[str]) -> dict[str, Column]:
        if self._integer:
            return {self._values[0].name: np.fromiter(values, np.int64, len(values))}
        matrix: Floats = np.full((len(self._values), len(values)), np.nan)
        places = np.fromiter(map(self._place.__getitem__, fields), np.intp, len(fields))
        matrix[places, np.arange(len(values))] = np.fromiter(values, np.float64, len(values))
        return {f.name: matrix[place] for place, f in enumerate(self._values)}

    def _times(self, rows: int, received_us: int) -> Ints:
        """A time for each row, none of them used before."""
        first = received_us
        if 0 <= self._last_us - received_us < STEP_US:
            first = self._last_us + 1
        if rows:
            self._last_us = first + rows - 1
        times: npt.NDArray[np.int64] = np.arange(first, first + rows, dtype=np.int64)
        return times


def _explain(index: int, payload: bytes, error: BaseException) -> Reject:
    text = payload[:200].decode(errors="backslashreplace")
    if isinstance(error, msgspec.ValidationError):
        return reject(index, reason_of(str(error)), f"value is {shown(text)}: {error}")
    return reject(index, Reason.MALFORMED, f"not a number: {shown(text)}: {str(error) or type(error).__name__}")
