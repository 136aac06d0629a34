"""kill -9 of the agent at random instants, and restarts of its sensors' broker: every acknowledged reading arrives once."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from tests.brokers import Broker, nats_broker
from tests.edge_agent.gateway import Bench, reading
from tests.edge_agent.nursery import Nursery
from tests.faults.account import settle_accounts

KILLS = 1_000
KILLS_REDUCED = 5
ROUND_KILLS = 50
LIFE_S_MAX = 0.8
START_S_MAX = 1.2  # of a whole start; of one from the nursery:
START_S_MAX_FORKED = 0.4
WHILE_STARTING = 0.25  # this share of them dies before it is ready
BROKER_EVERY = 7  # kills per restart of the sensors' broker
READINGS_PER_S = 150
READINGS_WAITING_MAX = 400


class Sensor:
    """Publishes reading after reading with QoS 1, in a thread, over restarts of its broker."""

    def __init__(self, broker: Broker, published: int) -> None:
        """`published`: how many readings have been, before it."""
        self.published = self._acknowledged = published
        self._client = Client(CallbackAPIVersion.VERSION2, "load", clean_session=False)
        self._client.reconnect_delay_set(0.05, 0.2)  # type: ignore[arg-type]
        self._client.on_publish = self._on_publish
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _on_publish(self, *_: object) -> None:
        self._acknowledged += 1

    def _run(self) -> None:
        while not self._stop.wait(1 / READINGS_PER_S):
            if self.published - self._acknowledged < READINGS_WAITING_MAX:
                self.published += 1  # while the broker is away, paho keeps it
                self._client.publish("sensors/plane-01/turbofan", reading(self.published), qos=1)

    def stop(self) -> int:
        """End; the number of readings, all of them acknowledged by the broker."""
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + 30
        while self._acknowledged < self.published and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self._acknowledged >= self.published, f"the sensors' broker took {self._acknowledged} of {self.published}"
        self._client.disconnect()
        self._client.loop_stop()
        return self.published


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        yield made
        made.close()


@pytest.fixture
def quick_bench(tmp_path: Path) -> Iterator[Bench]:
    """Its agents start in a fraction of the time, so that there can be many of them."""
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu, Nursery())
        yield made
        made.close()


def run(bench: Bench, kills: int, chance: random.Random, start_s_max: float) -> None:
    """Rounds of kills, each with its account."""
    bench.start()  # once: from now on the sensors' broker keeps what the agent has not acknowledged
    bench.kill()
    published = 0
    for done in range(0, kills, ROUND_KILLS):
        sensor = Sensor(bench.sensors, published)
        try:
            for number in range(done + 1, min(done + ROUND_KILLS, kills) + 1):
                kill_once(bench, chance, start_s_max, restart_broker=number % BROKER_EVERY == 0)
            bench.sensors.restart()
            bench.start()
        finally:
            published = sensor.stop()
        result = settle_accounts(bench, published)
        print(f"{number} kills, {published} readings: {result.arrived} arrived once, {result.named} named in the ledger", flush=True)
        bench.kill()


def kill_once(bench: Bench, chance: random.Random, start_s_max: float, *, restart_broker: bool) -> None:
    if chance.random() < WHILE_STARTING:
        bench.start_now()
        time.sleep(chance.uniform(0, start_s_max))
    else:
        bench.start()
        time.sleep(chance.uniform(0, LIFE_S_MAX))
    if restart_broker:
        bench.sensors.restart()
    bench.kill()


@pytest.mark.timeout(120)
def test_a_few_kills_lose_and_double_nothing(bench: Bench, seed: int) -> None:
    run(bench, KILLS_REDUCED, random.Random(seed), START_S_MAX)


@pytest.mark.long
def test_kills_lose_and_double_nothing(quick_bench: Bench, seed: int) -> None:
    run(quick_bench, int(os.environ.get("FENCELINE_RUNS") or KILLS), random.Random(seed), START_S_MAX_FORKED)
