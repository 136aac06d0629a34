"""The pipes of all endpoints: who owes an answer for how long, compared with the others.

A state machine without clock or network: times are arguments (seconds, monotonic), timers are results.

- Silence alone proves nothing, it may be our own: an endpoint is a suspect once another one has answered something newer than
  what it owes. To know that, idle ones are asked with a heartbeat as soon as one is late.
- After a longer silence the connection is dead, whatever the others do.
"""

from __future__ import annotations

from collections.abc import Iterable

from edge_agent.core.deadline import DeadlineLimits, RoundTrips
from edge_agent.core.pipe import BEAT_BYTES, INFINITY, Message, Pipe


class Pipes:
    """See the module's rules. A pipe is as old as its connection, round trips outlive it."""

    def __init__(self, limits: DeadlineLimits, heartbeat_s: float) -> None:
        self._limits, self._heartbeat_s = limits, heartbeat_s
        self._pipes: dict[str, Pipe] = {}
        self._trips: dict[str, RoundTrips] = {}

    def opened(self, endpoint: str, now: float) -> Pipe:
        """The endpoint is connected: a new pipe, empty."""
        pipe = self._pipes[endpoint] = Pipe(self.trips(endpoint), now)
        return pipe

    def closed(self, endpoint: str) -> Iterable[Message]:
        """The connection is gone; returns what it had not answered."""
        pipe = self._pipes.pop(endpoint, None)
        return () if pipe is None else pipe.messages.values()

    def get(self, endpoint: str) -> Pipe | None:
        return self._pipes.get(endpoint)

    def at(self, endpoint: str, now: float) -> Pipe:
        """The pipe of an endpoint; a new one if there is none."""
        return self._pipes.get(endpoint) or self.opened(endpoint, now)

    def items(self) -> Iterable[tuple[str, Pipe]]:
        return self._pipes.items()

    def trips(self, endpoint: str) -> RoundTrips:
        """The round trips of an endpoint, over all its connections."""
        return self._trips.setdefault(endpoint, RoundTrips(self._limits))

    def beat(self, endpoint: str, mid: int, now: float) -> None:
        """A heartbeat was handed to the link of `endpoint` as message `mid`."""
        self.at(endpoint, now).sent(mid, None, BEAT_BYTES, now)

    def beats(self, now: float) -> list[str]:
        """Endpoints to ask with a heartbeat: idle ones, and those that could tell whether another's silence is its own."""
        owed = [since for pipe in self._pipes.values() if pipe.is_late(now) and (since := pipe.owed_since()) is not None]
        doubt = min(owed, default=-INFINITY)
        return [
            name
            for name, pipe in self._pipes.items()
            if not pipe.messages and (pipe.beat_at(self._heartbeat_s) <= now or pipe.answered_sent_at < doubt)
        ]

    def suspects(self, now: float) -> list[str]:
        """Endpoints that are silent while another one has answered something newer than what they owe."""
        newest = sorted(((pipe.answered_sent_at, name) for name, pipe in self._pipes.items()), reverse=True)[:2]
        found = []
        for name, pipe in self._pipes.items():
            since = pipe.owed_since()
            if since is not None and pipe.suspect_at(now) <= now and any(at > since and other != name for at, other in newest):
                found.append(name)
        return found

    def dead(self, now: float) -> list[str]:
        """Endpoints that are silent for so long that the connection must be dead."""
        return [name for name, pipe in self._pipes.items() if pipe.dead_at(now) <= now]

    def excuse(self, late_s: float, now: float) -> None:
        """This process did not run for `late_s`: nobody is late because of that."""
        for pipe in self._pipes.values():
            pipe.excuse(late_s, now)

    def wake_at(self, now: float) -> float:
        """When something is late, suspect or dead, or a heartbeat due, next; later than `now`."""
        times = (
            time
            for pipe in self._pipes.values()
            for time in (pipe.late_at, pipe.suspect_at(now), pipe.dead_at(now), pipe.beat_at(self._heartbeat_s))
        )
        return min((time for time in times if time > now), default=INFINITY)

    def in_flight(self, endpoint: str) -> tuple[int, int]:
        """Blocks and bytes that wait for a PUBACK at `endpoint`."""
        pipe = self._pipes.get(endpoint)
        return (0, 0) if pipe is None else (pipe.blocks, pipe.bytes)

    def silent_s(self, endpoint: str, now: float) -> float:
        """How long `endpoint` has owed an answer without giving any."""
        pipe = self._pipes.get(endpoint)
        return 0.0 if pipe is None else pipe.silent_s(now)
