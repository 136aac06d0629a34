"""The cloud's end of a regional broker: what devices send, on a queue; what they are told, published.

- MQTT 3.1.1 or 5, QoS 1, a persistent session: what arrives while the ingest is down is kept by the broker; on MQTT 5 for
  SESSION_EXPIRY_S, and after that the devices send it again.
- A message is PUBACKed when it is released, not when it arrives. A release after a reconnect does nothing: its number may name
  another message by then, and the broker sends the unacknowledged ones again.
- What is not `kept` is for another session: it is PUBACKed at once.
- A broker that loses patience (NATS after `ack_wait`) sends a message again that is still on its way here: it is not taken twice.
- The limit of unacknowledged messages bounds the queue: ours on MQTT 5, the broker's on 3.1.1. It does not count messages of QoS 0,
  which Fenceline's devices do not send for blocks: beyond UNCOUNTED_BYTES_MAX of unreleased ones they are dropped, as MQTT allows.
- paho's callbacks only put messages on the queue.
- Nobody asks for the properties of a message (MQTT 5), and they are not read: a sender writes into them what it likes.
"""

from __future__ import annotations

import logging
import queue
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage, MQTTv5, MQTTv311
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers
from paho.mqtt.reasoncodes import ReasonCode

from cloud.config import Region
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.topics import ALL_BLOCKS

log = logging.getLogger(__name__)

KEEPALIVE_S = 15
RECONNECT_S = (0.1, 2.0)
QOS = 1
UNCOUNTED_BYTES_MAX = 64 * 1024 * 1024
MESSAGE_BYTES = 1_024  # what one takes besides its payload
RECEIVE_MAX = 4_096
SESSION_EXPIRY_S = 3_600
FORGET_S = 5.0
_QOS_BITS = 0x06  # of the first byte of a PUBLISH


@dataclass(frozen=True, slots=True)
class Received:
    """A message; `connection` and `mid` are for its PUBACK, `retained` says that the broker had kept it."""

    topic: str
    payload: bytes
    connection: int
    mid: int
    retained: bool
    qos: int = QOS


def everything(topic: str) -> bool:
    """Keep all messages."""
    return True


class Intake:
    """A session with a region's broker. `filters` are subscribed at every connection. `None` on the queue is somebody's `wake`."""

    def __init__(
        self,
        region: Region,
        user: str,
        password: str,
        *,
        client_id: str,
        filters: Sequence[str] = (ALL_BLOCKS,),
        kept: Callable[[str], bool] = everything,
        persistent: bool = True,
    ) -> None:
        self.region = region
        self.queue: queue.SimpleQueue[Received | None] = queue.SimpleQueue()
        self.connection = 0  # rises with every connection
        self.connected = False  # and subscribed
        self._alive = False  # what a kept session brings comes before it is subscribed
        self._filters, self._kept = list(filters), kept
        self._persistent = persistent
        self._unreleased: set[int] = set()  # of this connection; no other message can have these numbers
        self._uncounted_bytes, self._uncounted = 0, threading.Lock()  # of messages of QoS 0, from their coming to their release
        self._client = _client(region, client_id, user, password, persistent=persistent)
        self._client.reconnect_delay_set(*RECONNECT_S)  # type: ignore[arg-type]
        self._client.on_socket_open = _no_delay
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message

    def open(self) -> None:
        """Connect, and again whenever the connection is lost; does not wait."""
        self._client.connect_async(self.region.host, self.region.port, KEEPALIVE_S, **_session(self.region, self._persistent))
        self._client.loop_start()

    def wake(self) -> None:
        """Put None on the queue: whoever waits there looks around."""
        self.queue.put(None)

    def release(self, batch: Sequence[Received]) -> None:
        """PUBACK messages, unless the connection that brought them is gone. Those of QoS 0 have no PUBACK: it would break the protocol."""
        for message in batch:
            if not message.qos:
                self._uncount(-len(message.payload) - MESSAGE_BYTES)
            elif self._alive and message.connection == self.connection:
                self._unreleased.discard(message.mid)
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
        self._unreleased.clear()
        self._alive = True
        client.subscribe([(f, QOS) for f in self._filters])

    def _on_subscribe(self, client: Client, data: Any, mid: int, codes: list[ReasonCode], properties: Properties | None) -> None:
        self.connected = not any(code.is_failure for code in codes)
        log.info("broker connected region=%s subscribed=%s", self.region.name, self.connected)

    def _on_disconnect(self, client: Client, data: Any, flags: DisconnectFlags, code: ReasonCode, properties: Properties | None) -> None:
        self.connected = self._alive = False
        log.info("broker lost region=%s reason=%s", self.region.name, code)

    def _on_message(self, client: Client, data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = repr(message._topic)
        if message.dup and message.mid in self._unreleased:
            return
        if self._kept(topic):
            if message.qos:
                self._unreleased.add(message.mid)
            elif not self._uncount(len(message.payload) + MESSAGE_BYTES):
                return
            self.queue.put(Received(topic, bytes(message.payload), self.connection, message.mid, message.retain, message.qos))
        elif message.qos:
            client.ack(message.mid, QOS)

    def _uncount(self, more_bytes: int) -> bool:
        """Add to the bytes that no acknowledgement bounds; False: there is no room for them."""
        with self._uncounted:
            if more_bytes > 0 and self._uncounted_bytes + more_bytes > UNCOUNTED_BYTES_MAX:
                return False
            self._uncounted_bytes += more_bytes
            return True


def forget(region: Region, client_id: str, user: str, password: str) -> None:
    """End a session that nobody will take up again: the broker would keep messages for it.

    Raises:
        UnavailableError: the broker did not answer in FORGET_S, or refused the connection all that time; the session is there still.
        ConfigError: there is no certificate of that name.
    """
    client, taken = _client(region, client_id, user, password, persistent=False), threading.Event()
    said = "did not answer"

    def answered(client: Client, data: Any, flags: ConnectFlags, code: ReasonCode, properties: Properties | None) -> None:
        nonlocal said
        if code.is_failure:
            said = f"refused ({code})"
        else:
            taken.set()

    client.on_connect = answered
    try:
        client.connect_async(region.host, region.port, KEEPALIVE_S, **_session(region, persistent=False))
        client.loop_start()
        if not taken.wait(FORGET_S):
            raise UnavailableError(f"broker of {region.name} {said} in {FORGET_S:.0f} s")
    finally:
        client.disconnect()
        client.loop_stop()


class _Client(Client):
    """paho, but for the properties of messages.

    It takes a text with U+FEFF there for a broken protocol, which it is not, and disconnects. The broker would send that message again
    at once, for ever.
    """

    def _handle_publish(self) -> MQTTErrorCode:
        if self._protocol == MQTTv5:
            self._in_packet["packet"] = _without_properties(self._in_packet["command"], self._in_packet["packet"])
        return super()._handle_publish()


def _without_properties(command: int, packet: bytearray) -> bytearray:
    """A PUBLISH with no properties, from the first byte of its header and all that comes after its length."""
    start = 2 + int.from_bytes(packet[:2], "big") + (2 if command & _QOS_BITS else 0)
    length, length_bytes = VariableByteIntegers.decode(packet[start : start + 4])
    return packet[:start] + b"\0" + packet[start + length_bytes + length :] if length else packet


def _client(region: Region, client_id: str, user: str, password: str, *, persistent: bool) -> Client:
    five = region.mqtt == 5
    clean = None if five else not persistent
    client = _Client(CallbackAPIVersion.VERSION2, client_id, clean, protocol=MQTTv5 if five else MQTTv311, manual_ack=True)
    if region.tls is not None:
        client.tls_set_context(region.tls.context(client_id))
    if region.tls is None or region.tls.cert_file is None:  # otherwise the certificate says who we are
        client.username_pw_set(user, password)
    return client


def _session(region: Region, persistent: bool) -> dict[str, Any]:
    """How MQTT 5 is told, at CONNECT, what 3.1.1 is told by the client's `clean_session`."""
    if region.mqtt != 5:
        return {}
    properties = Properties(PacketTypes.CONNECT)
    properties.ReceiveMaximum = RECEIVE_MAX
    properties.SessionExpiryInterval = SESSION_EXPIRY_S if persistent else 0
    return {"clean_start": not persistent, "properties": properties}


def _no_delay(client: Client, data: Any, sock: Any) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
