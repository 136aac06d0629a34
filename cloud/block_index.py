"""Which blocks a table of the lake holds: one row per block, read from each of the table's files once.

Files of a Delta table never change, so what is in one is remembered; a look at a lake that has grown reads only what is new. Columns:
`device`, `epoch`, `sequence`, `rows`, `arrived_us`, `first_us` and `last_us` (event times), and for each field asked for `missing_FIELD`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from edge_agent.contract.errors import UnavailableError

BLOCK = ("device", "epoch", "sequence")
_MERGE = {"rows": "sum", "arrived_us": "min", "first_us": "min", "last_us": "max"}


class BlockIndex:
    """What was read of tables so far; keep it to look again cheaply."""

    def __init__(self) -> None:
        self._files: dict[tuple[str, ...], dict[str, pa.Table]] = {}

    def blocks(self, table: DeltaTable, event_time: str, fields: Sequence[str] = ()) -> pa.Table:
        """The blocks of a table, sorted by device, epoch, sequence.

        Args:
            event_time: the column of event times; `fields`: count the missing values of these.

        Raises:
            UnavailableError: a file does not read.
        """
        merge = {**_MERGE, **{f"missing_{name}": "sum" for name in fields}}
        parts = self._parts(table, ("blocks", event_time, *fields), lambda rows: _by_block(rows, event_time, fields))
        if not parts:
            none = {"device": pa.string(), "epoch": pa.string(), "sequence": pa.int64(), **dict.fromkeys(merge, pa.int64())}
            return pa.schema(list(none.items())).empty_table()
        whole = pa.concat_tables(parts).group_by(list(BLOCK)).aggregate(list(merge.items()))
        whole = whole.rename_columns([*BLOCK, *merge])
        return whole.sort_by([(name, "ascending") for name in BLOCK])

    def newest(self, table: DeltaTable, event_time: str, entity: str) -> pa.Table:
        """The newest event time of each entity: columns `device`, `entity`, `last_us`.

        Raises:
            UnavailableError: a file does not read.
        """
        parts = self._parts(table, ("newest", event_time, entity), lambda rows: _by_entity(rows, event_time, entity))
        if not parts:
            return pa.schema([("device", pa.string()), ("entity", pa.string()), ("last_us", pa.int64())]).empty_table()
        whole = pa.concat_tables(parts).group_by(["device", "entity"]).aggregate([("last_us", "max")])
        return whole.rename_columns(["device", "entity", "last_us"])

    def _parts(self, table: DeltaTable, what: tuple[str, ...], read: Callable[[_Rows], pa.Table]) -> list[pa.Table]:
        key = (table.table_uri, *what)
        known, now = self._files.get(key, {}), dict[str, pa.Table]()
        try:
            dataset = table.to_pyarrow_dataset()
            for fragment in dataset.get_fragments():
                now[fragment.path] = known[fragment.path] if fragment.path in known else read(_Rows(fragment, dataset.schema))
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"lake {table.table_uri} does not read: {e}") from e
        self._files[key] = now
        return list(now.values())


class _Rows:
    """Columns of one file; those that it, or its table, does not have are null."""

    def __init__(self, fragment: pads.Fragment, schema: pa.Schema) -> None:
        self._fragment, self._schema = fragment, schema

    def read(self, columns: Sequence[str]) -> pa.Table:
        wanted = list(dict.fromkeys(columns))
        found = self._fragment.to_table(columns=[name for name in wanted if name in self._schema.names], schema=self._schema)
        for name in wanted:
            if name not in found.column_names:  # a field that is newer than every row of the table
                found = found.append_column(name, pa.nulls(found.num_rows))
        return found


def _by_block(rows: _Rows, event_time: str, fields: Sequence[str]) -> pa.Table:
    found = rows.read([*BLOCK, "arrived_at", event_time, *fields])
    event_us, arrived_us = found[event_time].cast(pa.int64()), found["arrived_at"].cast(pa.int64())
    missing = {f"missing_{name}": pc.is_null(found[name]).cast(pa.int64()) for name in fields}
    facts = pa.table({**{name: found[name] for name in BLOCK}, "arrived_us": arrived_us, "event_us": event_us, **missing})
    grouped = facts.group_by(list(BLOCK)).aggregate(
        [([], "count_all"), ("arrived_us", "min"), ("event_us", "min"), ("event_us", "max"), *((name, "sum") for name in missing)]
    )
    return grouped.rename_columns([*BLOCK, "rows", "arrived_us", "first_us", "last_us", *missing])


def _by_entity(rows: _Rows, event_time: str, entity: str) -> pa.Table:
    found = rows.read(["device", entity, event_time])
    facts = pa.table({"device": found["device"], "entity": found[entity], "last_us": found[event_time].cast(pa.int64())})
    return facts.group_by(["device", "entity"]).aggregate([("last_us", "max")]).rename_columns(["device", "entity", "last_us"])
