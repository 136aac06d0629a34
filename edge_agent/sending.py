"""Sending: one round of the uplink. Links, routes (core.routing), and order and deadlines (core.outbox), brought together.

- A block goes to the endpoint that the router names for its lane, or waits.
- A block that is late at its endpoint also goes to the lane's standby; the lake removes the copy. An endpoint that stays silent while
  another one answers is suspected and left; the connection stays, and is given up after a longer silence.
- An idle connection is asked by a heartbeat (an empty publish), the standby's too: what does not answer is no standby.
- When a link is lost, what it had not acknowledged goes to the lane's next endpoint at once.

All of it happens in the uplink's thread, and nothing here waits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from edge_agent.buffer import StoredBlock
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.outbox import Outbox
from edge_agent.core.routing import Plan, Router
from edge_agent.mqtt.link import Acked, Connected, EndpointConfig, Link, Lost
from edge_agent.notices import Notices
from edge_agent.uplink_events import UplinkEvents

log = logging.getLogger(__name__)

SEND_STEP_MAX = 128


class Reads(Protocol):
    """Reads blocks of a lane after a sequence; they come back to `Outbox.load`."""

    def __call__(self, lane: str, after: int) -> None: ...


class Sending:
    """See the module's rules.

    Args:
        endpoints: by name.
        allowed: the endpoints that a lane allows, in order of preference.
        open_link: makes a link to an endpoint, whose events come to `apply`.
        read: asks for blocks of a lane's backlog.

    Attributes:
        here: the lane in which the device is; its endpoints stay connected though there may be nothing to send.
        plan: the routes of the last round.
    """

    def __init__(
        self,
        endpoints: Mapping[str, EndpointConfig],
        topics: DeviceTopics,
        router: Router,
        outbox: Outbox[StoredBlock],
        notices: Notices,
        events: UplinkEvents,
        *,
        allowed: Callable[[str], Sequence[str]],
        open_link: Callable[[EndpointConfig], Link],
        read: Reads,
    ) -> None:
        self._topics, self._notices, self._events = topics, notices, events
        self._allowed, self._open_link, self._read = allowed, open_link, read
        self.endpoints, self.router, self.outbox = endpoints, router, outbox
        self.links: dict[str, Link] = {}
        self.connected: dict[str, Link] = {}
        self.plan = Plan({})
        self.here: str | None = None
        self.blocks_sent = self.bytes_sent = 0

    def step(self, now: float) -> bool:
        """One round; True if there may be more to send at once."""
        self._judge(now)
        self._route(now)
        self._hedge(now)
        self._beat(now)
        self._publish_notices(now)
        return self._send(now)

    def wake_at(self, now: float) -> float:
        """When the next round is due, if nothing comes in before."""
        return min(self.outbox.wake_at(now), float("inf") if self.plan.wake_at is None else self.plan.wake_at)

    def routes(self) -> dict[str, str]:
        """The lanes that can be sent now, each with its endpoint."""
        return {lane: r.endpoint for lane, r in self.plan.routes.items() if r.endpoint is not None and r.endpoint in self.connected}

    def held(self) -> dict[str, str]:
        """The lanes with blocks that have no endpoint, each with the reason."""
        busy = set(self.outbox.busy())
        return {lane: str(r.held) for lane, r in self.plan.routes.items() if r.held is not None and (lane != self.here or lane in busy)}

    def close(self) -> None:
        """Close all links."""
        for link in self.links.values():
            link.close()

    # What links say.

    def apply(self, event: Connected | Lost | Acked, now: float) -> None:
        """An event of a link that is in use."""
        name = event.link.name
        match event:
            case Connected(link):
                log.info("endpoint connected endpoint=%s", name)
                link.subscribe()
                self.connected[name] = link
                self.outbox.pipes.opened(name, now)
                self.router.connected(name, now)
                self._send_beat(name, now)  # the first round trip
            case Lost(link, reason):
                self._lose(link, reason, now)
            case Acked(_, mid):
                if self.outbox.acked(name, mid, now):
                    self.router.answered(name, now, self.outbox.pipes.trips(name).srtt_s)
                else:
                    self._notices.acked(name, mid)

    def _lose(self, link: Link, reason: str, now: float) -> None:
        log.warning("endpoint lost endpoint=%s reason=%s", link.name, reason)
        self._forget(link)
        self.router.lost(link.name, now, reason)

    def _forget(self, link: Link) -> None:
        link.close()
        del self.links[link.name]
        self.connected.pop(link.name, None)
        self.outbox.lost(link.name)
        self._notices.lost(link.name)

    # What is done about it.

    def _judge(self, now: float) -> None:
        """Who is silent: suspected, then given up."""
        pipes = self.outbox.pipes
        for name in pipes.suspects(now):
            if not self.router.suspected(name):
                reason = f"silent for {pipes.silent_s(name, now):.2f} s while another endpoint answers"
                log.warning("endpoint suspected endpoint=%s reason=%s", name, reason)
                self.router.suspect(name, now, reason)
                self.outbox.suspected(name)
        for name in pipes.dead(now):
            link, reason = self.links[name], f"no PUBACK for {pipes.silent_s(name, now):.1f} s"
            pipes.trips(name).given_up()
            link.abort(reason)
            self._lose(link, reason, now)

    def _route(self, now: float) -> None:
        lanes = dict.fromkeys(self.outbox.busy())
        if self.here is not None:
            lanes[self.here] = None
        self.router.use({lane: self._allowed(lane) for lane in lanes})
        self.plan = self.router.step(now)
        for move in self.plan.moves:
            if move.failed and move.source is not None:
                self.outbox.leave(move.source, move.lane)
            self._events.moved(move)
        for name in self.plan.close:
            log.info("endpoint closed endpoint=%s", name)
            self._forget(self.links[name])
        for name in self.plan.open:
            self.links[name] = link = self._open_link(self.endpoints[name])
            link.open()

    def _hedge(self, now: float) -> None:
        routes = self.plan.routes
        standbys = {lane: r.standby for lane, r in routes.items() if r.standby is not None and r.standby in self.connected}
        for hedge in self.outbox.late(standbys, now):
            block, endpoint, late = hedge
            mid = self._send_block(block, endpoint, now)
            if mid is not None:
                self.outbox.hedged(hedge, mid, now)
                log.debug("block hedged lane=%s sequence=%s late=%s to=%s", block.lane, block.sequence, late, endpoint)

    def _beat(self, now: float) -> None:
        for name in self.outbox.pipes.beats(now):
            self._send_beat(name, now)

    def _send_beat(self, endpoint: str, now: float) -> None:
        mid = self._publish(endpoint, self._topics.beat, b"", now)
        if mid is not None:
            self.outbox.pipes.beat(endpoint, mid, now)

    def _publish_notices(self, now: float) -> None:
        for link in list(self.connected.values()):
            try:
                self._notices.publish(link)
            except UnavailableError as e:
                self._lose(link, str(e), now)

    def _send(self, now: float) -> bool:
        """Send blocks while there is room, at most SEND_STEP_MAX; True if there may be more."""
        routes = self.routes()
        for lane, after in self.outbox.wants(routes):
            self._read(lane, after)
        for _ in range(SEND_STEP_MAX):
            choice = self.outbox.take(routes, now)
            if choice is None:
                return False
            block, endpoint = choice
            mid = self._send_block(block, endpoint, now)
            if mid is None:
                self.outbox.put_back(block)
                return True
            self.outbox.sent(block, endpoint, mid, now)
        return True

    def _send_block(self, block: StoredBlock, endpoint: str, now: float) -> int | None:
        mid = self._publish(endpoint, self._topics.up(block.lane, block.stream), block.block, now)
        if mid is not None:
            self.blocks_sent += 1
            self.bytes_sent += len(block.block)
        return mid

    def _publish(self, endpoint: str, topic: str, payload: bytes, now: float) -> int | None:
        """Hand a message to a link; None if that is gone, and then it is forgotten."""
        link = self.connected.get(endpoint)
        if link is None:
            return None
        try:
            return link.publish(topic, payload)
        except UnavailableError as e:
            self._lose(link, str(e), now)
            return None
