"""Ingest against a real broker: receipts, refusals, crashes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud import brokers, cli, config, ingest, intake
from cloud.audit import Audit
from cloud.config import IngestLimits, Settings
from cloud.gate import Sealed
from cloud.ingest_status import read_status, read_worker, status_path
from cloud.intake import Received
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.workers import ONE, Pool, Worker, command, end_unused
from edge_agent.contract.block import encode_block
from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt, decode_receipt
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import Broker, User, mosquitto_broker, nats_broker
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block, block_bytes
from tests.cloud.test_quarantine import bad
from tests.cloud.test_quarantine import rows as held_rows

ROOT = Path(__file__).parents[2]
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


def test_an_idle_ingest_rests_between_upkeep(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_up: list[int] = []
    monkeypatch.setattr(CheckedLake, "compact", lambda self, files_max: kept_up.append(files_max))
    with running(settings):
        kept_up.clear()
        time.sleep(4 * ingest.IDLE_S)
        assert 1 <= len(kept_up) <= 5


def test_blocks_are_committed_before_their_receipt(settings: Settings, device: Device) -> None:
    with running(settings):
        for sequence in (1, 2, 4):
            device.send(block_bytes(sequence))
        deadline = time.monotonic() + WAIT_S
        receipt = device.wait_for(2)
        while receipt.lanes[0].ranges == [] and time.monotonic() < deadline:
            receipt = device.wait_for(2)
        assert receipt == Receipt(device="d1", epoch="e1", lanes=[LaneReceipt(lane="europe", cumulative=2, ranges=[(4, 4)])])
        assert rows(settings) == [(s, r) for s in (1, 2, 4) for r in range(3)]


def test_a_block_that_is_sent_again_gets_a_receipt_and_no_rows(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.send(block_bytes(1))
        device.wait_for(1)
        device.send(block_bytes(1))
        assert device.wait_for(1).lanes == [LaneReceipt(lane="europe", cumulative=1)]
        wait_until(lambda: work.status.duplicates == 1)
        assert len(rows(settings)) == 3


@pytest.mark.parametrize(
    ("payload", "lane", "reason"),
    [
        (block_bytes(1, lane="atlantis"), "atlantis", "wrong_region"),
        (block_bytes(1, lane="europe"), "canada", "wrong_device"),
        (block_bytes(1)[:-1] + b"!", "europe", "corrupt"),
        (b"", "europe", "corrupt"),
        (block_bytes(1, contract_version="9"), "europe", "unknown_stream"),
    ],
    ids=["foreign zone", "forged zone", "damaged", "empty", "unknown contract"],
)
def test_what_is_refused_is_counted_audited_and_alarmed_and_the_next_block_goes_on(
    settings: Settings, device: Device, payload: bytes, lane: str, reason: str
) -> None:
    with running(settings) as work:
        device.send(payload, lane)
        device.send(block_bytes(1))
        device.wait_for(1)

        assert work.status.refused == {reason: 1}
        alarm = device.alarms.get(timeout=WAIT_S)
        assert (alarm["event"], alarm["region"], alarm["reason"], alarm["count"]) == ("block_refused", "eu", reason, 1)
        (entry,) = Audit(settings.audit_db).entries()
        assert (entry.subject, entry.region, entry.reason) == ("d1", "eu", reason)
        assert len(rows(settings)) == 3
        time.sleep(1.5)  # past ack_wait: an unacknowledged message would have come again
        assert work.status.refused == {reason: 1}


def test_a_storm_of_refusals_is_a_few_entries_with_their_number(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        for sequence in range(1, 31):
            device.send(block_bytes(sequence, lane="atlantis"), "atlantis")
        wait_until(lambda: work.status.refused == {"wrong_region": 30})
    audit = Audit(settings.audit_db)
    assert audit.counts() == {"wrong_region": 30} and len(audit.entries()) <= 2


def unavailable(*_: object) -> None:
    raise UnavailableError("away")


class Flooded:
    """Stands in for the intake at its worst: whenever a refused message is acknowledged, the broker has the next one there."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self.connected = self.flooding = True

    def wake(self) -> None:
        self.queue.put(None)

    def release(self, batch: list[Received]) -> None:
        for message in batch:
            if self.flooding and message.payload == b"junk":
                self.queue.put(message)

    def publish(self, topic: str, payload: bytes, **_: Any) -> bool:
        return True


def test_a_flood_of_refused_messages_keeps_nobody_s_blocks_waiting_nor_a_stop(settings: Settings) -> None:
    work = ingest.build(settings, "eu")
    flooded: Any = Flooded()
    work.intake = flooded
    for mid in range(8):
        flooded.queue.put(Received("fenceline/v1/evil/up/europe/pump", b"junk", 1, mid, False))
    flooded.queue.put(Received("fenceline/v1/d1/up/europe/pump", block_bytes(1), 1, 9, False))
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        wait_until(lambda: work.status.blocks == 1 and work.status.receipts == 1)
        wait_until(lambda: (found := read_status(settings, "eu")) is not None and found.refused.get("corrupt", 0) > 8)
        work.stop = True
        thread.join(WAIT_S)
        assert not thread.is_alive(), "it ends although messages go on to come"
    finally:
        flooded.flooding, work.stop = False, True
        thread.join()


def test_what_a_device_wrote_reaches_log_audit_and_broker_cut_to_length(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    header, table = block(1)
    payload = encode_block(header, {**table, "c" * 1_000_000: table["count"]})
    assert len(payload) < 2_000
    work, sent = ingest.build(settings, "eu"), list[bytes]()
    intake: Any = Flooded()
    intake.publish = lambda topic, payload: sent.append(payload) is None
    work.intake = intake
    intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", payload, 1, 1, False))
    thread = threading.Thread(target=work.run)
    thread.start()
    wait_until(lambda: work.status.refused == {"corrupt": 1} and sent)
    work.stop = True
    thread.join()
    assert json.loads(sent[0])["reason"] == "corrupt" and len(sent[0]) < 2_000
    assert max(len(record.getMessage()) for record in caplog.records) < 2_000


def test_an_ingest_that_has_no_room_rests_until_it_may_try_the_lake_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    work, loops = ingest.build(replace(settings, ingest=IngestLimits(batch_blocks_max=2)), "eu"), list[float]()
    monkeypatch.setattr(ingest, "RETRY_S", (0.8, 0.8))
    work._retry_s = 0.8
    with monkeypatch.context() as away:
        away.setattr(work.lake, "append", unavailable)
        away.setattr(work._receipts, "send", loops.append)
        for sequence in range(1, 6):
            work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", block_bytes(sequence), 1, sequence, False))
        thread = threading.Thread(target=work.run)
        thread.start()
        wait_until(lambda: not work.status.lake_available and work._full)
        loops.clear()
        time.sleep(1.0)
        assert len(loops) < 30, "of them two for each time it tries"
    wait_until(lambda: work.status.blocks == 5)
    work.stop = True
    thread.join()


def test_a_status_that_cannot_be_written_keeps_no_block_waiting(settings: Settings) -> None:
    work = ingest.build(settings, "eu")
    work.status_file = settings.run_dir / "nowhere" / "status.json"
    thread = threading.Thread(target=work.run)
    thread.start()
    time.sleep(2 * ingest.STATUS_S)
    work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", block_bytes(1), 1, 1, False))
    wait_until(lambda: work.status.blocks == 1)
    work.stop = True
    thread.join()
    work.status_file.parent.mkdir()
    work.status_file.write_bytes(b"")
    assert read_worker(work.status_file) is None, "cut off by a power cut"


def test_messages_without_qos_take_so_much_memory_and_no_more(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "UNCOUNTED_BYTES_MAX", 100_000)
    taken = intake.Intake(settings.region("eu"), "cloud", SECRET, client_id="ingest-1")
    message = mqtt.MQTTMessage(topic=b"fenceline/v1/d1/up/europe/pump")
    message.payload = bytes(30_000)
    for _ in range(5):
        taken._on_message(taken._client, None, message)
    assert taken.queue.qsize() == 3
    first = taken.queue.get()
    assert first is not None
    taken.release([first])
    for _ in range(5):
        taken._on_message(taken._client, None, message)
    assert taken.queue.qsize() == 3


@pytest.mark.needs_mosquitto
@pytest.mark.parametrize("qos", [0, 1])
def test_no_text_in_a_message_s_properties_cuts_the_ingest_off(settings: Settings, tmp_path: Path, qos: int) -> None:
    with mosquitto_broker(tmp_path, [User("cloud", SECRET), User("d1", "p")]) as five:
        taken = intake.Intake(replace(settings.region("eu"), port=five.port, mqtt=5), "cloud", SECRET, client_id="ingest-1")
        taken.open()
        wait_until(lambda: taken.connected)
        client = mqtt.Client(CallbackAPIVersion.VERSION2, "d1", protocol=mqtt.MQTTv5)
        client.username_pw_set("d1", "p")
        client.connect(five.host, five.port)
        client.loop_start()
        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = [("name", "\ufeff"), ("long", "x" * 300)]
        for payload in (b"with", b"without"):
            topic = "fenceline/v1/d1/up/europe/pump"
            client.publish(topic, payload, qos=qos, properties=properties if payload == b"with" else None).wait_for_publish(WAIT_S)
        got = [taken.queue.get(timeout=WAIT_S) for _ in range(2)]
        assert [message and message.payload for message in got] == [b"with", b"without"] and taken.connection == 1
        for session in (client, taken._client):
            session.disconnect()
            session.loop_stop()


def test_upkeep_has_its_turn_however_busy_the_lake_is(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "UPKEEP_S", 0.2)
    work, done = ingest.build(settings, "eu"), list[int]()
    monkeypatch.setattr(work, "_upkeep", lambda: done.append(work.status.blocks))
    for sequence in range(1, 400):
        work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", block_bytes(sequence), 1, sequence, False))
    work.limits = IngestLimits(batch_blocks_max=4)
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        wait_until(lambda: work.status.blocks >= 399)
    finally:
        work.stop = True
        thread.join()
    assert [blocks for blocks in done if 0 < blocks < 380], f"only before or after all of it: {done}"


def test_a_batch_is_as_large_as_what_its_blocks_unpack_to(settings: Settings) -> None:
    header, table = block(1, rows=2_000)
    texts = Strings(np.arange(2_000, dtype=np.int32), tuple(f"{n:01000}" for n in range(2_000)))
    payload = encode_block(header, {**table, "pump": texts})
    message = Received("fenceline/v1/d1/up/europe/pump", payload, 1, 1, False)
    sealed = ingest.build(settings, "eu").gate.admit(message.topic, payload)
    assert isinstance(sealed, Sealed)
    batch = ingest.Batch()
    batch.add(message, sealed, 0.0)
    assert 20 * len(payload) < 2_000 * 1_000 < batch.size_bytes < 1.2 * 2_000 * 1_000 and batch.rows == 2_000, "a text in each row"


def test_small_messages_that_unpack_to_much_are_committed_few_at_a_time(settings: Settings) -> None:
    work = ingest.build(replace(settings, ingest=IngestLimits(batch_bytes_max=3 * 1024 * 1024)), "eu")
    for sequence in range(1, 9):
        header, table = block(sequence, rows=1)
        large = encode_block(header, {**table, "pump": Strings.of(["x" * 1024 * 1024])})
        assert len(large) < 1024
        work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", large, 1, sequence, False))
    work._collect()
    assert len(work._next.messages) == 3 and work.intake.queue.qsize() == 5


def test_blocks_wait_unacknowledged_while_the_lake_cannot_write(
    settings: Settings, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*args: object, **kw: object) -> None:
        raise OSError(28, "No space left on device")

    with running(settings) as work:
        with monkeypatch.context() as patch:
            patch.setattr("cloud.lake.write_deltalake", no_space)
            device.send(block_bytes(1))
            wait_until(lambda: not work.status.lake_available)
            assert device.receipts.empty()
        device.wait_for(1)
        assert len(rows(settings)) == 3


def test_blocks_sent_while_ingest_is_down_are_stored_when_it_returns(settings: Settings, device: Device) -> None:
    with running(settings):
        device.send(block_bytes(1))
        device.wait_for(1)
    device.send(block_bytes(2))
    with running(settings):
        device.wait_for(2)
    assert len(rows(settings)) == 6


def test_ingest_goes_on_after_its_broker_was_killed(settings: Settings, broker: Broker, device: Device) -> None:
    with running(settings) as work:
        device.send(block_bytes(1))
        device.wait_for(1)
        broker.restart()
        wait_until(lambda: work.intake.connection == 2 and work.intake.connected)
        wait_until(device.client.is_connected)
        time.sleep(0.3)
        device.send(block_bytes(2))
        device.send(block_bytes(2))
        device.wait_for(2)
    assert len(rows(settings)) == 6


DIES_BEFORE_THE_RECEIPT = """
import os, signal
from cloud import ingest
from cloud.intake import Intake
Intake.publish = lambda *a, **kw: os.kill(os.getpid(), signal.SIGKILL)
ingest.main()
"""


def test_killed_between_commit_and_receipt_it_stores_nothing_twice(settings: Settings, device: Device) -> None:
    arguments = ["--region", "eu", "--project", str(settings.project)]
    work = subprocess.Popen([sys.executable, "-c", DIES_BEFORE_THE_RECEIPT, *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_until(lambda: (status := read_status(settings, "eu")) is not None and status.connected)
    device.send(block_bytes(1))
    assert work.wait(WAIT_S) == -9
    assert len(rows(settings)) == 3 and device.receipts.empty()

    with running(settings) as again:
        device.wait_for(1)  # the broker sends the block again
        wait_until(lambda: again.status.duplicates >= 1)  # counted after the receipt
        device.send(block_bytes(2))
        device.wait_for(2)
    assert len(rows(settings)) == 6


def test_a_block_sent_without_qos_is_stored_and_does_not_cost_the_connection(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.client.publish(device.topics.up("europe", "pump"), block_bytes(1), qos=0)
        device.wait_for(1)
        device.send(block_bytes(2))
        device.wait_for(2)
        assert work.intake.connected and work.intake.connection == 1


def test_on_a_broker_without_shared_subscriptions_each_device_has_its_worker(settings: Settings, broker: Broker, device: Device) -> None:
    region = settings.region("eu")
    workers = [Worker(number, 3) for number in (1, 2, 3)]
    names = [f"gw-{i}" for i in range(60)]
    kept = {name: [w.number for w in workers if w.kept(region)(DeviceTopics(name).up("europe", "pump"))] for name in names}
    assert all(len(owners) == 1 for owners in kept.values()) and {owners[0] for owners in kept.values()} == {1, 2, 3}
    assert sum(w.kept(region)("no/device") for w in workers) == sum(w.kept(region)("odd") for w in workers) == 1

    with running(settings, workers[0]) as first, running(settings, workers[1]) as second, running(settings, workers[2]) as third:
        for sequence in (1, 2, 3):
            device.send(block_bytes(sequence))
        device.wait_for(3)
        wait_until(lambda: sorted(w.status.blocks for w in (first, second, third)) == [0, 0, 3])
        assert read_status(settings, "eu") is not None
    assert len(rows(settings)) == 9


@pytest.mark.needs_mosquitto
def test_what_a_worker_would_have_got_goes_to_the_others_once_its_session_is_ended(settings: Settings, tmp_path: Path) -> None:
    with mosquitto_broker(tmp_path, [User("cloud", SECRET), User("d1", "p")]) as shared:
        region = replace(settings.region("eu"), port=shared.port, shared_subscriptions=True)
        settings = replace(settings, regions=(region,))
        device = Device(shared)
        with running(settings, Worker(1, 2)), running(settings, Worker(2, 2)):
            pass  # both sessions are there, and status files
        device.send(block_bytes(1))
        device.send(block_bytes(2))
        with running(settings, ONE):
            wait_until(lambda: len(rows(settings)) == 3)  # the other block waits for a worker that never comes
        end_unused(settings, region, ONE)
        assert [path.name for path in settings.run_dir.glob("ingest-eu*")] == ["ingest-eu.ingest-1.json"]
        with running(settings, ONE):
            for sequence in (1, 2, 3):
                device.send(block_bytes(sequence))
            device.wait_for(3)
        device.client.disconnect()
        device.client.loop_stop()
    assert len(rows(settings)) == 9


def test_a_session_that_the_broker_refuses_to_end_is_tried_again_at_the_next_start(
    settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FORGET_S", 1.0)
    unused = status_path(settings, "eu", "ingest-2")
    unused.parent.mkdir(parents=True, exist_ok=True)
    unused.write_text("{}")
    password = brokers.password_path(settings, brokers.CLOUD_USER)
    password.write_text("of yesterday")
    end_unused(settings, settings.region("eu"), ONE)
    assert unused.exists()
    with pytest.raises(UnavailableError, match="refused"):
        intake.forget(settings.region("eu"), "ingest-2", brokers.CLOUD_USER, "of yesterday")
    password.write_text(SECRET)
    end_unused(settings, settings.region("eu"), ONE)
    assert not unused.exists()


def test_a_pool_starts_its_workers_again_and_ends_them(settings: Settings, device: Device) -> None:
    stop = threading.Event()
    commands = [command(settings, "eu", Worker(number, 2)) for number in (1, 2)]
    pool = threading.Thread(target=Pool(commands, stop).run)
    pool.start()
    try:
        files = [status_path(settings, "eu", f"ingest-{number}") for number in (1, 2)]
        wait_until(lambda: all((status := read_worker(path)) is not None and status.connected for path in files), 60.0)
        before = [status.pid for path in files if (status := read_worker(path)) is not None]
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: (status := read_worker(files[0])) is not None and status.pid != before[0] and status.connected, 60.0)
        device.send(block_bytes(1))
        device.wait_for(1)
    finally:
        stop.set()
        pool.join()
    assert not Path(f"/proc/{before[1]}").exists()


def test_a_mistake_that_every_worker_would_end_with_is_said_once(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    (settings.project / "pump.yaml").write_text("not: a contract")
    assert cli.main(["--project", str(settings.project), "ingest", "--region", "eu", "--workers", "2"]) == 2
    assert "pump.yaml" in capsys.readouterr().err


def test_rows_that_break_their_contract_are_put_apart_told_and_settled(settings: Settings, device: Device) -> None:
    with running(settings) as work:
        device.send(encode_block(*bad(1, [0, 2])))
        device.send(encode_block(*bad(2, [0, 1, 2, 3])))
        device.wait_for(2)
        alarm = device.alarms.get(timeout=WAIT_S)
        wait_until(lambda: work.status.quarantined_rows == 6)
    assert rows(settings) == [(1, 1), (1, 3)]
    assert held_rows(CheckedLake(Lake(settings.lake)).held) == [(1, 0), (1, 2), *((2, r) for r in range(4))]
    assert (alarm["event"], alarm["reason"]) == ("rows_quarantined", "out_of_range")
    assert "field 'pressure': 0 to 100 allowed" in alarm["detail"]
    assert {e.kind for e in Audit(settings.audit_db).entries()} == {"rows_quarantined"}
