"""How fast, and how exactly, window features are made: on Ray from the lake's readings, and batch by batch as on a device.

- The lake: 10 M readings of two fields, 100 devices with 10 engines that take turns, in one Parquet file as the snapshot stage writes it.
  Five aggregates of each field, over the last 30 readings of the engine (`trailing`), and over seconds of 100 readings (`tumbling`).
  Everybody reads the file and ends with the features in memory: ours in Ray's object store, made by tasks on a Ray that runs;
  Polars (`rolling_* .over`, `group_by_dynamic`) on all cores; pandas (`groupby.rolling`, `groupby`) once, the others best of several.
- Every value is compared with both peers' (rtol 1e-6: a deviation is a root of differences). Ours must have the same bits when the readings
  are cut otherwise.
- A device: microseconds per reading, by readings per batch.
- Exactness: the largest relative error of the standard deviation against rational arithmetic, on steady values with one
  spike, after it has left the window. pandas updates running sums, so something of the spike stays in its results.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import resource
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

from bench import window_peers as peers
from bench.report import Cell, Report, best_of, main
from bench.streams import Stream, engines
from edge_agent.contract.columns import Floats, Strings, take
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract
from edge_agent.core.features import Windows
from pipelines import cluster
from pipelines import features as stage

DEVICES, ROWS_PER_ENGINE, PARTS = 100, 10_000, 8
OBJECT_STORE_BYTES = 3 * 1024**3
BATCHES = (1, 16, 256, 4_096)
SINGLES_MAX = 1_500
ENGINES = 25
ROUNDS = 3
SPIKES = (1e6, 1e9)
SPIKE_PLACE = 100
CONTRACT = Path(__file__).parents[1] / "contracts/turbofan.odcs.yaml"
WANTED = [Feature(f, a) for f in peers.FIELDS for a in peers.AGGREGATES]
TRAILING = FeatureSpec(features=WANTED, window_rows=peers.WINDOW_ROWS, window_s=10.0**9)
TUMBLING = FeatureSpec(features=WANTED, window_rows=200, window_s=peers.EVERY_US / 1e6, kind=WindowKind.TUMBLING)
FIELDS = [f"sensor_{i}" for i in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)]
DEVICE = FeatureSpec(features=[Feature(f, a) for f in FIELDS for a in peers.AGGREGATES], window_rows=peers.WINDOW_ROWS, window_s=10.0**9)


def measure(arguments: argparse.Namespace) -> Report:
    """The lake's readings on Ray, then a device's batches."""
    rows, numbers, notes = lake(arguments.quick)
    device_rows, device_numbers, device_notes = device(arguments.quick)
    return Report(
        "Window features", ["way", "µs/reading", "readings/s"], [*rows, *device_rows], numbers | device_numbers, notes + device_notes
    )


def lake(quick: bool) -> tuple[list[list[Cell]], dict[str, Any], list[str]]:
    """Ours on Ray beside pandas and Polars, over both kinds of windows."""
    cluster.OBJECT_STORE_BYTES = OBJECT_STORE_BYTES
    contract = parse_contract(CONTRACT.read_bytes())
    table: list[list[Cell]] = []
    with tempfile.TemporaryDirectory() as directory, cluster.local_head():
        path = Path(directory) / "readings.parquet"
        count = peers.write_readings(path, 4 if quick else DEVICES, 500 if quick else ROWS_PER_ENGINE, seed=1)
        numbers: dict[str, Any] = {"rows": count, "features": len(WANTED)}
        for spec, polars, pandas in (
            (TRAILING, peers.polars_trailing, peers.pandas_trailing),
            (TUMBLING, peers.polars_tumbling, peers.pandas_tumbling),
        ):
            found = compare(path, contract, spec, partial(polars, path), partial(pandas, path), 1 if quick else ROUNDS)
            ways = (("Fenceline on Ray, 2 tasks", "ours_s"), ("Polars", "polars_s"), ("pandas", "pandas_s"))
            table += [[f"{spec.kind}: {way}", found[key] * 1e6 / count, count / found[key]] for way, key in ways]
            numbers |= found if spec is TRAILING else {"tumbling": found}
    notes = [
        f"{spec}: {n['pandas_s'] / n['ours_s']:.1f} times as fast as pandas, {n['polars_s'] / n['ours_s']:.2f} times as fast as Polars; "
        f"equal values (checked); a task of ours held at most {n['task_peak_mb']:.0f} MB more than an idle one."
        for spec, n in (("trailing", numbers), ("tumbling", numbers["tumbling"]))
    ]
    return table, numbers, notes


def compare(
    path: Path,
    contract: StreamContract,
    spec: FeatureSpec,
    polars: Callable[[], pl.DataFrame],
    pandas: Callable[[], Any],
    rounds: int,
) -> dict[str, Any]:
    """Time all three, and check their values."""
    on_ray(path, contract, spec, 2, stage.BATCH_ROWS)  # the workers are there now
    ours_s = best_of(rounds, partial(on_ray, path, contract, spec, PARTS, stage.BATCH_ROWS))
    ours, peak_mb = on_ray(path, contract, spec, PARTS, stage.BATCH_ROWS)
    recut, _ = on_ray(path, contract, spec, 3, 7_777)
    assert digest(ours, spec) == digest(recut, spec), "another cut changes the bits"
    del recut
    polars_s = best_of(rounds, polars)
    check_polars(ours, polars(), spec)
    results: list[Any] = []
    pandas_s = best_of(1, lambda: results.append(pandas()))
    check_pandas(ours, results.pop(), spec)
    return {"ours_s": ours_s, "pandas_s": pandas_s, "polars_s": polars_s, "equal": True, "windows": ours.num_rows, "task_peak_mb": peak_mb}


def on_ray(path: Path, contract: StreamContract, spec: FeatureSpec, parts: int, batch_rows: int) -> tuple[pa.Table, float]:
    """All features, the devices' one after the other, and the most memory in MB that a task took beyond what its worker had."""
    groups = stage.deal(stage.count_by_device(path), parts)
    made = [m for _, m in cluster.as_done(of_devices, [(path, devices, contract, spec, batch_rows) for devices in groups])]
    by_device = {name: table for tables, _ in made for name, table in tables.items()}
    return pa.concat_tables([by_device[name] for name in sorted(by_device)]), max(peak for _, peak in made)


def of_devices(
    path: Path, devices: list[str], contract: StreamContract, spec: FeatureSpec, batch_rows: int
) -> tuple[dict[str, pa.Table], float]:
    """The features of some devices, by device; what `pipelines.features.write_part` writes."""
    stage.BATCH_ROWS = batch_rows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    windows = stage.LakeWindows(contract, spec, devices_max=1)
    made: dict[str, list[pa.Table]] = {}
    for rows in stage.read_devices(path, devices, contract.entity, windows.columns):
        made.setdefault(rows["device"][0].as_py(), []).append(windows.push(rows)[0])
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {name: pa.concat_tables(tables) for name, tables in made.items()}, peak_mb


def digest(table: pa.Table, spec: FeatureSpec) -> str:
    """The bits of all features."""
    found = hashlib.sha256()
    for name in spec.names:
        for chunk in table[name].chunks:
            found.update(chunk.to_numpy())
    return found.hexdigest()


def check_polars(ours: pa.Table, theirs: pl.DataFrame, spec: FeatureSpec) -> None:
    """Trailing: in the order of the file. Tumbling: by engine and window; Polars also has the last, which are still open."""
    if spec.kind is not WindowKind.TRAILING:
        mine = pl.from_arrow(ours.select([*spec.names, "engine", stage.WINDOW_START]))
        assert isinstance(mine, pl.DataFrame)
        mine = mine.with_columns(pl.col("engine").cast(pl.String)).rename({stage.WINDOW_START: "ts"})
        joined = mine.join(theirs, on=["engine", "ts"], how="left", suffix="_polars")
        assert joined.height == ours.num_rows == theirs.height - theirs["engine"].n_unique(), "Polars has other windows"
        for name in spec.names:
            assert_near(joined[name].to_numpy(), joined[f"{name}_polars"].to_numpy(), f"Polars {name}")
        return
    for name in spec.names:
        assert_near(ours[name].to_numpy(), theirs[name].to_numpy(), f"Polars {name}")


def check_pandas(ours: pa.Table, theirs: Any, spec: FeatureSpec) -> None:
    """pandas' rows by engine, brought into our order."""
    if spec.kind is WindowKind.TRAILING:
        for feature in spec.features:
            column = theirs[feature.aggregate][feature.field]
            values = column if feature.aggregate == "last" else column.droplevel(0).sort_index()
            assert_near(ours[feature.name].to_numpy(), values.to_numpy(), f"pandas {feature.name}")
        return
    keys = pd.MultiIndex.from_arrays([ours["engine"].cast(pa.string()).to_pandas(), ours[stage.WINDOW_START].to_pandas()])
    theirs = theirs.reindex(keys)
    for feature in spec.features:
        assert_near(ours[feature.name].to_numpy(), theirs[feature.field, feature.aggregate].to_numpy(), f"pandas {feature.name}")


def assert_near(ours: Floats, theirs: Floats, what: str) -> None:
    assert np.allclose(ours, theirs, rtol=1e-6, atol=1e-6), f"{what} differs by {np.nanmax(np.abs(ours - theirs))}"


def device(quick: bool) -> tuple[list[list[Cell]], dict[str, Any], list[str]]:
    """Speed by batch size, and what each way gets right."""
    stream = engines(2 if quick else ENGINES)
    count = len(stream.messages)
    whole = windows(stream, count)
    rows: list[list[Cell]] = []
    numbers: dict[str, Any] = {"windows_us_per_reading": {}, "device_features": len(DEVICE.features), "window_rows": peers.WINDOW_ROWS}
    for batch in BATCHES:
        size = min(count, SINGLES_MAX) if batch == 1 else count
        same = np.array_equal(windows(stream, batch, size).view(np.int64), whole[:size].view(np.int64))
        assert same, f"batches of {batch} change the bits"
        us = best_of(ROUNDS, partial(windows, stream, batch, size)) * 1e6 / size
        rows.append([f"device: {batch:,} a batch", us, 1e6 / us])
        numbers["windows_us_per_reading"][str(batch)] = us
    numbers["bit_equal_across_batches"] = True
    notes = [
        f"device: {len(DEVICE.features)} features over windows of {peers.WINDOW_ROWS} rows; the same bits for every batch size (checked)."
    ]
    for spike in SPIKES:
        ours, theirs = std_errors(spike)
        numbers[f"std_error_after_spike_{spike:.0e}"] = {"windows": ours, "pandas": theirs}
        notes.append(f"Largest relative error of std after a spike of {spike:.0e} has left: Windows {ours:.0e}, pandas {theirs:.0e}.")
    return rows, numbers, notes


def windows(stream: Stream, batch: int, size: int | None = None) -> Floats:
    """The features of the first `size` readings, pushed in batches."""
    open_windows = Windows(DEVICE)
    entity, total = column(stream, "engine"), size or len(stream.messages)
    parts = []
    for start in range(0, total, batch):
        rows = slice(start, min(start + batch, total))
        parts.append(open_windows.push(entity[rows], stream.event_us[rows], take(stream.table, rows)).features)
    return np.concatenate(parts)


def std_errors(spike: float) -> tuple[float, float]:
    """The largest relative error of std in windows after the spike, ours and pandas'."""
    values = np.round(np.random.default_rng(3).normal(20, 0.5, 1_000), 2)
    values[SPIKE_PLACE] = spike
    spec = FeatureSpec(features=[Feature("x", "std")], window_rows=peers.WINDOW_ROWS, window_s=10.0**9)
    ours = Windows(spec).push(Strings.of(["a"] * len(values)), np.arange(len(values)), {"x": values}).features[:, 0]
    theirs = pd.Series(values).rolling(peers.WINDOW_ROWS, min_periods=1).std(ddof=0).to_numpy()
    clean = slice(SPIKE_PLACE + peers.WINDOW_ROWS, None)
    exact = np.array([exact_std(values[i - peers.WINDOW_ROWS + 1 : i + 1].tolist()) for i in range(len(values))[clean]])
    return float(np.max(abs(ours[clean] - exact) / exact)), float(np.max(abs(theirs[clean] - exact) / exact))


def exact_std(values: list[float]) -> float:
    """The population's standard deviation, rounded once."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact, Fraction()) / len(exact)
    return math.sqrt(sum((v - mean) ** 2 for v in exact) / len(exact))


def column(stream: Stream, name: str) -> Strings:
    found = stream.table[name]
    assert isinstance(found, Strings)
    return found


if __name__ == "__main__":
    main(__doc__, measure)
