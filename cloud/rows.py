"""Rows of the lake: what a block becomes when it is stored.

- A row holds the contract's fields, `score`, and where it came from: `device, epoch, lane, sequence, row` name the reading
  for ever, `ordinal` gives the order in which the device saw it, the rest says how it was captured and stored.
- `boot`, `monotonic_us`, `clock_synced` and `clock_shift_us` say how far its times can be trusted: see `cloud.clocks`.
- `latitude` and `longitude` are there for streams whose devices give them away, and null otherwise.
- NaN ("missing", "not scored", "place not known") becomes null; timestamps become `timestamp[us, UTC]`.
- The columns of a block must be those of its contract and `ordinal`; it may have `score`, and the two of its place together. Anything
  else is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from edge_agent.contract.block import LATITUDE, LONGITUDE, ORDINAL, SCORE, BlockHeader
from edge_agent.contract.columns import Column, Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import AGENT_STREAMS, FieldType, StreamContract

TIME = pa.timestamp("us", "UTC")
ORDER = ("device", "epoch", "ordinal", "row")

_ARROW = {FieldType.STRING: pa.string(), FieldType.INTEGER: pa.int64(), FieldType.NUMBER: pa.float64(), FieldType.TIMESTAMP: TIME}
_META = pa.schema(
    [
        (SCORE, pa.float64()),
        (LATITUDE, pa.float64()),
        (LONGITUDE, pa.float64()),
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
        ("boot", pa.string()),
        ("monotonic_us", pa.int64()),
        ("clock_synced", pa.bool_()),
        ("clock_shift_us", pa.int64()),
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
    if LATITUDE in table or LONGITUDE in table:
        wanted |= {LATITUDE: "float64", LONGITUDE: "float64"}
    missing, unknown = sorted(set(wanted) - set(table)), sorted(set(table) - set(wanted))
    if missing or unknown:
        raise ContractError(f"block {header.identity}: missing columns {missing}, unknown columns {unknown}")
    for name, kind in wanted.items():
        if _kind(table[name]) != kind:
            raise ContractError(f"block {header.identity}: column {name!r} is {_kind(table[name])}, its contract wants {kind}")


def stamped(contract: StreamContract) -> tuple[str, ...]:
    """The fields whose times are from the device's clock, not from a sensor."""
    return (contract.event_time,) if contract in AGENT_STREAMS else ()


def to_rows(
    contract: StreamContract, region: str, header: BlockHeader, table: Table, received_us: int, shift_us: int | None = None
) -> pa.Table:
    """The rows of a checked block that `region` received at `received_us`; `shift_us` corrects the device's clock."""
    n = header.rows
    if shift_us is not None:
        table = {**table, **{name: _shifted(table[name], shift_us) for name in stamped(contract)}}
    columns = {f.name: _array(table[f.name], f.type) for f in contract.fields}
    meta = {
        **{name: _optional(table, name, n) for name in (SCORE, LATITUDE, LONGITUDE)},
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
        "boot": _constant(header.boot, n),
        "monotonic_us": pa.repeat(pa.scalar(header.monotonic_us, pa.int64()), n),
        "clock_synced": pa.repeat(pa.scalar(header.clock_synced or shift_us is not None), n),
        "clock_shift_us": pa.repeat(pa.scalar(shift_us, pa.int64()), n),
        "sealed_at": pa.repeat(pa.scalar(header.sealed_us + (shift_us or 0), TIME), n),
        "received_at": pa.repeat(pa.scalar(received_us, TIME), n),
    }
    return pa.table({**columns, **meta}, schema=schema(contract))


def _shifted(column: Column, shift_us: int) -> Column:
    assert not isinstance(column, Strings)
    return column + shift_us


_KINDS = {FieldType.STRING: "text", FieldType.INTEGER: "int64", FieldType.NUMBER: "float64", FieldType.TIMESTAMP: "int64"}


def _kind(column: Column) -> str:
    return "text" if isinstance(column, Strings) else str(column.dtype)


def _array(column: Column, kind: FieldType) -> pa.Array:
    if isinstance(column, Strings):
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(list(column.values), pa.string())).cast(pa.string())
    if kind is FieldType.TIMESTAMP:
        return pa.array(column).cast(TIME)
    return pa.array(column, from_pandas=True)


def _optional(table: Table, name: str, rows: int) -> pa.Array:
    return _array(table[name], FieldType.NUMBER) if name in table else pa.nulls(rows, pa.float64())


def _constant(text: str | None, rows: int) -> pa.Array:
    return pa.repeat(pa.scalar(text, pa.string()), rows)
