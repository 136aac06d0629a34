"""The aircraft's sensors: what the gateways' journeys hold, published at QoS 1 until every message is acknowledged."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cloud.demo.journey import Message
from cloud.replay import Progress, Publisher, SensorBroker

WINDOW = 400


def play(broker: SensorBroker, journeys: list[list[Message]], messages_per_s: float, progress: Progress) -> None:
    """Publish all journeys at once, each in its own order; returns when the broker has acknowledged everything.

    Args:
        messages_per_s: the speed, over all journeys.
        progress: told the messages acknowledged so far, and their number in all.

    Raises:
        UnavailableError: the broker does not answer, or acknowledges nothing any more.
    """
    total = sum(len(journey) for journey in journeys)
    started = time.monotonic()
    with Publisher(broker, WINDOW) as publisher:
        for i, message in enumerate(interleave(journeys)):
            time.sleep(max(0.0, started + i / messages_per_s - time.monotonic()))
            publisher.publish(message.topic, message.payload)
            publisher.tell(progress, total)
        publisher.finish(progress, total)


def interleave(journeys: list[list[Message]]) -> Iterator[Message]:
    """Position and reading of the first journey, of the second, and so on, until all are at their end."""
    places = [0] * len(journeys)
    while any(place < len(journey) for place, journey in zip(places, journeys, strict=True)):
        for i, journey in enumerate(journeys):
            while places[i] < len(journey):
                message = journey[places[i]]
                places[i] += 1
                yield message
                if message.reading is not None:
                    break
