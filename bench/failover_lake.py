"""The receiving side of the failover benchmark: one ingest per endpoint, one lake, and what arrived when.

- An ingest is a subscriber in its broker's own place, with its own certificate. The broker forwards a block to it and acknowledges it to
  the device in the same turn of its loop, so the time of arrival here stands for the time of the PUBACK (`Site.puback_offset` measures it).
- The lake takes a block once, by its name; what comes again is a copy. A receipt goes out by the broker that brought the block.
- Readings carry a number of their own (`n`): that is how the lake is checked. Times are seconds of the monotonic clock.
- Messages of a Mosquitto bridge are single readings without a block; a lake can only count them.
"""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract.block import decode_block
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import ALL_BLOCKS, DeviceTopics, parse
from tests.certificates import Identity
from tests.faults.network import Place

READING = "n"
RECONNECT_S = (0.05, 0.2)
KEEPALIVE_S = 60


@dataclass(frozen=True)
class Arrival:
    """A message that an endpoint forwarded; `name` is the block's, or the number of a bridge's reading."""

    at: float
    endpoint: str
    name: tuple[str, str, str, int] | int


@dataclass
class Lake:
    """Everything that arrived.

    `committed` says when each reading was stored first; `rows` counts rows stored, `copies` blocks that came again.
    """

    arrivals: list[Arrival] = field(default_factory=list)
    commits: list[float] = field(default_factory=list)
    committed: dict[int, float] = field(default_factory=dict)
    rows: int = 0
    copies: int = 0
    _blocks: set[Any] = field(default_factory=set)
    _settled: dict[tuple[str, str], SequenceSet] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take_block(self, endpoint: str, payload: bytes, now: float) -> bytes:
        """Store a block unless it is there already; returns the receipt."""
        header, table = decode_block(payload)
        with self._lock:
            self.arrivals.append(Arrival(now, endpoint, header.identity))
            if header.identity in self._blocks:
                self.copies += 1
            else:
                self._blocks.add(header.identity)
                numbers = table[READING] if READING in table else np.empty(0, np.int64)
                assert isinstance(numbers, np.ndarray)
                self._commit(numbers.tolist(), now)
            settled = self._settled.setdefault((header.epoch, header.lane), SequenceSet())
            settled.add(header.sequence)
            lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
        return encode_receipt(Receipt(device=header.device, epoch=header.epoch, lanes=[lane]))

    def take_reading(self, endpoint: str, payload: bytes, now: float) -> None:
        """Store a reading that came without a block: each time it comes."""
        number = int(msgspec.json.decode(payload)[READING])
        with self._lock:
            self.arrivals.append(Arrival(now, endpoint, number))
            self._commit([number], now)

    def forget(self) -> None:
        """Begin again, for another forwarder's readings."""
        with self._lock:
            self.committed.clear()
            self.arrivals.clear()
            self.commits.clear()
            self.rows = 0

    def missing(self, numbers: range) -> int:
        """How many of the readings are not stored."""
        with self._lock:
            return sum(n not in self.committed for n in numbers)

    @property
    def duplicates(self) -> int:
        """Rows stored more than once."""
        with self._lock:
            return self.rows - len(self.committed)

    def _commit(self, numbers: list[int], now: float) -> None:
        self.rows += len(numbers)
        self.commits.append(now)
        for n in numbers:
            self.committed.setdefault(n, now)


class Ingest:
    """A subscriber in the place of its broker; it connects again by itself."""

    def __init__(self, lake: Lake, endpoint: str, place: Place, port: int, identity: Identity, bridges: frozenset[str]) -> None:
        self._lake, self._endpoint, self._bridges = lake, endpoint, bridges
        self.ready = threading.Event()
        self._client = client = new_client(identity)
        client.on_connect = self._on_connect
        client.on_subscribe = lambda *_: self.ready.set()
        client.on_disconnect = lambda *_: self.ready.clear()
        client.on_message = self._on_message
        with place.entered():
            client.connect(place.address, port, KEEPALIVE_S)
            client.loop_start()

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Client, *_: object) -> None:
        client.subscribe(ALL_BLOCKS, qos=1)

    def _on_message(self, client: Client, _data: object, message: MQTTMessage) -> None:
        now, topic, payload = time.monotonic(), parse(message.topic), bytes(message.payload)
        if topic.stream == PROBE:
            return
        if topic.device in self._bridges:
            self._lake.take_reading(self._endpoint, payload, now)
        else:
            receipt = self._lake.take_block(self._endpoint, payload, now)
            client.publish(DeviceTopics(topic.device).receipts, receipt, qos=1)


PROBE = "probe"
"""A stream of no meaning: what comes in it is only timed."""


def new_client(identity: Identity) -> Client:
    """A client that shows its certificate and connects again by itself."""
    client = Client(CallbackAPIVersion.VERSION2, identity.name, clean_session=False)
    client.reconnect_delay_set(*RECONNECT_S)  # type: ignore[arg-type]
    context = ssl.create_default_context(cafile=identity.ca)
    context.load_cert_chain(identity.certificate, identity.key)
    client.tls_set_context(context)
    return client
