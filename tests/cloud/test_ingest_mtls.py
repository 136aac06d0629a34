"""Ingest and control loop at Mosquitto as it is deployed: certificates only, the CN is user and client id, MQTT 5, shared subscriptions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest

from cloud import config, ingest
from cloud.audit import Audit
from cloud.config import Settings
from cloud.control import Control
from cloud.fleet import Fleet
from cloud.intake import Intake
from cloud.lake import Lake
from cloud.rights import mosquitto_acl
from cloud.workers import Worker
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.receipt import SequenceSet, decode_receipt
from edge_agent.contract.state import Phase, Reported, encode_state
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.zones import parse_zones
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block_bytes
from tests.cloud.ingests import running, wait_until
from tests.house import test_deploy as deploy

pytestmark = pytest.mark.needs_mosquitto

DEVICES = ("plane-01", "plane-02")
CLOUD = ("ingest-1", "ingest-2", "control-1")


@dataclass
class Site:
    """A region's broker with deploy's configuration, and a project that uses it."""

    folder: Path
    port: int
    settings: Settings

    @contextmanager
    def worker(self, number: int = 1, count: int = 1) -> Iterator[ingest.Ingest]:
        with running(self.settings, Worker(number, count)) as work:
            yield work

    def device(self, name: str) -> tuple[mqtt.Client, SequenceSet]:
        """A device with its certificate, and what its receipts have settled."""
        client, settled = deploy.certified(self.folder, name, self.port), SequenceSet()

        def take(client: mqtt.Client, data: object, message: mqtt.MQTTMessage) -> None:
            for lane in decode_receipt(message.payload).lanes:
                settled.add_range(1, lane.cumulative)
                for first, last in lane.ranges:
                    settled.add_range(first, last)

        client.on_message = take
        client.subscribe(DeviceTopics(name).receipts, 1)
        return client, settled


def up(device: str) -> str:
    return DeviceTopics(device).up("europe", "pump")


@pytest.fixture(params=[4, 5], ids=["MQTT 3.1.1", "MQTT 5"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    folder, project = tmp_path / "etc", tmp_path / "project"
    folder.mkdir()
    project.mkdir()
    (project / "pump.yaml").write_text(CONTRACT_YAML)
    (project / "zones.geojson").write_bytes(ZONES_JSON)
    acl = mosquitto_acl(parse_zones(ZONES_JSON, "zones"), "eu", CLOUD)
    with deploy.broker(folder, "region", [*DEVICES, *CLOUD], acl) as port:
        (project / "fenceline.toml").write_text(
            f"contracts = ['pump.yaml']\nzones = 'zones.geojson'\n[[regions]]\nname = 'eu'\nport = {port}\nmqtt = {request.param}\n"
            f"shared_subscriptions = true\nbroker_log = '{folder / 'mosquitto.log'}'\n"
            f"tls = {{ca_file = '{folder}/ca.crt', cert_file = '{folder}/{{name}}.crt', key_file = '{folder}/{{name}}.key'}}\n"
        )
        yield Site(folder, port, config.load(project))


def test_blocks_come_in_and_receipts_go_out_with_certificates(site: Site) -> None:
    device, settled = site.device("plane-01")
    with site.worker():
        for sequence in (1, 2, 3):
            device.publish(up("plane-01"), block_bytes(sequence, device="plane-01"), qos=1).wait_for_publish(20)
        wait_until(lambda: settled.cumulative == 3)
    device.publish(up("plane-01"), block_bytes(4, device="plane-01"), qos=1).wait_for_publish(20)  # nobody is there: the session keeps it
    with site.worker():
        wait_until(lambda: settled.cumulative == 4)
    assert Lake(site.settings.lake).read("pump").num_rows == 12


def test_a_certificate_of_another_device_is_refused_alarmed_and_written_down(site: Site) -> None:
    operator = deploy.certified(site.folder, "control-1", site.port)
    alarms = deploy.collect(operator, "fenceline/v1/+/events", count=1)
    with site.worker() as work:
        thief = deploy.certified(site.folder, "plane-02", site.port, client_id="plane-01")
        thief.publish(up("plane-01"), block_bytes(1, device="plane-01"), qos=1).wait_for_publish(20)
        audit = Audit(site.settings.audit_db)
        wait_until(lambda: audit.counts() == {"denied": 1})
        (entry,) = audit.entries()
        assert (entry.kind, entry.subject, entry.region) == ("denied_by_broker", "plane-02", "eu") and up("plane-01") in entry.detail
        ((topic, alarm),) = alarms()
        assert topic == DeviceTopics("plane-02").events and b"denied_by_broker" in alarm
        honest, settled = site.device("plane-01")
        honest.publish(up("plane-01"), block_bytes(1, device="plane-01"), qos=1).wait_for_publish(20)
        wait_until(lambda: settled.cumulative == 1)
        assert work.status.refused == {"denied": 1}
    assert audit.verify() is None and Lake(site.settings.lake).read("pump").num_rows == 3


def test_two_workers_share_what_one_device_sends(site: Site) -> None:
    device, settled = site.device("plane-01")
    with site.worker(1, 2) as first, site.worker(2, 2) as second:
        for sequence in range(1, 41):
            device.publish(up("plane-01"), block_bytes(sequence, device="plane-01"), qos=1).wait_for_publish(20)
        wait_until(lambda: settled.cumulative == 40)
        wait_until(lambda: first.status.blocks + second.status.blocks == 40)
        assert min(first.status.blocks, second.status.blocks) >= 10
    assert Lake(site.settings.lake).read("pump").num_rows == 120


def test_the_control_loop_hears_reports_with_a_certificate_of_its_own(site: Site) -> None:
    Fleet(site.settings.fleet_db).add("plane-01")
    control = Control(site.settings)
    control.start()
    try:
        wait_until(lambda: control.connected)
        with site.worker():
            wait_until(lambda: control.connected)  # neither ends the other's session
            device, _ = site.device("plane-01")
            report = Reported(device="plane-01", agent_version="0", desired_version=1, phase=Phase.IDLE)
            device.publish(DeviceTopics("plane-01").reported, encode_state(report), qos=1, retain=True).wait_for_publish(20)
            wait_until(lambda: "plane-01" in Fleet(site.settings.fleet_db).all_reported())
    finally:
        control.stop()


def test_a_certificate_that_is_not_there_is_named(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"ingest-9\.crt"):
        Intake(site.settings.region("eu"), "cloud", "", client_id="ingest-9")
