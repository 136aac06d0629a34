"""A sensor side: one thread, one connection to a broker of the sensors, whole batches into the inlet.

- The thread owns the socket. It waits in one place (`select`), on the socket and on a wake-up pipe, always with a limit.
- While messages come densely, a breath is taken before each read: brokers send message by message, and to wake up for each
  costs more than to read it.
- Back-pressure: while the inlet has no room and the open batch is full, the socket is not read, so TCP holds the broker.
  Keepalive pings go on meanwhile, and the broker's silence is not held against it.
- `Batch.release()` queues the PUBACKs, in any thread, without blocking; the thread sends them in one piece. If the connection
  has changed since, nothing is sent: the broker delivers those messages again.
- The session is persistent and QoS 1 is asked for; a broker that grants less is refused. A filter that the session has from an earlier
  configuration is given up.
- Connection losses are retried for ever with decorrelated jitter (Brooker, 2015); the last error stays in `status`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.mqtt import frames
from edge_agent.mqtt.inlet import Batch, Inlet, OpenBatch, Wake
from edge_agent.mqtt.side import SideStatus, SideThread
from edge_agent.mqtt.tls import tls_context
from edge_agent.subscriptions import Subscriptions

if TYPE_CHECKING:
    from edge_agent.config import Tls

log = logging.getLogger(__name__)

RECV_BYTES = 256 * 1024
OUTBOX_BYTES_MAX = 4 * 1024 * 1024
IDLE_S_MAX = 60.0
BREATH_S = 0.001
DENSE_S = 0.0025  # a breath, and what reading and cutting may take
_SUBSCRIBE_ID, _UNSUBSCRIBE_ID = 1, 2


@dataclass(frozen=True)
class SourceConfig:
    """One sensor broker and one filter. `version`: 4 is MQTT 3.1.1, 5 is 5.

    `packet_bytes_max`: a larger message arrives cut to this size, so it must be above `payload_bytes_max` of every contract.
    """

    host: str
    port: int
    client_id: str
    subscribe: str
    version: frames.Version = 4
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Tls | None = None
    keepalive_s: int = 30
    session_expiry_s: int = 30 * 24 * 3600
    connect_timeout_s: float = 10.0
    backoff_s_min: float = 0.2
    backoff_s_max: float = 30.0
    packet_bytes_max: int = frames.PACKET_BYTES_MAX

    def __post_init__(self) -> None:
        if self.keepalive_s < 2:  # pings go out at half of it
            raise ConfigError(f"sensors: keepalive_s {self.keepalive_s} is too small; at least 2")
        if not 0 < self.backoff_s_min <= self.backoff_s_max or self.packet_bytes_max < 1024:
            raise ConfigError(
                f"sensors: want 0 < backoff_s_min {self.backoff_s_min} <= backoff_s_max {self.backoff_s_max}, "
                f"packet_bytes_max {self.packet_bytes_max} >= 1024"
            )


@dataclass(frozen=True)
class SourceStatus(SideStatus):
    """How the source stands."""

    connections: int = 0


class Source:
    """Reads one sensor broker in its own thread, from `start` to `stop`."""

    def __init__(self, config: SourceConfig, inlet: Inlet, subscriptions: Subscriptions) -> None:
        self._config = config
        self._inlet = inlet
        self._subscriptions, self._session = subscriptions, f"{config.client_id} at {config.host}:{config.port}"
        if config.tls is not None:
            tls_context(config.tls)  # every connection reads the files again; here it is said at once if they do not load
        self._status = SourceStatus()
        self._thread = SideThread("source", self._run, inlet)

    def start(self) -> None:
        """Start the thread; it connects and keeps connected."""
        self._thread.start()

    def stop(self) -> None:
        """End the connection and the thread. What was not released is delivered again to the next session."""
        self._thread.stop()

    @property
    def status(self) -> SourceStatus:
        """A snapshot, from any thread."""
        return self._status

    def _run(self) -> None:
        try:
            self._keep_connected()
        finally:
            self._status = self._status.ended()

    def _keep_connected(self) -> None:
        pause_s = self._config.backoff_s_min
        while not self._thread.stopping.is_set():
            started = time.monotonic()
            try:
                self._connect_and_read()
            except (UnavailableError, ContractError) as e:
                self._status = replace(self._status.ended(), error=str(e))
                log.warning("source connection lost broker=%s:%d error=%s", self._config.host, self._config.port, e)
            if time.monotonic() - started > self._config.backoff_s_max:  # it held: forget earlier failures
                pause_s = self._config.backoff_s_min
            pause_s = min(self._config.backoff_s_max, random.uniform(self._config.backoff_s_min, 3 * pause_s))
            self._thread.stopping.wait(pause_s)

    def _connect_and_read(self) -> None:
        inlet = self._inlet
        with contextlib.closing(_Connection(self._config, self._thread.wake, inlet)) as connection:
            while not self._thread.stopping.is_set():
                for packet in connection.step(hungry=inlet.hungry):
                    self._on_packet(packet, connection)
                if inlet.room:
                    batch = connection.take_batch(hungry=inlet.hungry)
                    if batch is not None:
                        self._status = self._status.after(batch)
                        inlet.put(batch)
                if connection.full != self._status.paused:
                    self._status = replace(self._status, paused=connection.full)
            connection.finish()

    def _on_packet(self, packet: frames.Packet, connection: _Connection) -> None:
        config = self._config
        if isinstance(packet, frames.PingResp):
            return
        if isinstance(packet, frames.UnsubAck):
            self._on_unsubscribed(packet)
            return
        refused = frames.refusal(packet, config.version)
        if isinstance(packet, frames.Disconnect):
            raise UnavailableError(f"broker {config.host}:{config.port} disconnected us: {refused or 'no reason given'}")
        if isinstance(packet, frames.ConnAck):
            if refused:
                raise UnavailableError(f"broker {config.host}:{config.port} refuses client {config.client_id!r}: {refused}")
            if self._status.connections and not packet.session_present:
                log.warning("source session lost by broker client=%s hint=messages queued meanwhile are gone", config.client_id)
            connection.accepted(packet, self._former(packet.session_present))
            return
        if refused or packet.packet_id != _SUBSCRIBE_ID or packet.codes != (1,):
            got = refused or f"granted QoS {packet.codes} instead of (1,)"
            raise UnavailableError(f"broker {config.host}:{config.port} refuses the subscription to {config.subscribe!r}: {got}")
        connection.subscribed()
        self._status = replace(self._status, connected=True, error="", connections=self._status.connections + 1)
        log.info("source connected broker=%s:%d filter=%s", config.host, config.port, config.subscribe)

    def _former(self, session_present: bool) -> list[str]:
        """Filters that the broker may hold for this session and that are not wanted any more; what is wanted is noted with them."""
        wanted = self._config.subscribe
        former = [f for f in self._subscriptions.held(self._session) if f != wanted] if session_present else []
        self._subscriptions.note(self._session, [*former, wanted])
        return former

    def _on_unsubscribed(self, packet: frames.UnsubAck) -> None:
        refused = frames.refusal(packet, self._config.version)
        if refused:  # the next connection asks again
            log.warning("source cannot give up its former filters client=%s error=%s", self._config.client_id, refused)
            return
        self._subscriptions.note(self._session, [self._config.subscribe])
        log.info("source gave up its former filters client=%s filter=%s", self._config.client_id, self._config.subscribe)


class _Connection:
    """One connection: socket, decoder, the open batch, what is to be sent, and the times that matter.

    Only `send` may be called from other threads.
    """

    def __init__(self, config: SourceConfig, wake: Wake, inlet: Inlet) -> None:
        self._config = config
        self._limits = inlet.limits
        self._wake = wake
        self._decoder = frames.Decoder(config.version, config.packet_bytes_max)
        self._lock = threading.Lock()  # guards _outbox and _closed
        self._outbox = bytearray()
        self._closed = False
        self._open = OpenBatch(self._limits)
        self._acks: list[bytes] = []
        self._more = False  # the decoder holds whole packets
        self._keepalive_s = float(config.keepalive_s)
        self._pinged: float | None = None  # since when an answer is due
        self._handshake = True
        self._dense = False
        self._outbox += frames.connect(
            config.version,
            config.client_id,
            config.keepalive_s,
            username=config.username,
            password=config.password,
            session_expiry_s=config.session_expiry_s,
        )
        self._socket = _open_socket(config)
        self._heard = self._sent = time.monotonic()
        self._deadline = self._heard + config.connect_timeout_s

    def send(self, data: bytes) -> None:
        """Queue bytes for sending; dropped if the connection is closed."""
        with self._lock:
            if self._closed:
                return
            self._outbox += data
        self._wake.set()

    def accepted(self, packet: frames.ConnAck, former: list[str]) -> None:
        """The broker took our CONNECT: subscribe, and give up the `former` filters."""
        if packet.keepalive_s:
            self._keepalive_s = float(packet.keepalive_s)
        self.send(frames.subscribe(self._config.version, _SUBSCRIBE_ID, self._config.subscribe))
        if former:
            self.send(frames.unsubscribe(self._config.version, _UNSUBSCRIBE_ID, former))

    def subscribed(self) -> None:
        """The handshake is complete."""
        self._handshake = False

    @property
    def full(self) -> bool:
        """The open batch takes no more: nothing is read until it has been taken."""
        return not self._open.room

    def step(self, hungry: bool) -> list[frames.Packet]:
        """Wait for something to do, read once unless full, send; gives packets that are not publishes.

        Args:
            hungry: the consumer waits, so the open batch should not, once it is old enough.

        Raises:
            UnavailableError: the connection is lost or silent for too long.
            ContractError: the broker breaks the protocol.
        """
        reading = not self.full
        with self._lock:
            writing = bool(self._outbox)
        ready = self._more or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0)
        if reading and not ready and self._dense:
            time.sleep(BREATH_S)
        wait_s = 0.0 if reading and ready else self._wait_s(time.monotonic(), hungry)
        readable = self._select(reading, writing, wait_s)
        packets: list[frames.Packet] = []
        if reading and (readable or ready):
            packets = self._read()
        self._flush()
        self._keep_alive(reading)
        return packets

    def take_batch(self, hungry: bool) -> Batch | None:
        """The open batch, if it is full or its time has come."""
        full = self._open
        if not full.ready(hungry):
            return None
        acks = b"".join(self._acks)
        self._open, self._acks = OpenBatch(self._limits), []
        return Batch(full.topics, full.payloads, full.received_us, functools.partial(self.send, acks) if acks else None)

    def finish(self) -> None:
        """Say goodbye after a wanted end; what was released is sent before."""
        self.send(frames.disconnect(self._config.version))
        with contextlib.suppress(UnavailableError):  # we leave anyway
            self._flush()

    def close(self) -> None:
        """Drop the connection; later releases of its batches have no effect."""
        with self._lock:
            self._closed = True
            self._outbox.clear()
        self._socket.close()

    def _wait_s(self, now: float, hungry: bool) -> float:
        due = min(IDLE_S_MAX, (self._deadline if self._handshake else self._next_ping()) - now)
        if self._pinged is not None:
            due = min(due, self._pinged + self._ping_timeout_s - now)
        if hungry:
            due = min(due, self._open.due_s(now))
        return max(0.0, due)

    def _select(self, reading: bool, writing: bool, wait_s: float) -> bool:
        """Wait; True if the socket can be read."""
        wanted = (select.POLLIN if reading else 0) | (select.POLLOUT if writing else 0)
        poll = select.poll()
        poll.register(self._wake.fileno(), select.POLLIN)
        if wanted:  # without, poll would still report a hang-up, again and again
            poll.register(self._socket.fileno(), wanted)
        events = dict(poll.poll(wait_s * 1000 + (0.5 if wait_s else 0)))  # rounded up, or it would spin at the end
        if self._wake.fileno() in events:
            self._wake.clear()
        return bool(events.get(self._socket.fileno(), 0) & ~select.POLLOUT)

    def _read(self) -> list[frames.Packet]:
        data = b""
        if not self._more:
            try:
                data = self._receive()
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return []
            except OSError as e:
                raise UnavailableError(f"broker {self._config.host}:{self._config.port}: connection lost: {e}") from e
            if not data:
                during = "during the handshake (wrong credentials or version?)" if self._handshake else ""
                raise UnavailableError(f"broker {self._config.host}:{self._config.port} closed the connection {during}".rstrip())
            now = time.monotonic()
            self._dense = now - self._heard < DENSE_S
            self._heard, self._pinged = now, None
        cut = self._decoder.feed(data, self._open.room)
        self._more = cut.more
        if cut.payloads:
            self._open.add(cut.topics, cut.payloads, cut.size)
            self._acks.append(cut.acks)
        return cut.packets

    def _receive(self) -> bytes:
        """What has come, at most RECV_BYTES. TLS gives one record at a time, and a broker makes one of every message."""
        data = self._socket.recv(RECV_BYTES)
        if not data or not isinstance(self._socket, ssl.SSLSocket):
            return data
        records, size = [data], len(data)
        with contextlib.suppress(OSError):  # nothing more, or an end that the next call meets again
            while size < RECV_BYTES and (data := self._socket.recv(RECV_BYTES - size)):
                records.append(data)
                size += len(data)
        return b"".join(records)

    def _flush(self) -> None:
        """Send what the socket takes now."""
        with self._lock:
            if not self._outbox:
                return
            try:
                sent = self._socket.send(self._outbox)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                sent = 0
            except OSError as e:
                raise UnavailableError(f"broker {self._config.host}:{self._config.port}: connection lost: {e}") from e
            del self._outbox[:sent]
            left = len(self._outbox)
        if sent:
            self._sent = time.monotonic()
        if left > OUTBOX_BYTES_MAX:
            raise UnavailableError(f"broker {self._config.host}:{self._config.port} takes no acknowledgements, {left} bytes wait")

    @property
    def _ping_timeout_s(self) -> float:
        return min(self._keepalive_s / 2, 10.0)

    def _next_ping(self) -> float:
        """We must be heard, and want to hear, at least every half keepalive."""
        return (self._sent if self._pinged is not None else min(self._sent, self._heard)) + self._keepalive_s / 2

    def _keep_alive(self, reading: bool) -> None:
        now = time.monotonic()
        if self._handshake and now > self._deadline:
            seconds = self._config.connect_timeout_s
            raise UnavailableError(f"broker {self._config.host}:{self._config.port} did not complete the handshake in {seconds} s")
        if self._pinged is not None and not reading:
            self._pinged = now  # the answer may lie unread behind what we do not read
        if self._pinged is not None and now - self._pinged > self._ping_timeout_s:
            raise UnavailableError(f"broker {self._config.host}:{self._config.port} silent for {now - self._heard:.1f} s")
        if not self._handshake and now >= self._next_ping():
            self.send(frames.PINGREQ)
            self._flush()
            self._sent = now
            self._pinged = now if self._pinged is None else self._pinged


def _open_socket(config: SourceConfig) -> socket.socket:
    try:
        tls = None if config.tls is None else tls_context(config.tls)
        raw = socket.create_connection((config.host, config.port), config.connect_timeout_s)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wrapped = raw if tls is None else tls.wrap_socket(raw, server_hostname=config.host)
        except BaseException:
            raw.close()
            raise
    except (OSError, ValueError, ConfigError) as e:  # ValueError: a host name that cannot be encoded; ConfigError: files being renewed
        raise UnavailableError(f"broker {config.host}:{config.port} is not reachable: {e}") from e
    wrapped.setblocking(False)
    return wrapped
