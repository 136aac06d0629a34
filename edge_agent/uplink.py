"""The uplink: blocks from the buffer to the endpoints that their lanes allow, and control documents both ways.

One thread owns all of it: links, routes (core.routing), order (core.outbox). Others only put something on its inbox.

- A block goes to the endpoint that the router names for its lane, or waits.
- When a link is lost, what it had not acknowledged goes to the lane's next endpoint at once.
- A block leaves the buffer when the lake's receipt names it; without one it is sent again (the lake removes copies).
- `reported` goes to every connected endpoint, retained, when it has changed or the endpoint has connected again.
- `desired` may come from several endpoints, in any order: the updater refuses the older one.

Callbacks run in the uplink's thread: they must not raise, and must not wait.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

from edge_agent.buffer import Buffer, StoredBlock
from edge_agent.contract.errors import ContractError, UnavailableError
from edge_agent.contract.receipt import Receipt, decode_receipt
from edge_agent.contract.state import Reported, encode_state
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.outbox import Outbox, OutboxLimits
from edge_agent.core.routing import Plan, Router, RoutingConfig
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Link, Lost, Message

log = logging.getLogger(__name__)

TICK_S = 0.5
DISCOVER_S = 5.0
PAUSE_S = 1.0
EVENTS_MAX = 1_000
EVENTS_IN_FLIGHT_MAX = 32
INBOX_STEP_MAX = 512
SEND_STEP_MAX = 128
READ_BLOCKS = 16
OVERDUE_STEP_MAX = 64


@dataclass(frozen=True)
class UplinkConfig:
    """The device, its endpoints in order of preference for control, and limits; see RoutingConfig and OutboxLimits."""

    device: str
    endpoints: tuple[EndpointConfig, ...]
    control: tuple[str, ...] | None = None
    failback_s: float = 10.0
    backoff_max_s: float = 30.0
    limits: OutboxLimits = field(default_factory=OutboxLimits)

    @cached_property
    def routing(self) -> RoutingConfig:
        return RoutingConfig(
            endpoints=tuple(e.name for e in self.endpoints),
            control=self.control,
            failback_s=self.failback_s,
            backoff_max_s=self.backoff_max_s,
        )


@dataclass(frozen=True)
class EndpointStatus:
    """`failovers`: how often lanes left this endpoint because its link was lost; `reason`: why it was lost last."""

    connected: bool
    failovers: int
    in_flight_blocks: int
    in_flight_bytes: int
    reason: str


@dataclass(frozen=True)
class LaneStatus:
    """`waiting`: blocks in the buffer; `unreceipted`: those of them that were sent; `held`: why it has no endpoint, or ""."""

    endpoint: str | None
    standby: str | None
    waiting: int
    unreceipted: int
    held: str


@dataclass(frozen=True)
class UplinkStatus:
    """What the uplink does now, and its counters since the start."""

    endpoints: dict[str, EndpointStatus]
    lanes: dict[str, LaneStatus]
    blocks_sent: int
    bytes_sent: int
    blocks_sent_again: int
    blocks_settled: int
    receipts_refused: int
    events_dropped: int


class Uplink:
    """See the module's rules. `start` it once, `stop` it once.

    Args:
        allowed: the endpoints that a lane allows, in order of preference.
        on_desired: takes the bytes of a desired document; called in the uplink's thread.
        on_settled: called after receipts have settled that many blocks.
        clock: seconds, monotonic. `open_link` makes a link that is opened next; both are there for simulations.
    """

    def __init__(
        self,
        config: UplinkConfig,
        buffer: Buffer,
        allowed: Callable[[str], Sequence[str]],
        on_desired: Callable[[bytes], None],
        *,
        on_settled: Callable[[int], None] | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        open_link: Callable[[EndpointConfig, DeviceTopics, SimpleQueue[Any]], Link] = Link,
    ) -> None:
        self._clock, self._open_link = clock, open_link
        self._config, self._buffer, self._allowed, self._on_desired, self._on_settled = config, buffer, allowed, on_desired, on_settled
        self._topics = DeviceTopics(config.device)
        self._endpoints = {e.name: e for e in config.endpoints}
        self._router = Router(config.routing, (rng or random.Random()).uniform)
        self._outbox: Outbox[StoredBlock] = Outbox(config.limits)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._links: dict[str, Link] = {}
        self._connected: dict[str, Link] = {}
        self._plan = Plan({})
        self._here: str | None = None
        self._receipts: list[Receipt] = []
        self._reported: bytes | None = None
        self._reported_to: dict[str, bytes] = {}
        self._events: deque[bytes] = deque()
        self._events_in_flight: dict[tuple[str, int], bytes] = {}
        self._discover = True
        self._discovered_at = self._ticked_at = float("-inf")
        self._stop_by: float | None = None
        self._failovers = dict.fromkeys(self._endpoints, 0)
        self._blocks_sent = self._bytes_sent = self._settled = self._refused = self._events_dropped = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self.failure: BaseException | None = None

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and when the thread has failed (see `failure`)."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def stop(self, flush_s: float = 2.0) -> None:
        """Send what can still be sent, for at most `flush_s`, then close all links."""
        if self._thread.is_alive():
            self._inbox.put(_Stop(flush_s))
            self._thread.join(flush_s + 5.0)

    def offer(self, blocks: Sequence[StoredBlock]) -> None:
        """Send these blocks, just stored, at once."""
        if blocks:
            self._inbox.put(_Stored(blocks))

    def stay(self, lane: str) -> None:
        """The device is in `lane` now: keep its endpoints connected though it may have nothing to send."""
        self._inbox.put(_Here(lane))

    def publish_reported(self, reported: Reported) -> None:
        """Tell the cloud what the device runs."""
        self._inbox.put(reported)

    def publish_event(self, event: bytes) -> None:
        """Tell an operator; kept in memory until acknowledged, at most EVENTS_MAX of them."""
        self._inbox.put(_Event(event))

    def status(self) -> UplinkStatus:
        """What the uplink does now; reads the buffer."""
        waiting = {s.lane: s.blocks for s in self._buffer.lanes()}
        with self._lock:
            lanes = {lane: self._lane_status(lane, waiting.get(lane, 0)) for lane in sorted({*waiting, *self._plan.routes})}
            endpoints = {name: self._endpoint_status(name) for name in self._endpoints}
            return UplinkStatus(
                endpoints=endpoints,
                lanes=lanes,
                blocks_sent=self._blocks_sent,
                bytes_sent=self._bytes_sent,
                blocks_sent_again=self._outbox.sent_again,
                blocks_settled=self._settled,
                receipts_refused=self._refused,
                events_dropped=self._events_dropped,
            )

    def _lane_status(self, lane: str, waiting: int) -> LaneStatus:
        route = self._plan.routes.get(lane)
        unreceipted = self._outbox.unreceipted(lane)
        if route is None:
            return LaneStatus(None, None, waiting, unreceipted, "")
        return LaneStatus(route.endpoint, route.standby, waiting, unreceipted, str(route.held or ""))

    def _endpoint_status(self, name: str) -> EndpointStatus:
        blocks, size = self._outbox.in_flight(name)
        return EndpointStatus(name in self._connected, self._failovers[name], blocks, size, self._router.reason(name))

    def _run(self) -> None:
        try:
            more = False
            while not self._finished():
                events = self._take_events(0.0 if more else self._wait_s())
                try:
                    with self._lock:
                        for event in events:
                            self._apply(event)
                        more = self._step(self._clock())
                except UnavailableError as e:
                    log.warning("buffer unavailable error=%s retry_s=%s", e, PAUSE_S)
                    self._discover = True
                    time.sleep(PAUSE_S)
        except Exception as e:
            self.failure = e
            log.exception("uplink failed")
            raise
        finally:
            for link in self._links.values():
                link.close()

    def _step(self, now: float) -> bool:
        """One round; True if there is more to send right now."""
        self._settle()
        self._look_around(now)
        self._route(now)
        self._publish_control()
        return self._send(now)

    def _wait_s(self) -> float:
        if self._plan.wake_at is None:
            return TICK_S
        return min(TICK_S, max(0.0, self._plan.wake_at - self._clock()))

    def _take_events(self, wait_s: float) -> list[Any]:
        events: list[Any] = []
        try:
            events.append(self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait())
            while len(events) < INBOX_STEP_MAX:
                events.append(self._inbox.get_nowait())
        except Empty:
            pass
        return events

    def _finished(self) -> bool:
        if self._stop_by is None:
            return False
        routed = [lane for lane in self._outbox.busy() if lane in self._endpoint_of()]
        return self._clock() >= self._stop_by or not (routed or self._events or self._events_in_flight)

    def _apply(self, event: Any) -> None:
        match event:
            case _Stored(blocks):
                for block in blocks:
                    self._outbox.offer(block)
                self._discover |= not blocks
            case Connected() | Lost() | Acked() | Message():
                if self._links.get(event.link.name) is event.link:
                    self._apply_link_event(event)
            case Reported():
                self._reported = encode_state(event)
            case _Event(payload):
                self._queue_event(payload)
            case _Here(lane):
                self._here = lane
            case _Stop(flush_s):
                self._stop_by = self._clock() + flush_s
            case _:
                raise TypeError(f"unknown event {event!r}")

    def _apply_link_event(self, event: Connected | Lost | Acked | Message) -> None:
        now, name = self._clock(), event.link.name
        match event:
            case Connected(link):
                log.info("endpoint connected endpoint=%s", name)
                link.subscribe()
                self._connected[name] = link
                self._router.connected(name, now)
            case Lost(link, reason):
                self._lose(link, reason)
            case Acked(_, mid):
                self._events_in_flight.pop((name, mid), None)
                self._outbox.acked(name, mid, now)
            case Message(_, topic, payload):
                self._read_message(topic, payload)

    def _lose(self, link: Link, reason: str) -> None:
        log.warning("endpoint lost endpoint=%s reason=%s", link.name, reason)
        self._forget_link(link)
        self._router.lost(link.name, self._clock(), reason)

    def _forget_link(self, link: Link) -> None:
        link.close()
        del self._links[link.name]
        self._connected.pop(link.name, None)
        self._reported_to.pop(link.name, None)
        self._outbox.lost(link.name)
        for key in [key for key in self._events_in_flight if key[0] == link.name]:
            self._events.appendleft(self._events_in_flight.pop(key))

    def _read_message(self, topic: str, payload: bytes) -> None:
        if topic == self._topics.desired:
            if payload:  # an empty one only clears what was retained
                self._on_desired(payload)
            return
        try:
            receipt = decode_receipt(payload)
        except ContractError as e:
            self._refused += 1
            log.warning("receipt refused error=%s", e)
            return
        if receipt.device == self._config.device and receipt.epoch == self._buffer.epoch:
            self._receipts.append(receipt)

    def _settle(self) -> None:
        """Apply all receipts that have come in, in one transaction of the buffer."""
        if not self._receipts:
            return
        lanes = [lane for receipt in self._receipts for lane in receipt.lanes]
        settled = self._buffer.settle(Receipt(device=self._config.device, epoch=self._buffer.epoch, lanes=lanes))
        self._receipts.clear()
        for lane in lanes:
            self._outbox.settle(lane.lane, lane.settles())
        self._settled += settled
        if settled and self._on_settled is not None:
            self._on_settled(settled)

    def _look_around(self, now: float) -> None:
        if self._discover or now - self._discovered_at >= DISCOVER_S:
            self._outbox.discover({s.lane: s.blocks for s in self._buffer.lanes()})
            self._discover, self._discovered_at = False, now
        if now - self._ticked_at >= TICK_S:
            self._ticked_at = now
            self._read_overdue(now)
            for name in self._outbox.stuck(now):
                self._links[name].abort(f"no PUBACK for {self._config.limits.puback_timeout_s:g} s")

    def _read_overdue(self, now: float) -> None:
        for lane, sequence in self._outbox.due(now, OVERDUE_STEP_MAX):
            found = self._buffer.pending(lane, sequence - 1, 1)
            if found and found[0].sequence == sequence:
                self._outbox.again(found[0])
            else:
                self._outbox.forget(lane, sequence)

    def _route(self, now: float) -> None:
        lanes = dict.fromkeys(self._outbox.busy())
        if self._here is not None:
            lanes[self._here] = None
        self._router.use({lane: self._allowed(lane) for lane in lanes})
        self._plan = plan = self._router.step(now)
        for move in plan.moves:
            log.info("lane moved lane=%s from=%s to=%s reason=%s", move.lane, move.source, move.target, move.reason)
            if move.source is not None and move.source not in self._connected:
                self._failovers[move.source] += 1
        for name in plan.close:
            log.info("endpoint closed endpoint=%s", name)
            self._forget_link(self._links[name])
        for name in plan.open:
            self._links[name] = link = self._open_link(self._endpoints[name], self._topics, self._inbox)
            link.open()

    def _endpoint_of(self) -> dict[str, str]:
        return {lane: r.endpoint for lane, r in self._plan.routes.items() if r.endpoint is not None and r.endpoint in self._connected}

    def _send(self, now: float) -> bool:
        """Send blocks while there is room, at most SEND_STEP_MAX; True if there may be more."""
        routes = self._endpoint_of()
        for _ in range(SEND_STEP_MAX):
            for lane, cursor in self._outbox.wants(routes):
                blocks = self._buffer.pending(lane, cursor, READ_BLOCKS)
                self._outbox.load(lane, blocks, complete=len(blocks) < READ_BLOCKS)
            choice = self._outbox.take(routes)
            if choice is None:
                return False
            block, endpoint = choice
            try:
                mid = self._connected[endpoint].publish(self._topics.up(block.lane, block.stream), block.block)
            except UnavailableError as e:
                self._outbox.put_back(block)
                self._lose(self._links[endpoint], str(e))
                return True
            self._outbox.sent(block, endpoint, mid, now)
            self._blocks_sent += 1
            self._bytes_sent += len(block.block)
        return True

    def _publish_control(self) -> None:
        for name, link in list(self._connected.items()):
            try:
                self._publish_reported_to(name, link)
                self._publish_events_to(name, link)
            except UnavailableError as e:
                self._lose(link, str(e))

    def _publish_reported_to(self, name: str, link: Link) -> None:
        if self._reported is not None and self._reported_to.get(name) != self._reported:
            link.publish(self._topics.reported, self._reported, retain=True)
            self._reported_to[name] = self._reported

    def _publish_events_to(self, name: str, link: Link) -> None:
        while self._events and len(self._events_in_flight) < EVENTS_IN_FLIGHT_MAX:
            mid = link.publish(self._topics.events, self._events[0])
            self._events_in_flight[(name, mid)] = self._events.popleft()

    def _queue_event(self, payload: bytes) -> None:
        self._events.append(payload)
        if len(self._events) > EVENTS_MAX:
            self._events.popleft()
            self._events_dropped += 1


@dataclass(frozen=True)
class _Stored:
    blocks: Sequence[StoredBlock]


@dataclass(frozen=True)
class _Here:
    lane: str


@dataclass(frozen=True)
class _Event:
    payload: bytes


@dataclass(frozen=True)
class _Stop:
    flush_s: float
