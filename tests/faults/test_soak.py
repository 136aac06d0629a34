"""Soak: the whole path at 2,000 readings a second under random faults; nothing lost, nothing doubled, memory and descriptors flat.

`make test` runs it for seconds, to show that it works; `make test-long` for 30 minutes (FENCELINE_SOAK_S). Real Mosquitto on both sides,
real agent process, ingest and Delta lake. Faults: the uplink is cut; the region's broker is killed, or frozen; the sensors'
broker is restarted; the ingest is killed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from bench.edge_footprint import family, pss_mb
from bench.plant import Plant
from bench.proxy import Proxy

RATE = 2_000
SOAK_S = float(os.environ.get("FENCELINE_SOAK_S", "1800"))
WARM_SHARE = 0.3
SAMPLE_S = 2.0
SLOPE_MB_PER_H_MAX = 1.0
QUIET_S = 60.0  # longer than a block waits for its receipt before it goes again

pytestmark = pytest.mark.needs_mosquitto


@pytest.mark.timeout(180)
def test_seconds_of_random_faults_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    soak(tmp_path, seed, seconds=15.0, calm_s=1.0)


@pytest.mark.long
def test_half_an_hour_of_random_faults_leaves_memory_and_descriptors_flat(tmp_path: Path, seed: int) -> None:
    samples = soak(tmp_path, seed, seconds=SOAK_S, calm_s=20.0)
    settled = samples[int(len(samples) * WARM_SHARE) :]
    hours, memory_mb, descriptors = np.array(settled).T
    slope = float(np.polyfit(hours, memory_mb, 1)[0])
    print(f"memory: {memory_mb.min():.1f} to {memory_mb.max():.1f} MB, slope {slope:+.2f} MB/h; descriptors: {sorted(set(descriptors))}")
    assert slope < SLOPE_MB_PER_H_MAX
    assert np.median(descriptors[-20:]) <= np.median(descriptors[:20])


def soak(folder: Path, seed: int, seconds: float, calm_s: float) -> list[tuple[float, float, int]]:
    """Run it; returns samples of hours, PSS of the agent in MB, and its open descriptors, taken while no fault was on."""
    rng = random.Random(seed)
    samples = []
    with Plant(folder, settings="[buffer]\nbytes_max = 268435456\nhistory_rows = 2000") as plant, Proxy(plant.region.port) as link:
        plant.config = plant.write_config(link.port)
        plant.start_agent()
        faults = faults_of(plant, link, rng)
        out = folder / "sensors.json"
        sensors = subprocess.Popen(plant.sensor_command(RATE, seconds, out))
        started = time.monotonic()
        while sensors.poll() is None:
            calm_until = time.monotonic() + rng.uniform(0.5, 1.5) * calm_s
            while time.monotonic() < calm_until and sensors.poll() is None:
                time.sleep(min(SAMPLE_S, calm_s / 2))
                assert plant.agent is not None
                samples.append(((time.monotonic() - started) / 3600, pss_mb(plant.agent.pid), descriptors(plant.agent.pid)))
            if sensors.poll() is None:
                rng.choice(faults)()
        assert sensors.returncode == 0
        report = json.loads(out.read_text())
        assert report["acked"] == report["sent"]
        wait_for_rows(plant, report["sent"])
        total, distinct = rows(plant)
        found = f"{report['sent']} sent, {total} rows, {distinct} distinct; the agent: {plant.status()}"
        assert (report["sent"] - distinct, total - distinct) == (0, 0), f"{found}; its log ends\n{plant.agent_log()[-3000:]}"
    return samples


def faults_of(plant: Plant, link: Proxy, rng: random.Random) -> list[Callable[[], None]]:
    """Each makes a fault, lets it last a moment, and ends it."""

    def while_(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
        def fault() -> None:
            begin()
            time.sleep(rng.uniform(0.2, 3.0))
            end()

        return fault

    return [
        while_(link.cut, link.restore),
        while_(plant.region.kill, plant.region.start),
        while_(plant.region.stop_signal, plant.region.continue_signal),
        while_(plant.sensors.stop, plant.sensors.start),  # orderly: a killed Mosquitto loses what it has acknowledged
        while_(plant.stop_ingest, plant.start_ingest),
    ]


def descriptors(pid: int) -> int:
    return sum(len(list(Path(f"/proc/{member}/fd").iterdir())) for member in family(pid))


def wait_for_rows(plant: Plant, count: int) -> None:
    """Wait until the lake has that many rows, or gets no more for a while."""
    seen, since = -1, time.monotonic()
    while seen < count and time.monotonic() - since < QUIET_S:
        found = DeltaTable(plant.table).to_pyarrow_dataset().count_rows()
        if found != seen:
            seen, since = found, time.monotonic()
        time.sleep(1.0)


def rows(plant: Plant) -> tuple[int, int]:
    """Rows of the lake, and distinct readings among them."""
    path = plant.table
    if not DeltaTable.is_deltatable(path):
        return 0, 0
    table = DeltaTable(path).to_pyarrow_table(columns=["engine", "ts"])
    return table.num_rows, table.group_by(["engine", "ts"]).aggregate([]).num_rows
