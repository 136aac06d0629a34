"""The aircraft's sensors: they publish at QoS 1 and count what the broker has acknowledged.

- At most WINDOW messages are on their way; then the next one waits for the oldest acknowledgement.
- Only a reading whose PUBACK came counts as published: that is what the fleet promises not to lose.
- One connection for all devices, so the broker keeps each device's order.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import TracebackType

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

from cloud.demo.journey import Message, Reading
from edge_agent.contract.errors import UnavailableError

WINDOW = 400
CONNECT_S = 20.0
ACKNOWLEDGE_S = 60.0


@dataclass
class Sensors:
    """A publisher on the sensor broker. `published` are the acknowledged readings, `payload_bytes` their JSON."""

    host: str
    port: int
    username: str
    password: str
    published: list[Reading] = field(default_factory=list)
    payload_bytes: int = 0

    def __enter__(self) -> Sensors:
        self._answers: queue.SimpleQueue[ReasonCode] = queue.SimpleQueue()
        self._waiting: deque[tuple[mqtt.MQTTMessageInfo, Message]] = deque()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="fenceline-demo-sensors", clean_session=True)
        self._client.username_pw_set(self.username, self.password)
        self._client.on_connect = self._on_connect
        self._client.max_inflight_messages_set(WINDOW)
        try:
            self._client.connect(self.host, self.port, keepalive=60)
        except OSError as e:
            raise UnavailableError(f"sensor broker {self.host}:{self.port} does not answer: {e}") from e
        self._client.loop_start()
        try:
            answer = self._answers.get(timeout=CONNECT_S)
        except queue.Empty:
            answer = None
        if answer is None or answer.is_failure:
            self._client.loop_stop()
            raise UnavailableError(f"sensor broker {self.host}:{self.port} refused the connection: {answer or 'no answer'}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def publish(self, messages: Iterable[Message], progress: Callable[[int], None] = lambda readings: None) -> None:
        """Publish all, and return when all are acknowledged.

        Args:
            messages: in the order to send.
            progress: told how many more readings are acknowledged.

        Raises:
            UnavailableError: the broker refuses, or leaves a message unacknowledged for ACKNOWLEDGE_S.
        """
        for message in messages:
            while len(self._waiting) >= WINDOW:
                self._settle(progress)
            info = self._client.publish(message.topic, message.payload, qos=1)
            if info.rc != mqtt.MQTT_ERR_SUCCESS:
                raise UnavailableError(f"sensor broker refused a message on {message.topic}: {mqtt.error_string(info.rc)}")
            self._waiting.append((info, message))
        while self._waiting:
            self._settle(progress)

    def _on_connect(self, _client: mqtt.Client, _data: object, _flags: object, code: ReasonCode, _properties: object) -> None:
        self._answers.put(code)

    def _settle(self, progress: Callable[[int], None]) -> None:
        """Wait for the oldest acknowledgement."""
        info, message = self._waiting.popleft()
        info.wait_for_publish(ACKNOWLEDGE_S)
        if not info.is_published():
            raise UnavailableError(f"sensor broker {self.host}:{self.port} did not acknowledge a message within {ACKNOWLEDGE_S:.0f} s")
        if message.reading is not None:
            self.published.append(message.reading)
            self.payload_bytes += len(message.payload)
            progress(1)


def interleave(journeys: list[list[Message]]) -> Iterator[Message]:
    """All devices at once: position and reading of the first, of the second, and so on, each in its own order."""
    places = [0] * len(journeys)
    while any(place < len(journey) for place, journey in zip(places, journeys, strict=True)):
        for i, journey in enumerate(journeys):
            while places[i] < len(journey):
                message = journey[places[i]]
                places[i] += 1
                yield message
                if message.reading is not None:
                    break
