"""The newest row of each entity of a view's batch source, in bounded memory.

- The newest row has the highest event time, then created time; equal ones are settled by content, so that the answer is always the same.
- DuckDB reads Parquet or Delta, local or on S3, with at most MEMORY_LIMIT, and spills to disk beside the feature registry; rows come out in
  batches. Why not Feast's own engine: see docs/decisions/0027.
- Rows without a key or an event time are no entity's; they are counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa
from deltalake.exceptions import DeltaError, TableNotFoundError

from edge_agent.contract.errors import ConfigError, UnavailableError
from pipelines.feature_sources import Source
from pipelines.online_writer import BATCH_ROWS

if TYPE_CHECKING:
    from feast import FeatureView

    from pipelines.feature_store import Repo

MEMORY_LIMIT = "1GB"
TIME = pa.timestamp("us", "UTC")
_TABLE = "source"


class Newest:
    """The rows of a source that a condition picks; conditions are SQL, made by `since` and `until`."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, view: FeatureView) -> None:
        source: Any = view.batch_source
        stored = {new: old for old, new in source.field_mapping.items()}
        self._connection = connection
        self._time, self._created = source.timestamp_field, source.created_timestamp_column
        self._keys = {e.name: stored.get(e.name, e.name) for e in view.entity_columns}
        self._features = {f.name: stored.get(f.name, f.name) for f in view.features}

    def since(self, created_us: int, event_us: int) -> str:
        """Created later than that, or of a later time. A source without created times can only be read whole."""
        return f"({_us(self._created)} > {created_us} OR {_us(self._time)} > {event_us})" if self._created else "TRUE"

    def until(self, moment: datetime) -> str:
        """Of that time or earlier; a time without a zone is UTC."""
        aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return f"{_us(self._time)} <= {(aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)}"

    def count(self, where: str) -> tuple[int, int, int, int]:
        """Entities; rows that are no entity's; the highest created and event time, in microseconds, 0 without rows."""
        keys = ", ".join(_name(c) for c in self._keys.values()) or "1"
        created = _us(self._created) if self._created else "0"
        entities = self._one(f"SELECT count(*) FROM (SELECT DISTINCT {keys} FROM {_TABLE} WHERE {where} AND {self._whole})")
        found = self._one(
            f"SELECT count(*) FILTER (NOT ({self._whole})), coalesce(max({created}), 0), coalesce(max({_us(self._time)}), 0) "
            f"FROM {_TABLE} WHERE {where}"
        )
        return entities[0], found[0], found[1], found[2]

    def batches(self, where: str) -> Iterator[pa.RecordBatch]:
        """The newest of the rows of each entity, under Feast's names, at most BATCH_ROWS at a time."""
        times = [c for c in (self._time, self._created) if c]
        named = [f"{_name(old)} AS {_name(new)}" for new, old in (*self._keys.items(), *self._features.items())]
        partition = f"PARTITION BY {', '.join(_name(c) for c in self._keys.values())}" if self._keys else ""
        order = [f"{_us(c)} DESC NULLS LAST" for c in times]
        order.append(f"hash({', '.join(_name(c) for c in self._features.values())}) DESC")
        query = (
            f"SELECT {', '.join([*named, *(f'{_us(c)} AS {_name(c)}' for c in times)])} FROM {_TABLE} WHERE {where} AND {self._whole} "
            f"QUALIFY row_number() OVER ({partition} ORDER BY {', '.join(order)}) = 1"
        )
        for batch in self._connection.sql(query).to_arrow_reader(BATCH_ROWS):
            for first in range(0, batch.num_rows, BATCH_ROWS):
                yield _with_times(batch.slice(first, BATCH_ROWS), times)

    @property
    def _whole(self) -> str:
        return " AND ".join(f"{_name(c)} IS NOT NULL" for c in (*self._keys.values(), self._time))

    def _one(self, query: str) -> tuple[int, ...]:
        (found,) = self._connection.sql(query).fetchall()
        return tuple(int(x) for x in found)


@contextmanager
def newest_of(repo: Repo, view: FeatureView) -> Iterator[Newest]:
    """The source of a view, open for reading; what DuckDB spills goes with it.

    Raises:
        ConfigError: the source is not there, or is of another kind.
        UnavailableError: its storage does not answer.
    """
    spill_dir = repo.data / "spill"
    spill_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=spill_dir) as spill, duckdb.connect() as connection:
        for setting, value in (("memory_limit", MEMORY_LIMIT), ("temp_directory", spill), ("preserve_insertion_order", "false")):
            connection.execute(f"SET {setting} = '{value}'")
        try:
            connection.register(_TABLE, Source.of(view.batch_source, repo.store.config).dataset())
            yield Newest(connection, view)
        except (FileNotFoundError, TableNotFoundError) as e:
            raise ConfigError(f"the source of view {view.name!r} is not there ({e}); make it first: fenceline train") from e
        except (OSError, DeltaError, duckdb.IOException) as e:
            raise UnavailableError(f"the source of view {view.name!r} does not read: {e}") from e


def _with_times(batch: pa.RecordBatch, times: list[str]) -> pa.RecordBatch:
    for name in times:
        place = batch.schema.get_field_index(name)
        batch = batch.set_column(place, name, batch.column(place).cast(TIME))
    return batch


def _us(column: str) -> str:
    return f"epoch_us({_name(column)})"


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'
