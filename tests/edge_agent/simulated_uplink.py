"""A world in which the real uplink runs without clock, sockets and disk: endpoints that fail in every way, one seed, no waiting.

    world = World(seed, {"atlantic": ("eu", "us")}, ("eu", "us"))
    world.endpoints["eu"].mode = Mode.BLACK_HOLE
    world.run(10.0)

- TCP keeps its promises: what is sent arrives in order or not at all; a lost packet comes 200 ms later, twice that when lost again.
- The store stands for the buffer: what it is told to settle is gone.
- Every turn of the uplink is checked against the rules in `_check`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from queue import SimpleQueue
from typing import Any, NamedTuple

from edge_agent.buffer import StoredBlock
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import DeviceTopics, parse
from edge_agent.core.outbox import OutboxLimits
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Lost, Message
from edge_agent.uplink import Uplink, UplinkConfig

EPOCH = "epoch"
RTO_S = 0.2
TURNS_AT_ONCE_MAX = 500


class Mode(StrEnum):
    """How an endpoint behaves."""

    UP = "up"
    DEAD = "dead"  # connections are reset, attempts refused
    BLACK_HOLE = "black_hole"  # nothing passes
    KICKING = "kicking"  # accepts, and ends the connection soon after
    DEAF = "deaf"  # takes messages, answers do not come back


@dataclass
class Endpoint:
    """One broker and the way to it. `bytes_per_s` counts in the direction of the broker."""

    mode: Mode = Mode.UP
    round_trip_s: float = 0.002
    loss: float = 0.0
    bytes_per_s: float = 10e6
    links: list[SimLink] = field(default_factory=list)
    attempts: list[float] = field(default_factory=list)
    blocks: int = 0


class Waiting(NamedTuple):
    lane: str
    blocks: int


class Store:
    """The buffer's verbs that the uplink uses, in memory."""

    epoch = EPOCH

    def __init__(self) -> None:
        self.blocks: dict[str, dict[int, StoredBlock]] = defaultdict(dict)
        self.last: dict[str, int] = defaultdict(int)

    def append(self, lane: str, size: int) -> StoredBlock:
        self.last[lane] += 1
        block = StoredBlock(lane, self.last[lane], "pump", 1, f"{self.last[lane]:08}".encode().ljust(size, b"x"))
        self.blocks[lane][block.sequence] = block
        return block

    def pending(self, lane: str, after_sequence: int, limit: int) -> list[StoredBlock]:
        return list(itertools.islice((b for n, b in self.blocks[lane].items() if n > after_sequence), limit))

    def lanes(self) -> list[Waiting]:
        return [Waiting(lane, len(blocks)) for lane, blocks in self.blocks.items() if blocks]

    def settle(self, receipt: Receipt) -> int:
        before = sum(map(len, self.blocks.values()))
        for lane in receipt.lanes:
            settled = lane.settles()
            for n in [n for n in self.blocks[lane.lane] if n in settled]:
                del self.blocks[lane.lane][n]
        return before - sum(map(len, self.blocks.values()))


class World:
    """One device with `lanes` (the endpoints each allows), endpoints and a lake."""

    def __init__(
        self, seed: int, lanes: dict[str, tuple[str, ...]], endpoints: Sequence[str], *, failback_s: float = 2.0, **changes: Any
    ) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0
        self.lanes = lanes
        self.endpoints = {name: Endpoint() for name in endpoints}
        self.store = Store()
        self.lake: dict[str, SequenceSet] = defaultdict(SequenceSet)
        self.arrived_at: dict[tuple[str, int], float] = {}
        self.stored_at: dict[tuple[str, int], float] = {}
        self.moves: list[tuple[float, str, dict[str, str]]] = []
        self.turns = 0
        self.limits = OutboxLimits(receipt_timeout_s=5.0, **changes)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._turn_at = self.now
        self.uplink = Uplink(
            UplinkConfig(
                "plane-01", tuple(EndpointConfig(name, "sim", 1) for name in endpoints), failback_s=failback_s, limits=self.limits
            ),
            self.store,  # type: ignore[arg-type]
            lambda lane: self.lanes[lane],
            lambda document: None,
            on_event=lambda event, fields: self.moves.append((self.now, event, dict(fields))),
            rng=random.Random(seed + 1),
            clock=lambda: self.now,
            open_link=lambda config, topics, inbox: SimLink(self, config, topics, inbox),  # type: ignore[arg-type,return-value]
        )

    def at(self, time: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._order), action))

    def put(self, lane: str, size: int, *, offer: bool = True) -> None:
        block = self.store.append(lane, size)
        self.stored_at[(lane, block.sequence)] = self.now
        if offer:
            self.uplink.offer([block])
            self._turn_at = self.now  # what comes into the inbox wakes the uplink

    def feed(self, lane: str, every_s: float, size: int, until: float) -> None:
        """Store a block every `every_s` until then."""
        if self.now < until:
            self.put(lane, size)
            self.at(self.now + every_s, lambda: self.feed(lane, every_s, size, until))

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end, at_once = self.now + seconds, 0
        while True:
            next_event = self._events[0][0] if self._events else end
            step_to = min(self._turn_at, next_event, end)
            at_once = at_once + 1 if step_to <= self.now else 0
            assert at_once < TURNS_AT_ONCE_MAX, "the uplink spins"
            self.now = max(self.now, step_to)
            if self.now >= end:
                return
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            self._turn_at = self.now + self.uplink.turn()
            self.turns += 1
            self._check()

    def kill(self, name: str) -> None:
        """The broker dies: its connections are reset."""
        endpoint = self.endpoints[name]
        endpoint.mode = Mode.DEAD
        for link in list(endpoint.links):
            link.end("reset")

    def waiting(self) -> int:
        return sum(map(len, self.store.blocks.values()))

    def on_links_s(self) -> float:
        """How long it takes until the links have delivered what they have taken; they took it at the speed that they had then."""
        return max((link.busy_s for site in self.endpoints.values() for link in site.links), default=0.0)

    def arrived(self, lane: str, sequence: int, link: SimLink) -> None:
        """A block has reached a broker; the lake commits it a little later and tells the device over this broker."""
        assert link.name in self.lanes[lane], f"lane {lane} reached {link.name}"
        self.endpoints[link.name].blocks += 1
        self.arrived_at.setdefault((lane, sequence), self.now)
        self.at(self.now + self.rng.uniform(0.005, 0.05), lambda: self._commit(lane, sequence, link.name))

    def _commit(self, lane: str, sequence: int, name: str) -> None:
        settled = self.lake[lane]
        settled.add(sequence)
        receipt = LaneReceipt(lane=lane, cumulative=settled.cumulative, ranges=settled.ranges[:1000])
        payload = encode_receipt(Receipt(device="plane-01", epoch=EPOCH, lanes=[receipt]))
        for link in self.endpoints[name].links:
            link.send_down(lambda link=link: Message(link, DeviceTopics("plane-01").receipts, payload))  # type: ignore[misc]

    def _check(self) -> None:
        sending, limits = self.uplink._sending, self.limits
        plan, outbox, connected = sending.plan, sending.outbox, sending.connected
        for lane, route in plan.routes.items():
            usable = [name for name in self.lanes[lane] if name in connected]
            assert route.endpoint is None or route.endpoint in self.lanes[lane]
            assert route.standby is None or (route.standby in self.lanes[lane] and route.standby != route.endpoint)
            assert route.endpoint is not None or not usable, f"{lane} has no endpoint though {usable} are connected"
        assert outbox.hedging.bytes - outbox.hedging.needed_bytes <= limits.hedge_burst_bytes + limits.hedge_share_max * sending.bytes_sent
        for name in self.endpoints:
            blocks, size = outbox.pipes.in_flight(name)
            assert blocks <= limits.inflight_blocks_max + 64
            assert size <= limits.inflight_bytes_max + 1_000_000


class SimLink:
    """What mqtt.link.Link is to the uplink."""

    def __init__(self, world: World, config: EndpointConfig, topics: DeviceTopics, inbox: SimpleQueue[Any]) -> None:
        self.endpoint, self._world, self._inbox = config, world, inbox
        self._site = world.endpoints[config.name]
        self._mids = itertools.count(1)
        self._ended = False
        self._up_free_at = self._up_last = self._down_last = world.now

    @property
    def name(self) -> str:
        return self.endpoint.name

    @property
    def busy_s(self) -> float:
        return max(0.0, self._up_last - self._world.now)

    def open(self) -> None:
        world, site = self._world, self._site
        site.attempts.append(world.now)
        if site.mode is Mode.DEAD:
            world.at(world.now + 0.001, lambda: self.end("refused"))
        elif site.mode is not Mode.BLACK_HOLE:
            world.at(world.now + 3 * site.round_trip_s, self._accept)

    def subscribe(self) -> None:
        pass

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        if self._ended:
            raise UnavailableError(f"endpoint {self.name}: gone")
        mid, lane = next(self._mids), parse(topic).lane
        sequence = int(payload[:8]) if lane else 0
        site, world = self._site, self._world
        self._up_free_at = max(self._up_free_at, world.now) + (len(payload) + 60) / site.bytes_per_s
        self._up_last = max(self._up_last, self._up_free_at + site.round_trip_s / 2 + self._retransmissions())
        world.at(self._up_last, lambda: self._pass(lambda: self._arrive(mid, lane, sequence), 1))
        return mid

    def close(self) -> None:
        self.end("closed")

    def abort(self, reason: str) -> None:
        self.end(reason)

    def end(self, reason: str) -> None:
        if not self._ended:
            self._ended = True
            self._inbox.put(Lost(self, reason))  # type: ignore[arg-type]
            if self in self._site.links:
                self._site.links.remove(self)

    def send_down(self, event: Callable[[], Any]) -> None:
        """The broker sends; `event` is what the device gets."""
        site, world = self._site, self._world
        self._down_last = max(self._down_last, world.now + site.round_trip_s / 2 + self._retransmissions())
        world.at(self._down_last, lambda: self._pass(lambda: self._inbox.put(event()), 1, down=True))

    def _accept(self) -> None:
        if self._ended or self._site.mode in (Mode.DEAD, Mode.BLACK_HOLE):
            return
        self._site.links.append(self)
        self._inbox.put(Connected(self))  # type: ignore[arg-type]
        if self._site.mode is Mode.KICKING:
            self._world.at(self._world.now + self._world.rng.uniform(0.0, 0.3), lambda: self.end("kicked"))

    def _arrive(self, mid: int, lane: str, sequence: int) -> None:
        if lane:
            self._world.arrived(lane, sequence, self)
        self.send_down(lambda: Acked(self, mid))  # type: ignore[arg-type]

    def _pass(self, action: Callable[[], None], attempt: int, *, down: bool = False) -> None:
        """Something arrives, if the way is open; otherwise TCP tries again, later and later."""
        if self._ended:
            return
        mode = self._site.mode
        if mode is Mode.BLACK_HOLE or (mode is Mode.DEAF and down):
            self._world.at(self._world.now + RTO_S * 2 ** min(attempt, 6), lambda: self._pass(action, attempt + 1, down=down))
        else:
            action()

    def _retransmissions(self) -> float:
        delay_s, rto_s = 0.0, RTO_S + self._site.round_trip_s
        while self._site.loss and self._world.rng.random() < self._site.loss:
            delay_s, rto_s = delay_s + rto_s, 2 * rto_s
        return delay_s
