"""Two regions as the device sees them: brokers that die, go silent and forget, ingest behind them, and the lake.

- TCP keeps its promises: what is sent on one link arrives in order or not at all. Everything behind the broker may come late, twice and
  in any order, and what a broker held is gone when it is killed, acknowledged or not.
- The lake knows each block by its name. The same name with other bytes is a failure, and so is a block where it may not be.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field
from enum import StrEnum
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from edge_agent.contract.block import BlockHeader, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import DeviceTopics, Kind, parse
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Lost, Message

if TYPE_CHECKING:
    from tests.simulators.world import World

DEVICE = "plane-01"
RETRY_S = 0.2
RECEIPT_RANGES_MAX = 1_000


class Mode(StrEnum):
    """How a region behaves towards the device."""

    UP = "up"
    DEAD = "dead"  # attempts are refused
    BLACK_HOLE = "black_hole"  # nothing passes, nothing ends
    KICKING = "kicking"  # accepts, and ends the connection soon
    DEAF = "deaf"  # takes messages; answers do not come back


@dataclass
class Region:
    """A broker and the ingest behind it. `life` rises when the broker is killed: what it held then never arrives."""

    name: str
    mode: Mode = Mode.UP
    round_trip_s: float = 0.002
    life: int = 0
    links: list[SimLink] = field(default_factory=list)
    receipts_lost: float = 0.0
    delay_s: float = 0.05
    twice: float = 0.0


class Lake:
    """What the cloud has committed, by name of the block."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, str, str, int], tuple[BlockHeader, Table, bytes]] = {}
        self.settled: dict[tuple[str, str], SequenceSet] = defaultdict(SequenceSet)
        self.copies = self.refused = 0

    def commit(self, payload: bytes, world: World, region: str) -> BlockHeader | None:
        """Store a block once; None if this region may not hold it any more."""
        header, table = decode_block(payload)
        if region not in world.zones.endpoints(header.lane):
            self.refused += 1  # the policy changed while it was under way
            return None
        known = self.blocks.get(header.identity)
        assert known is None or known[2] == payload, world.story(f"two blocks have one name: {known[0]} and {header}")
        self.copies += known is not None
        self.blocks[header.identity] = (header, table, payload)
        self.settled[(header.epoch, header.lane)].add(header.sequence)
        return header


class Cloud:
    """Regions and the lake."""

    def __init__(self, world: World, names: tuple[str, ...]) -> None:
        self.world, self.lake = world, Lake()
        self.regions = {name: Region(name) for name in names}

    def kill(self, name: str) -> None:
        """The broker dies and forgets."""
        region = self.regions[name]
        region.mode, region.life = Mode.DEAD, region.life + 1
        for link in list(region.links):
            link.end("reset")

    def arrived(self, region: Region, topic: str, payload: bytes) -> None:
        """A broker has taken a message from the device; ingest gets it a little later."""
        if parse(topic).kind is not Kind.UP:
            return
        life = region.life
        for _ in range(1 + (self.world.rng.random() < region.twice)):
            delay_s = self.world.rng.uniform(0.002, region.delay_s)
            self.world.after(delay_s, lambda: self._ingest(region, life, topic, payload))

    def _ingest(self, region: Region, life: int, topic: str, payload: bytes) -> None:
        if region.life != life:
            return
        header = self.lake.commit(payload, self.world, region.name)
        if header is None:
            return
        where = parse(topic)
        assert (where.device, where.lane, where.stream) == (header.device, header.lane, header.stream)
        self.world.check_place(header, self.lake.blocks[header.identity][1], region.name)
        self.world.after(self.world.rng.uniform(0.0, region.delay_s), lambda: self._receipt(region, header))

    def _receipt(self, region: Region, header: BlockHeader) -> None:
        settled = self.lake.settled[(header.epoch, header.lane)]
        receipt = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges[:RECEIPT_RANGES_MAX])
        payload = encode_receipt(Receipt(device=DEVICE, epoch=header.epoch, lanes=[receipt]))
        for _ in range(1 + (self.world.rng.random() < region.twice)):
            if self.world.rng.random() < region.receipts_lost:
                continue
            for link in list(region.links):
                link.send_down(Message(link, DeviceTopics(DEVICE).receipts, payload))  # type: ignore[arg-type]


class SimLink:
    """What mqtt.link.Link is to the uplink."""

    def __init__(self, world: World, config: EndpointConfig, inbox: SimpleQueue[Any]) -> None:
        self.endpoint, self._world, self._inbox = config, world, inbox
        self._region = world.cloud.regions[config.name]
        self._mids = itertools.count(1)
        self._ended = False
        self._up_at = self._down_at = world.now

    @property
    def name(self) -> str:
        return self.endpoint.name

    def open(self) -> None:
        if self._region.mode is Mode.DEAD:
            self._world.after(0.001, lambda: self.end("refused"))
        elif self._region.mode is not Mode.BLACK_HOLE:
            self._world.after(3 * self._region.round_trip_s, self._accept)

    def subscribe(self) -> None:
        pass

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        if self._ended:
            raise UnavailableError(f"endpoint {self.name}: gone")
        where = parse(topic)
        if where.kind is Kind.UP:
            assert self.name in self._world.zones.endpoints(where.lane), f"lane {where.lane} sent to {self.name}"
        mid = next(self._mids)
        self._up_at = max(self._up_at, self._world.now) + len(payload) / 10e6
        self._world.after(self._up_at - self._world.now + self._region.round_trip_s / 2, lambda: self._pass_up(topic, payload, mid, 1))
        return mid

    def close(self) -> None:
        self.end("closed")

    def abort(self, reason: str) -> None:
        self.end(reason)

    def end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._inbox.put(Lost(self, reason))  # type: ignore[arg-type]
            if self in self._region.links:
                self._region.links.remove(self)

    def send_down(self, event: Any, attempt: int = 1) -> None:
        """The broker sends; `event` is what the device gets, after everything sent before it."""
        self._down_at = max(self._down_at, self._world.now + self._region.round_trip_s / 2) + 1e-6
        self._world.after(self._down_at - self._world.now, lambda: self._pass_down(event, attempt))

    def _accept(self) -> None:
        if self._ended or self._region.mode in (Mode.DEAD, Mode.BLACK_HOLE):
            return
        self._region.links.append(self)
        self._inbox.put(Connected(self))  # type: ignore[arg-type]
        if self._region.mode is Mode.KICKING:
            self._world.after(self._world.rng.uniform(0.0, 0.3), lambda: self.end("kicked"))

    def _pass_up(self, topic: str, payload: bytes, mid: int, attempt: int) -> None:
        if self._ended:
            return
        if self._region.mode is Mode.BLACK_HOLE:
            self._world.after(RETRY_S * 2 ** min(attempt, 6), lambda: self._pass_up(topic, payload, mid, attempt + 1))
            return
        self._world.cloud.arrived(self._region, topic, payload)
        self.send_down(Acked(self, mid))  # type: ignore[arg-type]

    def _pass_down(self, event: Any, attempt: int) -> None:
        if self._ended:
            return
        if self._region.mode in (Mode.BLACK_HOLE, Mode.DEAF):
            self._world.after(RETRY_S * 2 ** min(attempt, 6), lambda: self._pass_down(event, attempt + 1))
        else:
            self._inbox.put(event)
