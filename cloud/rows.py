"""Rows of the lake: what a block becomes when it is stored.

- A row holds the contract's fields, `score`, and where it came from: `device, epoch, lane, sequence, row` name the reading
  for ever, `ordinal` gives the order in which the device saw it, the rest says how it was captured and stored.
- `boot`, `monotonic_us`, `clock_synced` and `clock_shift_us` say how far its times can be trusted: see `cloud.clocks`.
- `latitude` and `longitude` are there for streams whose devices give them away, and null otherwise.
- `event_date` is the UTC date of the event time, the partition that the row lies in. It is null, and the row lies apart, if the time has no
  date of the years 1 to 9999, or if the row's block spans more than DATES_MAX dates: one block must not make thousands of files.
- Rows are sorted by entity and event time: what is computed from them goes entity by entity, and a column of one entity's values
  compresses best.
- NaN ("missing", "not scored", "place not known") becomes null; timestamps become `timestamp[us, UTC]`.
- The columns of a block must be those of its contract and `ordinal`; it may have `score`, and the two of its place together. Anything
  else is refused.
- A text of the loss ledger is a name, or a few words, and no row of it goes to quarantine: one of more than STRING_CHARACTERS_MAX
  characters is refused with its block.
- A text that many rows share takes its room once in a block, and in each row here: blocks and commits have a limit of TEXT_BYTES_MAX.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloud.evolution import check_versions
from cloud.stacks import Stack
from edge_agent.contract.block import LATITUDE, LONGITUDE, ORDINAL, SCORE, BlockHeader
from edge_agent.contract.columns import Column, Strings, Table
from edge_agent.contract.errors import ContractError
from edge_agent.contract.stream import AGENT_STREAMS, LOSSES, FieldType, StreamContract
from edge_agent.core.topic_levels import STRING_CHARACTERS_MAX

TEXT_BYTES_MAX = 256 * 1024 * 1024  # Arrow counts the bytes of a text column in 31 bits
TEXT_CHARACTERS_MAX = 4 * 1024 * 1024
"""Of one text: more than a whole message of a sensor takes (`edge_agent.mqtt.cutter.PACKET_BYTES_MAX`), kept in base64."""
DATES_MAX = 366
"""Dates that the rows of one block may lie in: a year of daily values."""
TIME = pa.timestamp("us", "UTC")
EVENT_DATE = "event_date"
ROW = "row"
"""A column that a block has here only if rows were taken out of it: the numbers that those left had in it."""
DAY_US = 86_400_000_000
DAYS = range((date.min - date(1970, 1, 1)).days, (date.max - date(1970, 1, 1)).days + 1)
"""The days since 1970 that have a date."""
DATED_US = range(DAYS.start * DAY_US, DAYS.stop * DAY_US)
"""The times that have one."""
ORDER = ("device", "epoch", "ordinal", "row", "lane", "sequence")
"""How rows are sorted: as the device saw them. The rest, with which no two rows are alike, counts where a device numbered two as one."""

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
        ("arrived_at", TIME),
        (EVENT_DATE, pa.date32()),
    ]
)

Days = npt.NDArray[np.int64]
NO_DAY = np.iinfo(np.int32).min


class Contracts:
    """The contracts of all streams, by stream and version; the quarantine is always one of them.

    Raises:
        ConfigError: versions of one stream cannot share a table.
    """

    def __init__(self, contracts: Iterable[StreamContract] = ()) -> None:
        self.listed = tuple(contracts)
        check_versions(self.listed)
        self._contracts = {(c.stream, c.version): c for c in (*self.listed, *AGENT_STREAMS)}

    def get(self, header: BlockHeader) -> StreamContract | None:
        """The contract of a block, or None if it is not known."""
        return self._contracts.get((header.stream, header.contract_version))


def schema(contract: StreamContract) -> pa.Schema:
    """The schema of the lake's rows of a stream."""
    return pa.schema([*((f.name, _ARROW[f.type]) for f in contract.fields), *_META])


def check_columns(contract: StreamContract, stack: Stack) -> None:
    """Raise ContractError unless blocks of one shape have the columns of their contract, in type and number, and no more text than fits."""
    table, name_of = stack.table, stack.headers[0].identity
    wanted = {f.name: _KINDS[f.type] for f in contract.fields} | {ORDINAL: "int64"}
    if SCORE in table:
        wanted[SCORE] = "float64"
    if LATITUDE in table or LONGITUDE in table:
        wanted |= {LATITUDE: "float64", LONGITUDE: "float64"}
    missing, unknown = sorted(set(wanted) - set(table)), sorted(set(table) - set(wanted))
    if missing or unknown:
        raise ContractError(f"block {name_of}: missing columns {missing}, unknown columns {unknown}")
    for name, kind in wanted.items():
        if _kind(table[name]) != kind:
            raise ContractError(f"block {name_of}: column {name!r} is {_kind(table[name])}, its contract wants {kind}")
    bound = text_bytes_bound(stack)
    limit = STRING_CHARACTERS_MAX if contract == LOSSES else TEXT_CHARACTERS_MAX
    if bound > 4 * limit and (longest := _longest(table)) > limit:
        raise ContractError(f"block {name_of}: a text of {longest} characters; at most {limit}")
    for header, own in stack.blocks() if bound > TEXT_BYTES_MAX else ():
        if (size := text_bytes(header, own)) > TEXT_BYTES_MAX:
            raise ContractError(f"block {header.identity}: {size} bytes of text in its rows; at most {TEXT_BYTES_MAX}")


def text_bytes_bound(stack: Stack) -> int:
    """What the `text_bytes` of all its blocks are at most, without a look at the rows: UTF-8 takes four bytes for a character."""
    each = sum(max((len(text) for text in column.values), default=0) for column in stack.table.values() if isinstance(column, Strings))
    return 4 * sum(h.rows * (each + sum(map(len, _texts(h)))) for h in stack.headers)


def _longest(table: Table) -> int:
    return max((len(text) for column in table.values() if isinstance(column, Strings) for text in column.values), default=0)


def text_bytes(header: BlockHeader, table: Table) -> int:
    """The bytes of text in the rows of a block."""
    size = header.rows * sum(len(text.encode()) for text in _texts(header))
    for column in table.values():
        if isinstance(column, Strings):
            size += int(np.array([len(text.encode()) for text in column.values], np.int64)[column.codes].sum())
    return size


def _texts(header: BlockHeader) -> tuple[str, ...]:
    """What a header adds to each row."""
    return header.device, header.epoch, header.lane, header.contract_version, header.model or "", header.policy, header.boot


def stamped(contract: StreamContract) -> tuple[str, ...]:
    """The fields whose times are from the device's clock, not from a sensor."""
    return (contract.event_time,) if contract in AGENT_STREAMS else ()


def to_rows(contract: StreamContract, region: str, stack: Stack, shifts: Sequence[int | None], arrived_us: int) -> pa.Table:
    """The rows of checked blocks of one contract that `region` received at `arrived_us`, sorted by entity and event time.

    `shifts` are the corrections of the devices' clocks, one for each block, if they are known.
    """
    headers, table = stack.headers, _corrected(contract, stack, shifts)
    dates = event_days(table[contract.event_time], stack.counts)
    order = _sorted(table[contract.entity], table[contract.event_time], dates)
    owner = pa.array(stack.each(range(len(headers)))[order])
    rows = table.get(ROW, np.arange(len(order)) - stack.each(stack.starts))
    shifted = list(zip(headers, shifts, strict=True))

    def each(values: Iterable[object], kind: pa.DataType) -> pa.Array:
        found = list(values)
        if len(set(found)) == 1:
            return pa.repeat(pa.scalar(found[0], kind), len(owner))
        return pa.array(found, kind).take(owner)

    columns = {f.name: _array(table[f.name][order], f.type) for f in contract.fields}
    meta = {
        **{name: _array(table[name][order], FieldType.NUMBER) for name in (SCORE, LATITUDE, LONGITUDE) if name in table},
        **{name: pa.nulls(len(order), pa.float64()) for name in (SCORE, LATITUDE, LONGITUDE) if name not in table},
        "device": each((h.device for h in headers), pa.string()),
        "epoch": each((h.epoch for h in headers), pa.string()),
        "lane": each((h.lane for h in headers), pa.string()),
        "sequence": each((h.sequence for h in headers), pa.int64()),
        "row": _array(rows[order], FieldType.INTEGER),
        ORDINAL: _array(table[ORDINAL][order], FieldType.INTEGER),
        "contract_version": each((h.contract_version for h in headers), pa.string()),
        "model": each((h.model for h in headers), pa.string()),
        "policy": each((h.policy for h in headers), pa.string()),
        "fix": each((str(h.fix) for h in headers), pa.string()),
        "region": each((region for _ in headers), pa.string()),
        "boot": each((h.boot for h in headers), pa.string()),
        "monotonic_us": each((h.monotonic_us for h in headers), pa.int64()),
        "clock_synced": each((h.clock_synced or shift_us is not None for h, shift_us in shifted), pa.bool_()),
        "clock_shift_us": each(shifts, pa.int64()),
        "sealed_at": each((h.sealed_us + (shift_us or 0) for h, shift_us in shifted), TIME),
        "arrived_at": each((arrived_us for _ in headers), TIME),
        EVENT_DATE: pa.array(dates[order].astype(np.int32), mask=dates[order] == NO_DAY).cast(pa.date32()),
    }
    return pa.table({**columns, **meta}, schema=schema(contract))


def date_span(contract: StreamContract, table: Table) -> tuple[int, int]:
    """The first and the last event date of rows, in days since 1970."""
    times = table[contract.event_time]
    assert not isinstance(times, Strings)
    return int(times.min()) // DAY_US, int(times.max()) // DAY_US


def event_dates(contract: StreamContract, table: Table) -> set[int]:
    """The event dates of a block's rows."""
    first, last = date_span(contract, table)
    return {first} if first == last else set(np.unique(event_days(table[contract.event_time], [len(table[ORDINAL])])).tolist())


def event_days(times: Column, counts: Sequence[int] | Days) -> Days:
    """The event date of each row of blocks, in days since 1970; NO_DAY for rows that lie apart."""
    assert not isinstance(times, Strings)
    days: Days = times.astype(np.int64) // DAY_US
    days[(days < DAYS.start) | (days >= DAYS.stop)] = NO_DAY
    end = 0
    for count in counts if days.max() - days.min() >= DATES_MAX else ():
        end += count
        if count > DATES_MAX and len(np.unique(days[end - count : end])) > DATES_MAX:
            days[end - count : end] = NO_DAY
    return days


def _sorted(entity: Column, times: Column, days: Days) -> Days:
    """The order of rows by date, entity and event time."""
    assert isinstance(entity, Strings) and not isinstance(times, Strings)
    rank = np.empty(len(entity.values), np.int64)
    rank[sorted(range(len(entity.values)), key=entity.values.__getitem__)] = np.arange(len(entity.values))
    return np.lexsort((times, rank[entity.codes], days))


def _corrected(contract: StreamContract, stack: Stack, shifts: Sequence[int | None]) -> Table:
    if not any(shifts) or not stamped(contract):
        return stack.table
    shift = stack.each([shift_us or 0 for shift_us in shifts])
    return {**stack.table, **{name: _shifted(stack.table[name], shift) for name in stamped(contract)}}


def _shifted(column: Column, shift: Days) -> Column:
    """The times moved. Those that have no date say nothing anyway and stay: at the edge of 64 bits they would come round."""
    assert not isinstance(column, Strings)
    dated = (column >= DATED_US.start) & (column < DATED_US.stop)
    return np.where(dated, column + shift, column)


_KINDS = {FieldType.STRING: "text", FieldType.INTEGER: "int64", FieldType.NUMBER: "float64", FieldType.TIMESTAMP: "int64"}


_NAMES = {np.dtype(np.int64): "int64", np.dtype(np.float64): "float64"}
"""To ask a type for its name takes twenty times as long."""


def _kind(column: Column) -> str:
    return "text" if isinstance(column, Strings) else _NAMES.get(column.dtype) or str(column.dtype)


def _array(column: Column, kind: FieldType) -> pa.Array:
    if isinstance(column, Strings):
        return pa.DictionaryArray.from_arrays(pa.array(column.codes), pa.array(list(column.values), pa.string())).cast(pa.string())
    if kind is FieldType.TIMESTAMP:
        return pa.array(column).cast(TIME)
    missing = np.isnan(column)
    return pa.array(column, mask=missing) if missing.any() else pa.array(column)
