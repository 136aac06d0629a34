"""features: window features of every reading, by the code that runs on the device.

- Devices are dealt out to Ray tasks; a device's readings go through one `Windows` per epoch, in the order the device saw them.
  A new epoch is a new disk: the device itself starts with empty windows then.
- The result does not depend on the number of tasks or on how readings are cut into batches.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from edge_agent.contract.bundle import FeatureSpec
from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from pipelines import cluster, stage
from pipelines.cli import progress
from pipelines.stage import Context

BATCH_ROWS = 8_192
EVENT_TIME, CREATED_TIME = "event_time", "created_time"


def work(context: Context) -> None:
    """Write the features of all readings, one Parquet file per task."""
    shutil.rmtree(context.features, ignore_errors=True)
    out = context.folder("features")
    parts = deal(count_by_device(context.readings), context.params.features.parts)
    calls = [
        (context.readings, devices, context.contract, context.params.spec, out / f"part-{i:03d}.parquet") for i, devices in enumerate(parts)
    ]
    rows = 0
    for done, (_, written) in enumerate(cluster.as_done(write_part, calls), 1):
        rows += written
        progress(f"{rows} readings with {len(context.params.spec.features)} features", done, len(calls))


def count_by_device(readings: Path) -> dict[str, int]:
    """Readings of each device in the snapshot."""
    counts = pq.read_table(readings, columns=["device"]).column("device").value_counts().to_pylist()
    return {c["values"]: c["counts"] for c in counts}


def deal(counts: dict[str, int], parts: int) -> list[list[str]]:
    """Groups of devices with about equally many readings, the largest first; never an empty group."""
    groups: list[list[str]] = [[] for _ in range(min(parts, len(counts)))]
    sizes = [0] * len(groups)
    for device in sorted(counts, key=lambda d: (-counts[d], d)):
        smallest = sizes.index(min(sizes))
        groups[smallest].append(device)
        sizes[smallest] += counts[device]
    return [sorted(group) for group in groups]


def write_part(readings: Path, devices: list[str], contract: StreamContract, spec: FeatureSpec, out: Path) -> int:
    """Write the features of some devices; the number of rows."""
    fields = dict.fromkeys(f.field for f in spec.features)
    columns = [*fields, contract.entity, contract.event_time, "device", "epoch", "arrived_at"]
    table = pq.read_table(readings, columns=list(dict.fromkeys(columns)), filters=[("device", "in", devices)])
    features = windows_of(table, contract, spec)
    made = {name: features[:, i] for i, name in enumerate(spec.names)}
    keys = {
        contract.entity: table[contract.entity],
        EVENT_TIME: table[contract.event_time],
        CREATED_TIME: table["arrived_at"],
        "device": table["device"],
    }
    pq.write_table(pa.table({**keys, **made}), out, compression="zstd")
    return int(table.num_rows)


def windows_of(readings: pa.Table, contract: StreamContract, spec: FeatureSpec, batch_rows: int = BATCH_ROWS) -> Floats:
    """The features of readings that are sorted by device, epoch and order seen: float64 (rows, features)."""
    out = np.empty((readings.num_rows, len(spec.features)))
    fields = list(dict.fromkeys(f.field for f in spec.features))
    for start, end in runs(readings):
        windows = Windows(spec)
        for first in range(start, end, batch_rows):
            part = readings.slice(first, min(batch_rows, end - first))
            entity = part[contract.entity].combine_chunks().dictionary_encode()
            strings = Strings(entity.indices.to_numpy(zero_copy_only=False), tuple(entity.dictionary.to_pylist()))
            event_us = part[contract.event_time].cast(pa.int64()).to_numpy()
            columns: Table = {name: _floats(part[name]) for name in fields}
            out[first : first + part.num_rows] = windows.push(strings, event_us, columns)
    return out


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


def _floats(column: pa.ChunkedArray) -> Floats:
    values: Floats = column.cast(pa.float64()).fill_null(np.nan).to_numpy()
    return values


if __name__ == "__main__":
    sys.exit(stage.main("features", work))
