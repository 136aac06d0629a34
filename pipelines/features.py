"""features: window features of the lake's readings, by the code that runs on the device.

- `LakeWindows` turns rows of the lake, as they come, into rows of features. Each device and epoch has windows of its own, fed in the order
  in which the device saw the readings. A new epoch is a new disk: the device itself starts with empty windows then.
- Devices are dealt out to Ray tasks. A task reads record batches and writes as it goes: it holds a batch and the open windows only.
- The result does not depend on the number of tasks or on how readings are cut into batches.
- A window's row says when it was known: `event_time` is the reading's (trailing) or the end of the window (tumbling, hopping),
  `created_time` when the lake had all the readings that it may hold, and the one that closes it (`pipelines.arrival`).
- Windows that are still open at the end of the lake are not made: the device has not made them either.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.feature_spec import FeatureSpec, WindowKind
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Made, Windows
from edge_agent.core.functions import NO_FUNCTIONS, Functions
from pipelines import cluster, stage
from pipelines.arrival import ARRIVED, Known, KnownHops
from pipelines.cli import progress
from pipelines.stage import Context

BATCH_ROWS = 65_536
DEVICES_MAX = 10_000
EVENT_TIME, CREATED_TIME, WINDOW_START = "event_time", "created_time", "window_start"
HALF = ".features"


@dataclass(frozen=True)
class Counts:
    """What a task did: readings taken and windows made; readings that missed windows of theirs: too late, or the hop was full."""

    readings: int = 0
    windows: int = 0
    late: int = 0
    overfull: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass
class _Device:
    """What is remembered of a device and epoch: open windows, last arrivals."""

    windows: Windows
    known: Known | KnownHops


class LakeWindows:
    """The open windows of many devices.

    Args:
        devices_max: so many (device, epoch) are remembered; the one longest unseen is forgotten first, and begins anew.

    Raises:
        BundleError: a function of the spec is not installed here.
    """

    def __init__(
        self, contract: StreamContract, spec: FeatureSpec, functions: Functions = NO_FUNCTIONS, devices_max: int = DEVICES_MAX
    ) -> None:
        self._contract, self._spec, self._functions, self._devices_max = contract, spec, functions, devices_max
        self._devices: dict[tuple[str, str], _Device] = {}

    @property
    def columns(self) -> list[str]:
        """What `push` needs of a row."""
        c = self._contract
        return list(dict.fromkeys([*self._spec.fields, c.entity, c.event_time, "device", "epoch", ARRIVED]))

    def push(self, rows: pa.Table) -> tuple[pa.Table, Counts]:
        """The features of the windows that these rows are done with.

        Args:
            rows: rows of the lake, sorted by device, epoch and the order seen; those of a device newer than what was taken of it.

        Returns:
            entity, event_time, created_time, device, window_start (windows that close), and a column per feature; in the order in
            which the windows were done.
        """
        parts, counts = [], Counts()
        for start, end in runs(rows):
            part = rows.slice(start, end - start)
            device = self._device(part)
            entity, event_us, fields = readings_of(part, self._contract, self._spec)
            made = device.windows.push(entity, event_us, fields)
            arrived_us = _microseconds(part[ARRIVED])
            if isinstance(device.known, Known):
                known_us = device.known.push(entity, arrived_us)
            else:
                known_us = device.known.push(entity, event_us, arrived_us, made)
            counts += Counts(part.num_rows, len(made.rows), len(made.late), len(made.overfull))
            parts.append(self._table(part, made, known_us))
        return (pa.concat_tables(parts) if parts else self._table(rows, _nothing(self._spec), np.zeros(0, np.int64))), counts

    def _device(self, part: pa.Table) -> _Device:
        """What is remembered of the device and epoch of these rows."""
        key = (part["device"][0].as_py(), part["epoch"][0].as_py())
        device = self._devices.pop(key, None)
        if device is None:
            windows, spec = Windows(self._spec, self._functions), self._spec
            trailing = spec.kind is WindowKind.TRAILING
            known = Known(spec.window_rows, windows.entities_max) if trailing else KnownHops(spec, windows.entities_max)
            device = _Device(windows, known)
        self._devices[key] = device
        for old in list(islice(self._devices, max(0, len(self._devices) - self._devices_max))):
            del self._devices[old]
        return device

    def _table(self, rows: pa.Table, made: Made, known_us: Ints) -> pa.Table:
        trailing = self._spec.kind is WindowKind.TRAILING
        done = rows if trailing else rows.select(list(dict.fromkeys([self._contract.entity, "device"]))).take(made.rows)
        time = pa.timestamp("us", "UTC")
        start = {} if trailing else {WINDOW_START: pa.array(made.start_us).cast(time)}
        return pa.table(
            {
                self._contract.entity: done[self._contract.entity],
                EVENT_TIME: pa.array(made.end_us).cast(time),
                CREATED_TIME: pa.array(known_us).cast(time),
                "device": done["device"],
                **start,
                **{name: pa.array(np.ascontiguousarray(made.features[:, i])) for i, name in enumerate(self._spec.names)},
            }
        )


def work(context: Context) -> None:
    """Write the features of all readings, one Parquet file per task.

    They appear together: who materialises meanwhile would take a part for the whole, and the next time only what is newer.
    """
    for left in (context.features, context.features.with_name(HALF)):
        shutil.rmtree(left, ignore_errors=True)
    out, params = context.folder(HALF), context.params
    parts = deal(count_by_device(context.readings), params.features.parts)
    calls = [
        (context.readings, devices, context.contract, params.spec, params.functions, out / f"part-{i:03d}.parquet")
        for i, devices in enumerate(parts)
    ]
    total = Counts()
    for done, (_, counts) in enumerate(cluster.as_done(write_part, calls), 1):
        total += counts
        progress(f"{total.readings} readings, {total.windows} windows with {len(params.spec.features)} features", done, len(calls))
    if total.late or total.overfull:
        progress(f"{total.late} readings came too late for a window of theirs, {total.overfull} found theirs full (features.window_rows)")
    out.rename(context.features)


def count_by_device(readings: Path) -> dict[str, int]:
    """Readings of each device in the snapshot. Row groups with one device alone are not read."""
    counts: dict[str, int] = {}
    file = pq.ParquetFile(readings, read_dictionary=["device"], memory_map=True)
    for group in range(file.num_row_groups):
        bounds = _device_bounds(file, group)
        if bounds is not None and bounds[0] == bounds[1]:
            found = {bounds[0]: file.metadata.row_group(group).num_rows}
        else:
            column = file.read_row_group(group, columns=["device"]).column(0)
            found = {count["values"]: count["counts"] for count in column.value_counts().to_pylist()}
        for device, rows in found.items():
            counts[device] = counts.get(device, 0) + rows
    return counts


def deal(counts: dict[str, int], parts: int) -> list[list[str]]:
    """At most so many groups of devices with about equally many readings, none of them empty.

    A group's devices follow each other in the sorted file, so that hardly any row group is read for two of them.
    """
    total, before = sum(counts.values()), 0
    groups: dict[int, list[str]] = {}
    for device in sorted(counts):
        middle = before + counts[device] / 2
        groups.setdefault(int(middle * parts / total), []).append(device)
        before += counts[device]
    return list(groups.values())


def write_part(readings: Path, devices: list[str], contract: StreamContract, spec: FeatureSpec, functions: Functions, out: Path) -> Counts:
    """Write the features of some devices."""
    windows, counts = LakeWindows(contract, spec, functions, devices_max=1), Counts()
    writer: pq.ParquetWriter | None = None
    waiting: list[pa.Table] = []
    try:
        for batch in read_devices(readings, devices, contract.entity, windows.columns):
            made, more = windows.push(batch)
            counts += more
            waiting.append(plain(made))
            writer = writer or pq.ParquetWriter(out, waiting[0].schema, compression="zstd")
            if sum(t.num_rows for t in waiting) >= BATCH_ROWS:
                writer.write_table(pa.concat_tables(waiting))
                waiting = []
        if writer is not None and waiting:
            writer.write_table(pa.concat_tables(waiting))
    finally:
        if writer is not None:
            writer.close()
    return counts


def read_devices(readings: Path, devices: list[str], entity: str, columns: list[str]) -> Iterator[pa.Table]:
    """The rows of some devices in the order of the file, one device and epoch at a time; row groups without them are not read."""
    file = pq.ParquetFile(readings, read_dictionary=[entity, "device", "epoch"], memory_map=True)
    wanted, groups = set(devices), []
    for group in range(file.num_row_groups):
        bounds = _device_bounds(file, group)
        if bounds is None or any(bounds[0] <= device <= bounds[1] for device in devices):
            groups.append(group)
    for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
        table = pa.Table.from_batches([batch])
        for start, end in runs(table):
            if table["device"][start].as_py() in wanted:
                yield table.slice(start, end - start)


def _device_bounds(file: pq.ParquetFile, group: int) -> tuple[str, str] | None:
    """The first and the last device of a row group, if the file says so."""
    place = file.schema_arrow.get_field_index("device")
    found = file.metadata.row_group(group).column(place).statistics
    return (found.min, found.max) if found is not None and found.has_min_max else None


def windows_of(
    readings: pa.Table,
    contract: StreamContract,
    spec: FeatureSpec,
    functions: Functions = NO_FUNCTIONS,
    batch_rows: int = BATCH_ROWS,
) -> Made:
    """The windows of readings that are sorted by device, epoch and the order seen."""
    parts = []
    for start, end in runs(readings):
        windows = Windows(spec, functions)
        for first in range(start, end, batch_rows):
            part = readings.slice(first, min(batch_rows, end - first))
            parts.append((first, windows.push(*readings_of(part, contract, spec))))
    return Made.together(parts) if parts else _nothing(spec)


def readings_of(rows: pa.Table, contract: StreamContract, spec: FeatureSpec) -> tuple[Strings, np.ndarray, Table]:
    """Entity, event time in microseconds and the fields of rows, ready for `Windows.push`."""
    entity = rows[contract.entity].combine_chunks().dictionary_encode()
    strings = Strings(entity.indices.to_numpy(zero_copy_only=False), tuple(entity.dictionary.to_pylist()))
    return strings, _microseconds(rows[contract.event_time]), {name: _floats(rows[name]) for name in spec.fields}


def runs(readings: pa.Table) -> list[tuple[int, int]]:
    """The stretches [start, end) of rows of one device and epoch."""
    if not readings.num_rows:
        return []
    changed = np.zeros(readings.num_rows - 1, bool)
    for name in ("device", "epoch"):
        codes = pc.dictionary_encode(readings[name].combine_chunks()).indices.to_numpy(zero_copy_only=False)
        changed |= codes[1:] != codes[:-1]
    cuts = (np.flatnonzero(changed) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, readings.num_rows], strict=True))


def _microseconds(column: pa.ChunkedArray) -> Ints:
    """Times of microseconds, as numbers."""
    values: Ints = column.cast(pa.int64()).to_numpy()
    return values


def _floats(column: pa.ChunkedArray) -> Floats:
    if column.null_count:
        column = column.cast(pa.float64()).fill_null(np.nan)
    values: Floats = column.combine_chunks().to_numpy(zero_copy_only=False)
    return values


def plain(table: pa.Table) -> pa.Table:
    """The table with plain text columns: readers of Parquet need not know of dictionaries."""
    fields = [pa.field(f.name, pa.string()) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pa.schema(fields))


def _nothing(spec: FeatureSpec) -> Made:
    none, times = np.zeros(0, np.intp), np.zeros(0, np.int64)
    return Made(np.empty((0, len(spec.features))), none, times, times, none, none)


if __name__ == "__main__":
    sys.exit(stage.main("features", work))
