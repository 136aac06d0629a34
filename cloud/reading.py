"""Reading rows of the lake: in the order in which each device saw them, and only files of the dates that are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cloud.evolution import StoredContract
from cloud.rows import DAY_US, DAYS, EVENT_DATE, ORDER, TIME
from cloud.tables import contract_of, read_table

TAKE_BYTES_MAX = 2**30
"""Of one text column that is sorted as it is; Arrow counts them in 31 bits."""


def read_rows(tables: Sequence[DeltaTable], columns: Sequence[str] | None, during_us: tuple[int, int] | None) -> pa.Table:
    """Rows of a stream's tables as one, sorted by ORDER; the arguments are those of `Lake.read`.

    A column that a table does not have is null: no row of the field's contract has come there yet.

    Raises:
        UnavailableError: files cannot be read.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, *ORDER]))
    parts = []
    for table in tables:
        within = None if during_us is None else _during(contract_of(table), *during_us)
        parts.append(_filled(read_table(table, columns=_there(table, wanted), filter=within), wanted or ()))
    if not parts:
        return pa.table({})
    whole = _ordered(pa.concat_tables(parts, promote_options="default"))
    return whole if columns is None else whole.select(list(columns))


def schema_with(table: DeltaTable, columns: Sequence[str]) -> pa.Schema:
    """A table's schema, with these columns: what it does not have yet can only be a number (`cloud.evolution`)."""
    known = pa.schema(table.schema())
    return pa.schema([*known, *((name, pa.float64()) for name in columns if name not in known.names)])


def _there(table: DeltaTable, wanted: Sequence[str] | None) -> list[str] | None:
    known = {field.name for field in table.schema().fields}
    return None if wanted is None else [name for name in wanted if name in known]


def _filled(part: pa.Table, wanted: Sequence[str]) -> pa.Table:
    for name in wanted:
        if name not in part.column_names:
            part = part.append_column(name, pa.nulls(part.num_rows, pa.float64()))
    return part


def _during(contract: StoredContract, from_us: int, to_us: int) -> pc.Expression:
    """Rows whose event time is at least `from_us` and less than `to_us`; rows that have no date are looked at too."""
    first, last = (min(max(us // DAY_US, DAYS.start), DAYS.stop - 1) for us in (from_us, to_us - 1))
    epoch, day = date(1970, 1, 1), pc.field(EVENT_DATE)
    dates = (day >= epoch + timedelta(first)) & (day <= epoch + timedelta(last))
    times = pc.field(contract.event_time)
    return (dates | day.is_null()) & (times >= pa.scalar(from_us, TIME)) & (times < pa.scalar(to_us, TIME))


def _ordered(table: pa.Table) -> pa.Table:
    """Rows sorted by ORDER. Columns with more text than Arrow can sort at once are sorted with wide offsets."""
    index = pc.sort_indices(table.select(ORDER), [(name, "ascending") for name in ORDER])
    if max(map(_text_bytes, table.columns)) <= TAKE_BYTES_MAX:
        return table.take(index)
    wide = pa.schema([f.with_type(pa.large_string()) if pa.types.is_string(f.type) else f for f in table.schema])
    return pa.concat_tables(narrowed(table.cast(wide).take(index), table.schema))


def narrowed(wide: pa.Table, narrow: pa.Schema) -> Iterator[pa.Table]:
    """The table in parts whose texts fit usual columns."""
    if wide.num_rows > 1 and max(map(_text_bytes, wide.columns)) > TAKE_BYTES_MAX:
        half = wide.num_rows // 2
        yield from narrowed(wide.slice(0, half), narrow)
        yield from narrowed(wide.slice(half), narrow)
    else:
        yield wide.cast(narrow)


def _text_bytes(column: pa.ChunkedArray) -> int:
    return int(column.nbytes) if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else 0
