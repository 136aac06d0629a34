"""The publisher: everything arrives at a real broker, in each device's order, and is acknowledged."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from cloud.demo.journey import Aircraft, Message
from cloud.demo.sensors import interleave, play
from cloud.demo.simulator import build_engine
from cloud.demo.track import TOURS, Track
from cloud.replay import SensorBroker
from edge_agent.core.zones import parse_zones
from tests.brokers import User, nats_broker

ZONES = Path(__file__).parents[3] / "contracts" / "zones.geojson"


def journeys(devices: int) -> list[list[Message]]:
    zones = parse_zones(ZONES.read_bytes())
    return [Aircraft(f"plane-{i}", Track(TOURS[i]), zones).fly(build_engine(f"sim-{i}", 1)) for i in range(devices)]


def test_devices_take_turns_and_a_position_stays_before_its_reading() -> None:
    flights = journeys(3)
    messages = list(interleave(flights))
    assert sorted(m.payload for m in messages) == sorted(m.payload for flight in flights for m in flight)
    for i, flight in enumerate(flights):
        assert [m for m in messages if f"/plane-{i}/" in m.topic] == flight
    assert [m.topic for m in messages[:4]] == [
        "sensors/plane-0/position", "sensors/plane-0/turbofan", "sensors/plane-1/position", "sensors/plane-1/turbofan",
    ]  # fmt: skip


def test_everything_is_acknowledged_and_arrives_in_order(tmp_path: Path) -> None:
    flights = journeys(2)
    seen: list[bytes] = []
    told: list[int] = []
    with nats_broker(tmp_path, users=[User("sensor", "secret")]) as broker:
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="listener")
        client.username_pw_set("sensor", "secret")
        subscribed = threading.Event()
        client.on_connect = lambda *_: client.subscribe("sensors/plane-0/#", qos=0)
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _client, _data, message: seen.append(message.payload)
        client.connect(broker.host, broker.port)
        client.loop_start()
        assert subscribed.wait(10)
        play(SensorBroker(broker.host, broker.port, "sensor", "secret"), flights, 1e6, lambda done, total: told.append(done))
        deadline = time.monotonic() + 10
        while len(seen) < len(flights[0]) and time.monotonic() < deadline:
            time.sleep(0.01)
        client.disconnect()
        client.loop_stop()
    assert told[-1] == sum(len(flight) for flight in flights)
    assert seen == [m.payload for m in flights[0]]
