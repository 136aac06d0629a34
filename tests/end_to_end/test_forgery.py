"""Devices that lie: real brokers with the product's own rights, real ingests, the audit trail and the alarm.

What a lie cannot be told from the truth by, no test can show: a device that says it was in a zone where it was not, and sends to that
zone's region under its own name, is believed. Everything else is refused.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, config, ingest, keys, policy
from cloud.audit import Audit
from cloud.broker_log import BrokerLog
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.lake import Lake
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import Broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block_bytes
from tests.cloud.ingests import wait_until
from tests.house import test_deploy as deploy
from tests.servers import HOST, free_port

PASSWORDS = {"d1": "one", "d2": "two"}
REGIONS = ("eu", "us")


@dataclass
class Cloud:
    """Two regions at work, and what was alarmed."""

    settings: Settings
    ingests: dict[str, ingest.Ingest] = field(default_factory=dict)
    alarms: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def rows(self) -> int:
        return int(Lake(self.settings.lake).read("pump").num_rows)

    def audited(self) -> list[tuple[str, str, str]]:
        """(kind, device, reason) of every entry, the oldest first."""
        return [(e.kind, e.subject, e.reason) for e in reversed(Audit(self.settings.audit_db).entries())]

    def caught(self, kind: str, device: str, reason: str) -> str:
        """Wait until it stands in the audit trail and was alarmed; the detail."""
        wait_until(lambda: (kind, device, reason) in self.audited())
        wait_until(lambda: any(d == device and (a["event"], a["reason"]) == (kind, reason) for d, a in self.alarms))
        assert Audit(self.settings.audit_db).verify() is None
        return next(e.detail for e in Audit(self.settings.audit_db).entries() if (e.kind, e.subject, e.reason) == (kind, device, reason))


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pump.yaml").write_text(CONTRACT_YAML)
    (project / "zones.geojson").write_bytes(ZONES_JSON)
    regions = "".join(f"[[regions]]\nname = '{name}'\nport = {free_port()}\n" for name in REGIONS)
    (project / "fenceline.toml").write_text(f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n{regions}")
    made = Cloud(config.load(project, tmp_path / "state"))
    made.settings.logs_dir.mkdir(parents=True)
    brokers.write_configs(made.settings, lambda: PASSWORDS)
    with ExitStack() as stack:
        for name in REGIONS:
            stack.enter_context(region(made, name))
        yield made


@contextmanager
def region(cloud: Cloud, name: str) -> Iterator[None]:
    """A region's broker with its log, its ingest, and someone who hears the alarms."""
    settings = cloud.settings
    running = Broker(brokers.command(settings, name), settings.region(name).port, settings.logs_dir / f"broker-{name}.log")
    running.start()
    cloud.ingests[name] = work = ingest.build(settings, name)
    work.intake.open()
    thread = threading.Thread(target=work.run)
    thread.start()
    listener = connect(settings, name, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER), f"operator-{name}")
    listener.on_message = lambda _c, _d, m: cloud.alarms.append((m.topic.split("/")[2], json.loads(m.payload)))
    listener.subscribe("fenceline/v1/+/events", qos=1)
    wait_until(lambda: work.intake.connected)
    try:
        yield
    finally:
        work.stop = True
        thread.join()
        work.intake.close()
        listener.loop_stop()
        running.kill()


def connect(settings: Settings, name: str, user: str, password: str, client_id: str) -> mqtt.Client:
    client, answered = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=client_id), threading.Event()
    client.username_pw_set(user, password)
    client.on_connect = lambda *_: answered.set()
    client.connect(HOST, settings.region(name).port)
    client.loop_start()
    assert answered.wait(20)
    return client


def send(
    cloud: Cloud, name: str, topic: str, payload: bytes, *, user: str = "d1", password: str | None = None, client_id: str = ""
) -> None:
    client = connect(cloud.settings, name, user, password or PASSWORDS[user], client_id or user)
    client.publish(topic, payload, qos=1).wait_for_publish(20)
    client.disconnect()
    client.loop_stop()


def up(device: str, lane: str) -> str:
    return DeviceTopics(device).up(lane, "pump")


@pytest.mark.parametrize("header", [{"lane": "canada"}, {"lane": "europe", "device": "d2"}], ids=["another zone", "another device"])
def test_a_forged_header_is_refused_alarmed_and_written_down(cloud: Cloud, header: dict[str, str]) -> None:
    send(cloud, "eu", up("d1", "europe"), block_bytes(1, **header))
    detail = cloud.caught("block_refused", "d1", "wrong_device")
    assert header.get("device", header["lane"]) in detail
    assert cloud.rows() == 0


def test_a_block_of_another_regions_zone_is_dropped_by_the_broker_and_refused_by_the_gate(cloud: Cloud) -> None:
    send(cloud, "us", up("d1", "europe"), block_bytes(1, lane="europe"))
    assert up("d1", "europe") in cloud.caught("denied_by_broker", "d1", "denied")
    secret = brokers.password(cloud.settings, brokers.CLOUD_USER)  # as if the broker let it pass
    send(cloud, "us", up("d1", "europe"), block_bytes(1, lane="europe"), user="cloud", password=secret, client_id="lax")
    assert "'us' may not hold 'europe'" in cloud.caught("block_refused", "d1", "wrong_region")
    assert cloud.rows() == 0


def test_a_device_on_another_devices_topic_is_dropped_alarmed_and_written_down(cloud: Cloud) -> None:
    send(cloud, "eu", up("d2", "europe"), block_bytes(1, device="d2"))
    assert up("d2", "europe") in cloud.caught("denied_by_broker", "d1", "denied")
    send(cloud, "eu", DeviceTopics("d2").reported, b"{}")
    send(cloud, "eu", up("d1", "europe"), block_bytes(1))  # what is its own goes on
    wait_until(lambda: cloud.rows() == 3)


def test_the_password_of_another_device_does_not_open_ones_own_topics(cloud: Cloud) -> None:
    send(cloud, "eu", up("d1", "europe"), block_bytes(1), user="d2", client_id="d1")
    assert up("d1", "europe") in cloud.caught("denied_by_broker", "d1", "denied")
    assert cloud.rows() == 0


def test_a_policy_that_was_published_is_in_force_at_the_gate_without_a_restart(cloud: Cloud, tmp_path: Path) -> None:
    settings, fleet = cloud.settings, Fleet(cloud.settings.fleet_db)
    keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    fleet.add("d1")
    send(cloud, "us", up("d1", "canada"), block_bytes(1, lane="canada"))
    wait_until(lambda: cloud.rows() == 3)
    stricter = tmp_path / "stricter.geojson"
    stricter.write_bytes(ZONES_JSON.replace(b'["us", "eu"]', b'["eu"]'))
    ref = policy.publish(settings, fleet, stricter, now=datetime.now(UTC))
    assert policy.publish(settings, fleet, stricter, now=datetime.now(UTC)) == ref and ref.version == 1
    assert (fleet.desired("d1").version, fleet.desired("d1").zones) == (2, ref)
    wait_until(lambda: cloud.ingests["us"].gate.zones.digest == ref.sha256)
    send(cloud, "us", up("d1", "canada"), block_bytes(2, lane="canada", policy="an older one"))
    cloud.caught("block_refused", "d1", "wrong_region")
    assert ("policy_published", "fleet", "") in cloud.audited() and cloud.rows() == 3
    assert policy.show(settings, fleet).behind == ["d1"]


@pytest.mark.needs_mosquitto
def test_with_certificates_the_name_in_the_log_is_the_certificates(tmp_path: Path) -> None:
    with deploy.broker(tmp_path, "region", ["plane-01", "plane-02", "ingest-1"]) as port:
        thief = deploy.certified(tmp_path, "plane-02", port, client_id="plane-01")
        thief.publish(up("plane-01", "europe"), block_bytes(1, device="plane-01"), qos=1).wait_for_publish(20)
        log = BrokerLog(tmp_path / "mosquitto.log", tmp_path / "place.json")
        found: list[tuple[str, str, str]] = []
        wait_until(lambda: found.extend((d.client, d.action, d.topic) for d in log.read()) or found)
        assert found == [("plane-02", "publish", up("plane-01", "europe"))]
        thief.disconnect()
        thief.loop_stop()
