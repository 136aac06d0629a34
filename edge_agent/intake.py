"""From a batch of sensor messages to checked readings, fixes and rejects. No I/O: everything comes in, everything goes out.

- A message's topic decides what it is: a reading of one stream, a position, or unknown. Sparkplug nodes are listened to as a whole,
  in the order received, because the births of one message say how to read the next.
- What breaks its contract is rejected with a reason, never silently away.
- A reading seen before (the broker delivered it again) is dropped and counted. It is known by its key; in Sparkplug, where messages
  of one time may hold different metrics, by all its values; with single-value topics not at all (see core/single_values.py).
- Fixes are taken first: readings are stamped by event time, not by their place in the batch.
- A reject has no event time to trust: it gets the lane of the newest fix that came before it.
- Personal fields are treated before anything else sees them; of rejects, quarantine gets what `core.privacy` leaves. Where a stream has
  personal fields, payloads that belong to no stream are withheld: they may be its readings on a wrong topic.
"""

from __future__ import annotations

import bisect
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import numpy as np

from edge_agent.contract.block import LATITUDE, LONGITUDE
from edge_agent.contract.columns import Ints, Strings, Table, take
from edge_agent.contract.errors import ContractError, PayloadError, Reason
from edge_agent.contract.sensor_topics import parse_shape
from edge_agent.contract.stream import Encoding, StreamContract
from edge_agent.core.decode import Decoded, Decoder
from edge_agent.core.dedupe import RecentKeys
from edge_agent.core.fix import Fix, Position, Precision
from edge_agent.core.privacy import WITHHELD as PRIVATE
from edge_agent.core.privacy import Pseudonyms, Treatment
from edge_agent.core.rejects import Reject
from edge_agent.core.single_values import ValueDecoder
from edge_agent.core.sparkplug import is_sparkplug
from edge_agent.core.sparkplug_nodes import Heard, Nodes
from edge_agent.core.sparkplug_rows import SparkplugDecoder, hear
from edge_agent.core.validate import validate
from edge_agent.fence import Fence
from edge_agent.position import read_position

ROUTES_MAX = 10_000
TOPIC_CHARACTERS_MAX = 256  # of topics whose route is remembered, and that are shown whole
WITHHELD = b"(a position, not stored: no stream has location = exact)"
_POSITION = "/position"  # no stream can have this name
_NOT_SHOWN = "(not shown: topics here have personal levels)"
_NODE = "/node"  # nor this one: a Sparkplug node whose devices have a stream, but not it


@dataclass(frozen=True)
class Rejected:
    """A payload that goes to quarantine, why, and the lane it was captured in; `treated`: of its personal fields."""

    lane: str
    topic: str
    reason: Reason
    detail: str
    payload: bytes
    treated: bool = False


@dataclass(frozen=True)
class Readings:
    """Fresh, valid readings of one stream, in the order seen, with the lane of each."""

    contract: StreamContract
    table: Table
    lanes: Strings

    def __len__(self) -> int:
        return len(self.lanes)


@dataclass
class Intaken:
    """What one batch held; `redelivered` counts dropped readings by stream, `gaps` says where Sparkplug messages are missing."""

    readings: list[Readings] = field(default_factory=list)
    fixes: list[Fix] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    redelivered: dict[str, int] = field(default_factory=dict)
    gaps: list[str] = field(default_factory=list)
    nodes_heard: bool = False


class Intake:
    """The checks of one agent. `fence` places its readings, `recent_rows` is how many readings the redelivery filter remembers.

    `nodes` are the Sparkplug nodes as they were when the agent ran last. `pseudonyms` are needed if a contract hashes a field.
    """

    def __init__(
        self,
        contracts: tuple[StreamContract, ...],
        position_topic: str | None,
        fence: Fence,
        recent_rows: int,
        nodes: Nodes | None = None,
        pseudonyms: Pseudonyms | None = None,
    ) -> None:
        self.fence = fence
        self.nodes = Nodes() if nodes is None else nodes
        self._contracts = {c.stream: c for c in contracts}
        self._decoders = {c.stream: _decoder(c, self.nodes) for c in contracts}
        self._shapes = {c.stream: c.shape for c in contracts}
        self._nodes = [parse_shape(c.filters[-1]) for c in contracts if c.encoding is Encoding.SPARKPLUG]
        self._named = {c.stream: _named(c) for c in contracts if c.encoding is not Encoding.VALUE}
        self._recent = {stream: RecentKeys(recent_rows, secrets.randbits(64)) for stream in self._named}
        self._treatments = {c.stream: Treatment(c, pseudonyms) for c in contracts if c.private}
        self._position_topic = position_topic
        self._routes: dict[str, str | None] = {}

    def remember(self, stream: str, table: Table) -> None:
        """Take stored readings as seen: after a restart, those that the buffer still holds."""
        if stream in self._recent:
            self._recent[stream].remember(self._named[stream], table)

    def take(
        self, topics: list[str], payloads: list[bytes], received_us: int, *, synced: bool = False, positions: Sequence[Position] = ()
    ) -> Intaken:
        """Check one batch; afterwards its readings count as seen.

        Args:
            received_us: wall time at which it came; `synced`: whether that clock can be trusted.
            positions: those that did not come as messages.
        """
        out = Intaken()
        places = self._places(topics)
        rejects: list[tuple[int, Reason, str]] = []
        now_us = received_us if synced else None
        for position in positions:
            fix, _ = self.fence.take(position, now_us)
            out.fixes += [fix] if fix is not None else []
        track = self.fence.track
        lanes = [(-1, track.lane_now(received_us))]  # from which message on the device was where
        for i in places.pop(_POSITION, []):
            fix, refused = self._take_position(payloads[i], received_us, now_us)
            out.fixes += [fix] if fix is not None else []
            rejects += [(i, *refused)] if refused is not None else []
            lanes.append((i, track.lane_now(received_us)))
        heard = self._hear(topics, payloads, out)
        for i in places.pop(_NODE, []):
            message = heard[i]
            rejects += [(i, message.reason, str(message))] if isinstance(message, PayloadError) else []
        for i in places.pop(None, []):
            rejects.append((i, Reason.UNKNOWN_TOPIC, f"no stream has the topic {self._unknown(topics[i])[:TOPIC_CHARACTERS_MAX]!r}"))
        for stream, rows in places.items():
            decoded = self._decode(str(stream), rows, topics, payloads, received_us, heard)
            rejects += self._take_readings(str(stream), rows, decoded, received_us, out)
        for i, reason, detail in sorted(rejects):
            lane = lanes[bisect.bisect_left(lanes, i, key=lambda step: step[0]) - 1][1]
            topic, payload, treated = self._shown(topics[i], payloads[i])
            out.rejected.append(Rejected(lane, topic, reason, detail, payload, treated))
        return out

    def _take_position(self, payload: bytes, received_us: int, now_us: int | None) -> tuple[Fix | None, tuple[Reason, str] | None]:
        """The fix of a position message, if it makes one, and why it was refused, if it was."""
        try:
            position = read_position(payload)
        except ContractError as e:
            return None, (Reason.MALFORMED, str(e))
        fix, refused = self.fence.take(position, now_us)
        if refused is None:
            self.fence.track.hear(position.time_us, received_us)
        return fix, refused

    def _shown(self, topic: str, payload: bytes) -> tuple[str, bytes, bool]:
        """A message as quarantine may keep it: positions only where a stream may know them exactly, nothing that is personal.

        Returns:
            Its topic, its payload, and whether that was treated.
        """
        if topic == self._position_topic:
            return topic, payload if self.fence.precision is Precision.EXACT else WITHHELD, False
        if not self._treatments:
            return topic, payload, False
        route = self._route(topic)
        if route not in self._contracts:
            return self._unknown(topic), PRIVATE, False
        treatment = self._treatments.get(str(route))
        return (topic, payload, False) if treatment is None else (treatment.topic(topic), treatment.payload(payload), True)

    def _unknown(self, topic: str) -> str:
        """A topic that no stream has, as it may be shown: it may be that of a personal one, misspelt."""
        return _NOT_SHOWN if any(t.topic_is_personal for t in self._treatments.values()) else topic

    def _places(self, topics: list[str]) -> dict[str | None, list[int]]:
        """The places of the messages, by route."""
        routes = {topic: self._route(topic) for topic in set(topics)}
        if len(set(routes.values())) == 1:  # the usual case
            return {next(iter(routes.values())): list(range(len(topics)))}
        places: dict[str | None, list[int]] = {}
        for i, topic in enumerate(topics):
            places.setdefault(routes[topic], []).append(i)
        return places

    def _route(self, topic: str) -> str | None:
        """The stream of a topic, _POSITION, or None."""
        if topic in self._routes:
            return self._routes[topic]
        route = None
        if topic == self._position_topic:
            route = _POSITION
        else:
            route = next((s for s, shape in self._shapes.items() if shape.matches(topic)), None)
            if route is None and any(node.matches(topic) for node in self._nodes):
                route = _NODE
        if len(self._routes) < ROUTES_MAX and len(topic) <= TOPIC_CHARACTERS_MAX:
            self._routes[topic] = route
        return route

    def _hear(self, topics: list[str], payloads: list[bytes], out: Intaken) -> dict[int, Heard | PayloadError]:
        """What the Sparkplug nodes make of their messages, by place in the batch."""
        if not self._nodes:
            return {}
        heard = {i: hear(self.nodes, topic, payloads[i]) for i, topic in enumerate(topics) if is_sparkplug(topic)}
        out.gaps, self.nodes.gaps = self.nodes.gaps, []
        out.nodes_heard = bool(heard)
        return heard

    def _decode(
        self,
        stream: str,
        rows: list[int],
        topics: list[str],
        payloads: list[bytes],
        received_us: int,
        heard: dict[int, Heard | PayloadError],
    ) -> Decoded:
        decoder = self._decoders[stream]
        if len(rows) < len(topics):
            topics, payloads = [topics[i] for i in rows], [payloads[i] for i in rows]
        if isinstance(decoder, SparkplugDecoder):
            return decoder.rows([heard[i] for i in rows], topics, [len(p) for p in payloads])
        return decoder.decode(payloads, topics, received_us)

    def _take_readings(
        self, stream: str, rows: list[int], decoded: Decoded, received_us: int, out: Intaken
    ) -> list[tuple[int, Reason, str]]:
        """Put the fresh, valid readings of one stream into `out`; returns the place, reason and detail of each reject."""
        contract = self._contracts[stream]
        valid, out_of_range = validate(contract, decoded.table)
        treatment = self._treatments.get(stream)
        said: Callable[[Reject], str] = treatment.detail if treatment else attrgetter("detail")
        rejects = [(rows[r.index], r.reason, said(r)) for r in decoded.rejects]
        first = {int(decoded.rows[r.index]): r for r in reversed(out_of_range)}  # one reject each, though a payload may give many rows
        rejects += [(rows[i], r.reason, said(r)) for i, r in first.items()]
        table = take(decoded.table, valid)
        if treatment:
            table = treatment.table(table)
        if stream in self._recent:
            table = self._drop_redelivered(stream, table, out)
        event_us = table[contract.event_time]
        assert isinstance(event_us, np.ndarray)
        if len(event_us):
            out.readings.append(self._placed(contract, table, event_us.astype(np.int64, copy=False)))
            self.fence.track.hear(int(event_us.max()), received_us)
        return rejects

    def _drop_redelivered(self, stream: str, table: Table, out: Intaken) -> Table:
        recent, named = self._recent[stream], self._named[stream]
        fresh = recent.remember(named, table)
        redelivered = len(fresh) - int(np.count_nonzero(fresh))
        if not redelivered:
            return table
        out.redelivered[stream] = redelivered
        return take(table, fresh)

    def _placed(self, contract: StreamContract, table: Table, event_us: Ints) -> Readings:
        """Readings with their lanes, and with their places as exactly as the stream may know them."""
        track, precision = self.fence.track, self.fence.streams.get(contract.stream, Precision.ZONE_ONLY)
        if precision is not Precision.ZONE_ONLY:
            latitude, longitude = track.places(event_us, precision)
            table = {**table, LATITUDE: latitude, LONGITUDE: longitude}
        return Readings(contract, table, track.stamp(event_us))


def _decoder(contract: StreamContract, nodes: Nodes) -> Decoder | ValueDecoder | SparkplugDecoder:
    if contract.encoding is Encoding.VALUE:
        return ValueDecoder(contract)
    return SparkplugDecoder(contract, nodes) if contract.encoding is Encoding.SPARKPLUG else Decoder(contract)


def _named(contract: StreamContract) -> StreamContract:
    """The contract, with the key that tells a redelivered reading."""
    whole = contract.encoding is Encoding.SPARKPLUG
    return replace(contract, key=tuple(f.name for f in contract.fields)) if whole else contract
