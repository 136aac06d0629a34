"""From sensor to PUBACK and to the lake at 1,000 readings a second: the whole agent, with fsync, real Mosquitto, ingest and Delta lake.

Sensors connect to the agent itself, so a PUBACK means: on the disk of the agent. A row has arrived when the commit that holds it is in the
Delta log. Everything runs on this machine, on one clock.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.plant import Plant, percentiles
from bench.report import Cell, Report, main

RATE = 1_000
SECONDS = 20.0
WARM_S = 3.0


def measure(arguments: argparse.Namespace) -> Report:
    """p50 and p99 of both ways, after a warm-up."""
    seconds = 1.0 if arguments.quick else SECONDS
    with tempfile.TemporaryDirectory() as folder, Plant(Path(folder), listen=True) as plant:
        plant.start_agent()
        warm = plant.play(RATE, 0.5 if arguments.quick else WARM_S)
        played = plant.play(RATE, seconds)
        sent = warm["sent"] + played["sent"]
        plant.wait(lambda: plant.rows() >= sent)
        arrivals = plant.arrivals()
    if played["acked"] != played["sent"] or len(set(arrivals.keys)) != sent or len(arrivals.keys) != sent:
        raise AssertionError(f"{sent} sent, {len(arrivals.keys)} rows, {len(set(arrivals.keys))} distinct")
    measured = arrivals.event_us >= played["first_us"]
    puback = percentiles(played["puback_us"])
    lake = percentiles((arrivals.commit_us - arrivals.event_us)[measured])
    numbers = {"puback_p50_ms": puback[0], "puback_p99_ms": puback[1], "lake_p50_ms": lake[0], "lake_p99_ms": lake[1]}
    rows: list[list[Cell]] = [["sensor publish → PUBACK (durable)", *puback], ["sensor publish → row in the lake", *lake]]
    return Report(f"Latency at {RATE:,} readings/s, milliseconds", ["way", "p50", "p99"], rows, {**numbers, "readings": played["sent"]})


if __name__ == "__main__":
    main(__doc__, measure)
