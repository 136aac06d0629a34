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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.contract.block import BlockHeader, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import ALL_BLOCKS, DeviceTopics, parse
from tests.certificates import Identity
from tests.faults.network import Place

READING = "n"
RECONNECT_S = (0.05, 0.2)
KEEPALIVE_S = 60

Confirm = Callable[[Receipt], None]
Store = Callable[[BlockHeader, Table, Confirm], None]
"""Takes a block, and confirms it when it is stored."""


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

    def arrived(self, endpoint: str, header: BlockHeader, now: float) -> None:
        """A block came from an endpoint."""
        with self._lock:
            self.arrivals.append(Arrival(now, endpoint, header.identity))
            self.copies += header.identity in self._blocks
            self._blocks.add(header.identity)

    def store(self, header: BlockHeader, table: Table, now: float) -> Receipt:
        """Store a block unless it is there already."""
        with self._lock:
            settled = self._settled.setdefault((header.epoch, header.lane), SequenceSet())
            if settled.add(header.sequence):
                self._commit(numbers_of(table), now)
            lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
        return Receipt(device=header.device, epoch=header.epoch, lanes=[lane])

    def stored(self, tables: list[Table], now: float) -> None:
        """Blocks were stored elsewhere, once."""
        with self._lock:
            for table in tables:
                self._commit(numbers_of(table), now)

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

    def __init__(
        self, lake: Lake, endpoint: str, place: Place, port: int, identity: Identity, bridges: frozenset[str], store: Store | None = None
    ) -> None:
        self._lake, self._endpoint, self._bridges = lake, endpoint, bridges
        self._store: Store = store or self._store_at_once
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
            header, table = decode_block(payload)
            self._lake.arrived(self._endpoint, header, now)
            self._store(header, table, self.confirm)

    def confirm(self, receipt: Receipt) -> None:
        """Send a receipt to its device."""
        self._client.publish(DeviceTopics(receipt.device).receipts, encode_receipt(receipt), qos=1)

    def _store_at_once(self, header: BlockHeader, table: Table, confirm: Confirm) -> None:
        confirm(self._lake.store(header, table, time.monotonic()))


def numbers_of(table: Table) -> list[int]:
    """The numbers of a block's readings; none if it holds something else."""
    numbers = table.get(READING)
    return [int(n) for n in numbers.tolist()] if isinstance(numbers, np.ndarray) else []


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
