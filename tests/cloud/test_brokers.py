"""The embedded brokers keep devices and zones apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config
from cloud.config import Settings
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import Broker
from tests.servers import HOST, free_port

ROOT = Path(__file__).parents[2]
WAIT_S = 10.0
PASSWORDS = {"plane-01": "one", "plane-02": "two"}


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    """The embedded broker of region eu runs, with two devices."""
    settings = config.load(ROOT, tmp_path / "state").with_ports({"eu": free_port()})
    brokers.write_configs(settings, lambda: PASSWORDS)
    running = Broker(brokers.command(settings, "eu"), settings.region("eu").port, tmp_path / "nats.log")
    running.start()
    yield settings
    running.kill()


def connect(settings: Settings, user: str, password: str) -> mqtt.Client:
    client, answered = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=user), threading.Event()
    client.username_pw_set(user, password)
    client.on_connect = lambda *_: answered.set()
    client.connect(HOST, settings.region("eu").port)
    client.loop_start()
    assert answered.wait(WAIT_S)
    return client


def collect(client: mqtt.Client, filter_: str, last: str) -> tuple[list[str], threading.Event]:
    """The topics of what comes, and an event that is set when `last` has come."""
    topics, done, subscribed = [], threading.Event(), threading.Event()

    def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        topics.append(message.topic)
        if message.topic == last:
            done.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe(filter_, qos=1)
    assert subscribed.wait(WAIT_S)
    return topics, done


def test_a_device_writes_only_under_its_name_and_only_in_lanes_of_the_region(settings: Settings) -> None:
    cloud = connect(settings, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER))
    device = connect(settings, "plane-01", PASSWORDS["plane-01"])
    own, other = DeviceTopics("plane-01"), DeviceTopics("plane-02")
    good = [own.up("europe", "turbofan"), own.up("atlantic_europe", "losses"), own.reported, own.beat, own.events]
    bad = [own.up("united-states", "turbofan"), own.up("atlantic_united-states", "turbofan"), own.up("nowhere", "turbofan")]
    bad += [own.receipts, own.desired, *(other.up("europe", "turbofan"), other.reported, other.events)]
    topics, done = collect(cloud, "fenceline/v1/#", last=own.events)
    for topic in [*bad, *good]:
        device.publish(topic, b"x", qos=1).wait_for_publish(WAIT_S)
    assert done.wait(WAIT_S)
    assert topics == good
    for client in (cloud, device):
        client.disconnect()
        client.loop_stop()


def test_a_device_reads_only_what_is_meant_for_it(settings: Settings) -> None:
    cloud = connect(settings, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER))
    device = connect(settings, "plane-01", PASSWORDS["plane-01"])
    refused: list[bool] = []
    answered = threading.Event()

    def on_subscribe(_client: mqtt.Client, _data: object, _mid: int, codes: list[mqtt.ReasonCode], _properties: object) -> None:
        refused.extend(c.is_failure for c in codes)
        answered.set()

    device.on_subscribe = on_subscribe
    wanted = ["fenceline/v1/#", "fenceline/v1/plane-02/receipts", "fenceline/v1/+/desired", "fenceline/v1/plane-01/receipts"]
    device.subscribe([(f, 1) for f in wanted])
    assert answered.wait(WAIT_S)
    assert refused == [True, True, True, False]
    for client in (cloud, device):
        client.disconnect()
        client.loop_stop()
