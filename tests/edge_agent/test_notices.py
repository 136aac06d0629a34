"""Events in memory: in order, within limits, over lost links."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_agent.contract.topics import DeviceTopics
from edge_agent.notices import EVENTS_MAX, Notices


@dataclass
class Wire:
    """A link of which only the name and what was published matter."""

    name: str
    sent: list[bytes] = field(default_factory=list)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        self.sent.append(payload)
        return len(self.sent)


def test_events_of_a_lost_link_go_to_another_in_their_order() -> None:
    notices, lost, other = Notices(DeviceTopics("plane-01")), Wire("eu"), Wire("us")
    events = [b"%d" % n for n in range(5)]
    for event in events:
        notices.add(event)
    notices.publish(lost)  # type: ignore[arg-type]
    notices.acked("eu", 1)
    notices.lost("eu")
    notices.publish(other)  # type: ignore[arg-type]
    assert lost.sent == events
    assert other.sent == events[1:]
    for mid in range(1, 5):
        notices.acked("us", mid)
    assert not notices.pending


def test_oldest_events_give_way_and_are_counted() -> None:
    notices, wire = Notices(DeviceTopics("plane-01")), Wire("eu")
    for n in range(EVENTS_MAX + 3):
        notices.add(b"%d" % n)
    notices.publish(wire)  # type: ignore[arg-type]
    assert notices.dropped == 3
    assert wire.sent[0] == b"3"
