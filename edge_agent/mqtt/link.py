"""One connection to one endpoint, over paho-mqtt. It carries blocks up and receipts and control down.

- A link lives once: `open`, then events on the inbox, then one `Lost`, and nothing after it. To connect again, make
  another. So no message of an old connection is ever sent again behind our back: the buffer is the durable part.
- Nothing here blocks the caller: connecting and TLS run in a thread of their own, closing does not wait.
- paho's callbacks only put events on the inbox; they never block and never send.
- A connection is dead when paho's ping has no answer within `keepalive_s`, or TCP has none within the same time.

MQTT 3.1.1, clean session, QoS 1.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.topics import DeviceTopics
from edge_agent.mqtt.tls import tls_context

if TYPE_CHECKING:
    from edge_agent.config import Tls

log = logging.getLogger(__name__)

PACKET_BYTES_MAX = 1024 * 1024  # that an endpoint may send: receipts are up to a quarter of it, desired documents are small
CONNECT_TIMEOUT_S = 8.0  # the router's patience, and no shorter


@dataclass(frozen=True)
class EndpointConfig:
    """A broker in a region. With `tls` the server is verified, and a client certificate shown if it names one."""

    name: str
    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    keepalive_s: int = 30


@dataclass(frozen=True)
class Connected:
    """The broker accepted us."""

    link: Link


@dataclass(frozen=True)
class Lost:
    """The connection ended or never came to be; the link's last event."""

    link: Link
    reason: str


@dataclass(frozen=True)
class Acked:
    """The broker acknowledged the message `mid`."""

    link: Link
    mid: int


@dataclass(frozen=True)
class Message:
    """A message arrived."""

    link: Link
    topic: str
    payload: bytes


LinkEvent = Connected | Lost | Acked | Message


class _Client(Client):
    """paho, which would take in packets of up to 256 MiB: `broken` says why it was cut off here. The method is paho's own business; a test
    sends such a packet.
    """

    broken = ""

    def _sock_recv(self, bufsize: int) -> bytes:
        if bufsize > PACKET_BYTES_MAX:
            self.broken = f"the broker sends a packet of {bufsize} bytes; at most {PACKET_BYTES_MAX} are taken"
            raise ConnectionAbortedError(self.broken)
        return super()._sock_recv(bufsize)


class Link:
    """A connection to `endpoint`; events go to `inbox`. The user of the inbox calls the methods, from one thread."""

    def __init__(self, endpoint: EndpointConfig, topics: DeviceTopics, inbox: SimpleQueue[Any]) -> None:
        self.endpoint = endpoint
        self._topics, self._inbox = topics, inbox
        self._ended = threading.Lock()
        self._closing = threading.Event()
        self._client = self._make_client()

    @property
    def name(self) -> str:
        return self.endpoint.name

    def open(self) -> None:
        """Begin to connect. `Connected` or `Lost` follows."""
        threading.Thread(target=self._connect, name=f"connect-{self.name}", daemon=True).start()

    def subscribe(self) -> None:
        """Ask for receipts and the desired state. A refusal ends the link: without receipts it is of no use."""
        self._client.subscribe([(self._topics.receipts, 1), (self._topics.desired, 1)])

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Send with QoS 1 and return the message id that `Acked` will carry.

        Raises:
            UnavailableError: the connection is gone; `Lost` follows or is on the inbox already.
        """
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            raise UnavailableError(f"endpoint {self.name}: {info.rc.name}")
        return info.mid

    def close(self) -> None:
        """Say goodbye to the broker after what was published, without waiting for it."""
        self._closing.set()
        self._end("closed")
        self._client.disconnect()

    def abort(self, reason: str) -> None:
        """Cut a connection that does not answer any more."""
        self._closing.set()
        self._end(reason)
        sock = self._client.socket()
        if isinstance(sock, socket.socket):
            # Not sock.shutdown(): that of an SSL socket drops TLS, and what paho still sends would go out in the clear.
            with contextlib.suppress(OSError):  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def _make_client(self) -> _Client:
        client = _Client(CallbackAPIVersion.VERSION2, self._topics.device, clean_session=True, reconnect_on_failure=False)
        client.max_inflight_messages_set(0)  # the uplink has the limit
        client.connect_timeout = CONNECT_TIMEOUT_S
        if self.endpoint.username is not None:
            client.username_pw_set(self.endpoint.username, self.endpoint.password)
        client.on_connect = _weakly(self._on_connect)
        client.on_disconnect = _weakly(self._on_disconnect)
        client.on_subscribe = _weakly(self._on_subscribe)
        client.on_publish = _weakly(self._on_publish)
        client.on_message = _weakly(self._on_message)
        client.on_socket_open = _weakly(self._on_socket_open)
        return client

    def _connect(self) -> None:
        try:
            if self.endpoint.tls is not None:  # read anew each time: certificates are renewed, and not all their files at once
                self._client.tls_set_context(tls_context(self.endpoint.tls))
            self._client.connect(self.endpoint.host, self.endpoint.port, self.endpoint.keepalive_s)
        except (OSError, ValueError, ConfigError) as e:  # ValueError: paho found no usable address
            self._end(f"cannot connect to {self.endpoint.host}:{self.endpoint.port}: {e}")
            return
        self._client.loop_start()
        if self._closing.is_set():  # close() or abort() came before there was a socket
            self._client.disconnect()

    def _end(self, reason: str) -> None:
        if self._ended.acquire(blocking=False):
            self._inbox.put(Lost(self, reason))

    def _put(self, event: LinkEvent) -> None:
        if not self._ended.locked():
            self._inbox.put(event)

    def _on_socket_open(self, _client: Client, _data: Any, sock: Any) -> None:
        """Just before CONNECT.

        Raises:
            ConnectionAbortedError: this link was given up meanwhile; to connect now would end the session of the one that followed.
        """
        if self._closing.is_set():
            raise ConnectionAbortedError("given up")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, self.endpoint.keepalive_s * 1000)

    def _on_connect(self, _client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._end(f"refused: {reason}")
        else:
            self._put(Connected(self))

    def _on_disconnect(self, _client: Client, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._end(self._client.broken or f"disconnected: {reason}")

    def _on_subscribe(self, _client: Client, _data: Any, _mid: int, reasons: list[Any], _properties: Any) -> None:
        refused = [str(r) for r in reasons if r.is_failure]
        if refused:
            self._end(f"subscription refused: {', '.join(refused)}")

    def _on_publish(self, _client: Client, _data: Any, mid: int, _reason: Any, _properties: Any) -> None:
        self._put(Acked(self, mid))

    def _on_message(self, _client: Client, _data: Any, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError as e:  # raised here, it would end paho's thread, and nobody would know
            self._end(f"the broker breaks the protocol: a topic is not UTF-8: {e.object[:32]!r}")
            return
        self._put(Message(self, topic, bytes(message.payload)))


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Call `method` while its object lives. Without it client and link hold each other, and file descriptors wait for the collector."""
    reference = weakref.WeakMethod(method)

    def call(*values: Any) -> None:
        target = reference()
        if target is not None:
            target(*values)

    return call
