"""Rows of the lake: what a block becomes when it is stored.

- A row holds the contract's fields, `score`, and where it came from: `device, epoch, lane, sequence, row` name the reading
  for ever, `ordinal` gives the order in which the device saw it, the rest says how it was captured and stored.
- `boot`, `monotonic_us`, `clock_synced` and `clock_shift_us` say how far its times can be trusted: see `cloud.clocks`.
- `latitude` and `longitude` are there for streams whose devices give them away, and null otherwise.
- NaN ("missing", "not scored", "place not known") becomes null; timestamps become `timestamp[us, UTC]`.
- The columns of a block must be those of its contract and `ordinal`; it may have `score`, and the two of its place together. Anything
  else is refused.
- A text that many rows share takes its room once in a block, and in each row here: blocks and commits have a limit of TEXT_BYTES_MAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from edge_agent.contract.block import LATITUDE, LONGITUDE, ORDINAL, SCORE, BlockHeader
from edge_agent.contract.columns import Column, Strings, Table, concat
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import AGENT_STREAMS, FieldType, StreamContract

TEXT_BYTES_MAX = 256 * 1024 * 1024  # Arrow counts the bytes of a text column in 31 bits
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


Shifted = tuple[BlockHeader, Table, int | None]
"""A block, and the correction of its device's clock, if that is known."""


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
    if (size := text_bytes(header, table)) > TEXT_BYTES_MAX:
        raise ContractError(f"block {header.identity}: {size} bytes of text in its rows; at most {TEXT_BYTES_MAX}")


def text_bytes(header: BlockHeader, table: Table) -> int:
    """The bytes of text in the rows of a block."""
    each = (header.device, header.epoch, header.lane, header.contract_version, header.model or "", header.policy, header.boot)
    size = header.rows * sum(len(text.encode()) for text in each)
    for column in table.values():
        if isinstance(column, Strings):
            size += int(np.array([len(text.encode()) for text in column.values], np.int64)[column.codes].sum())
    return size


def stamped(contract: StreamContract) -> tuple[str, ...]:
    """The fields whose times are from the device's clock, not from a sensor."""
    return (contract.event_time,) if contract in AGENT_STREAMS else ()


def to_rows(contract: StreamContract, region: str, blocks: Sequence[Shifted], received_us: int) -> pa.Table:
    """The rows of checked blocks of one stream and version that `region` received at `received_us`.

    They are built together: a table of its own for each block would cost a millisecond each.
    """
    headers, counts = [h for h, _, _ in blocks], [h.rows for h, _, _ in blocks]
    tables = [_corrected(contract, table, shift_us) for _, table, shift_us in blocks]
    block = pa.array(np.repeat(np.arange(len(blocks)), counts))

    def each(values: Iterable[object], kind: pa.DataType) -> pa.Array:
        return pa.array(list(values), kind).take(block)

    columns = {f.name: _array(_stack([t[f.name] for t in tables]), f.type) for f in contract.fields}
    meta = {
        **{name: _optional(tables, name, counts) for name in (SCORE, LATITUDE, LONGITUDE)},
        "device": each((h.device for h in headers), pa.string()),
        "epoch": each((h.epoch for h in headers), pa.string()),
        "lane": each((h.lane for h in headers), pa.string()),
        "sequence": each((h.sequence for h in headers), pa.int64()),
        "row": pa.array(np.concatenate([np.arange(n, dtype=np.int64) for n in counts])),
        ORDINAL: _array(_stack([t[ORDINAL] for t in tables]), FieldType.INTEGER),
        "contract_version": each((h.contract_version for h in headers), pa.string()),
        "model": each((h.model for h in headers), pa.string()),
        "policy": each((h.policy for h in headers), pa.string()),
        "fix": each((str(h.fix) for h in headers), pa.string()),
        "region": each((region for _ in headers), pa.string()),
        "boot": each((h.boot for h in headers), pa.string()),
        "monotonic_us": each((h.monotonic_us for h in headers), pa.int64()),
        "clock_synced": each((h.clock_synced or shift_us is not None for h, _, shift_us in blocks), pa.bool_()),
        "clock_shift_us": each((shift_us for _, _, shift_us in blocks), pa.int64()),
        "sealed_at": each((h.sealed_us + (shift_us or 0) for h, _, shift_us in blocks), TIME),
        "received_at": each((received_us for _ in headers), TIME),
    }
    return pa.table({**columns, **meta}, schema=schema(contract))


def _corrected(contract: StreamContract, table: Table, shift_us: int | None) -> Table:
    if shift_us is None:
        return table
    return {**table, **{name: _shifted(table[name], shift_us) for name in stamped(contract)}}


def _shifted(column: Column, shift_us: int) -> Column:
    assert not isinstance(column, Strings)
    return column + shift_us


def _stack(parts: list[Column]) -> Column:
    return concat([{"": part} for part in parts])[""]


_KINDS = {FieldType.STRING: "text", FieldType.INTEGER: "int64", FieldType.NUMBER: "float64", FieldType.TIMESTAMP: "int64"}


def _kind(column: Column) -> str:
    return "text" if isinstance(column, Strings) else str(column.dtype)


def _array(column: Column, kind: FieldType) -> pa.Array:
    if isinstance(column, Strings):
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(list(column.values), pa.string())).cast(pa.string())
    if kind is FieldType.TIMESTAMP:
        return pa.array(column).cast(TIME)
    return pa.array(column, from_pandas=True)


def _optional(tables: Sequence[Table], name: str, counts: Sequence[int]) -> pa.Array:
    """A column that blocks may leave out."""
    if not any(name in table for table in tables):
        return pa.nulls(sum(counts), pa.float64())
    parts = [table[name] if name in table else np.full(n, np.nan) for table, n in zip(tables, counts, strict=True)]
    return _array(_stack(parts), FieldType.NUMBER)
