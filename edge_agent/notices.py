"""What the device tells the cloud beside blocks: its reported state, retained, and events.

- `reported` goes to every connected endpoint when it has changed or the endpoint has connected again.
- An event goes to one endpoint, and to another if that is lost before it acknowledged it. At most EVENTS_MAX wait in memory; the
  oldest give way.
"""

from __future__ import annotations

from collections import deque

from edge_agent.contract.topics import DeviceTopics
from edge_agent.mqtt.link import Link

EVENTS_MAX = 1_000
EVENTS_IN_FLIGHT_MAX = 32


class Notices:
    """See the module's rules."""

    def __init__(self, topics: DeviceTopics) -> None:
        self._topics = topics
        self._reported: bytes | None = None
        self._reported_to: dict[str, bytes] = {}
        self._events: deque[bytes] = deque()
        self._in_flight: dict[tuple[str, int], bytes] = {}
        self.dropped = 0

    @property
    def pending(self) -> bool:
        """Is there an event that nobody has acknowledged?"""
        return bool(self._events or self._in_flight)

    def report(self, reported: bytes) -> None:
        self._reported = reported

    def add(self, event: bytes) -> None:
        self._events.append(event)
        if len(self._events) > EVENTS_MAX:
            self._events.popleft()
            self.dropped += 1

    def publish(self, link: Link) -> None:
        """Send what `link`'s endpoint does not know.

        Raises:
            UnavailableError: the connection is gone.
        """
        if self._reported is not None and self._reported_to.get(link.name) != self._reported:
            link.publish(self._topics.reported, self._reported, retain=True)
            self._reported_to[link.name] = self._reported
        while self._events and len(self._in_flight) < EVENTS_IN_FLIGHT_MAX:
            mid = link.publish(self._topics.events, self._events[0])
            self._in_flight[(link.name, mid)] = self._events.popleft()

    def acked(self, endpoint: str, mid: int) -> None:
        self._in_flight.pop((endpoint, mid), None)

    def lost(self, endpoint: str) -> None:
        """The connection is gone, and what it had not acknowledged waits again, in its order."""
        self._reported_to.pop(endpoint, None)
        for key in [key for key in reversed(self._in_flight) if key[0] == endpoint]:
            self._events.appendleft(self._in_flight.pop(key))
