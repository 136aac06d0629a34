"""The uplink: blocks from the buffer to the endpoints that their lanes allow, and control documents both ways.

One thread owns all of it; each of its rounds takes what has come in, then sends (edge_agent.sending). Others only put something on its
inbox: callers, the links' callbacks, and the thread that reads and writes the buffer (backlog.py). So it never waits but for its inbox,
and no longer than until the next deadline.

- A block leaves the buffer when the lake's receipt names it (edge_agent.receipts); without one it is sent again (the lake removes copies).
- `desired` may come from several endpoints, in any order: the updater refuses the older one.

Callbacks run in the uplink's thread: they must not raise, and must not wait.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

from edge_agent.backlog import Backlog, Counted, Failed, Found, Loaded, Settled
from edge_agent.buffer import Buffer, StoredBlock
from edge_agent.contract.state import Reported, encode_state
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.outbox import Outbox, OutboxLimits
from edge_agent.core.routing import Router, RoutingConfig
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Link, Lost, Message
from edge_agent.notices import Notices
from edge_agent.receipts import Receipts
from edge_agent.sending import Sending
from edge_agent.uplink_events import Tell, UplinkEvents
from edge_agent.uplink_status import UplinkStatus, describe

log = logging.getLogger(__name__)

TICK_S = 0.5
DISCOVER_S = 5.0
CLOSE_S = 3.0
STALL_S = 0.05  # this process counts as stalled when it is later than this
INBOX_STEP_MAX = 512
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
        on_event: Tell | None = None,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        open_link: LinkMaker = Link,
    ) -> None:
        self._buffer, self._clock = buffer, clock
        self._on_desired, self._on_settled = on_desired, on_settled
        self._topics = DeviceTopics(config.device)
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        self._backlog = Backlog(buffer, config.device, self._inbox.put)
        self._notices = Notices(self._topics)
        self._events = UplinkEvents(on_event)
        self._receipts = Receipts(config.device, lambda: buffer.epoch, allowed)
        self._outbox: Outbox[StoredBlock] = Outbox(config.limits)
        self._sending = Sending(
            {e.name: e for e in config.endpoints},
            self._topics,
            Router(config.routing, (rng or random.Random()).uniform),
            self._outbox,
            self._notices,
            self._events,
            allowed=allowed,
            open_link=lambda endpoint: open_link(endpoint, self._topics, self._inbox),
            read=self._backlog.read,
        )
        self._discover_at = self._tick_at = self._wake_at = float("-inf")
        self._stop_by: float | None = None
        self._settled = 0
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
            return describe(
                self._sending,
                self._events,
                waiting,
                blocks_settled=self._settled,
                receipts_refused=self._receipts.refused,
                events_dropped=self._notices.dropped,
            )

    def _run(self) -> None:
        try:
            while not self._finished():
                self._round(self._take_events(max(0.0, self._wake_at - self._clock())))
        except Exception as e:
            self.failure = e
            log.exception("uplink failed")
            raise
        finally:
            self._sending.close()
            self._backlog.close(CLOSE_S)

    def _round(self, events: list[Any]) -> None:
        with self._lock:
            now = self._clock()
            if now - self._wake_at > STALL_S:
                self._outbox.pipes.excuse(now - self._wake_at, now)
            for event in events:
                self._apply(event, now)
            self._look_around(now)
            more = self._sending.step(now)
            self._wake_at = now if more or len(events) >= INBOX_STEP_MAX else min(now + TICK_S, self._sending.wake_at(now))

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
        routed = [lane for lane in self._outbox.busy() if lane in self._sending.routes()]
        return self._clock() >= self._stop_by or not (routed or self._notices.pending)

    def _apply(self, event: Any, now: float) -> None:
        match event:
            case Connected() | Lost() | Acked() | Message():
                if self._sending.links.get(event.link.name) is not event.link:
                    return  # of a link that is forgotten
                if isinstance(event, Message):
                    self._read_message(event)
                else:
                    self._sending.apply(event, now)
            case _Stored(blocks):
                for block in blocks:
                    self._outbox.offer(block)
            case Loaded(lane, after, blocks, complete):
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
                self._sending.here = lane
            case _Stop(flush_s):
                self._stop_by = now + flush_s
            case Failed(error):
                raise error
            case _:
                raise TypeError(f"unknown event {event!r}")

    def _read_message(self, message: Message) -> None:
        if message.topic == self._topics.desired:
            if message.payload:  # an empty one only clears what was retained
                self._on_desired(message.payload)
            return
        receipt = self._receipts.read(message.link.name, message.payload)
        if receipt is not None:
            for lane in receipt.lanes:
                self._outbox.settle(lane.lane, lane.settles())
            self._backlog.settle(receipt)

    def _look_around(self, now: float) -> None:
        """Ask the buffer, now and then, for what nobody told us, and tell the operator what he should know."""
        if now >= self._discover_at:
            self._discover_at = now + DISCOVER_S
            self._backlog.count()
        if now >= self._tick_at:
            self._tick_at = now + TICK_S
            if overdue := self._outbox.due(now, OVERDUE_STEP_MAX):
                self._backlog.find(overdue)
            self._events.hold(self._sending.held(), now)
            self._events.hedge(self._outbox.hedging, self._outbox.duplicate_bytes, now)


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
