"""The lake's Delta tables: one for each lane and stream, partitioned by event date.

- A table lies in `<root of the lane>/<lane>/<stream>/`: first where it may be, then what it is. Names with `_` before them are no lanes.
- The contract that made a table is its description: it says how rows are sorted and what later contracts have to fit.
- A lake whose tables lie elsewhere than its settings say is not read: it would look empty, or half of it would. Looked into are the roots
  that the settings name; of these, before a lane is written to, those that need no keys or answers of another zone's bucket.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from cloud.evolution import StoredContract, stored
from cloud.roots import Root, Roots, may_see
from cloud.rows import EVENT_DATE, schema
from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.contract.stream import StreamContract
from edge_agent.contract.topics import check_lane, check_name

LABELS = "_labels"
HISTORY = {"delta.logRetentionDuration": "interval 30 days", "delta.deletedFileRetentionDuration": "interval 7 days"}
"""How long versions can be read again; see docs/lake.md."""
STATISTICS = "delta.dataSkippingStatsColumns"
COUNTED = ("device", "epoch", "sequence", "ordinal", "arrived_at")
"""With entity and event time: the columns whose least and greatest values in each file are in the log. Delta's default is the first 32."""


class Tables:
    """The tables in `roots`."""

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self._checked: set[Root] = set()

    def check(self, roots: Iterable[Root]) -> None:
        """See that the tables in these roots lie where the settings say; looks once into each.

        Raises:
            ConfigError: they do not; the message says which, and what to do.
            UnavailableError: a root does not answer.
        """
        for root in [root for root in roots if root not in self._checked]:
            for lane in _named(root.folders()):
                stream = next((s for s in _named(root.folders(lane)) if is_table(root, lane, s)), None)
                if stream is not None:
                    self._check_layout(root, lane, stream)
                    self._check_place(root, lane)
            self._checked.add(root)

    def _check_layout(self, root: Root, lane: str, stream: str) -> None:
        columns = open_table(root.path(lane, stream), root).metadata().partition_columns
        if columns != [EVENT_DATE]:
            raise ConfigError(
                f"{root} holds a lake of an older layout: {lane}/{stream} is partitioned by {columns or 'nothing'}, not by {EVENT_DATE}, "
                "and streams lie above zones. Fenceline 0.1 never read it; move it away, or give the lake another root ([lake] root)"
            )

    def _check_place(self, root: Root, lane: str) -> None:
        try:
            check_lane(lane)
        except ContractError as e:
            raise ConfigError(f"{root} holds {lane!r}, which is no lane ({e}); the root of a lake holds nothing else") from e
        if (wanted := self.roots.of(lane)) != root:
            raise ConfigError(
                f"lane {lane!r} lies in {root}, but the settings place it in {wanted}. Stop every ingest, move {root.path(lane)} to "
                f"{wanted.path(lane)}, and start again; or change [lake.zones]"
            )

    def streams(self, lane: str | None = None) -> list[str]:
        """The streams that have a table, in `lane` or anywhere."""
        self.check(self.roots.all if lane is None else self.roots.beside(lane))
        lanes = self._lanes(self.roots.all) if lane is None else [(lane, self.roots.of(lane))]
        return sorted({s for name, root in lanes for s in _named(root.folders(name)) if is_table(root, name, s)})

    def lanes(self, stream: str) -> list[str]:
        """The lanes that have a table of a stream."""
        self.check(self.roots.all)
        return sorted(lane for lane, root in self._lanes(self.roots.all) if is_table(root, lane, stream))

    def within(self, zones: Collection[str]) -> list[tuple[str, str]]:
        """Stream and lane of each table of a lane of nothing but `zones`, sorted; no other zone's root is asked."""
        roots = self.roots.within(zones)
        self.check(roots)
        lanes = [(lane, root) for lane, root in self._lanes(roots) if may_see(lane, zones)]
        return sorted((s, lane) for lane, root in lanes for s in _named(root.folders(lane)) if is_table(root, lane, s))

    def _lanes(self, roots: list[Root]) -> list[tuple[str, Root]]:
        return [(lane, root) for root in roots for lane in _named(root.folders())]

    def open(self, stream: str, lane: str, version: int | None = None) -> DeltaTable:
        """A table as it is now, or as it was.

        Raises:
            UnavailableError: there is no such table or version, or the storage does not answer.
        """
        root = self.roots.of(check_lane(lane))
        return open_table(root.path(lane, check_name(stream, "stream")), root, version)

    def create(self, lane: str, contract: StreamContract) -> DeltaTable:
        """A table for rows of a contract; the one that is there, if there is one."""
        root = self.roots.of(check_lane(lane))
        return DeltaTable.create(
            root.path(lane, contract.stream),
            schema=schema(contract),
            mode="ignore",
            partition_by=EVENT_DATE,
            name=f"{lane}/{contract.stream}",
            description=msgspec.json.encode(stored(contract)).decode(),
            configuration={**HISTORY, STATISTICS: ",".join((contract.entity, contract.event_time, *COUNTED))},
            storage_options=root.storage_options(),
        )


def contract_of(table: DeltaTable) -> StoredContract:
    """The contract that made a table.

    Raises:
        UnavailableError: the table says none: it was not made by Fenceline.
    """
    try:
        return msgspec.json.decode(table.metadata().description or "", type=StoredContract)
    except msgspec.DecodeError as e:
        raise UnavailableError(f"table {table.table_uri} was not made by Fenceline: its description is not a contract ({e})") from e


def is_table(root: Root, *parts: str) -> bool:
    """Whether a table lies there.

    Raises:
        UnavailableError: the storage does not answer.
    """
    try:
        return DeltaTable.is_deltatable(root.path(*parts), root.storage_options())
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"{root.path(*parts)} does not answer: {e}") from e


def open_table(uri: str, root: Root, version: int | None = None) -> DeltaTable:
    """Open a table of a root.

    Raises:
        UnavailableError: there is no such table or version, or the storage does not answer.
    """
    try:
        return DeltaTable(uri, version=version, storage_options=root.storage_options())
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"lake {uri} version {'newest' if version is None else version} does not open: {e}") from e


def read_table(table: DeltaTable, **how: Any) -> pa.Table:
    """Rows of an open table; `how` is what a dataset's `to_table` takes.

    Raises:
        UnavailableError: its files cannot be read.
    """
    try:
        return table.to_pyarrow_dataset().to_table(**how)
    except (DeltaError, OSError) as e:
        raise UnavailableError(f"lake {table.table_uri} version {table.version()} does not read: {e}") from e


def text_field(column: str) -> pc.Expression:
    """A text column in a filter; every filter of a dataset by text uses it, and files are not skipped by it.

    Files that Delta's update wrote say that their text is `string_view`, which Arrow does not compare with `string`.
    """
    return pc.field(column).cast(pa.string())


def query_dataset(table: DeltaTable) -> pyarrow.dataset.Dataset:
    """A table for DuckDB, its text as `string_view`: DuckDB then filters text itself, and leaves the rest to Arrow (see `text_field`)."""
    fields = pa.schema(table.schema())
    views = [f.with_type(pa.string_view()) if pa.types.is_string(f.type) else f for f in fields]
    return table.to_pyarrow_dataset(schema=pa.schema(views))


def _named(folders: list[str]) -> list[str]:
    return [name for name in folders if not name.startswith(("_", "."))]
