"""Rows of the lake: what a block becomes when it is stored.

- A row holds the contract's fields, `score`, and where it came from: `device, epoch, lane, sequence, row` name the reading
  for ever, `ordinal` gives the order in which the device saw it, the rest says how it was captured and stored.
- NaN ("missing", "not scored") becomes null; timestamps become `timestamp[us, UTC]`.
- The columns of a block must be those of its contract and `ordinal`, and it may have `score`; anything else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from edge_agent.contract.block import ORDINAL, SCORE, BlockHeader
from edge_agent.contract.columns import Column, Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import AGENT_STREAMS, FieldType, StreamContract

TIME = pa.timestamp("us", "UTC")
ORDER = ("device", "epoch", "ordinal", "row")

_ARROW = {FieldType.STRING: pa.string(), FieldType.INTEGER: pa.int64(), FieldType.NUMBER: pa.float64(), FieldType.TIMESTAMP: TIME}
_META = pa.schema(
    [
        (SCORE, pa.float64()),
        ("device", pa.string()),
        ("epoch", pa.string()),
        ("lane", pa.string()),
        ("sequence", pa.int64()),
        ("row", pa.int64()),
        ("ordinal", pa.int64()),
        ("contract_version", pa.string()),
        ("model", pa.string()),
        ("policy", pa.string()),
        ("fix", pa.string()),
        ("region", pa.string()),
        ("clock_synced", pa.bool_()),
        ("sealed_at", TIME),
        ("received_at", TIME),
    ]
)


class Contracts:
    """The contracts of all streams, by stream and version; the quarantine is always one of them."""

    def __init__(self, contracts: Iterable[StreamContract] = ()) -> None:
        self.listed = tuple(contracts)
        self._contracts = {(c.stream, c.version): c for c in (*self.listed, *AGENT_STREAMS)}

    def get(self, header: BlockHeader) -> StreamContract | None:
        """The contract of a block, or None if it is not known."""
        return self._contracts.get((header.stream, header.contract_version))


def schema(contract: StreamContract) -> pa.Schema:
    """The schema of the lake's rows of a stream."""
    return pa.schema([*((f.name, _ARROW[f.type]) for f in contract.fields), *_META])


def check_columns(contract: StreamContract, header: BlockHeader, table: Table) -> None:
    """Raise ContractError unless the block has the columns of its contract, in type and number."""
    wanted = {f.name: _KINDS[f.type] for f in contract.fields} | {ORDINAL: "int64"}
    if SCORE in table:
        wanted[SCORE] = "float64"
    missing, unknown = sorted(set(wanted) - set(table)), sorted(set(table) - set(wanted))
    if missing or unknown:
        raise ContractError(f"block {header.identity}: missing columns {missing}, unknown columns {unknown}")
    for name, kind in wanted.items():
        if _kind(table[name]) != kind:
            raise ContractError(f"block {header.identity}: column {name!r} is {_kind(table[name])}, its contract wants {kind}")


def to_rows(contract: StreamContract, region: str, header: BlockHeader, table: Table, received_us: int) -> pa.Table:
    """The rows of a checked block that `region` received at `received_us`."""
    n = header.rows
    columns = {f.name: _array(table[f.name], f.type) for f in contract.fields}
    meta = {
        SCORE: _array(table[SCORE], FieldType.NUMBER) if SCORE in table else pa.nulls(n, pa.float64()),
        "device": _constant(header.device, n),
        "epoch": _constant(header.epoch, n),
        "lane": _constant(header.lane, n),
        "sequence": pa.array(np.full(n, header.sequence, np.int64)),
        "row": pa.array(np.arange(n, dtype=np.int64)),
        ORDINAL: _array(table[ORDINAL], FieldType.INTEGER),
        "contract_version": _constant(header.contract_version, n),
        "model": _constant(header.model, n),
        "policy": _constant(header.policy, n),
        "fix": _constant(str(header.fix), n),
        "region": _constant(region, n),
        "clock_synced": pa.repeat(pa.scalar(header.clock_synced), n),
        "sealed_at": pa.repeat(pa.scalar(header.sealed_us, TIME), n),
        "received_at": pa.repeat(pa.scalar(received_us, TIME), n),
    }
    return pa.table({**columns, **meta}, schema=schema(contract))


_KINDS = {FieldType.STRING: "text", FieldType.INTEGER: "int64", FieldType.NUMBER: "float64", FieldType.TIMESTAMP: "int64"}


def _kind(column: Column) -> str:
    return "text" if isinstance(column, Strings) else str(column.dtype)


def _array(column: Column, kind: FieldType) -> pa.Array:
    if isinstance(column, Strings):
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(list(column.values), pa.string())).cast(pa.string())
    if kind is FieldType.TIMESTAMP:
        return pa.array(column).cast(TIME)
    return pa.array(column, from_pandas=True)


def _constant(text: str | None, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), rows)
