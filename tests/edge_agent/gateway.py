"""A gateway's surroundings for tests of the whole agent: the agent as a process, its sensors, and a cloud that answers with receipts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract.block import BlockHeader, decode_block
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.state import Desired, encode_state
from edge_agent.contract.topics import ALL_BLOCKS, ALL_REPORTED, DeviceTopics, Kind, parse
from edge_agent.status import ask
from tests.brokers import Broker
from tests.edge_agent.nursery import Forked, Nursery
from tests.edge_agent.test_config import write

START_S = 1_700_000_000
START_PATIENCE_S = 60.0  # the machine may be busy with other things


class Cloud:
    """Keeps every block that arrives, once, and sends receipts while `answering`."""

    def __init__(self, broker: Broker) -> None:
        self.answering = True
        self.tables: dict[tuple[str, str, int], Table] = {}
        self.headers: dict[tuple[str, str, int], BlockHeader] = {}
        self.reported: dict[str, Any] = {}
        self._settled: dict[tuple[str, str], SequenceSet] = {}
        self._arriving = Lock()  # a dict that grows cannot be gone through
        self._client = Client(CallbackAPIVersion.VERSION2, "cloud", clean_session=False)
        self._client.reconnect_delay_set(0.1, 0.5)
        self._client.on_connect = lambda client, *_: client.subscribe([(ALL_BLOCKS, 1), (ALL_REPORTED, 1)])
        self._client.on_message = self._on_message
        self._client.connect(broker.host, broker.port)
        self._client.loop_start()

    def _on_message(self, client: Client, _data: Any, message: Any) -> None:
        if parse(message.topic).kind is Kind.REPORTED:
            self.reported = json.loads(message.payload)
            return
        header, table = decode_block(message.payload)
        name = (header.epoch, header.lane, header.sequence)
        with self._arriving:
            self.tables[name], self.headers[name] = table, header
        if self.answering:
            settled = self._settled.setdefault((header.epoch, header.lane), SequenceSet())
            settled.add(header.sequence)
            lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
            receipt = Receipt(device=header.device, epoch=header.epoch, lanes=[lane])
            client.publish(DeviceTopics(header.device).receipts, encode_receipt(receipt), qos=1)

    def desire(self, desired: Desired) -> None:
        """Publish a desired document, retained."""
        self._client.publish(DeviceTopics("plane-01").desired, encode_state(desired), qos=1, retain=True)

    def arrived(self, stream: str) -> list[tuple[BlockHeader, Table]]:
        """The blocks of a stream, by name."""
        with self._arriving:
            return [(header, self.tables[name]) for name, header in sorted(self.headers.items()) if header.stream == stream]

    def readings(self) -> list[tuple[str, int]]:
        """(lane, cycle) of every reading that arrived."""
        return [(header.lane, int(cycle)) for header, table in self.arrived("turbofan") for cycle in table["cycle"].tolist()]

    def quarantined(self) -> list[tuple[str, str]]:
        """(reason, detail) of every rejected payload that arrived."""
        out = []
        for _, table in self.arrived("quarantine"):
            reason, detail = table["reason"], table["detail"]
            assert isinstance(reason, Strings) and isinstance(detail, Strings)
            out += list(zip(reason.tolist(), detail.tolist(), strict=True))
        return out

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class Bench:
    """A device's surroundings in one folder."""

    def __init__(self, path: Path, sensors: Broker, eu: Broker, nursery: Nursery | None = None) -> None:
        """`nursery`: where agents come from that are to start quickly."""
        self.path, self.sensors, self.eu, self._nursery = path, sensors, eu, nursery
        self.config = write(path)
        text = self.config.read_text().replace('127.0.0.1:1883"', f'127.0.0.1:{sensors.port}"').replace("18831", str(eu.port))
        self.config.write_text(text)
        self.cloud = Cloud(eu)
        self.agent: subprocess.Popen[bytes] | Forked | None = None
        self._publisher = Client(CallbackAPIVersion.VERSION2, "sensor", clean_session=True)
        self._publisher.connect(sensors.host, sensors.port)
        self._publisher.loop_start()

    def replace(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def start_now(self, *more: str) -> None:
        """Start the agent and do not wait for it; `more` goes on its command line."""
        arguments = ["run", "--config", str(self.config), *more]
        if self._nursery is not None:
            self.agent = self._nursery.start(arguments, self.path / "agent.log", {"RUNTIME_DIRECTORY": str(self.path)})
            return
        command = [sys.executable, "-m", "edge_agent.cli", *arguments]
        with (self.path / "agent.log").open("ab") as log:
            self.agent = subprocess.Popen(command, stderr=log, env={**os.environ, "RUNTIME_DIRECTORY": str(self.path)})

    def start(self, *more: str) -> None:
        self.start_now(*more)
        wait_for(lambda: self.status()["sensors"]["connected"], self.log, START_PATIENCE_S)

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


def wait_for(done: Callable[[], Any], explain: Callable[[], str], timeout_s: float = 60.0) -> None:
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
