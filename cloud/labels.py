"""Labels: what a model learns to say of a reading.

- A label belongs to an entity and an event time. Adding it again changes nothing, adding another value replaces it.
- Who adds at the same time as another adds to what the other has added: additions exclude each other by a Delta transaction.
- Run-to-failure data labels itself: the remaining useful life of a row is the number of cycles until the last row of its engine.
  Only give it files that end with the failure.
- Values are stored as they are. Clipping (at 125 cycles, say) belongs to the training, not to the truth.

Columns: entity (string), event_time (timestamp[us, UTC]), label (float64).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.lake import ATTEMPTS_MAX, Lake
from cloud.mapping import Chunk, ColumnMapping, EntityRule, TimeRule, read_rows
from cloud.tables import LABELS, read_table
from edge_agent.contract.errors import ConfigError, UnavailableError

APP = "fenceline/labels"
SCHEMA = pa.schema([("entity", pa.string()), ("event_time", pa.timestamp("us", "UTC")), ("label", pa.float64())])


def run_to_failure(path: Path, mapping: ColumnMapping) -> pa.Table:
    """Remaining useful life of every row: cycles until the last row of its entity, not clipped.

    Cycles are counted in the mapping's `order` column; without one, the rows of the entity in order of time.

    Raises:
        ConfigError: the file does not fit the mapping.
    """
    frame = _frame(path, mapping, mapping.time.order)
    if mapping.time.order is None:
        frame["label"] = frame.groupby("entity")["event_us"].rank(method="dense")
    frame["label"] = frame.groupby("entity")["label"].transform("max") - frame["label"]
    return _table(frame)


def from_column(path: Path, mapping: ColumnMapping, value: str) -> pa.Table:
    """The labels that column `value` holds; rows without one are left out.

    Raises:
        ConfigError: the file does not fit the mapping, or a value is not a number.
    """
    return _table(_frame(path, mapping, value))


def plain(entity: str, time: str) -> ColumnMapping:
    """The mapping of a file with a header that has an entity column and a time column."""
    return ColumnMapping(entity=EntityRule(entity), time=TimeRule(column=time))


def add(lake: Lake, stream: str, table: pa.Table) -> int:
    """Store labels, replacing those of the same entity and event time.

    Returns:
        How many labels the stream has now.

    Raises:
        UnavailableError: the lake does not read or commit; add again.
    """
    root = lake.roots.default
    path = root.path(LABELS, stream)
    for _ in range(ATTEMPTS_MAX):
        try:
            stored = DeltaTable.create(path, SCHEMA, mode="ignore", storage_options=root.storage_options())
            result = _merged(read_table(stored), table)
            write_deltalake(
                stored,  # as it was read: who committed since then is met
                result,
                mode="overwrite",
                schema_mode="overwrite",
                commit_properties=CommitProperties(app_transactions=[Transaction(APP, time.time_ns())]),
            )
            return int(result.num_rows)
        except CommitFailedError:
            continue
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"labels of {stream} in {path} did not commit: {e}; add them again") from e
    raise UnavailableError(f"labels of {stream}: {ATTEMPTS_MAX} commits in a row met other additions; add them again")


def _merged(stored: pa.Table, new: pa.Table) -> pa.Table:
    whole = pa.concat_tables([stored.select(SCHEMA.names).cast(SCHEMA), new.cast(SCHEMA)])
    latest = whole.to_pandas().drop_duplicates(["entity", "event_time"], keep="last")
    return pa.Table.from_pandas(latest.sort_values(["entity", "event_time"]), SCHEMA, preserve_index=False)


def _frame(path: Path, mapping: ColumnMapping, value: str | None) -> pd.DataFrame:
    """Entity, time and value of every row; the last row wins where two name the same reading."""
    frames = list(_values(path, read_rows(path, mapping), value))
    if not any(len(frame) for frame in frames):
        raise ConfigError(f"{path} holds no rows to label")
    return pd.concat(frames, ignore_index=True).drop_duplicates(["entity", "event_us"], keep="last")


def _values(path: Path, chunks: Iterator[Chunk], value: str | None) -> Iterator[pd.DataFrame]:
    for chunk in chunks:
        labels: npt.NDArray[np.float64] = np.zeros(len(chunk.entity))
        if value is not None:
            if value not in chunk.frame:
                raise ConfigError(f"{path} has no column {value!r}; columns: {', '.join(map(str, chunk.frame.columns))}")
            if chunk.frame[value].dtype.kind in "mM":
                raise ConfigError(f"{path}, column {value!r} holds times; labels are numbers")
            try:
                labels = chunk.frame[value].to_numpy(np.float64)
            except (ValueError, TypeError) as e:
                raise ConfigError(f"{path}, column {value!r}: {e}; labels are numbers") from e
        yield pd.DataFrame({"entity": chunk.entity, "event_us": chunk.event_us, "label": labels})


def _table(frame: pd.DataFrame) -> pa.Table:
    labelled = frame.dropna(subset=["label"])
    times = pa.array(labelled["event_us"].to_numpy(np.int64), pa.timestamp("us", "UTC"))
    return pa.table([pa.array(labelled["entity"], pa.string()), times, pa.array(labelled["label"].to_numpy(np.float64))], schema=SCHEMA)
