"""An ingest in this process, a real broker for it, and a device that sends blocks: what the tests of ingest share."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config, ingest
from cloud.config import Settings
from cloud.lake import Lake
from cloud.workers import ONE, Worker
from edge_agent.contract.receipt import Receipt, decode_receipt
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import Broker, User, nats_broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON

SECRET = "between cloud and broker"
WAIT_S = 20.0


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with nats_broker(tmp_path, [User("cloud", SECRET), User("d1", "p")], max_ack_pending=512, ack_wait_s=1.0) as running:
        yield running


@pytest.fixture
def settings(tmp_path: Path, broker: Broker) -> Settings:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pump.yaml").write_text(CONTRACT_YAML)
    (project / "zones.geojson").write_bytes(ZONES_JSON)
    (project / "fenceline.toml").write_text(
        f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n[[regions]]\nname = 'eu'\nport = {broker.port}\n"
    )
    found = config.load(project)
    path = brokers.password_path(found, brokers.CLOUD_USER)
    path.parent.mkdir(parents=True)
    path.write_text(SECRET)
    return found


class Device:
    """Publishes blocks as a device does, and collects its receipts and alarms."""

    def __init__(self, broker: Broker) -> None:
        self.topics = DeviceTopics("d1")
        self.receipts: queue.SimpleQueue[Receipt] = queue.SimpleQueue()
        self.alarms: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="d1")
        self.client.username_pw_set("d1", "p")
        self.client.on_message = self._take
        subscribed = threading.Event()
        self.client.on_connect = lambda *_: self.client.subscribe([(self.topics.receipts, 1), (self.topics.events, 1)])
        self.client.on_subscribe = lambda *_: subscribed.set()
        self.client.connect(broker.host, broker.port)
        self.client.loop_start()
        assert subscribed.wait(WAIT_S)

    def _take(self, client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        if message.topic == self.topics.receipts:
            self.receipts.put(decode_receipt(bytes(message.payload)))
        else:
            self.alarms.put(json.loads(message.payload))

    def send(self, payload: bytes, lane: str = "europe", stream: str = "pump") -> None:
        self.client.publish(self.topics.up(lane, stream), payload, qos=1).wait_for_publish(WAIT_S)

    def wait_for(self, cumulative: int, timeout_s: float = WAIT_S) -> Receipt:
        """The first receipt that settles that many blocks."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            receipt = self.receipts.get(timeout=timeout_s)
            if receipt.lanes[0].cumulative >= cumulative:
                return receipt
        raise AssertionError(f"no receipt for {cumulative} blocks")


@pytest.fixture
def device(broker: Broker) -> Iterator[Device]:
    found = Device(broker)
    yield found
    found.client.disconnect()
    found.client.loop_stop()


@contextmanager
def running(settings: Settings, worker: Worker = ONE) -> Iterator[ingest.Ingest]:
    """An ingest in a thread, connected."""
    work = ingest.build(settings, "eu", worker)
    work.intake.open()
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        wait_until(lambda: work.intake.connected)
        yield work
    finally:
        work.stop = True
        thread.join()
        work.intake.close()


def wait_until(condition: Callable[[], object], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def rows(settings: Settings) -> list[tuple[int, int]]:
    table = Lake(settings.lake).read("pump", columns=["sequence", "row"])
    return sorted(zip(*(c.to_pylist() for c in table.columns), strict=True)) if table.num_rows else []
