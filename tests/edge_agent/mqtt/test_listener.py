"""The listener against real clients and raw sockets: PUBACK only when released, limits on each, nobody disturbs another."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_agent.addresses import Tls
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.topics import DeviceTopics
from edge_agent.mqtt import frames, server_frames
from edge_agent.mqtt.inlet import Batch, BatchLimits, Inlet
from edge_agent.mqtt.link import Connected, EndpointConfig, Link
from edge_agent.mqtt.listener import Listener, ListenerConfig
from edge_agent.mqtt.passwords import hash_password
from edge_agent.mqtt.peer import PeerLimits
from edge_agent.mqtt.wire import Version, sized, write_text
from tests.brokers import nats_broker
from tests.edge_agent.mqtt.certificates import make
from tests.edge_agent.mqtt.raw_sensor import RawSensor, connect_packet, publish_packet

WAIT_S = 20.0
VERSIONS: list[Version] = [4, 5]
FAST = {"log2_n": 4, "parallel": 1}


class Bench:
    """A listener, its inlet, and what has come out of it."""

    def __init__(self, listener: Listener, inlet: Inlet) -> None:
        self.listener, self.inlet = listener, inlet
        self.messages: list[tuple[str, bytes]] = []
        self._stop = threading.Event()
        self._consumer = threading.Thread(target=self._consume, daemon=True)

    @property
    def port(self) -> int:
        return self.listener.port

    def consume(self) -> None:
        """Take and release everything, in a thread."""
        self._consumer.start()

    def take(self, count: int, release: bool = True) -> list[Batch]:
        """Batches until `count` messages have come."""
        batches: list[Batch] = []
        deadline = time.monotonic() + WAIT_S
        while sum(map(len, batches)) < count:
            assert time.monotonic() < deadline, f"{sum(map(len, batches))} of {count} messages came; {self.listener.status}"
            batch = self.inlet.get(0.1)
            if batch is not None:
                batches.append(batch)
                if release:
                    batch.release()
        return batches

    def sensor(self, client_id: str = "s", version: Version = 4, **more: Any) -> RawSensor:
        return RawSensor(self.port).connect(client_id, version, **more)

    def _consume(self) -> None:
        while not self._stop.is_set():
            batch = self.inlet.get(0.05)
            if batch is not None:
                self.messages += zip(batch.topics, batch.payloads, strict=True)
                batch.release()

    def close(self) -> None:
        self._stop.set()
        if self._consumer.is_alive():
            self._consumer.join(WAIT_S)
        self.listener.stop()


@contextlib.contextmanager
def listening(
    limits: PeerLimits | None = None, batches: BatchLimits | None = None, batches_max: int = 4, consume: bool = True, **settings: Any
) -> Iterator[Bench]:
    inlet = Inlet(batches or BatchLimits(ms=2.0), batches_max)
    listener = Listener(ListenerConfig("127.0.0.1", 0, peer=limits or PeerLimits(), **settings), inlet)
    listener.start()
    bench = Bench(listener, inlet)
    if consume:
        bench.consume()
    try:
        yield bench
    finally:
        bench.close()


def until(condition: Callable[[], bool], state: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s in vain: {state()}"
        time.sleep(0.01)


@contextlib.contextmanager
def paho(port: int, client_id: str, version: int = 4, user: tuple[str, str] | None = None, tls: Tls | None = None) -> Iterator[Client]:
    protocol = MQTTProtocolVersion.MQTTv5 if version == 5 else MQTTProtocolVersion.MQTTv311
    client = Client(CallbackAPIVersion.VERSION2, client_id, protocol=protocol)
    if user is not None:
        client.username_pw_set(*user)
    if tls is not None:
        client.tls_set(str(tls.ca_file), str(tls.cert_file) if tls.cert_file else None, str(tls.key_file) if tls.key_file else None)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


@pytest.fixture
def users(tmp_path: Path) -> Path:
    file = tmp_path / "users"
    file.write_text("".join(f"{name}:{hash_password(f'{name}-secret', **FAST)}\n" for name in ("pump", "fan")))
    return file


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("certificates"), "server", "pump-01")


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_two_hundred_real_clients_of_both_versions() -> None:
    with listening() as bench, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(paho(bench.port, f"c{n}", 4 + n % 2)) for n in range(200)]
        infos = [client.publish(f"sensors/{n}/t", b"%d" % i, qos=1) for i in range(5) for n, client in enumerate(clients)]
        for info in infos:
            info.wait_for_publish(WAIT_S)
            assert info.is_published()
        assert sorted(bench.messages) == sorted((f"sensors/{n}/t", b"%d" % i) for n in range(200) for i in range(5))
        assert bench.listener.status.connections == 200
    assert bench.listener.status.last_lost == ""


@pytest.mark.parametrize("version", VERSIONS)
def test_a_puback_comes_only_after_release(version: Version) -> None:
    with listening(consume=False) as bench, bench.sensor(version=version) as sensor:
        for n in (7, 8, 9):
            sensor.publish(b"%d" % n, n, version)
        batches = bench.take(3, release=False)
        assert sensor.is_silent()
        for batch in batches:
            batch.release()
            batch.release()
        assert sensor.acks(3) == [7, 8, 9] and sensor.is_silent()


def test_qos_0_needs_no_puback_and_pings_are_answered() -> None:
    with listening() as bench, bench.sensor() as sensor:
        sensor.send(publish_packet(b"x", None) + frames.PINGREQ + publish_packet(b"y", None))
        assert sensor.packet() == server_frames.PINGRESP
        until(lambda: len(bench.messages) == 2)


def test_what_was_released_before_stop_is_acknowledged() -> None:
    with listening(consume=False) as bench, bench.sensor("five", 5) as sensor, bench.sensor("four") as other:
        sensor.publish(b"1", 1, 5)
        other.publish(b"2", 2)
        for batch in bench.take(2, release=False):
            batch.release()
        bench.listener.stop()
        assert sensor.acks(1) == [1] and sensor.packet() == b"\xe0\x01\x8b" and sensor.packet() == b""
        assert other.acks(1) == [2] and other.packet() == b""


def test_passwords(users: Path) -> None:
    with listening(users_file=users) as bench:
        for user in (("pump", "pump-secret"), ("fan", "fan-secret"), ("pump", "pump-secret")):
            with paho(bench.port, "x", user=user) as client:
                client.publish("sensors/a/t", user[0], qos=1).wait_for_publish(WAIT_S)
        assert [m[1] for m in bench.messages] == [b"pump", b"fan", b"pump"]
        codes: list[tuple[Version, int]] = [(4, 4), (5, 0x86)]
        for version, code in codes:
            for name, password in (("pump", "fan-secret"), ("nobody", "x"), ("pump", None), (None, None)):
                with RawSensor(bench.port) as sensor:
                    evil = publish_packet(b"evil", None, version)
                    sensor.send(connect_packet("x", version, username=name, password=password) + evil)
                    assert sensor.packet()[3] == code and sensor.packet() == b""
        assert bench.listener.status.refused == 8 and "bad user name or password" in bench.listener.status.last_lost
        assert len(bench.messages) == 3  # what came behind a refused CONNECT is not taken


def test_what_comes_right_behind_connect_is_taken_once_the_password_is_right(users: Path) -> None:
    with listening(users_file=users) as bench, RawSensor(bench.port) as sensor:
        sensor.send(connect_packet("x", username="pump", password="pump-secret") + publish_packet(b"early", 5))
        assert sensor.packet()[:4] == b"\x20\x02\0\0" and sensor.acks(1) == [5]


def test_users_come_and_go_while_the_agent_runs(users: Path) -> None:
    with listening(users_file=users) as bench:
        bench.sensor(username="pump", password="pump-secret").close()
        users.write_text(f"valve:{hash_password('v', **FAST)}\n")
        bench.sensor(username="valve", password="v").close()
        with RawSensor(bench.port) as sensor:
            sensor.send(connect_packet("x", username="pump", password="pump-secret"))
            assert sensor.packet() == b"\x20\x02\0\4"
        users.write_text("not a users file\n")  # the users from before stay
        bench.sensor(username="valve", password="v").close()


def test_a_slow_password_check_holds_nobody_else(users: Path) -> None:
    users.write_text(users.read_text() + f"slow:{hash_password('s', log2_n=14, parallel=10)}\n")
    with listening(users_file=users) as bench, contextlib.ExitStack() as stack:
        good = stack.enter_context(bench.sensor(username="pump", password="pump-secret"))
        for n in range(5):
            attacker = stack.enter_context(RawSensor(bench.port))
            attacker.send(connect_packet(f"a{n}", username="slow", password="guess"))
        good.publish(b"1", 1)
        assert good.acks(1) == [1]
        assert bench.listener.status.refused < 5  # it did not wait for the five hashes


def test_tls_with_and_without_client_certificates(certificates: Path, users: Path) -> None:
    server = Tls(None, certificates / "server.pem", certificates / "server.key")
    trusting = Tls(certificates / "ca.pem")
    with listening(tls=server, users_file=users) as bench:
        with paho(bench.port, "x", user=("pump", "pump-secret"), tls=trusting) as client:
            for n in range(50):
                client.publish("sensors/a/t", b"x" * 20_000 + b"%d" % n, qos=1)
            until(lambda: len(bench.messages) == 50, lambda: bench.listener.status)
        with pytest.raises(ssl.SSLError), RawSensor(bench.port, ssl.create_default_context()):
            pass
        with RawSensor(bench.port) as plain:  # no TLS at all
            plain.send(connect_packet("x"))
            assert b"\x20\x02" not in plain.packet()
    with_certificates = Tls(certificates / "ca.pem", certificates / "server.pem", certificates / "server.key")
    mine = Tls(certificates / "ca.pem", certificates / "pump-01.pem", certificates / "pump-01.key")
    with listening(tls=with_certificates) as bench:
        with paho(bench.port, "x", 5, tls=mine) as client:
            client.publish("sensors/a/t", b"1", qos=1).wait_for_publish(WAIT_S)
            assert len(bench.messages) == 1
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        with pytest.raises((ssl.SSLError, ConnectionError, AssertionError)), RawSensor(bench.port, context) as nobody:
            nobody.connect("x")
        until(lambda: "certificate" in bench.listener.status.last_lost.lower(), lambda: bench.listener.status)


def test_a_renewed_certificate_is_shown_without_a_restart(tmp_path: Path) -> None:
    make(tmp_path, "old", "new")
    shown, key = tmp_path / "shown.pem", tmp_path / "shown.key"
    trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")

    def name(port: int) -> str:
        with RawSensor(port, trusting) as sensor:
            sensor.connect("x")
            assert isinstance(sensor.socket, ssl.SSLSocket)
            return dict(part[0] for part in sensor.socket.getpeercert()["subject"])["commonName"]  # type: ignore[index]

    shown.write_bytes((tmp_path / "old.pem").read_bytes())
    key.write_bytes((tmp_path / "old.key").read_bytes())
    with listening(tls=Tls(None, shown, key)) as bench:
        assert name(bench.port) == "old"
        shown.write_bytes((tmp_path / "new.pem").read_bytes())  # its key comes a moment later
        assert name(bench.port) == "old"
        key.write_bytes((tmp_path / "new.key").read_bytes())
        assert name(bench.port) == "new"


def test_who_connects_and_vanishes_at_once_takes_nobody_along(certificates: Path) -> None:
    tls = Tls(None, certificates / "server.pem", certificates / "server.key")
    trusting = ssl.create_default_context(cafile=certificates / "ca.pem")
    with (
        listening(tls=tls, batches=BatchLimits(rows_max=1), batches_max=1, consume=False) as bench,
        RawSensor(bench.port, trusting) as good,
        RawSensor(bench.port, trusting) as unlucky,
    ):
        good.connect("good")
        for n in range(3):
            good.publish(b"%d" % n, n + 1)
        until(lambda: bench.listener.status.paused, lambda: bench.listener.status)
        unlucky.send(connect_packet("unlucky"))
        unlucky.socket.shutdown(socket.SHUT_WR)  # without TLS's goodbye: the listener reads CONNECT and the end together
        bench.take(3)
        assert good.acks(3) == [1, 2, 3]
        with RawSensor(bench.port, trusting) as later:
            later.connect("later")


def test_connack_of_mqtt_5_says_what_there_is_not() -> None:
    codec = pytest.importorskip("mqtt5", reason="the independent codec is not installed (pip install mqtt5)")
    limits = PeerLimits(packet_bytes_max=50_000, unacked_messages_max=99, keepalive_s_max=120)
    with listening(limits) as bench:
        with RawSensor(bench.port) as sensor:
            sensor.send(codec.ConnectPacket("", clean_start=True, keep_alive=0, session_expiry_interval=900).write())
            got, _ = codec.read(memoryview(sensor.packet()))
        assert (got.reason_code, got.session_present, got.session_expiry_interval) == (0, False, 0)
        assert (got.max_qos, got.retain_available, got.receive_max, got.max_packet_size) == (1, False, 99, 50_000)
        assert (got.topic_alias_max, got.server_keep_alive) == (0, 120) and got.assigned_client_id
        assert (got.wildcard_subscription_available, got.shared_subscription_available) == (False, False)
        with RawSensor(bench.port) as sensor:
            sensor.send(codec.ConnectPacket("mine", keep_alive=60).write())
            got, _ = codec.read(memoryview(sensor.packet()))
        assert (got.assigned_client_id, got.server_keep_alive, got.session_present) == (None, None, False)


REFUSED: list[tuple[str, bytes, bytes]] = [
    ("MQTT 3.1", b"\x10\x10\x00\x06MQIsdp\x03\x02\x00\x1e\x00\x02ab", b"\x20\x02\x00\x01"),
    ("MQTT 6", b"\x10\x0d\x00\x04MQTT\x06\x02\x00\x1e\x00\x01a", b"\x20\x02\x00\x01"),
    ("no client id, a session wanted", connect_packet("", clean=False), b"\x20\x02\x00\x02"),
    ("HTTP", b"GET / HTTP/1.1\r\n\r\n", b""),
    ("publish first", publish_packet(b"x"), b""),
    ("will of QoS 2", b"\x10\x15\x00\x04MQTT\x05\x16\x00\x1e\x00\x00\x01a\x00\x00\x01w\x00\x01x", b"\x20\x03\x00\x9b\x00"),
    ("will to be retained", b"\x10\x15\x00\x04MQTT\x05\x26\x00\x1e\x00\x00\x01a\x00\x00\x01w\x00\x01x", b"\x20\x03\x00\x9a\x00"),
    ("other authentication", b"\x10\x12\x00\x04MQTT\x05\x02\x00\x1e\x05\x15\x00\x02xy\x00\x00", b"\x20\x03\x00\x8c\x00"),
]


@pytest.mark.parametrize(("packet", "answer"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_who_asks_for_what_there_is_not_is_not_let_in(packet: bytes, answer: bytes) -> None:
    with listening() as bench:
        with RawSensor(bench.port) as sensor:
            sensor.send(packet)
            assert sensor.packet() == answer
            assert sensor.packet() == b""
        until(lambda: bench.listener.status.connections == 0)


def test_a_will_on_3_1_1_is_accepted_and_not_kept() -> None:
    with listening() as bench:
        client = Client(CallbackAPIVersion.VERSION2, "x")
        client.will_set("sensors/a/t", b"gone", qos=2, retain=True)
        client.connect("127.0.0.1", bench.port)
        client.loop_start()
        client.publish("sensors/a/t", b"here", qos=1, retain=True).wait_for_publish(WAIT_S)
        client.loop_stop()
        client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        until(lambda: bench.listener.status.connections == 0)
        assert [m[1] for m in bench.messages] == [b"here"]


ENDED: list[tuple[str, Version, bytes, bytes]] = [
    ("qos 2 on 5", 5, publish_packet(b"x", 1, 5, qos=2), b"\xe0\x01\x9b"),
    ("qos 2 on 3.1.1", 4, publish_packet(b"x", 1, qos=2), b""),
    ("pubrel", 5, b"\x62\x02\x00\x01", b"\xe0\x01\x82"),
    ("topic alias", 5, b"\x32\x09\x00\x01t\x00\x01\x03\x23\x00\x01", b"\xe0\x01\x94"),
    ("wildcard in a topic", 5, publish_packet(b"x", 1, 5, "a/#"), b"\xe0\x01\x90"),
    ("connect twice", 5, connect_packet("s", 5), b"\xe0\x01\x82"),
    ("auth", 5, b"\xf0\x00", b"\xe0\x01\x82"),
    ("too large on 5", 5, publish_packet(b"x" * 3_000, 1, 5), b"\xe0\x01\x95"),
    ("a subscription too large on 3.1.1", 4, b"\x82" + sized(b"\0\1" + b"\0\1a\0" * 1_000), b""),
    ("malformed", 5, b"\x32\x02\x00\x09", b"\xe0\x01\x81"),
]


@pytest.mark.parametrize(("version", "packet", "answer"), [e[1:] for e in ENDED], ids=[e[0] for e in ENDED])
def test_who_breaks_the_protocol_is_told_why_and_what_came_before_is_kept(version: Version, packet: bytes, answer: bytes) -> None:
    with listening(PeerLimits(packet_bytes_max=2_048)) as bench, bench.sensor("good") as good, bench.sensor("bad", version) as bad:
        bad.send(publish_packet(b"before", None, version) + packet)
        if answer:
            assert bad.packet() == answer
        assert bad.packet() == b""
        good.publish(b"still here", 1)
        assert good.acks(1) == [1]
        until(lambda: len(bench.messages) == 2)
        assert {m[1] for m in bench.messages} == {b"before", b"still here"}


@pytest.mark.parametrize("version", VERSIONS)
def test_subscriptions_are_refused_and_the_connection_stays(version: Version) -> None:
    with listening() as bench, bench.sensor(version=version) as sensor:
        sensor.send(frames.subscribe(version, 3, "#"))
        assert sensor.packet() == (b"\x90\x03\x00\x03\x80" if version == 4 else b"\x90\x04\x00\x03\x00\x87")
        properties = b"\0" if version == 5 else b""
        sensor.send(b"\xa2" + sized(b"\0\4" + properties + write_text("a") + write_text("b")))
        assert sensor.packet() == (b"\xb0\x02\x00\x04" if version == 4 else b"\xb0\x05\x00\x04\x00\x11\x11")
        sensor.publish(b"1", 1, version)
        assert sensor.acks(1) == [1]


def test_a_message_too_large_on_3_1_1_is_cut_and_does_not_come_again() -> None:
    with listening(PeerLimits(packet_bytes_max=2_048)) as bench, bench.sensor() as sensor:
        sensor.send(publish_packet(b"x" * 100_000, 1) + publish_packet(b"next", 2))
        assert sensor.acks(2) == [1, 2]
        assert 1_900 < len(bench.messages[0][1]) <= 2_048 and bench.messages[1][1] == b"next"


def test_the_same_client_again_ends_its_older_connection(users: Path) -> None:
    with listening(users_file=users) as bench:
        mine = {"username": "pump", "password": "pump-secret"}
        with bench.sensor("x", 5, **mine) as old, bench.sensor("x", 5, username="fan", password="fan-secret") as other:
            with bench.sensor("x", 5, **mine) as new:
                assert old.packet() == b"\xe0\x01\x8e" and old.packet() == b""
                new.publish(b"1", 1, 5)
                assert new.acks(1) == [1]
            other.publish(b"2", 2, 5)  # another user's client of the same id
            assert other.acks(1) == [2]


def test_late_acknowledgements_do_not_reach_the_next_connection() -> None:
    with listening(consume=False) as bench:
        with bench.sensor("x") as sensor:
            sensor.publish(b"1", 1)
            held = bench.take(1, release=False)
        with bench.sensor("x") as again:
            for batch in held:
                batch.release()
            assert again.is_silent()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_real_client_sends_again_what_was_not_acknowledged(version: Version) -> None:
    with listening(consume=False) as bench:
        protocol = MQTTProtocolVersion.MQTTv5 if version == 5 else MQTTProtocolVersion.MQTTv311
        more = {} if version == 5 else {"clean_session": False}
        client = Client(CallbackAPIVersion.VERSION2, "x", protocol=protocol, **more)  # type: ignore[arg-type]
        client.reconnect_delay_set(0.05, 0.1)
        client.connect("127.0.0.1", bench.port, **({"clean_start": False} if version == 5 else {}))
        client.loop_start()
        info = client.publish("sensors/a/t", b"1", qos=1)
        lost = bench.take(1, release=False)
        client.socket().shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]
        bench.take(1)
        info.wait_for_publish(WAIT_S)
        assert info.is_published() and lost[0].payloads == [b"1"]
        client.disconnect()
        client.loop_stop()


def test_who_is_slow_to_connect_is_closed_and_others_are_served() -> None:
    limits = PeerLimits(handshake_s=0.4)
    with listening(limits, connections_max=20) as bench, contextlib.ExitStack() as stack:
        lorises = [stack.enter_context(RawSensor(bench.port)) for _ in range(19)]
        for n, loris in enumerate(lorises):
            loris.send(connect_packet("slow")[: n % 10])
        with bench.sensor("good") as good:
            good.publish(b"1", 1)
            assert good.acks(1) == [1]
            for loris in lorises:
                assert loris.packet() == b""
            assert "not done in time" in bench.listener.status.last_lost
            good.publish(b"2", 2)
            assert good.acks(1) == [2]


def test_a_packet_that_never_gets_whole_ends_its_connection() -> None:
    with listening(PeerLimits(packet_s=0.3)) as bench, bench.sensor("slow", 5) as slow, bench.sensor("good") as good:
        slow.send(b"\x32\xff\x7f\x00\x01t\x00\x01\x00")
        with contextlib.suppress(OSError):
            for _ in range(100):
                slow.send(b"x")
                time.sleep(0.01)
        assert slow.packet() == b"\xe0\x01\x8d" and "not whole after 0.3 s" in bench.listener.status.last_lost
        good.publish(b"1", 1)
        assert good.acks(1) == [1]


def test_packets_that_are_not_whole_have_a_limit_for_all_together() -> None:
    with listening(held_bytes_max=1_000_000) as bench, contextlib.ExitStack() as stack:
        good = stack.enter_context(bench.sensor("good"))
        greedy = [stack.enter_context(bench.sensor(f"g{n}", 5)) for n in range(10)]
        part = publish_packet(b"x" * 400_000, 1, 5)[:-1]
        for sensor in greedy:
            with contextlib.suppress(OSError):
                sensor.send(part)
        until(lambda: bench.listener.status.connections <= 3, lambda: bench.listener.status)
        assert bench.listener._crowd.held <= 1_000_000
        good.publish(b"1", 1)
        assert good.acks(1) == [1]


def test_a_silent_client_is_given_up_after_one_and_a_half_keepalives() -> None:
    with listening() as bench, bench.sensor("dead", 5, keepalive_s=1) as dead, bench.sensor("alive", keepalive_s=1) as alive:
        for _ in range(5):
            alive.send(frames.PINGREQ)
            assert alive.packet() == server_frames.PINGRESP
            time.sleep(0.4)
        assert dead.packet() == b"\xe0\x01\x8d" and dead.packet() == b""
        dead.close()
        until(lambda: bench.listener.status.connections == 1)


def test_who_was_not_read_because_the_listener_did_not_run_is_not_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    put = Inlet.put

    def stalled(inlet: Inlet, batch: Batch) -> None:
        if batch.payloads == [b"first"]:
            time.sleep(2.5)  # as on a machine that has no time for it
        put(inlet, batch)

    monkeypatch.setattr(Inlet, "put", stalled)
    with listening(batches=BatchLimits(rows_max=1)) as bench, contextlib.ExitStack() as stack:
        first, *others = (stack.enter_context(bench.sensor(f"s{n}", keepalive_s=1)) for n in range(4))
        first.publish(b"first", 1)
        time.sleep(0.5)  # it stands still now
        for sensor in others:
            sensor.publish(b"meanwhile", 1)
        for sensor in (first, *others):
            assert sensor.acks(1) == [1]
        assert bench.listener.status.last_lost == ""


def test_who_reads_no_answers_is_closed() -> None:
    with listening(PeerLimits(outbox_bytes_max=10_000)) as bench, bench.sensor("good") as good:
        flood = bench.sensor("flood")
        flood.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        flood.socket.setblocking(False)
        deadline = time.monotonic() + WAIT_S
        while bench.listener.status.connections == 2:
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):
                flood.socket.send(frames.PINGREQ * 30_000)
        assert "takes no acknowledgements" in bench.listener.status.last_lost
        flood.close()
        good.publish(b"1", 1)
        assert good.acks(1) == [1]


def test_a_consumer_that_stands_still_holds_the_sensors_not_the_memory() -> None:
    count, padding = 3_000, 1_000
    with (
        listening(batches=BatchLimits(bytes_max=100_000, ms=2.0), batches_max=2, consume=False) as bench,
        bench.sensor("a", keepalive_s=1) as one,
        bench.sensor("b", keepalive_s=1) as two,
    ):
        for sensor in (one, two):
            data = b"".join(publish_packet(b"%d " % n + b"x" * padding, n) for n in range(1, count + 1))
            threading.Thread(target=sensor.send, args=(data,), daemon=True).start()
        until(lambda: bench.listener.status.paused, lambda: bench.listener.status)
        time.sleep(2.0)  # more than one and a half keepalives
        status = bench.listener.status
        assert status.paused and status.connections == 2 and bench.inlet.waiting == 2
        assert status.messages * padding < 3 * 100_000 + 2 * 256 * 1024
        batches = bench.take(2 * count)
        assert sorted(int(p.split()[0]) for b in batches for p in b.payloads) == sorted(2 * list(range(1, count + 1)))
        assert one.acks(count) == two.acks(count) == list(range(1, count + 1))


def test_more_unacknowledged_messages_than_allowed() -> None:
    limits = PeerLimits(unacked_messages_max=100)
    with listening(limits, consume=False) as bench, bench.sensor("four") as four, bench.sensor("five", 5) as five:
        for n in range(1, 301):
            four.publish(b"%d" % n, n)
        batches = bench.take(101, release=False)
        while (batch := bench.inlet.get(0.2)) is not None:  # what was read in one piece with it
            batches.append(batch)
        for batch in batches:
            batch.release()
        bench.consume()
        assert four.acks(300) == list(range(1, 301))  # 3.1.1 has no word for it: it was not read meanwhile
        five.send(b"".join(publish_packet(b"%d" % n, n, 5) for n in range(1, 201)))
        until(lambda: five.packet() in (b"\xe0\x01\x93", b""))  # told so when it took the limit


def test_more_connections_than_allowed() -> None:
    with listening(connections_max=3) as bench, contextlib.ExitStack() as stack:
        sensors = [stack.enter_context(bench.sensor(f"s{n}")) for n in range(3)]
        with RawSensor(bench.port) as late, contextlib.suppress(OSError):
            late.send(connect_packet("late"))
            assert late.packet() == b""
        until(lambda: "connections_max" in bench.listener.status.last_lost)
        sensors.pop().close()
        until(lambda: bench.listener.status.connections == 2)
        bench.sensor("late").close()


def test_connections_that_say_nothing_keep_nobody_out() -> None:
    with listening(connections_max=3) as bench, contextlib.ExitStack() as stack:
        good = stack.enter_context(bench.sensor("good"))
        silent = [stack.enter_context(RawSensor(bench.port)) for _ in range(5)]
        with bench.sensor("late") as late:
            for sensor in (good, late):
                sensor.publish(b"1", 1)
                assert sensor.acks(1) == [1]
            assert "for a newer connection" in bench.listener.status.last_lost  # before `late` leaves, too
            assert sum(s.packet(0.2) == b"" for s in silent[:3]) == 3


def test_however_many_sensors_there_are_the_uplink_can_connect(tmp_path: Path) -> None:
    hold = """
import resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (1_200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
sensors = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) for _ in range(1_050)]
print("there", flush=True)
sys.stdin.read()
"""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with nats_broker(tmp_path) as broker, listening(PeerLimits(handshake_s=60.0), connections_max=1_100) as bench:
            command = [sys.executable, "-c", hold, str(bench.port)]
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
                assert crowd.stdout is not None and crowd.stdout.readline() == "there\n"
                until(lambda: bench.listener.status.connections == 1_050, lambda: bench.listener.status)
                inbox: SimpleQueue[object] = SimpleQueue()
                link = Link(EndpointConfig("eu", broker.host, broker.port), DeviceTopics("plane-01"), inbox)
                link.open()
                assert isinstance(inbox.get(timeout=WAIT_S), Connected)
                link.close()
                crowd.communicate()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_every_listener_gets_its_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1_024, before[1]))
        with listening(connections_max=512), listening(connections_max=512):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 256 + 512 + 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


CROWD = """
import socket, sys
sys.stdin.readline()
sensors = [socket.create_connection(("127.0.0.1", int(sys.argv[1])), 20) for _ in range(20)]
for n, sensor in enumerate(sensors):
    sensor.sendall(bytes([16, 14, 0, 4]) + b"MQTT" + bytes([4, 2, 0, 30, 0, 2]) + b"%02d" % n)
assert all(sensor.recv(4) == bytes([32, 2, 0, 0]) for sensor in sensors)
print("served", flush=True)
"""


def test_without_file_descriptors_who_is_here_is_served_and_others_wait() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with listening() as bench, bench.sensor("good") as good:
        command = [sys.executable, "-c", CROWD, str(bench.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as crowd:
            assert crowd.stdin is not None and crowd.stdout is not None
            free = os.dup(0)  # the lowest number that is free
            os.close(free)
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (free + 3, hard))
                crowd.stdin.write("go\n")
                crowd.stdin.flush()
                until(lambda: "no connection accepted" in bench.listener.status.last_lost, lambda: bench.listener.status)
                good.publish(b"1", 1)
                assert good.acks(1) == [1]
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert crowd.stdout.readline() == "served\n"


def test_rubbish_from_many_disturbs_nobody(seed: int) -> None:
    rng = random.Random(seed)
    with listening(PeerLimits(handshake_s=1.0, packet_bytes_max=4_096)) as bench, bench.sensor("good") as good:
        for n in range(1, 201):
            with RawSensor(bench.port) as bad, contextlib.suppress(OSError):
                if rng.random() < 0.7:
                    bad.send(connect_packet(f"bad{n}", rng.choice(VERSIONS)))
                data = bytearray(publish_packet(rng.randbytes(rng.randrange(200)), n) + rng.randbytes(rng.randrange(300)))
                for _ in range(rng.randrange(3)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                bad.send(bytes(data))
            good.publish(b"good %d" % n, n)
            assert good.acks(1) == [n]
        assert sum(payload.startswith(b"good ") for _, payload in bench.messages) >= 200


def test_a_storm_of_three_hundred_reconnecting_clients_is_served_and_leaves_nothing_behind(users: Path) -> None:
    count, mine = 300, {"username": "pump", "password": "pump-secret"}
    with listening(users_file=users) as bench:

        def storm(first: int) -> None:
            """All connect at once; the connections of the storm before are cut off without a word."""
            sensors = [RawSensor(bench.port) for _ in range(count)]
            for n, sensor in enumerate(sensors):
                sensor.send(connect_packet(f"c{n}", 4 + n % 2, **mine) + publish_packet(b"%d" % (first + n), 1, 4 + n % 2))  # type: ignore[arg-type]
            for sensor in sensors:
                assert sensor.packet()[0] == 0x20 and sensor.acks(1) == [1]
            for sensor in sensors:
                sensor.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sensor.close()

        storm(0)
        until(lambda: bench.listener.status.connections == 0, lambda: bench.listener.status)
        before, resident = open_files(), _resident_kb()
        for turn in range(1, 6):
            storm(turn * count)
        until(lambda: bench.listener.status.connections == 0, lambda: bench.listener.status)
        assert open_files() <= before + 2
        assert _resident_kb() < resident + 8_000
        assert sorted(int(m[1]) for m in bench.messages) == list(range(6 * count))
        assert not bench.listener._crowd._sessions and not bench.listener._crowd.ready and bench.listener._crowd.held == 0


def _resident_kb() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def test_an_address_that_is_taken_is_a_configuration_error() -> None:
    with listening() as bench, pytest.raises(ConfigError, match="Address already in use"):
        Listener(ListenerConfig("127.0.0.1", bench.port), Inlet()).start()


def test_an_address_that_is_not_there_is_waited_for_and_told() -> None:
    listener = Listener(ListenerConfig("192.0.2.1", 0), Inlet())  # TEST-NET-1: nobody's
    listener.start()
    try:
        assert not listener.status.connected
        assert listener.status.error == "sensors.listen 192.0.2.1:0: Cannot assign requested address; is its network up?"
    finally:
        started = time.monotonic()
        listener.stop()
    assert time.monotonic() - started < WAIT_S


def test_sensors_are_taken_in_when_the_address_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    real, nobodys = socket.create_server, ("192.0.2.1", 0)

    def create_server(address: tuple[str, int], **more: Any) -> socket.socket:
        tries.append(address[0])
        return real(address if len(tries) > 2 else nobodys, **more)

    monkeypatch.setattr(socket, "create_server", create_server)
    monkeypatch.setattr("edge_agent.mqtt.listener.LISTEN_RETRY_S", 0.01)
    with listening() as bench:
        until(lambda: bench.listener.status.connected, lambda: bench.listener.status)
        assert (len(tries), bench.listener.status.error) == (3, "")
        bench.sensor().publish(b"1")
        until(lambda: bench.messages == [("sensors/a/t", b"1")], lambda: bench.messages)


def test_an_address_that_is_somebody_elses_when_it_has_come_ends_no_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    real, refused = socket.create_server, [errno.EADDRNOTAVAIL]

    def create_server(address: tuple[str, int], **more: Any) -> socket.socket:
        if refused:
            raise OSError(refused[0], os.strerror(refused[0]))
        return real(address, **more)

    monkeypatch.setattr(socket, "create_server", create_server)
    monkeypatch.setattr("edge_agent.mqtt.listener.LISTEN_RETRY_S", 0.01)
    with listening() as bench:
        refused[0] = errno.EADDRINUSE
        until(lambda: bench.listener.status.error.endswith("Address already in use; choose another address"), lambda: bench.listener.status)
        refused.clear()
        until(lambda: bench.listener.status.connected, lambda: bench.listener.status)
        bench.sensor().publish(b"1")
        until(lambda: bench.messages == [("sensors/a/t", b"1")], lambda: bench.messages)


def test_settings_out_of_bounds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unacked_messages_max"):
        ListenerConfig("127.0.0.1", 1, peer=PeerLimits(unacked_messages_max=70_000))
    with pytest.raises(ConfigError, match="edge-agent passwd"):
        Listener(ListenerConfig("127.0.0.1", 1, users_file=tmp_path / "missing"), Inlet())
