"""Mappings: which column of a recorded file is which field of a stream.

A mapping is a strict TOML file (`contracts/mappings/*.toml`):

    separator = "whitespace"               # or one character; "," if left out
    columns = ["unit", "cycle", …]         # names for a file without a header line

    [entity]                               # the contract's entity field
    column = "unit"
    prefix = "engine-"                     # engine-001
    digits = 3

    [time]                                 # the contract's event-time field: a column …
    column = "when"
    unit = "auto"                          # auto (numbers: seconds, text: ISO 8601), s, ms, us, iso
                                           # … or a rule for files without a clock: start + order * step
    start = 2024-01-01T00:00:00Z
    order = "cycle"
    step_s = 3600.0

    [fields]                               # every other field = its column
    sensor_1 = "T2"

Files: `.parquet`, or delimited text (`.csv`, `.txt`, …), also gzipped (`.gz`). They are read in chunks of CHUNK_ROWS.
Entity and time must be readable in every row; what the other columns hold is passed on as it is.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from cloud.config import read_text
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.stream import StreamContract
from edge_agent.core.decode import EVENT_S_END
from edge_agent.core.settings import nearest, parse_settings

CHUNK_ROWS = 20_000
WHITESPACE = "whitespace"
MAPPINGS_DIR = Path("contracts/mappings")
DAMAGED = (OSError, EOFError, ValueError, zlib.error)
"""What pandas, Arrow and gzip raise at a file that is not what its name says, or is damaged."""
_US = {"s": 1e6, "ms": 1e3, "us": 1.0}


class EntityRule(msgspec.Struct, frozen=True):
    """The entity is `prefix` and the column's value; whole numbers get at least `digits` digits."""

    column: str
    prefix: str = ""
    digits: int = 0


class TimeRule(msgspec.Struct, frozen=True):
    """The event time is a column, or `start + order * step_s`."""

    column: str | None = None
    unit: Literal["auto", "s", "ms", "us", "iso"] = "auto"
    start: datetime | None = None
    order: str | None = None
    step_s: float | None = None


class ColumnMapping(msgspec.Struct, frozen=True, kw_only=True):
    """How the columns of a file become fields; `fields` is field name → column name."""

    entity: EntityRule
    time: TimeRule
    fields: dict[str, str] = {}
    separator: str = ","
    columns: list[str] | None = None

    @property
    def needed(self) -> dict[str, str]:
        """Every column that must be there, with what it is for."""
        needed = {column: f"field {field!r}" for field, column in self.fields.items()}
        needed[self.entity.column] = "the entity"
        needed[str(self.time.column or self.time.order)] = "the time"
        return needed


@dataclass(frozen=True)
class Chunk:
    """Some rows of a file: their entities, event times (microseconds since 1970 UTC), and all columns."""

    entity: list[str]
    event_us: npt.NDArray[np.int64]
    frame: pd.DataFrame


def load_mapping(name: str, project: Path) -> ColumnMapping:
    """Read a mapping by its name in `contracts/mappings` or by its path.

    Raises:
        ConfigError: there is none, or it is not one; the message says where and why.
    """
    folder = project / MAPPINGS_DIR
    path = Path(name) if name.endswith(".toml") or "/" in name else folder / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(f"no mapping {name!r} at {path}{nearest(name, [p.stem for p in folder.glob('*.toml')])}")
    return parse_mapping(read_text(path), str(path))


def parse_mapping(document: str, origin: str = "mapping") -> ColumnMapping:
    """Read a mapping document.

    Raises:
        ConfigError: it is not one; the message says where and why.
    """
    mapping = parse_settings(document, ColumnMapping, origin)
    try:
        return _checked(mapping)
    except ConfigError as e:
        raise ConfigError(f"{origin}: {e}") from e


def same_names(contract: StreamContract) -> ColumnMapping:
    """The mapping of a file whose columns are called like the fields."""
    rest = [f.name for f in contract.fields if f.name not in (contract.entity, contract.event_time)]
    return ColumnMapping(entity=EntityRule(contract.entity), time=TimeRule(column=contract.event_time), fields={n: n for n in rest})


def adjust(
    mapping: ColumnMapping,
    contract: StreamContract,
    sets: Mapping[str, str] | None = None,
    entity_prefix: str | None = None,
    start: datetime | None = None,
) -> ColumnMapping:
    """The mapping with some things changed on the command line, checked against the contract.

    Args:
        sets: field name → column name; the entity and the event time may be among them.
        start: a new start, for mappings that count time from one.

    Raises:
        ConfigError: an unknown field, a required field without a column, or a start where none is counted from.
    """
    entity, time, fields = mapping.entity, mapping.time, dict(mapping.fields)
    for field, column in (sets or {}).items():
        if field == contract.entity:
            entity = msgspec.structs.replace(entity, column=column)
        elif field == contract.event_time:
            time = TimeRule(column=column)
        else:
            fields[field] = column
    if entity_prefix is not None:
        entity = msgspec.structs.replace(entity, prefix=entity_prefix)
    if start is not None:
        if time.start is None:
            raise ConfigError(f"the time comes from column {time.column!r}; a start is of no use")
        time = msgspec.structs.replace(time, start=start)
    _check_fields(fields, contract)
    return _checked(msgspec.structs.replace(mapping, entity=entity, time=time, fields=fields))


def count_rows(path: Path, mapping: ColumnMapping) -> int:
    """How many rows the file holds.

    Raises:
        ConfigError: the file is not there or cannot be read.
    """
    _check_file(path)
    try:
        if path.suffix == ".parquet":
            return int(pq.ParquetFile(path).metadata.num_rows)
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            lines = sum(1 for line in file if line.strip())
    except DAMAGED as e:
        raise ConfigError(f"{path} does not read: {e}") from e
    return max(0, lines - (0 if mapping.columns else 1))


def read_rows(path: Path, mapping: ColumnMapping) -> Iterator[Chunk]:
    """The rows of a file, in its order.

    Raises:
        ConfigError: the file cannot be read, a column is missing, or a row has no entity or time; the message names the place.
    """
    _check_file(path)
    first = 1
    for frame in _frames(path, mapping):
        if first == 1:
            _check_columns(path, frame, mapping)
        try:
            yield Chunk(_entities(frame[mapping.entity.column], mapping.entity), _event_us(frame, mapping.time), frame)
        except _RowError as e:
            raise ConfigError(f"{path}, row {first + e.row}: {e}") from e
        first += len(frame)


class _RowError(Exception):
    """A row (counted from 0 in its chunk) has no usable entity or time."""

    def __init__(self, row: int, message: str) -> None:
        super().__init__(message)
        self.row = row


def _checked(mapping: ColumnMapping) -> ColumnMapping:
    time = mapping.time
    counted = (time.start, time.order, time.step_s)
    if (time.column is None) == (None in counted) or (time.column is not None and counted != (None, None, None)):
        raise ConfigError("[time] wants either `column`, or all of `start`, `order` and `step_s`")
    if time.start is not None and time.start.tzinfo is None:
        raise ConfigError(f"[time] start {time.start} has no zone; write e.g. 2024-01-01T00:00:00Z")
    if mapping.separator != WHITESPACE and len(mapping.separator) != 1:
        raise ConfigError(f"separator {mapping.separator!r} is neither one character nor {WHITESPACE!r}")
    names = mapping.columns or []
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ConfigError(f"columns repeat: {', '.join(repeated)}")
    for column, use in mapping.needed.items() if names else ():
        if column not in names:
            raise ConfigError(f"column {column!r} of {use} is not among `columns`{nearest(column, names)}")
    return mapping


def _check_fields(fields: Collection[str], contract: StreamContract) -> None:
    known = [f.name for f in contract.fields if f.name not in (contract.entity, contract.event_time)]
    for field in fields:
        if field not in known:
            raise ConfigError(f"stream {contract.stream!r} has no field {field!r}{nearest(field, known)}")
    missing = [n for n in known if n not in fields and contract.field(n).required]
    if missing:
        raise ConfigError(f"no column for {', '.join(missing)} of stream {contract.stream!r}; give --set {missing[0]}=COLUMN")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"no file {path}")


def _check_columns(path: Path, frame: pd.DataFrame, mapping: ColumnMapping) -> None:
    known = [str(c) for c in frame.columns]
    for column, use in mapping.needed.items():
        if column not in known:
            raise ConfigError(f"{path} has no column {column!r} for {use}; columns: {', '.join(known)}")


def _frames(path: Path, mapping: ColumnMapping) -> Iterator[pd.DataFrame]:
    try:
        if path.suffix == ".parquet":
            yield from (batch.to_pandas() for batch in pq.ParquetFile(path).iter_batches(CHUNK_ROWS))
        else:
            yield from _text_frames(path, mapping)
    except pd.errors.EmptyDataError as e:
        raise ConfigError(f"{path} is empty") from e
    except DAMAGED as e:
        raise ConfigError(f"{path} does not read: {str(e).strip()}") from e


def _text_frames(path: Path, mapping: ColumnMapping) -> Iterator[pd.DataFrame]:
    separator = r"\s+" if mapping.separator == WHITESPACE else mapping.separator
    header = None if mapping.columns else 0
    # round_trip: the same float64 that any other reader makes of the text
    with pd.read_csv(
        path, sep=separator, header=header, chunksize=CHUNK_ROWS, float_precision="round_trip", index_col=False, skipinitialspace=True
    ) as reader:
        for frame in reader:
            if mapping.columns:
                _name_columns(path, frame, mapping.columns)
            yield frame


def _name_columns(path: Path, frame: pd.DataFrame, names: Sequence[str]) -> None:
    if len(frame.columns) != len(names):
        raise ConfigError(f"{path} has {len(frame.columns)} columns, the mapping names {len(names)}: {', '.join(names)}")
    frame.columns = pd.Index(names)


def _entities(column: pd.Series[Any], rule: EntityRule) -> list[str]:
    values = column.tolist()
    names = []
    for row, value in enumerate(values):
        if pd.isna(value) or value == "":
            raise _RowError(row, f"column {rule.column!r} names no entity")
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            value = str(int(value))
        text = str(value)  # a number is text where a neighbour in its chunk is no number
        names.append(rule.prefix + (text.zfill(rule.digits) if text.removeprefix("-").isdecimal() else text))
    return names


def _event_us(frame: pd.DataFrame, rule: TimeRule) -> npt.NDArray[np.int64]:
    if rule.start is not None and rule.step_s is not None:
        offset = _numbers(frame, str(rule.order)) * (rule.step_s * 1e6)
        start_us = round(rule.start.timestamp() * 1e6)
        _refuse_outside(start_us + offset, frame, str(rule.order))
        return start_us + np.rint(offset).astype(np.int64)
    column = frame[rule.column]
    clock = column.dtype.kind == "M"
    if rule.unit in _US or (rule.unit == "auto" and not clock and pd.to_numeric(column, errors="coerce").notna().any()):
        return _scaled(frame, str(rule.column), _US.get(rule.unit, 1e6))
    times = pd.to_datetime(column, utc=True, errors="coerce", format=None if clock else "ISO8601")
    _refuse_first(times.isna().to_numpy(), frame, str(rule.column))
    event_us = times.dt.as_unit("us").astype(np.int64).to_numpy()
    _refuse_outside(event_us, frame, str(rule.column))
    return event_us


def _numbers(frame: pd.DataFrame, column: str) -> npt.NDArray[Any]:
    numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy()
    _refuse_first(~np.isfinite(numbers), frame, column)
    return numbers


def _scaled(frame: pd.DataFrame, column: str, us: float) -> npt.NDArray[np.int64]:
    numbers = _numbers(frame, column)
    _refuse_outside(numbers.astype(np.float64) * us, frame, column)
    if numbers.dtype.kind in "iu":  # exact, also beyond 2**53
        return numbers.astype(np.int64) * int(us)
    return np.rint(numbers * us).astype(np.int64)


def _refuse_outside(event_us: npt.NDArray[Any], frame: pd.DataFrame, column: str) -> None:
    """Refuse what no reading can have, before it becomes another time in 64 bits."""
    why = "not a time from 1970 to 2200; [time] of a mapping says in which `unit` numbers are"
    _refuse_first(~((event_us >= 0) & (event_us < EVENT_S_END * 1e6)), frame, column, why)


def _refuse_first(bad: npt.NDArray[np.bool_], frame: pd.DataFrame, column: str, why: str = "not a time") -> None:
    rows = np.flatnonzero(bad)
    if len(rows):
        raise _RowError(int(rows[0]), f"column {column!r} holds {frame[column].iloc[[rows[0]]].tolist()[0]!r}, {why}")
