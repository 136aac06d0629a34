"""From a batch of sensor messages to checked readings, fixes and rejects. No I/O: everything comes in, everything goes out.

- A message's topic decides what it is: a reading of one stream, a position, or unknown.
- What breaks its contract is rejected with a reason, never silently away.
- A reading seen before (the broker delivered it again) is dropped and counted.
- Fixes are taken first: readings are stamped by event time, not by their place in the batch.
- A reject has no event time to trust: it gets the lane of the newest fix that came before it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from paho.mqtt.client import topic_matches_sub

from edge_agent.contract.block import LATITUDE, LONGITUDE
from edge_agent.contract.columns import Ints, Strings, Table, take
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import StreamContract
from edge_agent.core.decode import Decoder
from edge_agent.core.dedupe import RecentKeys
from edge_agent.core.track import Fix, Position, Precision
from edge_agent.core.validate import validate
from edge_agent.fence import Fence
from edge_agent.position import read_position

ROUTES_MAX = 10_000
TOPIC_CHARACTERS_MAX = 256  # of topics whose route is remembered, and that are shown whole
WITHHELD = b"(a position, not stored: no stream has location = exact)"
_POSITION = "/position"  # no stream can have this name


@dataclass(frozen=True)
class Rejected:
    """A payload that goes to quarantine, why, and the lane it was captured in."""

    lane: str
    topic: str
    reason: Reason
    detail: str
    payload: bytes


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
    """What one batch held; `redelivered` counts dropped readings by stream."""

    readings: list[Readings] = field(default_factory=list)
    fixes: list[Fix] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    redelivered: dict[str, int] = field(default_factory=dict)


class Intake:
    """The checks of one agent. `fence` places its readings, `recent_rows` is how many readings the redelivery filter remembers."""

    def __init__(self, contracts: tuple[StreamContract, ...], position_topic: str | None, fence: Fence, recent_rows: int) -> None:
        self.fence = fence
        self._contracts = {c.stream: c for c in contracts}
        self._decoders = {c.stream: Decoder(c) for c in contracts}
        self._recent = {c.stream: RecentKeys(recent_rows) for c in contracts}
        self._position_topic = position_topic
        self._routes: dict[str, str | None] = {}

    def remember(self, stream: str, table: Table) -> None:
        """Take stored readings as seen: after a restart, those that the buffer still holds."""
        self._recent[stream].remember(self._contracts[stream], table)

    def take(
        self, topics: list[str], payloads: list[bytes], received_us: int, *, synced: bool = False, positions: Sequence[Position] = ()
    ) -> Intaken:
        """Check one batch; afterwards its readings count as seen.

        Args:
            received_us: wall time at which it came; `synced`: whether that clock can be trusted.
            positions: those that did not come as messages.
        """
        out = Intaken()
        places: dict[str | None, list[int]] = {}
        for i, topic in enumerate(topics):
            places.setdefault(self._route(topic), []).append(i)
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
        for i in places.pop(None, []):
            rejects.append((i, Reason.UNKNOWN_TOPIC, f"no stream has the topic {topics[i][:TOPIC_CHARACTERS_MAX]!r}"))
        for stream, rows in places.items():
            rejects += self._take_readings(str(stream), rows, payloads, received_us, out)
        for i, reason, detail in sorted(rejects):
            lane = lanes[bisect.bisect_left(lanes, i, key=lambda step: step[0]) - 1][1]
            out.rejected.append(Rejected(lane, topics[i], reason, detail, self._shown(topics[i], payloads[i])))
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

    def _shown(self, topic: str, payload: bytes) -> bytes:
        """A payload as quarantine may keep it: positions only where a stream may know them exactly."""
        withheld = topic == self._position_topic and self.fence.precision is not Precision.EXACT
        return WITHHELD if withheld else payload

    def _route(self, topic: str) -> str | None:
        """The stream of a topic, _POSITION, or None."""
        if topic in self._routes:
            return self._routes[topic]
        route = None
        if topic == self._position_topic:
            route = _POSITION
        else:
            route = next((s for s, c in self._contracts.items() if topic_matches_sub(c.topic, topic)), None)
        if len(self._routes) < ROUTES_MAX and len(topic) <= TOPIC_CHARACTERS_MAX:
            self._routes[topic] = route
        return route

    def _take_readings(
        self, stream: str, rows: list[int], payloads: list[bytes], received_us: int, out: Intaken
    ) -> list[tuple[int, Reason, str]]:
        """Put the fresh, valid readings of one stream into `out`; returns the place, reason and detail of each reject."""
        contract = self._contracts[stream]
        decoded = self._decoders[stream].decode([payloads[i] for i in rows])
        valid, out_of_range = validate(contract, decoded.table)
        rejects = [(rows[r.index], r.reason, r.detail) for r in decoded.rejects]
        rejects += [(rows[int(decoded.rows[r.index])], r.reason, r.detail) for r in out_of_range]
        table = take(decoded.table, valid)
        fresh = self._recent[stream].fresh(contract, table)
        self._recent[stream].remember(contract, table)
        redelivered = len(fresh) - int(np.count_nonzero(fresh))
        if redelivered:
            out.redelivered[stream] = redelivered
            table = take(table, fresh)
        event_us = table[contract.event_time]
        assert isinstance(event_us, np.ndarray)
        if len(event_us):
            out.readings.append(self._placed(contract, table, event_us.astype(np.int64, copy=False)))
            self.fence.track.hear(int(event_us.max()), received_us)
        return rejects

    def _placed(self, contract: StreamContract, table: Table, event_us: Ints) -> Readings:
        """Readings with their lanes, and with their places as exactly as the stream may know them."""
        track, precision = self.fence.track, self.fence.streams.get(contract.stream, Precision.ZONE_ONLY)
        if precision is not Precision.ZONE_ONLY:
            latitude, longitude = track.places(event_us, precision)
            table = {**table, LATITUDE: latitude, LONGITUDE: longitude}
        return Readings(contract, table, track.stamp(event_us))
