"""How fast, and how exactly, window features are made: `Windows` (training, cloud and device) against pandas.

- Speed: microseconds per reading, by readings per batch; pandas gets the whole table at once, which no device can.
- Repeatability: the features are the same in every bit however the readings are cut into batches (checked).
- Exactness: the largest relative error of the standard deviation against rational arithmetic, on steady values with one
  spike, after it has left the window. pandas updates running sums, so something of the spike stays in its results.
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from bench.report import Cell, Report, best_of, main
from bench.streams import Stream, engines
from edge_agent.contract.columns import Floats, Strings, take
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from edge_agent.core.features import Windows

FIELDS = [f"sensor_{i}" for i in (2, 3, 4, 7, 8, 9, 11, 12, 13, 14, 15, 17, 20, 21)]
AGGREGATES = ("last", "mean", "std", "min", "max")
WINDOW_ROWS = 30
BATCHES = (1, 16, 256, 4_096)
SINGLES_MAX = 1_500
ENGINES = 25
ROUNDS = 3
SPIKES = (1e6, 1e9)
SPIKE_PLACE = 100
SPEC = FeatureSpec(features=[Feature(f, a) for f in FIELDS for a in AGGREGATES], window_rows=WINDOW_ROWS, window_s=10**9)


def measure(arguments: argparse.Namespace) -> Report:
    """Speed by batch size, and what each way gets right."""
    stream = engines(2 if arguments.quick else ENGINES)
    count = len(stream.messages)
    whole = windows(stream, count)
    rows: list[list[Cell]] = []
    numbers: dict[str, Any] = {"windows_us_per_reading": {}, "features": len(SPEC.features), "window_rows": WINDOW_ROWS}
    for batch in BATCHES:
        size = min(count, SINGLES_MAX) if batch == 1 else count
        same = np.array_equal(windows(stream, batch, size).view(np.int64), whole[:size].view(np.int64))
        assert same, f"batches of {batch} change the bits"
        us = best_of(ROUNDS, partial(windows, stream, batch, size)) * 1e6 / size
        rows.append([f"Windows, {batch:,} a batch", us, 1e6 / us])
        numbers["windows_us_per_reading"][str(batch)] = us
    frame = pd.DataFrame({"engine": column(stream, "engine").tolist(), **{f: stream.table[f] for f in FIELDS}})
    # std takes a root of differences, where a rounding error of the last bit grows
    assert np.allclose(rolling(frame), whole, rtol=1e-6, atol=1e-6, equal_nan=True), "pandas and Windows disagree"
    us = best_of(ROUNDS, lambda: rolling(frame)) * 1e6 / count
    rows.append(["pandas rolling, whole table", us, 1e6 / us])
    numbers |= {"pandas_us_per_reading": us, "bit_equal_across_batches": True}
    notes = [f"{len(SPEC.features)} features over windows of {WINDOW_ROWS} rows. The same bits for every batch size (checked)."]
    for spike in SPIKES:
        ours, theirs = std_errors(spike)
        numbers[f"std_error_after_spike_{spike:.0e}"] = {"windows": ours, "pandas": theirs}
        notes.append(f"Largest relative error of std after a spike of {spike:.0e} has left: Windows {ours:.0e}, pandas {theirs:.0e}.")
    return Report("Window features", ["way", "µs/reading", "readings/s"], rows, numbers, notes)


def windows(stream: Stream, batch: int, size: int | None = None) -> Floats:
    """The features of the first `size` readings, pushed in batches."""
    open_windows = Windows(SPEC)
    entity, total = column(stream, "engine"), size or len(stream.messages)
    parts = []
    for start in range(0, total, batch):
        rows = slice(start, min(start + batch, total))
        parts.append(open_windows.push(entity[rows], stream.event_us[rows], take(stream.table, rows)).features)
    return np.concatenate(parts)


def rolling(frame: pd.DataFrame) -> Floats:
    """The same features with pandas: rolling windows per engine, columns in the order of SPEC."""
    grouped = frame.groupby("engine", sort=False)[FIELDS].rolling(WINDOW_ROWS, min_periods=1)
    tables = {"mean": grouped.mean(), "std": grouped.std(ddof=0), "min": grouped.min(), "max": grouped.max(), "last": frame[FIELDS]}
    return np.stack([tables[f.aggregate][f.field].to_numpy() for f in SPEC.features], axis=1)


def std_errors(spike: float) -> tuple[float, float]:
    """The largest relative error of std in windows after the spike, ours and pandas'."""
    values = np.round(np.random.default_rng(3).normal(20, 0.5, 1_000), 2)
    values[SPIKE_PLACE] = spike
    spec = FeatureSpec(features=[Feature("x", "std")], window_rows=WINDOW_ROWS, window_s=10**9)
    ours = Windows(spec).push(Strings.of(["a"] * len(values)), np.arange(len(values)), {"x": values}).features[:, 0]
    theirs = pd.Series(values).rolling(WINDOW_ROWS, min_periods=1).std(ddof=0).to_numpy()
    clean = slice(SPIKE_PLACE + WINDOW_ROWS, None)
    exact = np.array([exact_std(values[i - WINDOW_ROWS + 1 : i + 1].tolist()) for i in range(len(values))[clean]])
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
