"""The control loop: what fails in one step is said, and the others go on. Desired documents reach the broker when they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config, fleet
from cloud.config import Region
from cloud.control import Control, RegionControl
from cloud.fleet import Fleet
from cloud.intake import Intake
from cloud.watch import read_quality
from edge_agent.contract.state import Desired, decode_desired
from edge_agent.contract.topics import PREFIX, parse
from tests.brokers import User, free_port, nats_broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON

WAIT_S = 60.0


def until(condition: Callable[[], object], step: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        step()
        time.sleep(0.01)


def test_a_fault_in_one_step_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    region = f"[[regions]]\nname = 'eu'\nport = {free_port()}\n"
    (tmp_path / "fenceline.toml").write_text(f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n{region}")
    settings = config.load(tmp_path)
    secret = brokers.password_path(settings, brokers.CLOUD_USER)
    secret.parent.mkdir(parents=True)
    secret.write_text("c")
    control = Control(settings)

    def fault() -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(control.regions[0], "step", fault)
    control.start()
    try:
        deadline = time.monotonic() + 60
        while read_quality(settings) is None or caplog.text.count("control step failed") < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        control.stop()
    assert "a fault of ours" in caplog.text


def test_documents_are_read_when_they_change_and_published_at_every_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    monkeypatch.setattr(fleet, "decode_desired", lambda document: (read.append(document), decode_desired(document))[1])
    here, elsewhere = Fleet(tmp_path / "fleet.db"), Fleet(tmp_path / "fleet.db")
    for number in range(50):
        elsewhere.add(f"d{number}")
    retained: dict[str, Desired] = {}

    def take(client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
        retained[parse(message.topic).device] = decode_desired(bytes(message.payload))

    with nats_broker(tmp_path, [User("cloud", "c"), User("told", "t")]) as broker:
        told = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="told")
        told.on_message = take
        told.on_connect = lambda *_: told.subscribe(f"{PREFIX}/+/desired", 1)
        told.username_pw_set("told", "t")
        told.connect(broker.host, broker.port)
        told.loop_start()
        intake = Intake(Region("eu", broker.host, broker.port), "cloud", "c", client_id="control-1", persistent=False)
        region = RegionControl(intake.region, here, intake)
        intake.open()
        try:
            until(lambda: len(retained) == 50, region.step)

            read.clear()
            for _ in range(5):
                region.step()
            assert read == [], "nothing changed"

            elsewhere.set_desired("d7", None)
            read.clear()
            until(lambda: retained["d7"].version == 2, region.step)
            assert len(read) == 1

            broker.kill()
            until(lambda: not intake.connected)
            elsewhere.set_desired("d8", None)
            broker.start()
            retained.clear()
            until(lambda: len(retained) == 50 and retained["d8"].version == 2, region.step)
        finally:
            intake.close()
            told.loop_stop()
