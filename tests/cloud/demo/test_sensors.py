"""The publisher: what it counts is what a real broker acknowledged, in order."""

from __future__ import annotations

import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from cloud.demo.journey import Aircraft, Message
from cloud.demo.sensors import Sensors, interleave
from cloud.demo.simulator import build_engine
from cloud.demo.track import TOURS, Track
from edge_agent.contract.errors import UnavailableError
from edge_agent.core.zones import parse_zones
from tests.brokers import HOST, User, free_port, nats_broker

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


def test_every_acknowledged_reading_is_counted_once_and_arrives_in_order(tmp_path: Path) -> None:
    flights = journeys(2)
    seen: list[bytes] = []
    with nats_broker(tmp_path, users=[User("sensor", "secret")]) as broker:
        client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="listener")
        client.username_pw_set("sensor", "secret")
        client.on_message = lambda _client, _data, message: seen.append(message.payload)
        client.connect(broker.host, broker.port)
        client.subscribe("sensors/plane-0/#", qos=0)
        client.loop_start()
        ticks: list[int] = []
        with Sensors(broker.host, broker.port, "sensor", "secret") as sensors:
            sensors.publish(interleave(flights), ticks.append)
        deadline = time.monotonic() + 10
        while len(seen) < len(flights[0]) and time.monotonic() < deadline:
            time.sleep(0.01)
        client.disconnect()
        client.loop_stop()
    expected = [m.reading for m in interleave(flights) if m.reading is not None]
    assert sensors.published == expected
    assert sum(ticks) == len(expected)
    assert sensors.payload_bytes == sum(len(m.payload) for flight in flights for m in flight if m.reading is not None)
    assert seen == [m.payload for m in flights[0]]


def test_a_broker_that_is_not_there_is_named() -> None:
    port = free_port()
    with pytest.raises(UnavailableError, match=f"{HOST}:{port} does not answer"), Sensors(HOST, port, "sensor", "x"):
        pass


def test_a_wrong_password_is_said_at_once(tmp_path: Path) -> None:
    with (
        nats_broker(tmp_path, users=[User("sensor", "secret")]) as broker,
        pytest.raises(UnavailableError, match="refused the connection"),
        Sensors(broker.host, broker.port, "sensor", "wrong"),
    ):
        pass
