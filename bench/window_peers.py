"""The window features of `bench.features` by pandas and Polars, and the readings that all three take.

The lake's order is kept: a device's readings as it saw them, its engines taking turns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.snapshot import ROW_GROUP

FIELDS = ("sensor_2", "sensor_11")
AGGREGATES = ("mean", "std", "min", "max", "last")
WINDOW_ROWS = 30
EVERY_US = 1_000_000
STEP_US = 10_000  # 100 readings of an engine in a tumbling window
ENGINES_PER_DEVICE = 10
START_US = 1_700_000_000_000_000
COLUMNS = ["engine", "ts", *FIELDS]


def write_readings(path: Path, devices: int, rows_per_engine: int, seed: int) -> int:
    """Readings as the snapshot stage writes them, sorted by device; the number of rows."""
    random, rows = np.random.default_rng(seed), rows_per_engine * ENGINES_PER_DEVICE
    count = devices * rows
    device, place = np.arange(count) // rows, np.arange(count) % rows
    names = pa.array([f"engine-{d:04d}-{i}" for d in range(devices) for i in range(ENGINES_PER_DEVICE)])
    ts = pa.array(START_US + place // ENGINES_PER_DEVICE * STEP_US).cast(pa.timestamp("us", "UTC"))
    wander = np.cumsum(random.normal(0, 0.02, (devices, rows)), axis=1).ravel()
    table = pa.table(
        {
            "device": pa.array([f"plane-{d:04d}" for d in range(devices)]).take(pa.array(device)),
            "epoch": pa.array(["e"]).take(pa.array(np.zeros(count, np.int64))),
            "engine": names.take(pa.array(device * ENGINES_PER_DEVICE + place % ENGINES_PER_DEVICE)),
            "ts": ts,
            "arrived_at": ts,
            "sensor_2": np.round(640 + wander + random.normal(0, 0.5, count), 2),
            "sensor_11": np.round(47 + 0.1 * wander + random.normal(0, 0.2, count), 2),
        }
    )
    pq.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)
    return count


def polars_trailing(path: Path) -> pl.DataFrame:
    """Windows of WINDOW_ROWS readings of each engine, in the order of the file."""
    wanted = []
    for field in FIELDS:
        column = pl.col(field)
        rolled = {
            "mean": column.rolling_mean(WINDOW_ROWS, min_samples=1),
            "std": column.rolling_std(WINDOW_ROWS, min_samples=1, ddof=0),
            "min": column.rolling_min(WINDOW_ROWS, min_samples=1),
            "max": column.rolling_max(WINDOW_ROWS, min_samples=1),
        }
        wanted += [made.over("engine").alias(f"{field}_{name}") for name, made in rolled.items()]
        wanted.append(column.alias(f"{field}_last"))
    return pl.scan_parquet(path).select("engine", "ts", *wanted).collect()


def polars_tumbling(path: Path) -> pl.DataFrame:
    """Windows of a second of each engine."""
    wanted = []
    for field in FIELDS:
        column = pl.col(field)
        made = {"mean": column.mean(), "std": column.std(ddof=0), "min": column.min(), "max": column.max(), "last": column.last()}
        wanted += [m.alias(f"{field}_{name}") for name, m in made.items()]
    return pl.scan_parquet(path).sort("engine", "ts").group_by_dynamic("ts", every="1s", group_by="engine").agg(wanted).collect()


def pandas_trailing(path: Path) -> dict[str, pd.DataFrame]:
    """The same as `polars_trailing`, by engine: a frame per aggregate."""
    frame = pd.read_parquet(path, columns=["engine", *FIELDS])
    grouped = frame.groupby("engine", sort=False)[list(FIELDS)].rolling(WINDOW_ROWS, min_periods=1)
    return {
        "mean": grouped.mean(),
        "std": grouped.std(ddof=0),
        "min": grouped.min(),
        "max": grouped.max(),
        "last": frame[list(FIELDS)],
    }


def pandas_tumbling(path: Path) -> pd.DataFrame:
    """The same as `polars_tumbling`."""
    frame = pd.read_parquet(path, columns=COLUMNS)
    frame["start"] = frame["ts"].dt.floor("1s")
    grouped = frame.groupby(["engine", "start"], sort=False)[list(FIELDS)]
    made = grouped.agg(["mean", "min", "max", "last"])
    deviation = grouped.std(ddof=0)
    for field in FIELDS:
        made[field, "std"] = deviation[field]
    return made
