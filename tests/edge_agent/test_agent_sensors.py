"""The whole agent with every kind of sensor side: its own listener, a broker over MQTT 5 and TLS, several at once."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_agent.mqtt.passwords import hash_password
from tests.brokers import Broker, ServerTls, mosquitto_broker, nats_broker
from tests.edge_agent.gateway import Bench, Cloud, reading, wait_for
from tests.edge_agent.mqtt.certificates import make
from tests.edge_agent.mqtt.raw_sensor import connect_packet, publish_packet
from tests.edge_agent.test_config import write
from tests.servers import free_port

BROKER = 'url = "mqtt://127.0.0.1:1883"\nsubscribe = "sensors/plane-01/#"'
TOPIC = "sensors/plane-01/turbofan"


class Gateway(Bench):
    """A device whose sensors come from outside this class: agent.toml with `sensors` in place of the broker."""

    def __init__(self, path: Path, eu: Broker, sensors: str) -> None:
        self.path, self.config, self.agent, self._nursery = path, write(path), None, None
        self.replace("18831", str(eu.port))
        self.replace(f"[sensors]\n{BROKER}", sensors)
        self.cloud = Cloud(eu)

    def close(self) -> None:
        if self.agent is not None:
            self.kill()
        self.cloud.close()


@contextlib.contextmanager
def gateway(path: Path, sensors: str) -> Iterator[Gateway]:
    with nats_broker(path / "eu") as eu:
        made = Gateway(path, eu, sensors)
        try:
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def sensor(port: int, version: int = 5, user: tuple[str, str] | None = None, tls: tuple[Path, ...] = ()) -> Iterator[Client]:
    protocol = MQTTProtocolVersion.MQTTv5 if version == 5 else MQTTProtocolVersion.MQTTv311
    client = Client(CallbackAPIVersion.VERSION2, f"sensor-{time.monotonic_ns()}", protocol=protocol)
    if user is not None:
        client.username_pw_set(*user)
    if tls:
        client.tls_set(*map(str, tls))
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def send(client: Client, cycles: range, topic: str = TOPIC) -> None:
    for info in [client.publish(topic, reading(cycle), qos=1) for cycle in cycles]:
        info.wait_for_publish(20)
        assert info.is_published()


def test_sensors_connect_to_the_agent_itself_with_password_over_tls(tmp_path: Path) -> None:
    make(tmp_path, "server")
    (tmp_path / "users").write_text(f"pump:{hash_password('secret', log2_n=4, parallel=1)}\n")
    port = free_port()
    listen = f'[sensors]\nlisten = "mqtts://127.0.0.1:{port}"\nusers_file = "users"\ncert_file = "server.pem"\nkey_file = "server.key"'
    with gateway(tmp_path, listen) as device:
        device.start()
        for n, version in enumerate((4, 5)):
            with sensor(port, version, ("pump", "secret"), (tmp_path / "ca.pem",)) as client:
                send(client, range(1 + 100 * n, 101 + 100 * n))
                client.publish("elsewhere", b"?", qos=1).wait_for_publish(20)
        wait_for(lambda: len(device.cloud.readings()) == 200 and len(device.cloud.quarantined()) == 2, device.log)
        assert sorted(device.cloud.readings()) == [("europe", c) for c in range(1, 201)]
        assert {reason for reason, _ in device.cloud.quarantined()} == {"unknown_topic"}
        sensors = device.status()["sensors"]
        assert (sensors["connected"], sensors["messages"]) == (True, 202)
        assert sensors["sides"][f"mqtts://127.0.0.1:{port}"]["accepted"] == 2
        assert device.kill(signal.SIGTERM) == 0
        assert "Traceback" not in device.log()


def test_a_batch_that_fits_no_block_is_stored_in_several(tmp_path: Path, seed: int) -> None:
    """Topics as long as MQTT allows, of characters that take four bytes and cannot be compressed: no sensor's message ends the agent."""
    rng, port = random.Random(seed), free_port()
    topics = ["".join(map(chr, rng.choices(range(0x10000, 0x110000), k=16_000))) for _ in range(240)]
    with gateway(tmp_path, f'[flush]\nms_max = 3000.0\n[sensors]\nlisten = "mqtt://127.0.0.1:{port}"') as device:
        device.start()
        with socket.create_connection(("127.0.0.1", port), 20) as hostile:
            hostile.sendall(connect_packet("hostile") + b"".join(publish_packet(b"", n + 1, topic=t) for n, t in enumerate(topics)))
            hostile.settimeout(60)
            answer = b""
            while len(answer) < 4 + 4 * len(topics):
                answer += hostile.recv(4_096) or b"closed" * 1_000
            assert b"closed" not in answer
        wait_for(lambda: len(device.cloud.quarantined()) == len(topics), device.log)
        assert device.kill(signal.SIGTERM) == 0


class StubbornSensor:
    """Publishes cycles, keeps those without PUBACK, and sends them again (DUP) after every loss of its connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.waiting: dict[int, int] = {}  # packet id: cycle
        self.cycle = self.acknowledged = self.resent = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """No new cycles; returns when all have their PUBACK."""
        self._stop.set()
        self._thread.join(30)
        assert not self.waiting, f"{len(self.waiting)} readings were never acknowledged"

    def _run(self) -> None:
        while not self._stop.is_set() or self.waiting:
            with contextlib.suppress(OSError):
                self._talk()
            time.sleep(0.05)

    def _talk(self) -> None:
        with socket.create_connection(("127.0.0.1", self._port), 5) as s:
            s.settimeout(5)
            s.sendall(connect_packet("stubborn"))
            if s.recv(4) != b"\x20\x02\0\0":
                return
            for packet_id, cycle in self.waiting.items():
                raw = publish_packet(reading(cycle), packet_id, topic=TOPIC)
                s.sendall(bytes([raw[0] | 0x08]) + raw[1:])
                self.resent += 1
            s.settimeout(0.002)
            rest = b""
            while not self._stop.is_set() or self.waiting:
                if len(self.waiting) < 200 and not self._stop.is_set():
                    self.cycle += 1
                    packet_id = self.cycle % 65_535 + 1
                    self.waiting[packet_id] = self.cycle
                    s.sendall(publish_packet(reading(self.cycle), packet_id, topic=TOPIC))
                try:
                    data = s.recv(4_096)
                except TimeoutError:
                    continue
                if not data:
                    return
                rest += data
                for (acked,) in struct.iter_unpack(">xxH", rest[: len(rest) // 4 * 4]):
                    del self.waiting[acked]
                    self.acknowledged += 1
                rest = rest[len(rest) // 4 * 4 :]


def test_kill_9_between_publish_and_puback_loses_nothing_and_doubles_nothing(tmp_path: Path, seed: int) -> None:
    rng, port = random.Random(seed), free_port()
    listen = f'[flush]\nms_max = 80.0\n[sensors]\nlisten = "mqtt://127.0.0.1:{port}"'
    with gateway(tmp_path, listen) as device:
        device.start()
        stubborn = StubbornSensor(port)
        stubborn.start()
        for _ in range(5):
            time.sleep(rng.uniform(0.1, 0.5))
            device.kill()
            device.start()
        time.sleep(0.3)
        stubborn.stop()
        assert stubborn.resent > 0 and stubborn.acknowledged == stubborn.cycle
        wait_for(lambda: len(set(device.cloud.readings())) == stubborn.cycle, device.log)
        assert sorted(device.cloud.readings()) == [("europe", c) for c in range(1, stubborn.cycle + 1)]


@pytest.mark.needs_mosquitto
def test_a_sensor_broker_over_mqtt_5_and_tls_with_certificates(tmp_path: Path) -> None:
    make(tmp_path, "server", "gateway", "pump")
    server = ServerTls(tmp_path / "server.pem", tmp_path / "server.key", tmp_path / "ca.pem")
    with mosquitto_broker(tmp_path, tls=server) as broker:
        side = (
            f'[sensors]\nurl = "mqtts://127.0.0.1:{broker.port}"\nversion = 5\nsubscribe = "sensors/plane-01/#"\n'
            'ca_file = "ca.pem"\ncert_file = "gateway.pem"\nkey_file = "gateway.key"'
        )
        with gateway(tmp_path, side) as device:
            device.start()
            with sensor(broker.port, 5, tls=(tmp_path / "ca.pem", tmp_path / "pump.pem", tmp_path / "pump.key")) as client:
                send(client, range(1, 51))
                device.kill()
                send(client, range(51, 101))  # the persistent session keeps them
                device.start()
                send(client, range(101, 151))
            wait_for(lambda: len(set(device.cloud.readings())) == 150, device.log)
            assert sorted(device.cloud.readings()) == [("europe", c) for c in range(1, 151)]


def test_two_brokers_and_a_listener_at_once(tmp_path: Path) -> None:
    port = free_port()
    with nats_broker(tmp_path / "one") as one, nats_broker(tmp_path / "two") as two:
        brokers = "".join(f'[[sensors]]\nurl = "mqtt://127.0.0.1:{b.port}"\nsubscribe = "sensors/plane-01/#"\n' for b in (one, two))
        with gateway(tmp_path, f'{brokers}[[sensors]]\nlisten = "mqtt://127.0.0.1:{port}"') as device:
            device.start()
            for n, place in enumerate((one.port, two.port, port)):
                with sensor(place, 4) as client:
                    send(client, range(1 + 50 * n, 51 + 50 * n))
            wait_for(lambda: len(device.cloud.readings()) == 150, device.log)
            two.kill()
            wait_for(lambda: not device.status()["sensors"]["connected"], device.log)
            with sensor(one.port, 4) as first, sensor(port, 4) as second:  # the others go on
                send(first, range(151, 161))
                send(second, range(161, 171))
            wait_for(lambda: len(device.cloud.readings()) == 170, device.log)
            assert sorted(device.cloud.readings()) == [("europe", c) for c in range(1, 171)]
            sensors: dict[str, Any] = device.status()["sensors"]
            assert [side["messages"] for side in sensors["sides"].values()] == [60, 50, 60]
            assert f"mqtt://127.0.0.1:{two.port}" in sensors["error"]


def test_more_messages_than_history_keeps_come_again_and_are_stored_once(tmp_path: Path) -> None:
    count = 30_000  # history_rows is 20,000; a connection can have 65,535 unacknowledged
    publishes = [publish_packet(reading(n), packet_id=n, topic=TOPIC) for n in range(1, count + 1)]
    again = [bytes([p[0] | 0x08]) + p[1:] for p in publishes]
    acknowledged: list[int] = []
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for packets in (publishes, again):  # a broker that lost what it got: the same messages come to the next connection
                peer, _ = server.accept()
                with peer:
                    peer.recv(65_536)
                    peer.sendall(b"\x20\x02\x01\x00")
                    peer.recv(65_536)
                    peer.sendall(b"\x90\x03\x00\x01\x01")
                    threading.Thread(target=peer.sendall, args=(b"".join(packets),), daemon=True).start()
                    got = 0
                    while got < 4 * count:
                        got += len(peer.recv(65_536))
                    acknowledged.append(got // 4)
                    if packets is again:
                        done.wait(20)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        address = f'[sensors]\nurl = "mqtt://127.0.0.1:{server.getsockname()[1]}"\nsubscribe = "sensors/plane-01/#"'
        with gateway(tmp_path, address) as bench:
            bench.start()
            wait_for(lambda: len(acknowledged) == 2, bench.log, 40)
            assert bench.status()["buffer"]["readings_stored"] == count
            done.set()
        thread.join(20)
