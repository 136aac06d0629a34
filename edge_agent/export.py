"""export: the readings that a buffer's file still holds, as CSV or JSON lines.

Columns: the stream's fields in the block's order, `score` if there is one, then what names a reading (device, epoch, lane, sequence,
row, ordinal) and how it was captured (stream, contract_version, model, fix, boot, monotonic_us, sealed_at, clock_synced), and
whether the lake has said that it holds it (settled). Of these, one that is called like a field gets `block_` before its name. Times are
ISO 8601 in UTC where the contract says that a field is one; without the contract they are microseconds since 1970. Missing numbers are
empty in CSV, null in JSON.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Container, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TextIO

from edge_agent.buffer_file import BufferFile, Found
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.stream import AGENT_STREAMS, FieldType, StreamContract

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def streams(file: BufferFile) -> list[str]:
    """The streams that the file holds readings of."""
    return sorted({found.header.stream for found in file.blocks()})


def export(file: BufferFile, out: TextIO, *, as_csv: bool, stream: str | None, contracts: Iterable[StreamContract] = ()) -> int:
    """Write the readings of one stream, or of all (JSON lines only); returns how many.

    Raises:
        ConfigError: several streams cannot share the columns of a CSV; the stream is not there; a key is missing.
    """
    times = {(c.stream, c.version): _times(c) for c in (*contracts, *AGENT_STREAMS)}
    if as_csv or stream is not None:
        there = streams(file)
        if stream is None and len(there) > 1:
            raise ConfigError(f"give --stream: the buffer holds {', '.join(there)}")
        if stream is not None and stream not in there:
            raise ConfigError(f"the buffer holds no readings of {stream!r}; it holds {', '.join(there) or 'none'}")
    rows = (
        row
        for found in file.blocks()
        if stream in (None, found.header.stream)
        for row in _rows(found, times.get((found.header.stream, found.header.contract_version), frozenset()))
    )
    return _write_csv(file, stream, rows, out) if as_csv else _write_lines(rows, out)


def _write_lines(rows: Iterator[dict[str, Any]], out: TextIO) -> int:
    count = 0
    for row in rows:
        out.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        count += 1
    return count


def _write_csv(file: BufferFile, stream: str | None, rows: Iterator[dict[str, Any]], out: TextIO) -> int:
    """Blocks of one stream may differ in columns: scored or not, contract versions."""
    fields: dict[str, None] = {}
    for found in file.blocks():
        if stream in (None, found.header.stream):
            fields |= dict.fromkeys(name for name in found.table if name != ORDINAL)
    writer = csv.DictWriter(out, [*fields, *(_word(name, fields) for name in (*_NAMES, *_CAPTURE))], restval="")
    writer.writeheader()
    count = 0
    for row in rows:
        writer.writerow({name: int(value) if isinstance(value, bool) else value for name, value in row.items()})
        count += 1
    return count


_NAMES = ("device", "epoch", "lane", "sequence", "row", ORDINAL)
_CAPTURE = ("stream", "contract_version", "model", "fix", "boot", "monotonic_us", "sealed_at", "clock_synced", "settled")


def _rows(found: Found, times: frozenset[str]) -> Iterator[dict[str, Any]]:
    header = found.header
    names = [name for name in found.table if name != ORDINAL]
    columns = [_values(found.table[name].tolist(), name in times) for name in names]
    ordinals: list[Any] = list(found.table[ORDINAL].tolist()) if ORDINAL in found.table else [None] * header.rows
    before = {"device": header.device, "epoch": header.epoch, "lane": header.lane, "sequence": header.sequence}
    after = {
        "stream": header.stream,
        "contract_version": header.contract_version,
        "model": header.model,
        "fix": str(header.fix),
        "boot": header.boot,
        "monotonic_us": header.monotonic_us,
        "sealed_at": _iso(header.sealed_us),
        "clock_synced": header.clock_synced,
        "settled": found.settled,
    }
    for row, values in enumerate(zip(*columns, strict=True)):
        block = {**before, "row": row, ORDINAL: ordinals[row], **after}
        yield {**dict(zip(names, values, strict=True)), **{_word(name, names): value for name, value in block.items()}}


def _word(name: str, fields: Container[str]) -> str:
    """What the block's own column is called beside a stream's fields."""
    return f"block_{name}" if name in fields else name


def _values(values: list[Any], are_times: bool) -> list[Any]:
    if are_times:
        return [_iso(value) for value in values]
    return [_number(value) if isinstance(value, float) else value for value in values]


def _number(value: float) -> float | str | None:
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)  # JSON has no infinity


def _iso(us: int) -> str | int:
    """ISO 8601 in UTC; a time that no calendar has stays a number."""
    try:
        return (_EPOCH + timedelta(microseconds=us)).isoformat()
    except OverflowError:
        return us


def _times(contract: StreamContract) -> frozenset[str]:
    return frozenset(f.name for f in contract.fields if f.type is FieldType.TIMESTAMP)
