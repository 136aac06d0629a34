"""The cloud's end of a regional broker: what devices send, on a queue; what they are told, published.

- MQTT 3.1.1, QoS 1, a persistent session: what arrives while the ingest is down is kept by the broker.
- A message is PUBACKed when it is released, not when it arrives. A release after a reconnect does nothing: its number may name
  another message by then, and the broker sends the unacknowledged ones again.
- The broker's limit of unacknowledged messages bounds the queue. It does not count messages of QoS 0, which Fenceline's devices do not
  send for blocks: beyond UNCOUNTED_MAX waiting messages they are dropped, as MQTT allows.
- paho's callbacks only put messages on the queue.
"""

from __future__ import annotations

import logging
import queue
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from cloud.config import Region
from edge_agent.contract.topics import ALL_BLOCKS

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
RECONNECT_S = (0.1, 2.0)
QOS = 1
UNCOUNTED_MAX = 10_000


@dataclass(frozen=True)
class Received:
    """A message; `connection` and `mid` are for its PUBACK, `retained` says that the broker had kept it."""

    topic: str
    payload: bytes
    connection: int
    mid: int
    retained: bool
    qos: int = QOS


class Intake:
    """A session with a region's broker. `filters` are subscribed at every connection."""

    def __init__(
        self,
        region: Region,
        user: str,
        password: str,
        *,
        filters: Sequence[str] = (ALL_BLOCKS,),
        client_id: str = "",
        persistent: bool = True,
    ) -> None:
        self.region = region
        self.queue: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self.connection = 0  # rises with every connection
        self.connected = False
        self._filters = list(filters)
        self._client = Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"ingest-{region.name}",
            clean_session=not persistent,
            manual_ack=True,
        )
        self._client.username_pw_set(user, password)
        self._client.reconnect_delay_set(*RECONNECT_S)  # type: ignore[arg-type]
        self._client.on_socket_open = _no_delay
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    def open(self) -> None:
        """Connect, and again whenever the connection is lost; does not wait."""
        self._client.connect_async(self.region.host, self.region.port, KEEPALIVE_S)
        self._client.loop_start()

    def release(self, batch: Sequence[Received]) -> None:
        """PUBACK messages, unless the connection that brought them is gone. Those of QoS 0 have no PUBACK: it would break the protocol."""
        for message in batch:
            if message.qos and self.connected and message.connection == self.connection:
                self._client.ack(message.mid, QOS)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, qos: int = 0) -> bool:
        """Send; False if there is no connection now, and then it is not sent later either."""
        if not self.connected:
            return False
        return self._client.publish(topic, payload, qos=qos, retain=retain).rc == MQTTErrorCode.MQTT_ERR_SUCCESS

    def close(self) -> None:
        """Disconnect and end the thread."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: Client, data: Any, flags: ConnectFlags, code: ReasonCode, properties: Properties | None) -> None:
        if code.is_failure:
            log.warning("broker refused region=%s reason=%s", self.region.name, code)
            return
        self.connection += 1
        client.subscribe([(f, QOS) for f in self._filters])

    def _on_subscribe(self, client: Client, data: Any, mid: int, codes: list[ReasonCode], properties: Properties | None) -> None:
        self.connected = not any(code.is_failure for code in codes)
        log.info("broker connected region=%s subscribed=%s", self.region.name, self.connected)

    def _on_disconnect(self, client: Client, data: Any, flags: DisconnectFlags, code: ReasonCode, properties: Properties | None) -> None:
        self.connected = False
        log.info("broker lost region=%s reason=%s", self.region.name, code)

    def _on_message(self, client: Client, data: Any, message: MQTTMessage) -> None:
        if not message.qos and self.queue.qsize() >= UNCOUNTED_MAX:
            return
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = repr(message._topic)
        self.queue.put(Received(topic, bytes(message.payload), self.connection, message.mid, message.retain, message.qos))


def _no_delay(client: Client, data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
