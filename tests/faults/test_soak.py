"""Soak: the whole path at 2,000 readings a second under random faults; nothing lost, nothing doubled, memory and descriptors flat.

`make test` runs it for seconds, to show that it works; `make test-long` for 30 minutes (FENCELINE_SOAK_S). Real Mosquitto on both sides,
real agent process, ingest and Delta lake. Faults: the uplink is cut; the region's broker is killed, or frozen; the sensors'
broker is restarted; the ingest is killed.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltalake import DeltaTable

from bench.edge_footprint import family, memory_mb
from bench.plant import ZONE, Plant
from bench.proxy import Proxy
from cloud.ingest_status import read_status
from edge_agent.contract.stream import QUARANTINE

RATE = 2_000
SOAK_S = float(os.environ.get("FENCELINE_SOAK_S", "1800"))
WARM_SHARE = 0.3
SAMPLE_S = 2.0
MEDIAN_S = 60.0
SLOPE_MB_PER_H_MAX = 1.0
QUIET_S = 60.0  # longer than a block waits for its receipt before it goes again, the first time
DRAIN_S_MAX = 600.0  # a block that was unlucky several times waits two minutes each time (OutboxLimits.receipt_timeout_max_s)
GAP_US = 1_000_000  # readings that are missing further apart are told apart

pytestmark = pytest.mark.needs_mosquitto


@pytest.mark.timeout(180)
def test_seconds_of_random_faults_lose_and_double_nothing(tmp_path: Path, seed: int) -> None:
    soak(tmp_path, seed, seconds=15.0, calm_s=1.0)


@pytest.mark.long
def test_half_an_hour_of_random_faults_leaves_memory_and_descriptors_flat(tmp_path: Path, seed: int) -> None:
    samples = soak(tmp_path, seed, seconds=SOAK_S, calm_s=20.0)
    slope = memory_slope(samples)
    descriptors = [s.descriptors for s in after_warm_up(samples)]
    assert slope < SLOPE_MB_PER_H_MAX
    assert np.median(descriptors[-20:]) <= np.median(descriptors[:20])


@dataclass(frozen=True)
class Sample:
    """The agent's processes at `hours` after the start: memory in MB (PSS; RSS), open descriptors."""

    hours: float
    pss_mb: float
    rss_mb: float
    descriptors: int


def after_warm_up(samples: list[Sample]) -> list[Sample]:
    return samples[int(len(samples) * WARM_SHARE) :]


def memory_slope(samples: list[Sample]) -> float:
    """MB per hour after the warm-up: the slope of Theil and Sen, over the medians of MEDIAN_S.

    What an agent uses rises by megabytes for seconds (a broker that comes back sends all that it kept at once). Nine such bursts in half an
    hour that is flat otherwise give least squares a slope between -1.2 and +1.3 MB/h, by where they happen to lie; the median of the slopes
    between all pairs of medians moves by 0.06 MB/h for them, and fully for what stays. It is taken of RSS, in which a page counts the same
    whoever else maps it: the PSS of the libraries alone went from 5 to 8 MB and back in one run, as other Python processes came and went.
    """
    of_time: dict[int, list[Sample]] = {}
    for sample in after_warm_up(samples):
        of_time.setdefault(int(sample.hours * 3600 / MEDIAN_S), []).append(sample)
    points = [(np.median([s.hours for s in some]), np.median([s.rss_mb for s in some])) for some in of_time.values()]
    return float(np.median([(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(points, 2)]))


def print_memory(samples: list[Sample]) -> None:
    """By tenth of the run, so that who reads it sees whether it is flat."""
    for name, values in (("PSS", [s.pss_mb for s in samples]), ("RSS", [s.rss_mb for s in samples])):
        tenths = [round(float(np.median(part)), 1) for part in np.array_split(values, 10)]
        print(f"memory by tenth of the run, median {name} in MB: {tenths}")
    descriptors = sorted({s.descriptors for s in after_warm_up(samples)})
    print(f"after the warm-up: {memory_slope(samples):+.2f} MB/h; descriptors: {descriptors}")


def soak(folder: Path, seed: int, seconds: float, calm_s: float) -> list[Sample]:
    """Run it; returns samples of the agent, taken while no fault was on."""
    rng = random.Random(seed)
    samples: list[Sample] = []
    happened: list[tuple[float, str]] = []
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
                samples.append(sample(plant.agent.pid, (time.monotonic() - started) / 3600))
            if sensors.poll() is None:
                name, fault = rng.choice(faults)
                happened.append((time.time(), name))
                fault()
        assert sensors.returncode == 0
        report = json.loads(out.read_text())
        assert report["acked"] == report["sent"]
        wait_for_rows(plant, report["sent"])
        total, distinct = rows(plant)
        if seconds > 2 * MEDIAN_S:  # a shorter run tells nothing
            print_memory(samples)
        print(f"{report['sent']} sent, {total} rows, {distinct} distinct, {len(happened)} faults: {Counter(name for _, name in happened)}")
        assert (report["sent"] - distinct, total - distinct) == (0, 0), story(plant, report, happened)
    return samples


def story(plant: Plant, report: dict[str, Any], happened: list[tuple[float, str]]) -> str:
    """Where the missing readings are, as far as it is known: with the sensors' broker, in the buffer, or lost on the way to the lake."""
    status, buffer = plant.status(), plant.status()["buffer"]
    report = {name: value for name, value in report.items() if name != "puback_us"}
    refused = plant.cloud.lake.of(ZONE).path(ZONE, QUARANTINE.stream)
    return "\n".join(
        [
            f"sensors: {report}",
            f"quarantine: {DeltaTable(refused).to_pyarrow_dataset().count_rows() if DeltaTable.is_deltatable(refused) else 0} rows",
            f"agent: {buffer['readings_stored']} readings stored, {buffer['waiting_blocks']} blocks wait, lost {buffer['lost_readings']}",
            f"sensors' side: {status['sensors']}",
            f"uplink: {status['uplink']} {status['lanes']} {status['endpoints']}",
            f"ingest: {read_status(plant.cloud, 'eu')}",
            *missing(plant, report, happened),
            f"the agent's log ends\n{plant.agent_log()[-3000:]}",
        ]
    )


def missing(plant: Plant, report: dict[str, Any], happened: list[tuple[float, str]]) -> list[str]:
    """A line for each second without a reading, and the faults before it. (A restart of the sensors' broker makes such a hole too.)"""
    times = DeltaTable(plant.table).to_pyarrow_table(columns=["ts"])["ts"].cast("int64").to_numpy()
    times = np.unique(np.concatenate([[report["first_us"]], times, [report["last_us"]]]))
    holes = np.flatnonzero(np.diff(times) > GAP_US)
    lines = []
    for start, end in zip(times[holes].tolist(), times[holes + 1].tolist(), strict=True):
        before = [f"{name} {start / 1e6 - at:.1f} s before" for at, name in happened if at <= end / 1e6][-2:]
        lines.append(f"no reading for {(end - start) / 1e6:.2f} s from {start}: {', '.join(before) or 'no fault before'}")
    return lines[:20]


def faults_of(plant: Plant, link: Proxy, rng: random.Random) -> list[tuple[str, Callable[[], None]]]:
    """Each makes a fault, lets it last a moment, and ends it."""

    def while_(begin: Callable[[], None], end: Callable[[], None]) -> Callable[[], None]:
        def fault() -> None:
            begin()
            time.sleep(rng.uniform(0.2, 3.0))
            end()

        return fault

    return [
        ("uplink cut", while_(link.cut, link.restore)),
        ("region killed", while_(plant.region.kill, plant.region.start)),
        ("region frozen", while_(plant.region.stop_signal, plant.region.continue_signal)),
        ("sensors' broker restarted", while_(plant.sensors.stop, plant.sensors.start)),  # a killed Mosquitto loses what it acknowledged
        ("ingest killed", while_(plant.stop_ingest, plant.start_ingest)),
    ]


def sample(pid: int, hours: float) -> Sample:
    descriptors = sum(len(list(Path(f"/proc/{member}/fd").iterdir())) for member in family(pid))
    return Sample(hours, memory_mb(pid, "Pss"), memory_mb(pid, "Rss"), descriptors)


def wait_for_rows(plant: Plant, count: int) -> None:
    """Wait until the lake has that many rows, or gets no more for a while although no block waits to go again."""
    seen, since, started = -1, time.monotonic(), time.monotonic()
    while seen < count and time.monotonic() - started < DRAIN_S_MAX:
        if time.monotonic() - since > QUIET_S and not plant.status()["buffer"]["waiting_blocks"]:
            return
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
