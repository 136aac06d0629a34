"""Receipts at their largest, over a real broker to a real link of an agent: no message is larger than a broker takes."""

from __future__ import annotations

import time
from pathlib import Path
from queue import SimpleQueue

from cloud.brokers import PAYLOAD_BYTES_MAX
from cloud.config import Region
from cloud.intake import Intake
from cloud.receipts import Receipts
from edge_agent.contract.receipt import (
    LANES_MAX,
    MESSAGE_BYTES_MAX,
    RANGES_MAX,
    SEQUENCE_MAX,
    LaneReceipt,
    Receipt,
    decode_receipt,
    encode_receipt,
)
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.zones import LANE_CHARACTERS_MAX
from edge_agent.mqtt.link import Connected, EndpointConfig, Link, LinkEvent, Message
from tests.brokers import User, nats_broker

DEVICE = "d" * 63
WAIT_S = 60.0


def largest(lanes: int, ranges: int) -> Receipt:
    """A receipt of lanes with the longest names and numbers."""
    pairs = [(SEQUENCE_MAX - 2 * n, SEQUENCE_MAX - 2 * n) for n in range(ranges)][::-1]
    names = [f"{n:04d}".ljust(LANE_CHARACTERS_MAX, "z") for n in range(lanes)]
    found = [LaneReceipt(lane=name, cumulative=SEQUENCE_MAX - 2 * RANGES_MAX - 2, ranges=pairs) for name in names]
    return Receipt(device=DEVICE, epoch="e" * 64, lanes=found)


def published(receipt: Receipt) -> list[bytes]:
    sent: list[Receipt] = []
    Receipts(sent.append, interval_s=0.0).add([receipt], 0.0)
    return [encode_receipt(one) for one in sent]


def test_messages_are_bounded_and_say_all_however_many_lanes_and_ranges() -> None:
    for lanes, ranges in ((300, RANGES_MAX), (4_096, 0), (4_096, 16), (1, RANGES_MAX), (257, 1)):
        whole = largest(lanes, ranges)
        messages = published(whole)
        assert max(map(len, messages)) <= MESSAGE_BYTES_MAX < PAYLOAD_BYTES_MAX / 8
        assert [lane for message in messages for lane in decode_receipt(message).lanes] == whole.lanes
    assert len(published(largest(LANES_MAX, 16))) == 1, "few ranges need no more messages than they did"


def test_the_largest_receipts_reach_an_agent_over_a_broker(tmp_path: Path) -> None:
    whole, inbox = largest(300, RANGES_MAX), SimpleQueue[LinkEvent]()
    topics, lanes = DeviceTopics(DEVICE), list[LaneReceipt]()
    with nats_broker(tmp_path, [User("cloud", "c"), User(DEVICE, "p")], payload_bytes_max=PAYLOAD_BYTES_MAX) as broker:
        link = Link(EndpointConfig("eu", broker.host, broker.port, DEVICE, "p"), topics, inbox)
        link.open()
        assert isinstance(inbox.get(timeout=WAIT_S), Connected)
        link.subscribe()
        intake = Intake(Region("eu", broker.host, broker.port), "cloud", "c", client_id="ingest-1", persistent=False)
        intake.open()
        try:
            deadline = time.monotonic() + WAIT_S
            while inbox.empty():  # it is not subscribed yet
                assert time.monotonic() < deadline
                intake.publish(topics.receipts, encode_receipt(largest(0, 0)))
                time.sleep(0.1)
            for message in published(whole):
                assert intake.publish(topics.receipts, message)
            while len(lanes) < len(whole.lanes):
                event = inbox.get(timeout=WAIT_S)
                assert isinstance(event, Message), event
                lanes += decode_receipt(event.payload).lanes
            assert lanes == whole.lanes and intake.connection == 1
        finally:
            intake.close()
            link.close()
