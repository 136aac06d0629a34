"""The uplink: blocks from the buffer to the endpoints that their lanes allow, and control documents both ways.

One thread owns all of it: links, routes (core.routing), order and deadlines (core.outbox). Others only put something on its inbox:
callers, the links' callbacks, and the thread that reads and writes the buffer (backlog.py). So it never waits but for its inbox, and
no longer than until the next deadline.

- A block goes to the endpoint that the router names for its lane, or waits.
- A block that is late at its endpoint also goes to the lane's standby; the lake removes the copy. An endpoint that stays silent while
  another one answers is suspected and left; the connection stays, and is given up after a longer silence.
- An idle connection is asked by a heartbeat (an empty publish), the standby's too: what does not answer is no standby.
- When a link is lost, what it had not acknowledged goes to the lane's next endpoint at once.
- A block leaves the buffer when the lake's receipt names it; without one it is sent again (the lake removes copies). A receipt counts
  only from an endpoint that the lane allows: a region cannot make the device forget what it may not hold.
- `desired` may come from several endpoints, in any order: the updater refuses the older one.

Callbacks run in the uplink's thread: they must not raise, and must not wait.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from edge_agent.backlog import Backlog, Counted, Failed, Found, Loaded, Settled
from edge_agent.buffer import Buffer, StoredBlock
from edge_agent.contract.errors import ContractError, UnavailableError
from edge_agent.contract.receipt import decode_receipt
from edge_agent.contract.state import Reported, encode_state
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.outbox import Hedge, Outbox, OutboxLimits
from edge_agent.core.routing import Move, Plan, Router, RoutingConfig
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Link, Lost, Message
from edge_agent.notices import Notices
from edge_agent.uplink_status import EndpointStatus, LaneStatus, UplinkStatus

log = logging.getLogger(__name__)

TICK_S = 0.5
DISCOVER_S = 5.0
CLOSE_S = 3.0
STALL_S = 0.05  # this process counts as stalled when it is later than this
HELD_S = 5.0
STORM_S = 60.0  # at most one event about hedges in this time
INBOX_STEP_MAX = 512
SEND_STEP_MAX = 128
OVERDUE_STEP_MAX = 64

LinkMaker = Callable[[EndpointConfig, DeviceTopics, "SimpleQueue[Any]"], Link]


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


class Uplink:
    """See the module's rules. `start` it once, `stop` it once.

    Args:
        allowed: the endpoints that a lane allows, in order of preference.
        on_desired: takes the bytes of a desired document; called in the uplink's thread.
        on_settled: called after receipts have settled that many blocks.
        on_event: takes what an operator should know: the name of the event, and its fields.
        clock: seconds, monotonic.
        open_link: makes a link that is opened next. A simulation gives both and calls `turn` instead of `start`.
    """

    def __init__(
        self,
        config: UplinkConfig,
        buffer: Buffer,
        allowed: Callable[[str], Sequence[str]],
        on_desired: Callable[[bytes], None],
        *,
        on_settled: Callable[[int], None] | None = None,
        on_event: Callable[[str, Mapping[str, str]], None] | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        open_link: LinkMaker = Link,
    ) -> None:
        self._config, self._buffer, self._allowed = config, buffer, allowed
        self._on_desired, self._on_settled, self._on_event = on_desired, on_settled, on_event
        self._clock, self._open_link = clock, open_link
        self._topics = DeviceTopics(config.device)
        self._endpoints = {e.name: e for e in config.endpoints}
        self._router = Router(config.routing, (rng or random.Random()).uniform)
        self._outbox: Outbox[StoredBlock] = Outbox(config.limits)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._backlog = Backlog(buffer, config.device, self._inbox.put)
        self._notices = Notices(self._topics)
        self._links: dict[str, Link] = {}
        self._connected: dict[str, Link] = {}
        self._plan = Plan({})
        self._here: str | None = None
        self._reading: set[str] = set()
        self._discover_at = self._tick_at = self._wake_at = float("-inf")
        self._held_since: dict[str, float] = {}
        self._storm_at, self._stormed = float("-inf"), 0
        self._stop_by: float | None = None
        self._failovers: Counter[str] = Counter()
        self._lane_failovers: Counter[str] = Counter()
        self._lane_reasons: dict[str, str] = {}
        self._blocks_sent = self._bytes_sent = self._settled = self._refused = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="uplink", daemon=True)
        self.failure: BaseException | None = None

    @property
    def alive(self) -> bool:
        """False before `start`, after `stop`, and when the thread has failed (see `failure`)."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._backlog.start()
        self._thread.start()

    def stop(self, flush_s: float = 2.0) -> None:
        """Send what can still be sent, for at most `flush_s`, then close all links."""
        if self._thread.is_alive():
            self._inbox.put(_Stop(flush_s))
            self._thread.join(flush_s + 2 * CLOSE_S)

    def turn(self) -> float:
        """One round without waiting, for a simulation; returns for how long nothing is to be done unless something comes in."""
        self._backlog.work()
        self._round(self._take_events(0.0))
        self._backlog.work()
        return 0.0 if not self._inbox.empty() else max(0.0, self._wake_at - self._clock())

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
        """Tell an operator; kept in memory until acknowledged, within limits (notices.py)."""
        self._inbox.put(_Event(event))

    def status(self) -> UplinkStatus:
        """What the uplink does now; reads the buffer."""
        waiting = {s.lane: s.blocks for s in self._buffer.lanes()}
        with self._lock:
            outbox = self._outbox
            return UplinkStatus(
                endpoints={name: self._endpoint_status(name) for name in self._endpoints},
                lanes={lane: self._lane_status(lane, waiting.get(lane, 0)) for lane in sorted({*waiting, *self._plan.routes})},
                blocks_sent=self._blocks_sent,
                bytes_sent=self._bytes_sent,
                blocks_sent_again=outbox.sent_again,
                blocks_settled=self._settled,
                receipts_refused=self._refused,
                events_dropped=self._notices.dropped,
                hedges=outbox.hedges,
                hedges_denied=outbox.hedges_denied,
                duplicate_bytes=outbox.duplicate_bytes,
            )

    def _lane_status(self, lane: str, waiting: int) -> LaneStatus:
        route = self._plan.routes.get(lane)
        unreceipted, reason = self._outbox.unreceipted(lane), self._lane_reasons.get(lane, "")
        if route is None:
            return LaneStatus(None, None, waiting, unreceipted, "", failovers=self._lane_failovers[lane], reason=reason)
        times = self._times_ms(route.endpoint)
        held = str(route.held or "")
        return LaneStatus(route.endpoint, route.standby, waiting, unreceipted, held, *times, self._lane_failovers[lane], reason)

    def _endpoint_status(self, name: str) -> EndpointStatus:
        return EndpointStatus(
            name in self._connected,
            self._router.suspected(name),
            self._failovers[name],
            *self._outbox.in_flight(name),
            *self._times_ms(name),
            self._router.reason(name),
        )

    def _times_ms(self, endpoint: str | None) -> tuple[float | None, float | None]:
        """Round trip and deadline of an endpoint that has answered before."""
        if endpoint is None or (srtt_s := (trips := self._outbox.trips(endpoint)).srtt_s) is None:
            return None, None
        return round(srtt_s * 1e3, 2), round(trips.deadline_s(0) * 1e3, 2)

    # The loop.

    def _run(self) -> None:
        try:
            while not self._finished():
                self._round(self._take_events(max(0.0, self._wake_at - self._clock())))
        except Exception as e:
            self.failure = e
            log.exception("uplink failed")
            raise
        finally:
            for link in self._links.values():
                link.close()
            self._backlog.close(CLOSE_S)

    def _round(self, events: list[Any]) -> None:
        with self._lock:
            now = self._clock()
            if now - self._wake_at > STALL_S:
                self._outbox.excuse(now - self._wake_at, now)
            for event in events:
                self._apply(event, now)
            self._look_around(now)
            self._judge(now)
            self._route(now)
            self._hedge(now)
            self._beat(now)
            self._publish_notices()
            more = self._send(now)
            times = [now + TICK_S, self._outbox.wake_at(now), self._plan.wake_at or float("inf")]
            self._wake_at = now if more or len(events) >= INBOX_STEP_MAX else min(times)

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
        routed = [lane for lane in self._outbox.busy() if lane in self._routes()]
        return self._clock() >= self._stop_by or not (routed or self._notices.pending)

    # What comes in.

    def _apply(self, event: Any, now: float) -> None:
        match event:
            case Connected() | Lost() | Acked() | Message():
                if self._links.get(event.link.name) is event.link:
                    self._apply_link_event(event, now)
            case _Stored(blocks):
                for block in blocks:
                    self._outbox.offer(block)
            case Loaded(lane, after, blocks, complete):
                self._reading.discard(lane)
                self._outbox.load(lane, after, blocks, complete)
            case Found(blocks):
                for (lane, sequence), found in blocks.items():
                    self._outbox.forget(lane, sequence) if found is None else self._outbox.again(found)
            case Counted(waiting):
                self._outbox.discover(waiting)
            case Settled(count):
                self._settled += count
                if count and self._on_settled is not None:
                    self._on_settled(count)
            case Reported():
                self._notices.report(encode_state(event))
            case _Event(payload):
                self._notices.add(payload)
            case _Here(lane):
                self._here = lane
            case _Stop(flush_s):
                self._stop_by = now + flush_s
            case Failed(error):
                raise error
            case _:
                raise TypeError(f"unknown event {event!r}")

    def _apply_link_event(self, event: Connected | Lost | Acked | Message, now: float) -> None:
        name = event.link.name
        match event:
            case Connected(link):
                log.info("endpoint connected endpoint=%s", name)
                link.subscribe()
                self._connected[name] = link
                self._outbox.opened(name, now)
                self._router.connected(name, now)
                self._send_beat(name, now)  # the first round trip
            case Lost(link, reason):
                self._lose(link, reason)
            case Acked(_, mid):
                if self._outbox.acked(name, mid, now):
                    self._router.answered(name, now, self._outbox.trips(name).srtt_s)
                else:
                    self._notices.acked(name, mid)
            case Message(_, topic, payload):
                self._read_message(name, topic, payload)

    def _read_message(self, endpoint: str, topic: str, payload: bytes) -> None:
        if topic == self._topics.desired:
            if payload:  # an empty one only clears what was retained
                self._on_desired(payload)
            return
        try:
            receipt = decode_receipt(payload)
        except ContractError as e:
            self._refused += 1
            log.warning("receipt refused endpoint=%s error=%s", endpoint, e)
            return
        if receipt.device != self._config.device or receipt.epoch != self._buffer.epoch:
            return
        mine = [lane for lane in receipt.lanes if self._may_settle(endpoint, lane.lane)]
        if len(mine) < len(receipt.lanes):
            self._refused += 1
            log.warning("receipt refused endpoint=%s error=%s", endpoint, "it names lanes that may not go there")
        for lane in mine:
            self._outbox.settle(lane.lane, lane.settles())
        self._backlog.settle(msgspec.structs.replace(receipt, lanes=mine))

    def _may_settle(self, endpoint: str, lane: str) -> bool:
        try:
            return endpoint in self._allowed(lane)
        except ContractError:  # no lane at all
            return False

    def _lose(self, link: Link, reason: str) -> None:
        log.warning("endpoint lost endpoint=%s reason=%s", link.name, reason)
        self._forget_link(link)
        self._router.lost(link.name, self._clock(), reason)

    def _forget_link(self, link: Link) -> None:
        link.close()
        del self._links[link.name]
        self._connected.pop(link.name, None)
        self._outbox.lost(link.name)
        self._notices.lost(link.name)

    # What is done about it.

    def _look_around(self, now: float) -> None:
        """Ask the buffer, now and then, for what nobody told us."""
        if now >= self._discover_at:
            self._discover_at = now + DISCOVER_S
            self._backlog.count()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            if overdue := self._outbox.due(now, OVERDUE_STEP_MAX):
                self._backlog.find(overdue)
            self._tell_held(now)
            self._tell_storm(now)

    def _judge(self, now: float) -> None:
        """Who is silent: suspected, then given up."""
        for name in self._outbox.suspects(now):
            if not self._router.suspected(name):
                reason = f"silent for {self._outbox.silent_s(name, now):.2f} s while another endpoint answers"
                log.warning("endpoint suspected endpoint=%s reason=%s", name, reason)
                self._router.suspect(name, now, reason)
                self._outbox.suspected(name)
        for name in self._outbox.dead(now):
            link, reason = self._links[name], f"no PUBACK for {self._outbox.silent_s(name, now):.1f} s"
            self._outbox.given_up(name)
            link.abort(reason)
            self._lose(link, reason)

    def _route(self, now: float) -> None:
        lanes = dict.fromkeys(self._outbox.busy())
        if self._here is not None:
            lanes[self._here] = None
        self._router.use({lane: self._allowed(lane) for lane in lanes})
        self._plan = plan = self._router.step(now)
        for move in plan.moves:
            self._moved(move)
        for name in plan.close:
            log.info("endpoint closed endpoint=%s", name)
            self._forget_link(self._links[name])
        for name in plan.open:
            self._links[name] = link = self._open_link(self._endpoints[name], self._topics, self._inbox)
            link.open()

    def _moved(self, move: Move) -> None:
        log.info("lane moved lane=%s from=%s to=%s reason=%s", move.lane, move.source, move.target, move.reason)
        self._lane_reasons[move.lane] = move.reason
        if move.source is None:
            return
        if move.failed:
            self._failovers[move.source] += 1
            self._lane_failovers[move.lane] += 1
            self._outbox.leave(move.source, move.lane)
        if move.failed or move.reason == "preferred":
            name = "failover" if move.failed else "failback"
            self._tell(name, lane=move.lane, source=move.source, target=move.target or "", reason=move.reason)

    def _hedge(self, now: float) -> None:
        routes = self._plan.routes
        standbys = {lane: r.standby for lane, r in routes.items() if r.standby is not None and r.standby in self._connected}
        for hedge in self._outbox.late(standbys, now):
            mid = self._publish(hedge.block, hedge.endpoint)
            if mid is not None:
                self._outbox.hedged(hedge, mid, now)
                log.debug("block hedged lane=%s sequence=%s late=%s to=%s", hedge.block.lane, hedge.block.sequence, *_names(hedge))

    def _beat(self, now: float) -> None:
        for name in self._outbox.beats(now):
            self._send_beat(name, now)

    def _send_beat(self, name: str, now: float) -> None:
        link = self._connected.get(name)
        if link is None:
            return
        try:
            self._outbox.beat(name, link.publish(self._topics.beat, b""), now)
        except UnavailableError as e:
            self._lose(link, str(e))

    def _routes(self) -> dict[str, str]:
        return {lane: r.endpoint for lane, r in self._plan.routes.items() if r.endpoint is not None and r.endpoint in self._connected}

    def _send(self, now: float) -> bool:
        """Send blocks while there is room, at most SEND_STEP_MAX; True if there may be more."""
        routes = self._routes()
        for lane, cursor in self._outbox.wants(routes):
            if lane not in self._reading:
                self._reading.add(lane)
                self._backlog.read(lane, cursor)
        for _ in range(SEND_STEP_MAX):
            choice = self._outbox.take(routes, now)
            if choice is None:
                return False
            block, endpoint = choice
            mid = self._publish(block, endpoint)
            if mid is None:
                self._outbox.put_back(block)
                return True
            self._outbox.sent(block, endpoint, mid, now)
        return True

    def _publish(self, block: StoredBlock, endpoint: str) -> int | None:
        """Hand a block to a link; None if that is gone, and then it is forgotten."""
        link = self._connected.get(endpoint)
        if link is None:
            return None
        try:
            mid = link.publish(self._topics.up(block.lane, block.stream), block.block)
        except UnavailableError as e:
            self._lose(link, str(e))
            return None
        self._blocks_sent += 1
        self._bytes_sent += len(block.block)
        return mid

    def _publish_notices(self) -> None:
        for link in list(self._connected.values()):
            try:
                self._notices.publish(link)
            except UnavailableError as e:
                self._lose(link, str(e))

    # What an operator should know.

    def _tell(self, event: str, **fields: str) -> None:
        if self._on_event is not None:
            self._on_event(event, fields)

    def _tell_held(self, now: float) -> None:
        """A lane with blocks that has had no endpoint for HELD_S, and its release."""
        held = {lane: str(r.held) for lane, r in self._plan.routes.items() if r.held is not None and lane != self._here}
        held |= {lane: str(r.held) for lane, r in self._plan.routes.items() if r.held is not None and lane in self._outbox.busy()}
        for lane in [lane for lane in self._held_since if lane not in held]:
            if self._held_since.pop(lane) == float("-inf"):
                self._tell("lane_released", lane=lane)
        for lane, why in held.items():
            since = self._held_since.setdefault(lane, now)
            if now - since >= HELD_S:
                self._held_since[lane] = float("-inf")  # told
                if since != float("-inf"):
                    log.warning("lane held lane=%s reason=%s", lane, why)
                    self._tell("lane_held", lane=lane, reason=why)

    def _tell_storm(self, now: float) -> None:
        """Hedges that the limit did not allow."""
        denied = self._outbox.hedges_denied
        if denied > self._stormed and now - self._storm_at >= STORM_S:
            self._storm_at, self._stormed = now, denied
            self._tell("hedge_storm", hedges=str(self._outbox.hedges), denied=str(denied), bytes=str(self._outbox.duplicate_bytes))


def _names(hedge: Hedge[StoredBlock]) -> tuple[str, str]:
    return hedge.late_endpoint, hedge.endpoint


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
