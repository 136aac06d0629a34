"""Point-in-time joins for training: ours, ours on Ray, Feast's DuckDB store, and bare Polars `join_asof`.

All give each label the newest features not after it and not older than the ttl: the 30 days of the features (a value holds until the next
one, as it does for most machines). Feast's store makes all pairs of a label and an earlier reading of its engine before it picks, so it
suffers from that, and little from a short ttl: hence 1Mx20k once more with a ttl of two hours. `join_ways.py` says what is timed. Each way
runs in a process of its own, so that its peak memory is its own; the results are compared value by value, NULLs included.

- `--huge` joins 50 M features with 1 M labels by ours alone (and checks a sample of labels with DuckDB): what counts is the peak.
- `--only ours,polars` picks ways, `--sizes 1Mx20k` sizes, `--rounds N` runs each way N times (Feast's store always once).
- `--quick` leaves Ray out, which takes longest to start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.join_ways import COLUMNS, FEATURES, LABELS, WAYS
from bench.report import Cell, Report, main


@dataclass(frozen=True)
class Size:
    """What is joined: readings of so many engines over 30 days, and labels at random times of random engines."""

    features: int
    labels: int
    engines: int
    ttl_h: int = 30 * 24


SIZES = {
    "1Mx20k": Size(1_000_000, 20_000, 200),
    "5Mx500k": Size(5_000_000, 500_000, 5_000),
    "1Mx20k_ttl_2h": Size(1_000_000, 20_000, 200, ttl_h=2),
}
QUICK = {"20kx2k": Size(20_000, 2_000, 200)}
HUGE = {"50Mx1M": Size(50_000_000, 1_000_000, 200)}
ONCE = ("feast_duckdb",)
NAMES = {
    "ours": "Feast, our store",
    "ours_ray": "Feast, our store on 2 Ray workers",
    "feast_duckdb": "Feast, DuckDB store",
    "polars": "bare Polars",
}
SPAN_US = 30 * 86_400_000_000
EPOCH_US = 1_700_000_000_000_000
FILE_ROWS = 5_000_000
SAMPLE = 2_000
SEED = 5
WAY_S_MAX = 7_200


def measure(arguments: argparse.Namespace) -> Report:
    """Seconds, peak memory and equality by size."""
    sizes = HUGE if arguments.huge else QUICK if arguments.quick else SIZES
    ways = ["ours"] if arguments.huge else arguments.only or [way for way in WAYS if way != "ours_ray" or not arguments.quick]
    numbers: dict[str, Any] = {}
    rows: list[list[Cell]] = []
    for name, size in sizes.items():
        if arguments.sizes and name not in arguments.sizes:
            continue
        with tempfile.TemporaryDirectory(prefix="join-") as folder:
            numbers[name], found = one_size(Path(folder), size, ways, 1 if arguments.quick else arguments.rounds)
        ours = numbers[name].get("ours_s", float("nan"))
        rows += [[name, NAMES[way], way_found["s"], way_found["s"] / ours, way_found["peak_gb"]] for way, way_found in found.items()]
    notes = [f"{len(COLUMNS)} features over 30 days; results equal in every value (checked)."]
    return Report("Point-in-time joins", ["size", "way", "s", "times ours", "peak GB"], rows, numbers, notes)


def one_size(folder: Path, size: Size, ways: list[str], rounds: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run each way; raises AssertionError if results differ."""
    write_features(folder, size)
    write_labels(folder, size)
    found = {way: run(way, folder, size.ttl_h, 1 if way in ONCE else rounds) for way in ways}
    first = pq.read_table(folder / f"{ways[0]}.parquet")
    for way in ways[1:]:
        check_equal(first, pq.read_table(folder / f"{way}.parquet"), way)
    check_sample(folder, first, size.ttl_h)
    numbers: dict[str, Any] = {f"{way}_s": found[way]["s"] for way in ways}
    numbers |= {"peak_gb": found[ways[0]]["peak_gb"], "equal": True, "null_share": first[COLUMNS[0]].null_count / first.num_rows}
    numbers |= {"peaks_gb": {way: found[way]["peak_gb"] for way in ways}, "times_s": {way: found[way]["times"] for way in ways}}
    return numbers, found


def run(way: str, folder: Path, ttl_h: int, rounds: int) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, "-m", "bench.join_ways", way, str(folder), str(ttl_h), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=WAY_S_MAX, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{way}: {found}", file=sys.stderr, flush=True)
    return found


def write_features(folder: Path, size: Size) -> None:
    """Random features, sorted by engine and time, no two of an engine at one time; created up to an hour after the event."""
    rng = np.random.default_rng(SEED)
    (folder / FEATURES).mkdir()
    files = -(-size.features // FILE_ROWS)
    for i, engines in enumerate(np.array_split(np.arange(size.engines), files)):
        engine = np.repeat(engines, -(-size.features // size.engines))
        at = (rng.random(len(engine)) * SPAN_US).astype(np.int64) // 1_000 * 1_000
        order = np.lexsort((at, engine))
        engine, at = engine[order], at[order]
        kept = np.append(True, (np.diff(engine) != 0) | (np.diff(at) != 0))
        engine, at = engine[kept], at[kept]
        columns = {"engine": names(engine), "event_time": times(at), "created_time": times(at + rng.integers(0, 3_600_000_000, len(at)))}
        columns |= {name: pa.array(rng.normal(size=len(at))) for name in COLUMNS}
        pq.write_table(pa.table(columns), folder / FEATURES / f"part-{i:03d}.parquet")


def write_labels(folder: Path, size: Size) -> None:
    rng = np.random.default_rng(SEED + 1)
    engine, at = rng.integers(0, size.engines, size.labels), rng.integers(0, SPAN_US // 1_000, size.labels) * 1_000
    columns = {"engine": names(engine), "event_timestamp": times(at), "n": pa.array(np.arange(size.labels))}
    pq.write_table(pa.table(columns), folder / LABELS)


def names(engines: Any) -> pa.Array:
    every = pa.array([f"engine-{i:04d}" for i in range(np.max(engines) + 1)])
    return every.take(pa.array(engines))


def times(us: Any) -> pa.Array:
    return pa.array(us + EPOCH_US).cast(pa.timestamp("us", "UTC"))


def check_equal(ours: pa.Table, theirs: pa.Table, way: str) -> None:
    """Raise AssertionError unless both tables hold the same labels and values, NULLs included."""
    assert ours.num_rows == theirs.num_rows, f"{way} returned {theirs.num_rows} labels of {ours.num_rows}"
    for name in ours.column_names:
        assert ours[name].combine_chunks().equals(theirs[name].combine_chunks()), f"{way} differs in {name}"


def check_sample(folder: Path, ours: pa.Table, ttl_h: int) -> None:
    """Compare some labels with a query that says what is meant, row by row."""
    import duckdb

    rng = np.random.default_rng(SEED + 2)
    places = np.sort(rng.choice(ours.num_rows, min(SAMPLE, ours.num_rows), replace=False))
    labels = pq.read_table(folder / LABELS).take(places)
    with duckdb.connect() as connection:
        connection.execute("SET memory_limit = '4GB'")
        connection.register("labels", labels)
        found = connection.sql(
            f"SELECT l.n, arg_max({COLUMNS[0]}, event_time) AS {COLUMNS[0]} FROM labels l "
            f"LEFT JOIN '{folder / FEATURES}/*.parquet' f ON f.engine = l.engine AND f.event_time <= l.event_timestamp "
            f"AND f.event_time >= l.event_timestamp - INTERVAL '{ttl_h} hours' GROUP BY l.n ORDER BY l.n"
        ).to_arrow_table()
    expected = found[COLUMNS[0]].combine_chunks()
    assert ours[COLUMNS[0]].take(places).combine_chunks().equals(expected), "the sample differs from the query"
    assert expected.null_count < len(expected), "nothing was joined"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--huge", action="store_true", help="50 M features and 1 M labels, ours alone")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="WAY,WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--sizes", type=lambda text: text.split(","), metavar="SIZE,SIZE", help=f"of {', '.join(SIZES)}")


if __name__ == "__main__":
    main(__doc__, measure, options)
