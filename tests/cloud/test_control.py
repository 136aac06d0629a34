"""The control loop: what fails in one step is said, and the others go on. Desired documents reach the broker when they change."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config, fleet, rollout
from cloud.config import Region, Settings
from cloud.control import Control, RegionControl
from cloud.fleet import Fleet
from cloud.intake import Intake
from cloud.watch import read_quality
from edge_agent.contract.state import Desired, Phase, Reported, decode_desired
from edge_agent.contract.topics import PREFIX, parse
from tests.brokers import Broker, User, free_port, nats_broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON
from tests.cloud.refs import a_ref

WAIT_S = 240.0
USERS = (User("cloud", "c"), User("told", "t"))
REF = a_ref(1)


def until(condition: Callable[[], object], step: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        step()
        time.sleep(0.01)


def settings_at(tmp_path: Path, port: int) -> Settings:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    region = f"[[regions]]\nname = 'eu'\nport = {port}\n"
    (tmp_path / "fenceline.toml").write_text(f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n{region}")
    settings = config.load(tmp_path)
    secret = brokers.password_path(settings, brokers.CLOUD_USER)
    secret.parent.mkdir(parents=True)
    secret.write_text("c")
    return settings


@contextmanager
def hearing(broker: Broker, heard: Callable[[str, Desired], object]) -> Iterator[None]:
    """Tell `heard` of every desired document that the broker is given, or has kept."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="told")
    client.username_pw_set("told", "t")
    client.on_message = lambda _client, _data, message: heard(parse(message.topic).device, decode_desired(bytes(message.payload)))
    client.on_connect = lambda *_: client.subscribe(f"{PREFIX}/+/desired", 1)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        yield
    finally:
        client.loop_stop()


def test_a_fault_in_one_step_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    settings = settings_at(tmp_path, free_port())
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
    with (
        nats_broker(tmp_path, USERS) as broker,
        hearing(broker, retained.__setitem__),
    ):
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


def test_documents_are_published_while_a_large_wave_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.control.ROLLOUT_S", 0.0)  # one device in a turn
    monkeypatch.setattr("cloud.rollout.HOLD_S", 0.0)
    asked: list[str] = []
    set_desired = Fleet.set_desired
    monkeypatch.setattr(Fleet, "set_desired", lambda fleet, device, ref: (asked.append(device), set_desired(fleet, device, ref))[1])
    heard: list[tuple[str, int]] = []  # a device that got the bundle, and how many had been asked until then

    def hear(device: str, desired: Desired) -> None:
        if desired.bundle is not None:
            heard.append((device, len(asked)))

    with nats_broker(tmp_path, USERS) as broker, hearing(broker, hear):
        settings = settings_at(tmp_path, broker.port)
        control = Control(settings)
        for number in range(8):
            control.fleet.add(f"d{number:02d}")
        rollout.start(settings, control.fleet, REF, now=time.time())
        control.fleet.record_reported(Reported(device="d00", agent_version="0", desired_version=2, phase=Phase.ACTIVE, active=REF))
        control.start()
        try:
            until(lambda: len(heard) >= 8)
        finally:
            control.stop()
    assert {device for device, _ in heard} == set(control.fleet.devices()) and len(asked) == 8
    assert min(count for device, count in heard if device != "d00") < 8
