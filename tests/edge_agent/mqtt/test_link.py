from __future__ import annotations

import gc
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from edge_agent.addresses import Tls
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.topics import DeviceTopics
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Link, Lost, Message
from tests.brokers import Broker, User, nats_broker
from tests.certificates import Authority
from tests.servers import free_port

TOPICS = DeviceTopics("plane-01")
DEVICE = User("plane-01", "secret", publish=["fenceline/v1/plane-01/#"], subscribe=["fenceline/v1/plane-01/#"])
BLIND = User("blind", "secret", publish=["fenceline/v1/plane-01/#"], subscribe=["other/#"])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with nats_broker(tmp_path_factory.mktemp("broker"), users=[DEVICE, BLIND]) as running:
        yield running


def endpoint(broker: Broker, *, user: User = DEVICE, password: str = "secret", keepalive_s: int = 30) -> EndpointConfig:
    return EndpointConfig("eu", broker.host, broker.port, user.name, password, keepalive_s=keepalive_s)


def connect(config: EndpointConfig) -> tuple[Link, SimpleQueue[Any]]:
    inbox: SimpleQueue[Any] = SimpleQueue()
    link = Link(config, TOPICS, inbox)
    link.open()
    assert isinstance(inbox.get(timeout=10), Connected)
    link.subscribe()
    return link, inbox


def nothing_more(inbox: SimpleQueue[Any], wait_s: float = 0.2) -> bool:
    try:
        inbox.get(timeout=wait_s)
    except Empty:
        return True
    return False


def test_published_block_is_acknowledged_and_control_messages_arrive(broker: Broker) -> None:
    link, inbox = connect(endpoint(broker))
    mid = link.publish(TOPICS.up("europe", "turbofan"), b"block")
    assert inbox.get(timeout=5) == Acked(link, mid)
    link.publish(TOPICS.desired, b"{}", retain=True)
    events = [inbox.get(timeout=5), inbox.get(timeout=5)]
    assert Message(link, TOPICS.desired, b"{}") in events
    link.close()
    assert inbox.get(timeout=5) == Lost(link, "closed")
    assert nothing_more(inbox)


def test_refused_password_ends_the_link_with_its_reason(broker: Broker) -> None:
    inbox: SimpleQueue[Any] = SimpleQueue()
    link = Link(endpoint(broker, password="wrong"), TOPICS, inbox)
    link.open()
    event = inbox.get(timeout=5)
    assert isinstance(event, Lost)
    assert "refused" in event.reason


def test_refused_subscription_ends_the_link(broker: Broker) -> None:
    link, inbox = connect(endpoint(broker, user=BLIND))
    event = inbox.get(timeout=5)
    assert isinstance(event, Lost)
    assert "subscription refused" in event.reason
    link.close()


def test_closed_port_ends_the_link_without_blocking_the_caller() -> None:
    inbox: SimpleQueue[Any] = SimpleQueue()
    link = Link(EndpointConfig("eu", "127.0.0.1", free_port()), TOPICS, inbox)
    began = time.monotonic()
    link.open()
    assert time.monotonic() - began < 0.5
    assert "cannot connect" in inbox.get(timeout=5).reason


def test_server_that_never_answers_can_be_aborted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        inbox: SimpleQueue[Any] = SimpleQueue()
        link = Link(EndpointConfig("eu", "127.0.0.1", server.getsockname()[1]), TOPICS, inbox)
        link.open()
        accepted, _ = server.accept()
        began = time.monotonic()
        link.abort("no CONNACK")
        assert time.monotonic() - began < 0.5
        assert inbox.get(timeout=1) == Lost(link, "no CONNACK")
        accepted.close()
        assert nothing_more(inbox)


def test_tls_files_that_are_being_renewed_end_the_link_and_no_more(tmp_path: Path) -> None:
    eu, us = (Authority(tmp_path).issue(name) for name in ("eu", "us"))
    inbox: SimpleQueue[Any] = SimpleQueue()
    for tls in (Tls(eu.ca, eu.certificate, us.key), Tls(tmp_path / "not there yet")):
        link = Link(EndpointConfig("eu", "127.0.0.1", free_port(), tls=tls), TOPICS, inbox)
        link.open()
        event = inbox.get(timeout=5)
        assert isinstance(event, Lost) and "do not load" in event.reason


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (b"\x30\4\0\1\xff5", "the broker breaks the protocol: a topic is not UTF-8: b'\\xff'"),
        (b"\x30\xff\xff\xff\x7f\0\1t" + bytes(100_000), "the broker sends a packet of 268435455 bytes; at most 1048576 are taken"),
    ],
)
def test_a_broker_that_breaks_the_protocol_or_fills_the_memory_ends_the_link(packet: bytes, why: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        inbox: SimpleQueue[Any] = SimpleQueue()
        link = Link(EndpointConfig("eu", "127.0.0.1", server.getsockname()[1]), TOPICS, inbox)
        link.open()
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"\x20\2\0\0" + packet)
            assert isinstance(inbox.get(timeout=5), Connected)
            assert inbox.get(timeout=5) == Lost(link, why)
            link.close()
            assert nothing_more(inbox)


def test_killed_broker_is_noticed_at_once_and_publishing_fails(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker:
        link, inbox = connect(EndpointConfig("eu", broker.host, broker.port))
        link.publish(TOPICS.up("europe", "turbofan"), b"block")
        assert isinstance(inbox.get(timeout=5), Acked)
        began = time.monotonic()
        broker.kill()
        assert isinstance(inbox.get(timeout=5), Lost)
        assert time.monotonic() - began < 1.0
        with pytest.raises(UnavailableError):
            link.publish(TOPICS.up("europe", "turbofan"), b"block")


def test_frozen_broker_is_noticed_by_the_keepalive(tmp_path: Path) -> None:
    with nats_broker(tmp_path) as broker:
        _link, inbox = connect(EndpointConfig("eu", broker.host, broker.port, keepalive_s=1))
        broker.stop_signal()
        assert isinstance(inbox.get(timeout=6), Lost)


def test_many_links_leave_no_file_descriptor_behind(broker: Broker) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.disable()  # a reconnect storm must not depend on the collector
    try:
        for turn in range(12):
            inbox: SimpleQueue[Any] = SimpleQueue()
            link = Link(endpoint(broker), TOPICS, inbox)
            link.open()
            inbox.get(timeout=10)  # NATS may refuse a client id that comes back this fast: that is fine here
            link.close()
            while not inbox.empty():
                inbox.get()
            del link, inbox
            if turn == 3:
                time.sleep(0.3)
                before = open_files()
        deadline = time.monotonic() + 10
        while open_files() > before + 1 and time.monotonic() < deadline:  # threads of closed links end by themselves
            time.sleep(0.1)
        assert open_files() <= before + 1
    finally:
        gc.enable()
