"""The uplink is down for 20 s at 2,000 readings a second, with and without kill -9 of the agent in the middle.

Real Mosquitto on both sides, real ingest and Delta lake; the link is a proxy that is cut and restored. Times run from the moment at
which the link is back: until everything captured before is in the lake (`drain_s`), and, for what is captured while that goes on,
from capture to the lake (`live_p99_ms_while_draining`).
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from bench.plant import Plant, percentiles
from bench.proxy import Proxy
from bench.report import Cell, Report, main

RATE = 2_000
WARM_S, OUTAGE_S, AFTER_S = 5.0, 20.0, 10.0


def measure(arguments: argparse.Namespace) -> Report:
    """Both outages, each on a plant of its own."""
    share = 0.05 if arguments.quick else 1.0
    numbers = {"outage": outage(share, crash=False), "crash": outage(share, crash=True)}
    rows: list[list[Cell]] = [[name, *values.values()] for name, values in numbers.items()]
    columns = ["outage", *(key.replace("_", " ") for key in numbers["outage"])]
    return Report(f"{OUTAGE_S * share:g} s without uplink at {RATE:,} readings/s", columns, rows, dict(numbers))


def outage(share: float, crash: bool) -> dict[str, float]:
    """One outage; `share` shortens all times."""
    with tempfile.TemporaryDirectory() as name, Plant(Path(name)) as plant, Proxy(plant.region.port) as link:
        plant.config = plant.write_config(link.port)
        plant.start_agent()
        out = plant.folder / "sensors.json"
        sensors = subprocess.Popen(plant.sensor_command(RATE, share * (WARM_S + OUTAGE_S + AFTER_S), out))
        time.sleep(share * WARM_S)
        plant.wait(lambda: plant.rows() > 0)
        link.cut()
        time.sleep(share * OUTAGE_S / 2)
        if crash:
            plant.stop_agent(signal.SIGKILL)
            plant.start_agent()
        time.sleep(share * OUTAGE_S / 2)
        back_us = time.time_ns() // 1_000
        link.restore()
        sensors.wait(120)
        sent = json.loads(out.read_text())["sent"]
        plant.wait(lambda: plant.rows() >= sent)
        arrivals = plant.arrivals()
    before = arrivals.event_us < back_us
    drained_us = int(arrivals.commit_us[before].max())
    live = ~before & (arrivals.event_us < drained_us)
    live_p99_ms = percentiles((arrivals.commit_us - arrivals.event_us)[live])[1] if live.any() else 0.0
    distinct = len(set(arrivals.keys))
    return {
        "sent": sent,
        "lost": sent - distinct,
        "duplicates": len(arrivals.keys) - distinct,
        "drain_s": (drained_us - back_us) / 1e6,
        "live_p99_ms_while_draining": live_p99_ms,
    }


if __name__ == "__main__":
    main(__doc__, measure)
