"""Ingest when something fails or means harm: the lake, the broker, its own process, its disk; floods, and messages that cost memory."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from cloud import ingest, intake
from cloud.config import IngestLimits, Settings
from cloud.ingest_status import read_status, read_worker
from cloud.intake import Received
from edge_agent.contract.block import encode_block
from edge_agent.contract.errors import UnavailableError
from tests.brokers import Broker, User, mosquitto_broker
from tests.cloud.blocks import block, block_bytes
from tests.cloud.ingests import SECRET, WAIT_S, Device, broker, device, rows, running, settings, wait_until

__all__ = ["broker", "device", "settings"]

ROOT = Path(__file__).parents[2]


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
