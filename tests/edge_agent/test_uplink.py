"""The uplink against two real brokers, a real buffer and a cloud that answers with receipts."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.backlog import Backlog, Loaded, Settled
from edge_agent.buffer import Buffer, BufferFullError, Draft, StoredBlock
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, read_header
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.state import Phase, Reported, decode_reported
from edge_agent.contract.topics import DeviceTopics, parse
from edge_agent.core.outbox import OutboxLimits
from edge_agent.mqtt.link import EndpointConfig
from edge_agent.store import DiskError
from edge_agent.uplink import DISCOVER_S, Uplink, UplinkConfig
from tests.brokers import Broker, nats_broker

TOPICS = DeviceTopics("plane-01")
NOW = Moment(1_700_000_000_000_000, 5_000_000, True)
ALLOWED = {"europe": ["eu"], "atlantic": ["eu", "us"], "united-states": ["us"], "nowhere": []}
LIMITS = OutboxLimits(receipt_timeout_s=1.0)


class Region:
    """The cloud behind one broker: remembers blocks, sends receipts unless `silent`."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.silent = False
        self.settled: dict[str, SequenceSet] = defaultdict(SequenceSet)
        self.arrivals: list[tuple[str, int]] = []
        self.arrived_at: dict[tuple[str, int], float] = {}
        self.control: list[tuple[str, bytes]] = []
        self.client = Client(CallbackAPIVersion.VERSION2, "cloud")
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe("fenceline/v1/#", qos=1)
        self.client.on_subscribe = lambda *_: self.ready.set()
        self.client.on_message = self._on_message
        self.ready = threading.Event()
        self.client.connect(broker.host, broker.port)
        self.client.loop_start()
        assert self.ready.wait(10)

    def _on_message(self, client: Client, _data: Any, message: Any) -> None:
        topic = parse(message.topic)
        if topic.kind != "up":
            self.control.append((topic.kind, bytes(message.payload)))
            return
        header = read_header(message.payload)
        assert (header.device, header.lane, header.stream) == (topic.device, topic.lane, topic.stream)
        self.arrivals.append((header.lane, header.sequence))
        self.arrived_at.setdefault((header.lane, header.sequence), time.monotonic())
        if not self.silent:
            settled = self.settled[header.lane]
            settled.add(header.sequence)
            lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
            client.publish(TOPICS.receipts, encode_receipt(Receipt(device="plane-01", epoch=header.epoch, lanes=[lane])), qos=1)

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()


@contextmanager
def region(path: Path, name: str) -> Iterator[Region]:
    with nats_broker(path, name=name) as broker:
        made = Region(broker)
        try:
            yield made
        finally:
            made.close()


class World:
    """Two regions and one device."""

    def __init__(self, path: Path, eu: Region, us: Region) -> None:
        self.eu, self.us = eu, us
        self.path = path
        self.desired: list[bytes] = []
        self.buffer = Buffer(path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={})
        self.uplink = self.make_uplink()

    def make_uplink(self, on_event: Any = None, **changes: Any) -> Uplink:
        endpoints = tuple(EndpointConfig(name, r.broker.host, r.broker.port) for name, r in (("eu", self.eu), ("us", self.us)))
        config = UplinkConfig("plane-01", endpoints, failback_s=1.0, backoff_max_s=0.5, limits=LIMITS, **changes)
        return Uplink(config, self.buffer, lambda lane: ALLOWED[lane], self.desired.append, on_event=on_event)

    def store(self, lane: str, count: int = 1, *, offer: bool = True) -> list[StoredBlock]:
        out = []
        for i in range(count):
            draft = Draft(lane, "pump", "1.0.0", FixQuality.STATIC, "policy", {"t": np.array([float(i)])}, 1, 1, 2)
            out += self.buffer.append([draft], [], NOW)
        if offer:
            self.uplink.offer(out)
        return out

    def empty(self, lane: str) -> bool:
        return lane not in {s.lane for s in self.buffer.lanes()}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with region(tmp_path, "eu") as eu, region(tmp_path, "us") as us:
        made = World(tmp_path, eu, us)
        yield made
        made.uplink.stop(0.0)
        assert made.uplink.failure is None
        made.buffer.close()


def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def connected(world: World, *names: str) -> bool:
    endpoints = world.uplink.status().endpoints
    return all(endpoints[name].connected for name in names)


def test_stored_blocks_reach_their_regions_and_leave_the_buffer_on_receipt(world: World) -> None:
    world.store("europe", 20, offer=False)
    world.store("united-states", 5, offer=False)
    world.uplink.start()
    until(lambda: world.empty("europe") and world.empty("united-states") and world.uplink.status().blocks_settled == 25)
    assert sorted(set(world.eu.arrivals)) == [("europe", n) for n in range(1, 21)]
    assert sorted(set(world.us.arrivals)) == [("united-states", n) for n in range(1, 6)]
    assert world.uplink.status().blocks_sent_again == 0


def test_fresh_block_leaves_at_once(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("europe")
    until(lambda: connected(world, "eu"))
    waits = []
    for n in range(1, 21):
        began = time.monotonic()
        world.store("europe")
        until(lambda n=n: ("europe", n) in world.eu.arrived_at)
        waits.append(world.eu.arrived_at[("europe", n)] - began)
        time.sleep(0.01)
    assert sorted(waits)[10] < DISCOVER_S / 5  # sent when offered, not found later in the buffer


def test_block_that_was_not_offered_is_found_in_the_buffer(world: World) -> None:
    world.uplink.start()
    world.store("europe", 3, offer=False)
    until(lambda: world.empty("europe"))


def test_killed_broker_moves_its_blocks_to_the_next_allowed_one_and_nowhere_else(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("atlantic")
    until(lambda: connected(world, "eu", "us") and world.uplink.status().lanes["atlantic"].endpoint == "eu")
    world.store("atlantic", 5)
    until(lambda: world.empty("atlantic"))
    assert world.us.arrivals == []
    world.eu.broker.kill()
    world.store("atlantic", 30)
    world.store("europe", 10)
    until(lambda: world.empty("atlantic"))
    assert {lane for lane, _ in world.us.arrivals} == {"atlantic"}
    status = world.uplink.status()
    assert status.endpoints["eu"].failovers >= 1
    until(lambda: world.uplink.status().lanes["europe"].held == "not_connected")
    assert world.uplink.status().lanes["europe"].waiting == 10
    world.eu.broker.restart()
    until(lambda: world.empty("europe"))
    assert "europe" not in {lane for lane, _ in world.us.arrivals}
    world.store("atlantic")
    until(lambda: world.uplink.status().lanes.get("atlantic") is None or world.empty("atlantic"))


def test_frozen_broker_is_left_when_it_does_not_acknowledge(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("atlantic")
    until(lambda: connected(world, "eu", "us") and world.uplink.status().lanes["atlantic"].endpoint == "eu")
    world.store("atlantic")
    until(lambda: world.empty("atlantic"))
    world.eu.broker.stop_signal()
    world.store("atlantic", 3)
    until(lambda: {n for _, n in world.us.arrivals} >= {2, 3, 4})
    assert world.uplink.status().hedges >= 1
    until(lambda: world.uplink.status().lanes["atlantic"].endpoint == "us")
    assert "silent for" in world.uplink.status().endpoints["eu"].reason
    until(lambda: "no PUBACK" in world.uplink.status().endpoints["eu"].reason)
    world.eu.broker.continue_signal()


def test_operator_is_told_of_failover_failback_and_held_lanes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.uplink_events.HELD_S", 0.3)
    told: list[tuple[str, dict[str, str]]] = []
    world.uplink = world.make_uplink(on_event=lambda event, fields: told.append((event, dict(fields))))
    world.uplink.start()
    world.uplink.stay("atlantic")
    until(lambda: connected(world, "eu", "us"))
    world.eu.broker.kill()
    world.store("europe")
    until(lambda: ("lane_held", {"lane": "europe", "reason": "not_connected"}) in told)
    assert ("failover", "atlantic", "us") in {(event, fields["lane"], fields.get("target", "")) for event, fields in told}
    world.eu.broker.restart()
    until(lambda: {"failback", "lane_released"} <= {event for event, _ in told})
    status = world.uplink.status()
    assert status.lanes["atlantic"].failovers == status.endpoints["eu"].failovers == 1
    assert "disconnected" in next(fields["reason"] for event, fields in told if event == "failover")


def test_round_trips_are_measured_while_nothing_is_sent(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("atlantic")
    until(lambda: all(e.round_trip_ms is not None for e in world.uplink.status().endpoints.values()))
    lane = world.uplink.status().lanes["atlantic"]
    assert lane.round_trip_ms is not None
    assert lane.deadline_ms is not None
    assert lane.deadline_ms >= 40.0
    assert world.uplink.status().blocks_sent == 0


def test_lane_returns_to_the_preferred_endpoint_when_it_has_proved_itself(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("atlantic")
    until(lambda: connected(world, "eu", "us"))
    world.eu.broker.kill()
    until(lambda: world.uplink.status().lanes["atlantic"].endpoint == "us")
    world.eu.broker.restart()
    until(lambda: world.uplink.status().lanes["atlantic"].endpoint == "eu")
    assert world.uplink.status().lanes["atlantic"].standby == "us"


def test_lane_without_allowed_endpoint_waits_though_all_brokers_live(world: World) -> None:
    world.uplink.start()
    world.store("nowhere", 3)
    world.store("europe", 3)
    until(lambda: world.empty("europe"))
    status = world.uplink.status().lanes["nowhere"]
    assert (status.endpoint, status.waiting, status.held) == (None, 3, "not_allowed")
    assert "nowhere" not in {lane for lane, _ in world.eu.arrivals + world.us.arrivals}


def test_blocks_without_receipt_are_sent_again_until_the_lake_answers(world: World) -> None:
    world.eu.silent = True
    world.uplink.start()
    world.store("europe", 3)
    until(lambda: len(world.eu.arrivals) >= 6)
    world.eu.silent = False
    until(lambda: world.empty("europe"))
    assert world.uplink.status().blocks_sent_again >= 3


def test_live_block_overtakes_a_long_backlog(world: World) -> None:
    world.store("europe", 2_000, offer=False)
    world.uplink.start()
    until(lambda: len(world.eu.arrivals) > 5)
    world.store("europe")
    until(lambda: world.empty("europe"), 30)
    order = [n for _, n in dict.fromkeys(world.eu.arrivals)]
    assert sorted(order) == list(range(1, 2_002))
    assert order.index(2_001) < 1_500


def test_restarted_uplink_sends_what_the_last_one_left(world: World) -> None:
    world.eu.silent = True
    world.uplink.start()
    world.store("europe", 5)
    until(lambda: len(world.eu.arrivals) == 5)
    world.uplink.stop(0.0)
    assert not world.uplink.alive
    world.eu.silent = False
    world.uplink = world.make_uplink()
    world.uplink.start()
    until(lambda: world.empty("europe"))


def test_stop_sends_what_it_can_first(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("europe")
    until(lambda: connected(world, "eu"))
    world.store("europe", 50)
    world.store("nowhere", 1)
    began = time.monotonic()
    world.uplink.stop(10.0)
    assert time.monotonic() - began < 5.0
    assert world.empty("europe")


def test_reported_state_goes_to_every_endpoint_when_changed_and_after_a_reconnect(world: World) -> None:
    def reports(region: Region) -> list[Reported]:
        return [decode_reported(payload) for kind, payload in region.control if kind == "reported"]

    report = Reported(device="plane-01", agent_version="1", desired_version=1, phase=Phase.ACTIVE, at_us=1)
    world.uplink.start()
    world.uplink.stay("atlantic")
    world.uplink.publish_reported(report)
    until(lambda: bool(reports(world.eu) and reports(world.us)))
    world.uplink.publish_reported(report)
    world.uplink.publish_reported(Reported(**{**_fields(report), "desired_version": 2}))
    until(lambda: reports(world.eu)[-1].desired_version == reports(world.us)[-1].desired_version == 2)
    assert len(reports(world.eu)) == 2
    world.us.broker.kill()
    world.us.broker.restart()
    until(lambda: len(reports(world.us)) >= 3)


def _fields(report: Reported) -> dict[str, Any]:
    return {name: getattr(report, name) for name in report.__struct_fields__}


def test_desired_state_and_events_pass_and_nonsense_receipts_are_counted(world: World) -> None:
    world.uplink.start()
    world.uplink.stay("europe")
    world.uplink.publish_event(b"hello")
    until(lambda: ("events", b"hello") in world.eu.control)
    world.eu.client.publish(TOPICS.desired, b'{"version": 1}', qos=1, retain=True)
    world.eu.client.publish(TOPICS.receipts, b"nonsense", qos=1)
    until(lambda: world.desired == [b'{"version": 1}'] and world.uplink.status().receipts_refused == 1)
    world.eu.client.publish(TOPICS.desired, b"", qos=1, retain=True)


def test_receipt_of_another_device_or_epoch_settles_nothing(world: World) -> None:
    world.eu.silent = True
    world.uplink.start()
    world.store("europe", 2)
    until(lambda: len(world.eu.arrivals) >= 2)
    lane = LaneReceipt(lane="europe", cumulative=9)
    for device, epoch in (("plane-02", world.buffer.epoch), ("plane-01", "other")):
        world.eu.client.publish(TOPICS.receipts, encode_receipt(Receipt(device=device, epoch=epoch, lanes=[lane])), qos=1)
    time.sleep(0.3)
    assert not world.empty("europe")


def test_region_cannot_settle_lanes_that_it_may_not_hold(world: World) -> None:
    world.eu.silent = True
    world.uplink.start()
    world.uplink.stay("united-states")
    world.store("europe", 2)
    until(lambda: len(world.eu.arrivals) >= 2 and connected(world, "us"))
    forged = [LaneReceipt(lane=lane, cumulative=9) for lane in ("europe", "united-states")]
    world.us.client.publish(TOPICS.receipts, encode_receipt(Receipt(device="plane-01", epoch=world.buffer.epoch, lanes=forged)), qos=1)
    until(lambda: world.uplink.status().receipts_refused == 1)
    time.sleep(0.3)
    assert [s.blocks for s in world.buffer.lanes() if s.lane == "europe"] == [2]


def test_receipt_that_waited_does_not_settle_the_blocks_of_a_new_buffer(tmp_path: Path) -> None:
    first, second = (Buffer(tmp_path / name, "plane-01", "boot", bytes_max=1 << 30, history_rows={}) for name in ("a.db", "b.db"))
    for buffer in (first, second):
        buffer.append([Draft("europe", "pump", "1.0.0", FixQuality.STATIC, "p", {"t": np.array([1.0])}, 1, 1, 2)], [], NOW)
    answers: list[Any] = []
    backlog = Backlog(first, "plane-01", answers.append)
    backlog.settle(Receipt(device="plane-01", epoch=first.epoch, lanes=[LaneReceipt(lane="europe", cumulative=1)]))
    backlog._buffer = second  # as after a file that could not be salvaged
    backlog.work()
    assert answers == [Settled(0)]
    assert [s.blocks for s in second.lanes()] == [1]
    first.close()
    second.close()


def test_receipts_that_a_full_disk_does_not_take_hold_up_no_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Buffer(tmp_path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={})
    for _ in range(2):
        buffer.append([Draft("europe", "pump", "1.0.0", FixQuality.STATIC, "p", {"t": np.array([1.0])}, 1, 1, 2)], [], NOW)
    full, answers = threading.Event(), SimpleQueue[Any]()
    full.set()

    def settle(receipt: Receipt) -> int:
        if full.is_set():
            raise BufferFullError("no room on the disk")
        return Buffer.settle(buffer, receipt)

    monkeypatch.setattr("edge_agent.backlog.PAUSE_S", 0.05)
    monkeypatch.setattr(buffer, "settle", settle)
    backlog = Backlog(buffer, "plane-01", answers.put)
    backlog.start()
    for cumulative in (1, 2):
        backlog.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=cumulative)]))
    backlog.read("europe", 0)
    while not isinstance(loaded := answers.get(timeout=10), Loaded):
        assert loaded == Settled(0)
    assert [block.sequence for block in loaded.blocks] == [1, 2]
    full.clear()
    until(lambda: buffer.lanes() == [])
    backlog.close(5.0)
    buffer.close()


def test_a_lane_that_cannot_be_read_holds_up_neither_receipts_nor_other_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = Buffer(tmp_path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={})
    for lane in ("europe", "switzerland"):
        buffer.append([Draft(lane, "pump", "1.0.0", FixQuality.STATIC, "p", {"t": np.array([1.0])}, 1, 1, 2)], [], NOW)
    bad, answers = threading.Event(), SimpleQueue[Any]()
    bad.set()

    def pending(lane: str, *more: int) -> list[StoredBlock]:
        if lane == "europe" and bad.is_set():
            raise DiskError("a bad sector")
        return Buffer.pending(buffer, lane, *more)

    monkeypatch.setattr("edge_agent.backlog.PAUSE_S", 0.05)
    monkeypatch.setattr(buffer, "pending", pending)
    backlog = Backlog(buffer, "plane-01", answers.put)
    backlog.start()
    backlog.read("europe", 0)
    backlog.read("switzerland", 0)
    assert answers.get(timeout=10).lane == "switzerland"
    backlog.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="switzerland", cumulative=1)]))
    assert answers.get(timeout=10) == Settled(1)
    bad.clear()
    assert answers.get(timeout=10).lane == "europe"
    backlog.close(5.0)
    buffer.close()


def test_buffer_that_fails_for_a_while_is_asked_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = 2

    def settle(receipt: Receipt) -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise UnavailableError("disk failed")
        return Buffer.settle(world.buffer, receipt)

    monkeypatch.setattr("edge_agent.backlog.PAUSE_S", 0.05)
    monkeypatch.setattr(world.buffer, "settle", settle)
    world.uplink.start()
    world.store("europe", 3)
    until(lambda: world.empty("europe"))
    assert failures == 0
