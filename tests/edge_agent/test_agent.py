"""The whole agent as a process: a real sensor broker, a real regional broker, a cloud that answers with receipts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract.block import decode_block
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import ALL_BLOCKS, DeviceTopics
from edge_agent.status import ask
from tests.brokers import Broker, nats_broker
from tests.edge_agent.test_config import write

START_S = 1_700_000_000


class Cloud:
    """Keeps every block that arrives, once, and sends receipts while `answering`."""

    def __init__(self, broker: Broker) -> None:
        self.answering = True
        self.tables: dict[tuple[str, str, int], Table] = {}
        self.streams: dict[tuple[str, str, int], str] = {}
        self._settled: dict[tuple[str, str], SequenceSet] = {}
        self._client = Client(CallbackAPIVersion.VERSION2, "cloud")
        self._client.on_connect = lambda client, *_: client.subscribe(ALL_BLOCKS, qos=1)
        self._client.on_message = self._on_block
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    def _on_block(self, client: Client, _data: Any, message: Any) -> None:
        header, table = decode_block(message.payload)
        name = (header.epoch, header.lane, header.sequence)
        self.tables[name], self.streams[name] = table, header.stream
        if self.answering:
            settled = self._settled.setdefault((header.epoch, header.lane), SequenceSet())
            settled.add(header.sequence)
            lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
            receipt = Receipt(device=header.device, epoch=header.epoch, lanes=[lane])
            client.publish(DeviceTopics(header.device).receipts, encode_receipt(receipt), qos=1)

    def readings(self) -> list[tuple[str, int]]:
        """(lane, cycle) of every reading that arrived."""
        return [
            (name[1], int(cycle))
            for name, table in sorted(self.tables.items())
            if self.streams[name] == "turbofan"
            for cycle in table["cycle"].tolist()
        ]

    def quarantined(self) -> list[tuple[str, str]]:
        """(reason, detail) of every rejected payload that arrived."""
        out = []
        for name, table in sorted(self.tables.items()):
            if self.streams[name] == "quarantine":
                reason, detail = table["reason"], table["detail"]
                assert isinstance(reason, Strings) and isinstance(detail, Strings)
                out += list(zip(reason.tolist(), detail.tolist(), strict=True))
        return out

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Bench:
    """A device's surroundings in one folder."""

    def __init__(self, path: Path, sensors: Broker, eu: Broker) -> None:
        self.path, self.sensors, self.eu = path, sensors, eu
        self.config = write(path)
        text = self.config.read_text().replace('127.0.0.1:1883"', f'127.0.0.1:{sensors.port}"').replace("18831", str(eu.port))
        self.config.write_text(text)
        self.cloud = Cloud(eu)
        self.agent: subprocess.Popen[bytes] | None = None
        self._publisher = Client(CallbackAPIVersion.VERSION2, "sensor", clean_session=True)
        self._publisher.connect(sensors.host, sensors.port)
        self._publisher.loop_start()

    def replace(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def start(self) -> None:
        log = (self.path / "agent.log").open("ab")
        self.agent = subprocess.Popen([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(self.config)], stderr=log)
        wait_for(lambda: self.status()["sensors"]["connected"], self.log)

    def status(self) -> dict[str, Any]:
        return ask(self.path / "state")

    def kill(self, sign: signal.Signals = signal.SIGKILL) -> int:
        assert self.agent is not None
        self.agent.send_signal(sign)
        code, self.agent = self.agent.wait(20), None
        return code

    def publish(self, payload: bytes, topic: str = "turbofan") -> None:
        self._publisher.publish(f"sensors/plane-01/{topic}", payload, qos=1).wait_for_publish(10)

    def log(self) -> str:
        return (self.path / "agent.log").read_text()

    def close(self) -> None:
        if self.agent is not None:
            self.kill()
        self.cloud.close()
        self._publisher.disconnect()
        self._publisher.loop_stop()


def wait_for(done: Callable[[], Any], explain: Callable[[], str], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if done():
                return
        except Exception as e:
            if time.monotonic() > deadline:
                raise AssertionError(explain()) from e
        assert time.monotonic() < deadline, explain()
        time.sleep(0.05)


def reading(cycle: int, **changes: object) -> bytes:
    values: dict[str, object] = {
        "ts": START_S + cycle,
        "engine": "e1",
        "cycle": cycle,
        "setting_1": 0.0,
        "setting_2": 0.0,
        "setting_3": 100.0,
    }
    real = [518.67, 641.82, 1589.7, 1400.6, 14.62, 21.61, 554.36, 2388.06, 9046.19, 1.3, 47.47, 521.66, 2388.02, 8138.62, 8.4195, 0.03, 392]
    real += [2388, 100.0, 39.06, 23.419]
    values |= {f"sensor_{i}": value for i, value in enumerate(real, 1)}
    return json.dumps(values | changes).encode()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        yield made
        made.close()


def test_every_reading_arrives_once_and_bad_payloads_arrive_in_quarantine(bench: Bench) -> None:
    bench.start()
    for cycle in range(1, 51):
        bench.publish(reading(cycle))
    bench.publish(reading(7))  # a sensor repeats itself
    bench.publish(b"not json")
    bench.publish(reading(51, sensor_2=-400.0))
    wait_for(lambda: len(bench.cloud.readings()) == 50 and len(bench.cloud.quarantined()) == 2, bench.log)
    assert sorted(bench.cloud.readings()) == [("europe", c) for c in range(1, 51)]
    reasons = dict(bench.cloud.quarantined())
    assert set(reasons) == {"malformed", "out_of_range"}
    assert "'sensor_2' is -400" in reasons["out_of_range"]
    wait_for(lambda: bench.status()["buffer"]["waiting_blocks"] == 0, bench.log)
    assert bench.kill(signal.SIGTERM) == 0


def test_kill_9_loses_nothing_and_doubles_nothing(bench: Bench) -> None:
    bench.start()
    cycle = 0
    for _ in range(4):
        for _ in range(40):
            cycle += 1
            bench.publish(reading(cycle))
        bench.kill()
        cycle += 1
        bench.publish(reading(cycle))
        bench.start()
    wait_for(lambda: len(set(bench.cloud.readings())) == cycle, bench.log)
    time.sleep(3.0)  # the broker delivers again what was not acknowledged
    assert sorted(bench.cloud.readings()) == [("europe", c) for c in range(1, cycle + 1)]


def test_without_a_receipt_blocks_stay_on_disk_over_a_restart(bench: Bench) -> None:
    bench.cloud.answering = False
    bench.start()
    bench.publish(reading(1))
    wait_for(lambda: bench.cloud.readings(), bench.log)
    assert bench.status()["buffer"]["waiting_blocks"] == 1
    bench.kill()
    bench.cloud.answering = True
    bench.start()
    wait_for(lambda: bench.status()["buffer"]["waiting_blocks"] == 0, bench.log)


def test_a_moving_device_stamps_each_reading_where_it_was_captured(bench: Bench) -> None:
    bench.replace('source = "static"\nlat = 50.0\nlon = 9.0', 'source = "mqtt"\ntopic = "sensors/plane-01/position"')
    bench.start()
    bench.publish(reading(1))  # no fix yet: it waits
    for cycle, (lat, lon) in enumerate([(50.0, 9.0), (46.8, 8.2), (50.0, 9.0)], 2):
        bench.publish(json.dumps({"ts": START_S + cycle, "lat": lat, "lon": lon}).encode(), "position")
        bench.publish(reading(cycle))
    wait_for(lambda: len(bench.cloud.readings()) == 3, bench.log)
    assert sorted(bench.cloud.readings()) == [("europe", 2), ("europe", 4), ("switzerland", 3)]
    assert bench.status()["lanes"]["nowhere"]["held"] == "not_allowed"


def test_a_full_buffer_holds_the_source_and_goes_on_after_receipts(bench: Bench) -> None:
    bench.replace("[position]", "[buffer]\nbytes_max = 80000\nhistory_rows = 10\n[flush]\nms_max = 1.0\n[position]")
    bench.cloud.answering = False
    bench.start()
    for cycle in range(1, 301):
        bench.publish(reading(cycle, sensor_2=600 + cycle / 7))
        time.sleep(0.005)  # so that they come in many small blocks
    wait_for(lambda: "buffer full, source held" in bench.log(), bench.log)
    bench.cloud.answering = True
    bench.kill()
    bench.start()
    wait_for(lambda: len(set(bench.cloud.readings())) == 300, bench.log, 60.0)


def test_a_second_agent_on_the_same_state_is_refused(bench: Bench) -> None:
    bench.start()
    second = subprocess.run([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(bench.config)], capture_output=True, timeout=30)
    assert second.returncode == 2
    assert b"another agent runs on" in second.stderr


def test_systemd_is_told_that_the_agent_is_ready_and_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        address = f"\0fenceline-{os.getpid()}-{time.monotonic_ns()}"
        inbox.bind(address)
        inbox.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:])
        bench.start()
        assert {inbox.recv(100), inbox.recv(100)} == {b"READY=1", b"WATCHDOG=1"}
        bench.kill(signal.SIGTERM)
