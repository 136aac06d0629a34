"""What waits for an answer at one endpoint, and since when it is silent. Blocks and heartbeats alike.

A state machine without clock or network: times are arguments (seconds, monotonic).

- Every message has a deadline from the moment it is sent (core.deadline).
- One round trip gives one sample: that of a message sent after the last one. A silence that made the endpoint suspect gives none.
- An endpoint is silent while something waits for its answer and none comes; an idle one is asked by a heartbeat.
- `excuse`: time in which this process itself did not run counts against nobody.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_agent.core.deadline import RoundTrips

BEAT_BYTES = 40  # a publish without payload, with its topic
INFINITY = float("inf")
WARM_ANSWERS, WARM_SHARE = 8, 0.1  # the first heartbeats of a connection come faster: its deadline is wanted soon


@dataclass(slots=True)
class Message:
    """A message under way. `key` names its block (lane, sequence), None for a heartbeat; `late_at` is its deadline, infinite once it
    was dealt with; `void`: its answer says nothing about round trips."""

    key: tuple[str, int] | None
    size: int
    sent_at: float
    late_at: float
    ahead_bytes: int
    answered_before: int
    void: bool = False


class Pipe:
    """The messages of one connection, by message id, in the order of sending."""

    def __init__(self, trips: RoundTrips, now: float) -> None:
        self.trips = trips
        self.messages: dict[int, Message] = {}
        self.blocks = self.bytes = 0
        self._answers = self._answered_bytes = 0
        self._sent_at = self._heard_at = now
        self._excused_at = self._sampled_at = -INFINITY
        self._late_at = INFINITY  # no message is late before
        self.answered_sent_at = -INFINITY  # when the newest answered message was sent

    def sent(self, mid: int, key: tuple[str, int] | None, size: int, now: float) -> None:
        """Message `mid` was handed to the link."""
        self.bytes += size
        self.blocks += key is not None
        late_at = now + self.trips.deadline_s(0 if self.is_late(now) else self.bytes)  # a silent endpoint gets no time for its queue
        self.messages[mid] = Message(key, size, now, late_at, self.bytes, self._answered_bytes)
        self._sent_at = now
        self._late_at = min(self._late_at, late_at)

    def answered(self, mid: int, now: float) -> Message | None:
        """The endpoint acknowledged `mid`; None if that is no message of ours."""
        message = self.messages.pop(mid, None)
        if message is None:
            return None
        self.bytes -= message.size
        self.blocks -= message.key is not None
        self._answers += 1
        self._answered_bytes += message.size
        self._heard_at = now
        self.answered_sent_at = max(self.answered_sent_at, message.sent_at)
        if not self.messages:
            self._late_at = INFINITY
        if message.key is not None:
            self.trips.block_answered()
        if message.sent_at >= self._sampled_at and not message.void:
            self._sampled_at = now
            answered_bytes = self._answered_bytes - message.answered_before
            self.trips.answered(max(0.0, now - message.sent_at), message.ahead_bytes, answered_bytes, now)
        return message

    def void(self) -> None:
        """The endpoint is suspected: what it owes says nothing about round trips, should it answer after all."""
        for message in self.messages.values():
            message.void = True

    def late(self, now: float) -> Iterator[Message]:
        """Messages past their deadline that nobody has dealt with, the oldest first."""
        if now < self._late_at:
            return
        self._late_at = INFINITY
        for message in list(self.messages.values()):
            if message.late_at <= now:
                yield message
            self._late_at = min(self._late_at, message.late_at)

    def is_late(self, now: float) -> bool:
        """Does the endpoint owe an answer beyond its deadline? Then it is not to be trusted with more."""
        oldest = self._oldest()
        return oldest is not None and now - self._silent_since(oldest) >= self.trips.deadline_s(oldest.ahead_bytes)

    def owed_since(self) -> float | None:
        """When the oldest unanswered message was sent."""
        oldest = self._oldest()
        return None if oldest is None else oldest.sent_at

    def silent_s(self, now: float) -> float:
        """How long it has owed an answer without giving any."""
        oldest = self._oldest()
        return 0.0 if oldest is None else max(0.0, now - self._silent_since(oldest))

    def suspect_at(self, now: float) -> float:
        """When the silence makes it suspect."""
        oldest = self._oldest()
        return INFINITY if oldest is None else self._silent_since(oldest) + self.trips.suspect_s(oldest.ahead_bytes, now)

    def dead_at(self, now: float) -> float:
        """When the silence means that the connection is dead."""
        oldest = self._oldest()
        return INFINITY if oldest is None else self._silent_since(oldest) + self.trips.dead_s(oldest.ahead_bytes, now)

    def beat_at(self, heartbeat_s: float) -> float:
        """When a heartbeat is due; never while something is under way. A new connection is measured a few times sooner."""
        pause_s = heartbeat_s if self._answers >= WARM_ANSWERS else heartbeat_s * WARM_SHARE
        return INFINITY if self.messages else max(self._sent_at, self._heard_at) + pause_s

    @property
    def late_at(self) -> float:
        """The earliest time at which `late` may find something."""
        return self._late_at if self.messages else INFINITY

    def excuse(self, late_s: float, now: float) -> None:
        """This process was late itself by `late_s`."""
        self._excused_at, self._late_at = now, self._late_at + late_s
        for message in self.messages.values():
            message.late_at += late_s

    def _oldest(self) -> Message | None:
        return next(iter(self.messages.values()), None)

    def _silent_since(self, oldest: Message) -> float:
        return max(oldest.sent_at, self._heard_at, self._excused_at)
