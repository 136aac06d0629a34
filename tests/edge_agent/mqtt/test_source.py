"""The source against real brokers: nothing is lost, nothing is acknowledged too early, memory stays bounded."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.config import Tls
from edge_agent.contract.errors import ConfigError
from edge_agent.mqtt import frames
from edge_agent.mqtt.inlet import Batch, BatchLimits, Inlet
from edge_agent.mqtt.source import Source, SourceConfig, SourceStatus
from edge_agent.subscriptions import Subscriptions
from tests.brokers import Broker, ServerTls, User, mosquitto_broker, nats_broker
from tests.edge_agent.mqtt.certificates import make
from tests.edge_agent.mqtt.packets import pubacks
from tests.servers import free_port

WAIT_S = 20.0
FORGETFUL = Subscriptions(None)


def config(broker: Broker, **settings: object) -> SourceConfig:
    base: dict[str, object] = {"client_id": "agent", "subscribe": "sensors/plane-01/#", "backoff_s_min": 0.05, "backoff_s_max": 0.2}
    return SourceConfig(host=broker.host, port=broker.port, **{**base, **settings})  # type: ignore[arg-type]


@dataclass
class Side:
    """A source and the inlet that it fills."""

    source: Source
    inlet: Inlet

    @property
    def status(self) -> SourceStatus:
        return self.source.status

    def get(self, timeout_s: float) -> Batch | None:
        return self.inlet.get(timeout_s)


@contextlib.contextmanager
def running(
    settings: SourceConfig,
    connected: bool = True,
    limits: BatchLimits | None = None,
    batches_max: int = 4,
    subscriptions: Subscriptions = FORGETFUL,
) -> Iterator[Side]:
    inlet = Inlet(limits, batches_max)
    source = Source(settings, inlet, subscriptions)
    source.start()
    try:
        if connected:
            until(lambda: source.status.connected, lambda: source.status)
        yield Side(source, inlet)
    finally:
        source.stop()


def until(condition: Callable[[], bool], state: Callable[[], object] = lambda: "") -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S} s in vain: {state()}"
        time.sleep(0.01)


@contextlib.contextmanager
def publisher(broker: Broker, user: User | None = None) -> Iterator[Client]:
    client = Client(CallbackAPIVersion.VERSION2, client_id=f"sensor-{time.monotonic_ns()}")
    if user is not None:
        client.username_pw_set(user.name, user.password)
    client.max_inflight_messages_set(1_000)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


def publish(client: Client, first: int, count: int, qos: int = 1, padding: int = 0) -> None:
    infos = [client.publish("sensors/plane-01/turbofan", b"%d" % n + b" " * padding, qos) for n in range(first, first + count)]
    for info in infos:
        info.wait_for_publish(WAIT_S)


def numbers(batches: list[Batch]) -> list[int]:
    return [int(payload) for batch in batches for payload in batch.payloads]


def collect(source: Side, count: int, release: bool = True) -> list[Batch]:
    """Batches until `count` different messages have come."""
    batches: list[Batch] = []
    seen: set[int] = set()
    deadline = time.monotonic() + WAIT_S
    while len(seen) < count:
        assert time.monotonic() < deadline, f"{len(seen)} of {count} messages came; {source.status}"
        batch = source.get(0.1)
        if batch is not None:
            batches.append(batch)
            seen.update(numbers([batch]))
            if release:
                batch.release()
    return batches


def test_every_message_arrives_once_and_in_order(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker)) as source, publisher(broker) as sensor:
        threading.Thread(target=publish, args=(sensor, 0, 5_000)).start()
        batches = collect(source, 5_000)
        assert numbers(batches) == list(range(5_000))
        assert all(topic == "sensors/plane-01/turbofan" for batch in batches for topic in batch.topics)
        assert all(len(batch.topics) == len(batch.payloads) == len(batch) for batch in batches)
        status = source.status
        assert (status.messages, status.connections, status.error) == (5_000, 1, "")
        assert status.last_received_us is not None and abs(status.last_received_us / 1e6 - time.time()) < WAIT_S


@pytest.mark.parametrize("version", [4, 5])
def test_mosquitto_in_both_versions(tmp_path: Path, version: int) -> None:
    users = [User("sensor", "secret")]
    with mosquitto_broker(tmp_path, users) as broker, publisher(broker, users[0]) as sensor:
        settings = config(broker, version=version, username="sensor", password="secret")
        with running(settings) as source:
            publish(sensor, 0, 300)
            first = collect(source, 300, release=False)
        publish(sensor, 300, 300)
        with running(settings) as source:  # the unreleased ones and those that came while we were away
            assert sorted(set(numbers(collect(source, 600)))) == list(range(600))
    assert sorted(numbers(first)) == list(range(300))


def test_a_quiet_message_is_not_held_back(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker), limits=BatchLimits(ms=5.0)) as source, publisher(broker) as sensor:
        delays = []
        for n in range(20):
            started = time.perf_counter()
            publish(sensor, n, 1)
            batch = source.get(WAIT_S)
            delays.append(time.perf_counter() - started)
            assert batch is not None and numbers([batch]) == [n]
            batch.release()
        assert sorted(delays)[10] < 0.1


def test_a_busy_consumer_gets_large_batches(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, publisher(broker) as sensor:
        with running(config(broker), limits=BatchLimits(rows_max=700), batches_max=1) as source:
            publish(sensor, 0, 3_000)
            until(lambda: source.status.paused, lambda: source.status)
            batches = collect(source, 3_000)
        sizes = [len(batch) for batch in batches]
        assert sizes[1] == 700, sizes  # the one that grew while the first one waited


def test_unreleased_batches_are_delivered_again_after_reconnecting(tmp_path: Path) -> None:
    # NATS sends them `ack_wait` after the first delivery, not at once as the standard has it.
    with nats_broker(tmp_path, ack_wait_s=2) as broker, publisher(broker) as sensor:
        with running(config(broker)) as source:
            publish(sensor, 0, 100)
            collect(source, 100)
            publish(sensor, 100, 100)
            collect(source, 100, release=False)
        with running(config(broker)) as source:
            again = collect(source, 100)
            assert source.get(0.5) is None
        assert sorted(numbers(again)) == list(range(100, 200))


def test_a_killed_broker_loses_nothing(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker)) as source:
        with publisher(broker) as sensor:
            publish(sensor, 0, 500)
        held = collect(source, 500, release=False)
        broker.kill()
        until(lambda: not source.status.connected)
        assert "127.0.0.1" in source.status.error
        broker.start()
        until(lambda: source.status.connected, lambda: source.status)
        for batch in held:
            batch.release()  # of the dead connection: must not reach the new one
        with publisher(broker) as sensor:
            publish(sensor, 500, 500)
        assert sorted(set(numbers(collect(source, 1_000)))) == list(range(1_000))
        assert source.status.connections == 2 and source.status.error == ""


def test_a_consumer_that_stands_still_holds_the_broker_not_the_memory(tmp_path: Path) -> None:
    padding, rows = 10_000, 2_000
    limits = BatchLimits(bytes_max=500_000)
    with (
        nats_broker(tmp_path, ack_wait_s=60) as broker,
        publisher(broker) as sensor,
        running(config(broker, keepalive_s=2), limits=limits, batches_max=2) as source,
    ):
        threading.Thread(target=publish, args=(sensor, 0, rows, 1, padding), daemon=True).start()
        until(lambda: source.status.paused, lambda: source.status)
        time.sleep(4.5)  # more than two keepalives: a broker that hears nothing for 1.5 of them ends the connection
        status = source.status
        assert status.connected and status.connections == 1, status
        assert source.inlet.waiting == 2
        assert status.messages * padding < 3 * (500_000 + frames.PACKET_BYTES_MAX)
        assert sorted(set(numbers(collect(source, rows)))) == list(range(rows))
        assert source.status.connections == 1


def test_a_frozen_broker_is_noticed(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker, keepalive_s=2)) as source:
        broker.stop_signal()
        until(lambda: not source.status.connected)
        assert "silent for" in source.status.error
        broker.continue_signal()
        until(lambda: source.status.connected, lambda: source.status)


def test_an_idle_connection_stays(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker, keepalive_s=2)) as source:
        time.sleep(4)
        assert source.status.connected and source.status.connections == 1


def test_a_wrong_password_is_named(tmp_path: Path) -> None:
    with (
        nats_broker(tmp_path, [User("sensor", "secret")]) as broker,
        running(config(broker, username="sensor", password="wrong"), connected=False) as source,
    ):
        until(lambda: source.status.error != "")
        assert "refuses client 'agent'" in source.status.error and "not authorized" in source.status.error
        assert "wrong" not in source.status.error and "wrong" not in repr(source.source._config)


def test_a_forbidden_filter_is_named(tmp_path: Path) -> None:
    users = [User("sensor", "secret", publish=[], subscribe=["other/#"])]
    with (
        nats_broker(tmp_path, users) as broker,
        running(config(broker, username="sensor", password="secret"), connected=False) as source,
    ):
        until(lambda: source.status.error != "")
        assert "refuses the subscription to 'sensors/plane-01/#'" in source.status.error


@pytest.mark.needs_mosquitto
@pytest.mark.parametrize("version", [4, 5])
def test_a_filter_that_is_not_wanted_any_more_is_given_up(version: frames.Version, tmp_path: Path) -> None:
    note = tmp_path / "subscriptions.json"
    with mosquitto_broker(tmp_path) as broker, publisher(broker) as sensor:
        for wanted in ("#", "sensors/+/pump"):
            with running(config(broker, subscribe=wanted, version=version), subscriptions=Subscriptions(note)):
                assert f'"{wanted}"' in note.read_text()
        wanted = "sensors/plane-01/#"
        with running(config(broker, subscribe=wanted, version=version), subscriptions=Subscriptions(note)) as source:
            until(lambda: note.read_text() == f'{{"agent at 127.0.0.1:{broker.port}":["{wanted}"]}}', note.read_text)
            for topic, payload in (("sensors/plane-02/turbofan", b"1"), ("sensors/plane-02/pump", b"2"), ("sensors/plane-01/pump", b"3")):
                sensor.publish(topic, payload, 1).wait_for_publish(WAIT_S)
            assert numbers(collect(source, 1)) == [3]


@pytest.mark.needs_mosquitto
@pytest.mark.parametrize("text", [b"", b"[1]", b'{"agent": "#"}', b'{"\xff": []}'])
def test_a_note_of_filters_that_cannot_be_read_is_written_anew(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "subscriptions.json").write_bytes(text)
    subscriptions = Subscriptions(tmp_path / "subscriptions.json")
    with mosquitto_broker(tmp_path) as broker, running(config(broker, subscribe="#"), subscriptions=subscriptions):
        assert subscriptions.held(f"agent at 127.0.0.1:{broker.port}") == ["#"]


def test_mqtt_5_against_a_broker_that_only_knows_3(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker, version=5), connected=False) as source:
        until(lambda: source.status.error != "")
        assert not source.status.connected


def test_a_broker_that_is_not_there_is_named() -> None:
    port = free_port()
    settings = SourceConfig(host="127.0.0.1", port=port, client_id="agent", subscribe="#", backoff_s_min=0.05)
    with running(settings, connected=False) as source:
        until(lambda: source.status.error != "")
        assert f"127.0.0.1:{port} is not reachable" in source.status.error


def test_an_oversize_message_arrives_cut_and_does_not_come_again(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker, packet_bytes_max=2_048)) as source, publisher(broker) as sensor:
        publish(sensor, 1, 1, padding=1_000_000)
        publish(sensor, 2, 1)
        batches = collect(source, 2)
        assert 1_900 < len(batches[0].payloads[0]) < 2_048
        assert numbers(batches) == [1, 2] and source.status.connections == 1


def test_qos_0_messages_need_no_acknowledgement(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker, running(config(broker)) as source, publisher(broker) as sensor:
        publish(sensor, 0, 10, qos=0)
        assert numbers(collect(source, 10)) == list(range(10))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ca.pem, and server and client certificates of it."""
    return make(tmp_path_factory.mktemp("certificates"), "server", "agent")


def test_tls_with_a_client_certificate(tmp_path: Path, certificates: Path) -> None:
    server = ServerTls(certificates / "server.pem", certificates / "server.key", certificates / "ca.pem")
    mine = Tls(certificates / "ca.pem", certificates / "agent.pem", certificates / "agent.key")
    with nats_broker(tmp_path, tls=server) as broker:
        with running(config(broker, tls=mine)) as source:
            sensor = Client(CallbackAPIVersion.VERSION2, client_id="sensor")
            sensor.tls_set(str(mine.ca_file), str(mine.cert_file), str(mine.key_file))
            sensor.connect(broker.host, broker.port)
            sensor.loop_start()
            publish(sensor, 0, 500, padding=2_000)
            assert sorted(set(numbers(collect(source, 500)))) == list(range(500))
            sensor.disconnect()
            sensor.loop_stop()
        with running(config(broker, tls=Tls(certificates / "ca.pem")), connected=False) as source:  # no client certificate
            until(lambda: source.status.error != "")
            assert not source.status.connected


def test_a_server_of_another_ca_is_not_trusted(tmp_path: Path, certificates: Path) -> None:
    server = ServerTls(certificates / "server.pem", certificates / "server.key")
    with nats_broker(tmp_path, tls=server) as broker, running(config(broker, tls=Tls()), connected=False) as source:
        until(lambda: source.status.error != "")
        assert "CERTIFICATE_VERIFY_FAILED" in source.status.error


def test_a_renewed_authority_is_trusted_without_a_restart(tmp_path: Path, certificates: Path) -> None:
    server, ca = ServerTls(certificates / "server.pem", certificates / "server.key"), make(tmp_path / "old") / "ca.pem"
    with nats_broker(tmp_path, tls=server) as broker, running(config(broker, tls=Tls(ca)), connected=False) as source:
        until(lambda: "CERTIFICATE_VERIFY_FAILED" in source.status.error)
        ca.write_text("half")
        until(lambda: "do not load" in source.status.error)
        ca.write_bytes((certificates / "ca.pem").read_bytes())
        until(lambda: source.status.connected)


def test_messages_that_come_in_a_tls_record_each_are_read_together(certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    reads: list[int] = []
    feed = frames.Decoder.feed

    def counted(decoder: frames.Decoder, data: bytes, packets_max: int) -> frames.Frames:
        reads.append(len(data))
        return feed(decoder, data, packets_max)

    monkeypatch.setattr(frames.Decoder, "feed", counted)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            peer = context.wrap_socket(server.accept()[0], server_side=True)
            with peer:
                for answer in (b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x01"):
                    peer.recv(65_536)
                    peer.sendall(answer)
                for n in range(2_000):
                    peer.sendall(b"\x32\x09\x00\x01t" + struct.pack(">H", n + 1) + b"%04d" % n)
                with contextlib.suppress(OSError):
                    while peer.recv(65_536):  # acknowledgements
                        pass

        threading.Thread(target=serve, daemon=True).start()
        broker = SourceConfig("127.0.0.1", server.getsockname()[1], "agent", "#", tls=Tls(certificates / "ca.pem"))
        with running(broker) as source:
            assert numbers(collect(source, 2_000)) == list(range(2_000))
    assert len(reads) < 1_000, "a read for each message: a breath of a millisecond each limits TLS to hundreds a second"


def test_tls_files_that_do_not_load_are_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.pem"):
        Source(SourceConfig("127.0.0.1", 1, "a", "#", tls=Tls(tmp_path / "missing.pem")), Inlet(), FORGETFUL)


@contextlib.contextmanager
def scripted_broker(*answers: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server that sends `answers[i]` after the i-th packet it gets, then keeps still."""
    received: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = server.accept()
                    with peer:
                        for answer in answers:
                            received.append(peer.recv(65_536))
                            peer.sendall(answer)
                        while data := peer.recv(65_536):
                            received.append(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1], received
        server.shutdown(socket.SHUT_RDWR)
    thread.join(WAIT_S)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([b"\x20\x02\x00\x05"], "not authorized"),
        ([b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x80"], "refuses the subscription"),
        ([b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x00"], "granted QoS (0,)"),
        ([b"\x20\x02\x00\x00", b"\x90\x03\x00\x02\x01"], "granted QoS"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "MQTT"),
        ([b"\x20\x02\x00\x00", b"\x34\x07\x00\x01t\x00\x01xy"], "a message with QoS 2, which is not taken here"),
        ([b""], "did not complete the handshake in 0.3 s"),
    ],
)
def test_a_broker_that_answers_badly_is_named_and_tried_again(answers: list[bytes], words: str) -> None:
    with scripted_broker(*answers) as (port, received):
        settings = SourceConfig("127.0.0.1", port, "agent", "#", connect_timeout_s=0.3, backoff_s_min=0.02, backoff_s_max=0.05)
        with running(settings, connected=False) as source:
            until(lambda: words in source.status.error, lambda: source.status)
            until(lambda: sum(r.startswith(b"\x10") for r in received) >= 2, lambda: received)
            assert not source.status.connected


def test_releasing_twice_or_late_sends_one_acknowledgement() -> None:
    publishes = b"".join(b"\x32\x06\x00\x01t" + struct.pack(">H", n) + b"1" for n in (1, 2, 3))
    with scripted_broker(b"\x20\x02\x00\x00", b"\x90\x03\x00\x01\x01" + publishes) as (port, received):
        with running(SourceConfig("127.0.0.1", port, "agent", "#"), limits=BatchLimits(ms=1)) as source:
            batch = source.get(WAIT_S)
            assert batch is not None and batch.payloads == [b"1"] * 3
            batch.release()
            batch.release()
            until(lambda: len(received) >= 3)
        batch.release()
        until(lambda: received[-1].endswith(b"\xe0\x00"), lambda: received)
        assert b"".join(received[2:]) == pubacks([1, 2, 3]) + frames.disconnect(4)


def test_a_broker_that_reads_no_acknowledgements_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.mqtt.source.OUTBOX_BYTES_MAX", 1_000)
    stuck = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)

        def serve() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(65_536)
                peer.sendall(b"\x20\x02\x00\x00")
                peer.recv(65_536)
                peer.sendall(b"\x90\x03\x00\x01\x01" + b"\x32\x06\x00\x01t\x00\x011")
                stuck.wait(WAIT_S)

        threading.Thread(target=serve, daemon=True).start()
        settings = SourceConfig("127.0.0.1", server.getsockname()[1], "agent", "#", backoff_s_min=5, backoff_s_max=9)
        with running(settings) as source:
            batch = source.get(WAIT_S)
            assert batch is not None
            assert batch._release is not None
            send = batch._release.func  # type: ignore[attr-defined]
            for _ in range(200):
                send(pubacks([1]) * 20_000)
                time.sleep(0.002)
            until(lambda: "takes no acknowledgements" in source.status.error, lambda: source.status)
        stuck.set()


@pytest.mark.parametrize("bad", [{"keepalive_s": 1}, {"backoff_s_min": 0.0}, {"packet_bytes_max": 10}])
def test_settings_out_of_bounds_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SourceConfig(host="127.0.0.1", port=1, client_id="a", subscribe="#", **bad)  # type: ignore[arg-type]
