"""Border drives of the whole agent: real brokers in two regions that die and come back, checked at the receiving side.

`make test` drives two; `make test-long` 20. FENCELINE_RUNS sets another count.
"""

from __future__ import annotations

import json
import os
import random
import signal
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.core.fix import Position
from edge_agent.core.zones import Zones, parse_zones
from tests.brokers import Broker, nats_broker
from tests.edge_agent.gateway import Bench, Cloud, reading, wait_for
from tests.simulators.drives import SPEED_M_S_MAX, Drive, Sample, allowed, drive

DRIVES, DRIVES_LONG = 2, int(os.environ.get("FENCELINE_RUNS") or 20)
ZONES = parse_zones((Path(__file__).parents[2] / "contracts/zones.geojson").read_bytes())
MOVES = (
    f'source = "mqtt"\ntopic = "sensors/plane-01/position"\nmax_age_s = 900\nnull_island_refused = true\nspeed_m_s_max = {SPEED_M_S_MAX}'
)
OUTAGES = 3
MANY = 10


class World:
    """Sensors' broker and two regions, each with someone who keeps what arrives. One drive each: brokers keep what was not taken."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.sensors = stack.enter_context(nats_broker(folder / "sensors"))
        self.regions: dict[str, Broker] = {name: stack.enter_context(nats_broker(folder / name)) for name in ("eu", "us")}
        self.folder = folder / "agent"
        self.folder.mkdir()

    def run(self, trip: Drive) -> tuple[int, int]:
        """One drive with a new device; how many readings were captured, and how many arrived."""
        bench = Bench(self.folder, self.sensors, self.regions["eu"])
        us = Cloud(self.regions["us"])
        bench.replace('source = "static"\nlat = 50.0\nlon = 9.0', MOVES)
        bench.config.write_text(
            f'{bench.config.read_text()}\n[[endpoints]]\nname = "us"\nurl = "mqtt://127.0.0.1:{self.regions["us"].port}"\n'
        )
        try:
            bench.start()
            self._publish(bench, trip)
            wait_for(lambda: bench.status()["buffer"]["readings_stored"] >= len(trip.samples), bench.log, 60.0)
            wait_for(lambda: _only_held_wait(bench), bench.log, 60.0)
            received = {"eu": _times(bench.cloud), "us": _times(us)}
        finally:
            us.close()
            bench.close()
        _judge(trip, received, ZONES)
        return len(trip.samples), len(set().union(*received.values()))

    def _publish(self, bench: Bench, trip: Drive) -> None:
        """Everything in the order of the drive, while regions and the agent die."""
        chance = random.Random(trip.seed)
        sensor = Client(CallbackAPIVersion.VERSION2, "drive", clean_session=True)
        sensor.connect(self.sensors.host, self.sensors.port)
        sensor.loop_start()
        breaks = sorted(chance.sample(range(len(trip.events)), 2 * OUTAGES + 1))
        down: str | None = None
        cycle = 0
        for i, event in enumerate(trip.events):
            if i in breaks[:-1]:
                down = self._toggle(chance, down)
            if i == breaks[-1]:
                bench.kill(signal.SIGKILL)
                bench.start()
            if isinstance(event, Position):
                body = {"ts": event.time_us / 1e6, "lat": event.lat, "lon": event.lon, "accuracy_m": event.accuracy_m}
                sensor.publish("sensors/plane-01/position", json.dumps(body), qos=1).wait_for_publish(10)
            else:
                cycle += 1
                sensor.publish("sensors/plane-01/turbofan", reading(cycle, ts=event.time_us / 1e6), qos=1).wait_for_publish(10)
        if down is not None:
            self.regions[down].restart()
        sensor.disconnect()
        sensor.loop_stop()

    def _toggle(self, chance: random.Random, down: str | None) -> str | None:
        if down is not None:
            self.regions[down].restart()
            return None
        name = chance.choice(sorted(self.regions))
        self.regions[name].kill()
        return name


def _only_held_wait(bench: Bench) -> bool:
    status = bench.status()
    connected = all(e["connected"] for e in status["endpoints"].values() if e["in_flight_blocks"])
    return connected and not any(lane["waiting"] for lane in status["lanes"].values() if lane["held"] != "not_allowed")


def _times(cloud: Cloud) -> list[int]:
    return [
        int(t) for name, table in cloud.tables.items() if cloud.headers[name].stream == "turbofan" for t in np.array(table["ts"]).tolist()
    ]


def _judge(trip: Drive, received: dict[str, list[int]], zones: Zones) -> None:
    samples: dict[int, Sample] = {s.time_us: s for s in trip.samples}
    for region, times in received.items():
        for time_us in times:
            assert region in allowed(zones, samples[time_us]), f"seed {trip.seed}: {region} holds what was captured at {samples[time_us]}"


def check(folder: Path, count: int, seed: int) -> None:
    chance = random.Random(seed)
    captured = arrived = 0
    for _ in range(count):
        trip = drive(ZONES, chance.randrange(2**63))
        with ExitStack() as stack:
            readings, stored = World(folder / f"drive-{trip.seed}", stack).run(trip)
        print(f"drive {trip.seed}: {stored} of {readings} readings arrived; {trip.spoofed} spoofed positions, {trip.lost} lost")
        captured, arrived = captured + readings, arrived + stored
    if count >= MANY:  # a single drive may lie outside every zone that an endpoint serves
        assert arrived > 0.1 * captured


@pytest.mark.timeout(240)
def test_no_region_gets_what_the_true_place_of_capture_forbids(tmp_path: Path, seed: int) -> None:
    check(tmp_path, DRIVES, seed)


@pytest.mark.long
def test_no_region_gets_what_the_true_place_of_capture_forbids_in_20_drives(tmp_path: Path, seed: int) -> None:
    check(tmp_path, DRIVES_LONG, seed)
