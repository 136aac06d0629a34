"""Ingest at scale: readings/s from MQTT to committed rows, exactly once, against a bare write; and the time from block to receipt.

Real Mosquitto, `cloud.ingest` as it is run, the real lake. Throughput: blocks of 300 readings of the turbofan contract (27 columns and
a score; 30 s of ten readings a second) of 100 devices, some sent twice, from the first block after the tables are made until every block
has its receipt. Also with small blocks of 10. Receipts: 1,000 devices, each one block of 10 readings a second.

The peer: the same rows, one Arrow table that is in memory already, by one call of `write_deltalake`, the best of two, with the machine for
itself. `bare write` is that into the lake's own layout (a folder for each event date, Parquet with zstd), which is what ingest writes;
`library's defaults` is one file with snappy and no partition, which is less work than the lake's layout asks for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from deltalake import write_deltalake

from bench.block_sender import STREAM
from bench.report import Cell, Report, best_of, main
from cloud import brokers, config
from cloud.config import Settings
from cloud.ingest_status import read_status
from cloud.lake import PARQUET, Lake
from cloud.rows import EVENT_DATE
from cloud.workers import Worker, command
from tests.brokers import Broker, mosquitto_broker

CONTRACTS = Path(__file__).parents[1] / "contracts"
SAVE_RARELY = ("autosave_on_changes false", "autosave_interval 1800")
AGAIN = 0.1
WARM = 1
"""Blocks of each device that go before what is timed."""
WAIT_S = 180.0


@contextlib.contextmanager
def plant(folder: Path, workers: int) -> Iterator[tuple[Broker, Settings]]:
    """A region's broker with its ingest workers, connected."""
    with mosquitto_broker(folder, extra=SAVE_RARELY) as broker, contextlib.ExitStack() as stack:
        settings = _project(folder / "project", broker.port)
        for number in range(1, workers + 1):
            log = stack.enter_context((folder / f"ingest-{number}.log").open("ab"))
            worker = subprocess.Popen(command(settings, "eu", Worker(number, workers)), stdout=log, stderr=log)
            stack.callback(worker.wait)
            stack.callback(worker.terminate)
        deadline = time.monotonic() + WAIT_S
        while (found := read_status(settings, "eu")) is None or not found.connected:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ingest did not connect: {(folder / 'ingest-1.log').read_text()[-2000:]}")
            time.sleep(0.05)
        yield broker, settings


def _project(folder: Path, port: int) -> Settings:
    folder.mkdir()
    for name in ("turbofan.odcs.yaml", "zones.geojson"):
        shutil.copy(CONTRACTS / name, folder)
    files = "contracts = ['turbofan.odcs.yaml']\nzones = 'zones.geojson'\n"
    (folder / "fenceline.toml").write_text(f"{files}[[regions]]\nname = 'eu'\nport = {port}\nshared_subscriptions = true\nmqtt = 5\n")
    settings = config.load(folder)
    brokers.password(settings, brokers.CLOUD_USER)
    return settings


def run(
    workers: int, devices: int, blocks: int, rows: int, *, period_s: float = 0.0, again: float = 0.0, bare: bool = False
) -> dict[str, Any]:
    """Play devices to the end, and check every row."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with plant(folder, workers) as (broker, settings):
            out = folder / "devices.json"
            sizes = ["--devices", str(devices), "--blocks", str(WARM + blocks), "--rows", str(rows), "--warm", str(WARM)]
            how = ["--port", str(broker.port), "--period", str(period_s), "--again", str(again), "--out", str(out)]
            subprocess.run([sys.executable, "-m", "bench.block_sender", *sizes, *how], check=True)
            time.sleep(1.0)  # the status is written twice a second
            status = read_status(settings, "eu")
        found: dict[str, Any] = json.loads(out.read_text())
        table = Lake(settings.lake).read(STREAM)
        expected = devices * (WARM + blocks) * rows
        distinct = table.select(["device", "sequence", "row"]).group_by(["device", "sequence", "row"]).aggregate([]).num_rows
        timed = devices * blocks * rows
        found |= {"readings": timed, "lost": expected - distinct, "duplicates": table.num_rows - distinct, "status": status}
        found["readings_per_s"] = timed / found["seconds"]
        if bare:
            for name, layout in (("bare_write", {"partition_by": [EVENT_DATE], "writer_properties": PARQUET}), ("library_defaults", {})):
                seconds = best_of(2, partial(_write, folder, table, layout))
                found[f"{name}_readings_per_s"] = expected / seconds
    if found["lost"] or found["duplicates"] or found["settled"] != found["sent"]:
        raise AssertionError(f"{found['lost']} lost, {found['duplicates']} twice, {found['sent'] - found['settled']} without receipt")
    return found


def _write(folder: Path, table: pa.Table, layout: dict[str, Any]) -> None:
    write_deltalake(str(folder / f"bare-{time.monotonic_ns()}"), table, **layout)


def measure(arguments: argparse.Namespace) -> Report:
    """Throughput with large and small blocks, then receipts at a steady rate."""
    quick = arguments.quick
    large = run(arguments.workers, 4 if quick else 100, 3 if quick else 80, 300, again=AGAIN, bare=True)
    small = run(arguments.workers, 4 if quick else 200, 10 if quick else 200, 10, again=AGAIN, bare=True)
    steady = run(arguments.workers, 10 if quick else 1_000, 2 if quick else 20, 10, period_s=1.0)
    p50, p99 = np.percentile(steady["latency_ms"], [50, 99])
    rows: list[list[Cell]] = []
    for name, found in (("blocks of 300 readings", large), ("blocks of 10 readings", small)):
        bare, defaults = found["bare_write_readings_per_s"], found["library_defaults_readings_per_s"]
        speed, status = found["readings_per_s"], found["status"]
        rows.append([name, speed, bare, speed / bare, defaults, speed / defaults, status.commits, status.duplicates])
    speeds = ("readings_per_s", "bare_write_readings_per_s", "library_defaults_readings_per_s", "block_bytes")
    numbers = {
        **{key: large[key] for key in ("readings", *speeds)},
        "ratio": large["readings_per_s"] / large["bare_write_readings_per_s"],
        "ratio_to_defaults": large["readings_per_s"] / large["library_defaults_readings_per_s"],
        "small_blocks": {key: small[key] for key in speeds},
        "receipt_p50_ms": float(p50),
        "receipt_p99_ms": float(p99),
        "lost": sum(found["lost"] for found in (large, small, steady)),
        "duplicates": sum(found["duplicates"] for found in (large, small, steady)),
        "workers": arguments.workers,
    }
    notes = [
        f"block sent → receipt, {steady['sent']:,} blocks of 10 readings, one a second per device: p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        f"broker, devices and ingest ({arguments.workers} workers) share this machine, the bare write has it alone",
        f"{AGAIN:.0%} of blocks go twice",
    ]
    columns = ["MQTT to committed rows", "readings/s", "bare write", "ratio", "library's defaults", "ratio", "commits", "copies"]
    return Report("Ingest into the lake, exactly once", columns, rows, numbers, notes)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=1)


if __name__ == "__main__":
    main(__doc__, measure, options)
