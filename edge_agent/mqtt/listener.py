"""Sensors connect to the agent itself: an MQTT 3.1.1 and 5 server that only takes messages in. One thread, hundreds of connections.

- PUBLISH with QoS 0 and 1. A PUBACK goes out after `Batch.release`: the message is on disk. There are no sessions (session
  present is always 0), no retained messages and no wills: they are accepted and dropped, as far as the standard lets us. QoS 2 and
  SUBSCRIBE are refused.
- Who may connect: everybody, or who has a password in `users_file`, or a certificate of `tls.ca_file`, or both where both are set.
  Passwords are hashed in a thread of their own; meanwhile only that client waits.
- A client that connects again under its client id ends its older connection; another user's client of that id stays.
- Messages of all clients share one open batch; how it is handed over is the inlet's rule. Back-pressure: while the inlet has no room and
  the batch is full, no client is read, and none is blamed for its silence; nor is it when this thread itself was kept from reading.
- Every client has limits (`PeerLimits`), all of them together too; who breaks one, or the protocol, goes alone. What came before is kept.
- The thread waits in one place, always with a limit. Two epoll sets lie inside one poll: leaving one out stops reading all clients.
"""

from __future__ import annotations

import functools
import logging
import select
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.mqtt import frames, server_frames
from edge_agent.mqtt.crowd import Crowd
from edge_agent.mqtt.door import Door, have_descriptors, refusal
from edge_agent.mqtt.inlet import Batch, Inlet, OpenBatch
from edge_agent.mqtt.peer import QUOTA_EXCEEDED, SHUTTING_DOWN, TAKEN_OVER, Peer, PeerLimits, State
from edge_agent.mqtt.side import SideStatus, SideThread
from edge_agent.mqtt.wire import PROTOCOL_ERROR, UNSUPPORTED_VERSION, FrameError

if TYPE_CHECKING:
    from edge_agent.addresses import Tls

log = logging.getLogger(__name__)

RECV_BYTES = 256 * 1024
IDLE_S_MAX = 60.0
CHECK_S = 0.25  # how often deadlines are looked at
LOG_S = 1.0  # at most one line about clients in this time
ACCEPT_RETRY_S = LISTEN_RETRY_S = 1.0

_Part = tuple[Peer, bytes, int]  # whose messages, their PUBACKs, their bytes


@dataclass(frozen=True)
class ListenerConfig:
    """Where to listen, whom to let in, and how much all clients together may cost. `port` 0: any free one."""

    host: str
    port: int
    tls: Tls | None = None
    users_file: Path | None = None
    connections_max: int = 512
    held_bytes_max: int = 32 * 1024 * 1024
    peer: PeerLimits = field(default_factory=PeerLimits)

    def __post_init__(self) -> None:
        if self.connections_max < 1 or not 1 <= self.peer.unacked_messages_max <= 65_535 or not 2 <= self.peer.keepalive_s_max <= 65_535:
            raise ConfigError("sensors: want connections_max >= 1, unacked_messages_max 1 to 65535, keepalive_s_max 2 to 65535")
        if self.peer.packet_bytes_max < 1024:
            raise ConfigError(f"sensors: packet_bytes_max {self.peer.packet_bytes_max} is too small; at least 1024")


@dataclass(frozen=True)
class ListenerStatus(SideStatus):
    """How the listener stands. `connected`: it listens. `last_lost`: which client was last sent away or lost, and why."""

    last_lost: str = ""
    connections: int = 0
    accepted: int = 0
    refused: int = 0


class Listener:
    """Serves sensors in its own thread, from `start` to `stop`."""

    def __init__(self, config: ListenerConfig, inlet: Inlet) -> None:
        """Read the files; ConfigError if they cannot be used."""
        self._config = config
        self._inlet = inlet
        self._thread = SideThread("listener", self._run, inlet)
        self._door = Door(config.tls, config.users_file, self._thread.wake.set)
        self._crowd = Crowd()
        self._poll = select.poll()
        self._status = ListenerStatus()
        self._open = OpenBatch(inlet.limits)
        self._parts: list[_Part] = []
        self._released: deque[list[_Part]] = deque()
        self._buffer = memoryview(bytearray(RECV_BYTES))
        self._made = 0  # client ids given out
        self._next_check = self._next_log = self._accept_again = self._paused_at = 0.0
        self._unsaid = 0

    def start(self) -> None:
        """Listen, at once or as soon as the address is there: its network may come up later. `status.error` says so until then.

        Raises:
            ConfigError: the address cannot be had.
        """
        have_descriptors(self._config.connections_max)
        try:
            self._listen()
        except UnavailableError as e:
            self._wait_for(e)
        self._thread.start()

    def _listen(self) -> None:
        self._door.open(self._config.host, self._config.port)
        for waited in (self._thread.wake, self._crowd.writers, self._crowd.readers, self._door):
            self._poll.register(waited.fileno(), select.POLLIN)
        self._status = replace(self._status, connected=True, error="")
        log.info("sensors listened address=%s:%d tls=%s", self._config.host, self.port, self._config.tls is not None)

    def _wait_for(self, error: UnavailableError | ConfigError) -> None:
        if self._status.error != str(error):
            log.warning("sensors not listened yet error=%s", error)
        self._status = replace(self._status, error=str(error))

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._door.port

    @property
    def status(self) -> ListenerStatus:
        """A snapshot, from any thread."""
        return replace(self._status, connections=len(self._crowd))

    def stop(self) -> None:
        """Send what was released, say goodbye, end the thread. What was not released comes again from the sensors."""
        self._thread.stop()

    def _run(self) -> None:
        try:
            while not (self._status.connected or self._thread.stopping.wait(LISTEN_RETRY_S)):
                try:
                    self._listen()
                except (UnavailableError, ConfigError) as e:  # the address has come, and is somebody else's: the agent runs by now
                    self._wait_for(e)
            while not self._thread.stopping.is_set():
                self._round()
            self._acknowledge()
        finally:
            self._close()

    def _round(self) -> None:
        waiting = self._wait()
        self._acknowledge()
        for peer, code in self._door.answers():
            self._guarded(peer, functools.partial(self._answer, peer, code))
        if self._door.fileno() in waiting:
            self._accept()
        for peer in self._crowd.writable():
            self._flush(peer)
        self._read()
        self._hand_over()
        self._expire()

    def _wait(self) -> set[int]:
        """Until something can be done; the file descriptors that say so."""
        paused = not self._open.room
        if paused != self._status.paused:
            self._pause(paused)
        now = time.monotonic()
        wait_s = self._next_check - now if len(self._crowd) or self._accept_again else IDLE_S_MAX
        if self._inlet.hungry:
            wait_s = min(wait_s, self._open.due_s(now))
        if self._crowd.ready and not paused:
            wait_s = 0.0
        wait_ms = wait_s * 1_000 + 0.5 if wait_s > 0 else 0.0  # rounded up, or it would spin at the end
        waiting = {fd for fd, _ in self._poll.poll(wait_ms)}
        if self._thread.wake.fileno() in waiting:
            self._thread.wake.clear()
        return waiting

    def _pause(self, paused: bool) -> None:
        """Read no client, or all of them again."""
        self._status = replace(self._status, paused=paused)
        if paused:
            self._poll.unregister(self._crowd.readers.fileno())
            self._paused_at = time.monotonic()
        else:
            self._poll.register(self._crowd.readers.fileno(), select.POLLIN)
            self._crowd.resume(time.monotonic() - self._paused_at)

    # Clients come and go.

    def _accept(self) -> None:
        try:
            for sock, address in self._door.accept():
                if len(self._crowd) >= self._config.connections_max and not self._make_room():
                    sock.close()
                    self._refuse(f"{address}: there are {len(self._crowd)} connections already (connections_max)")
                    continue
                now = time.monotonic()
                if not len(self._crowd):
                    self._next_check = now  # nobody was to be looked at until now
                self._crowd.add(Peer(sock, address, now, self._config.peer))
                self._status = replace(self._status, accepted=self._status.accepted + 1)
        except UnavailableError as e:  # others need file descriptors and memory too, so wait
            self._say(str(e))
            self._poll.unregister(self._door.fileno())
            self._accept_again = time.monotonic() + ACCEPT_RETRY_S

    def _make_room(self) -> bool:
        """Close the oldest connection that has said nothing yet; False if there is none."""
        oldest = self._crowd.early()
        if oldest is None:
            return False
        self._refuse(f"{oldest}: {oldest.state.value}, closed for a newer connection (connections_max)")
        self._crowd.drop(oldest)
        return True

    def _on_connect(self, peer: Peer, packet: server_frames.Connect) -> None:
        peer.check(packet)
        code = self._door.ask(peer, packet)
        if code is not None:
            self._answer(peer, code)

    def _answer(self, peer: Peer, code: int) -> None:
        """Let a client in, or tell it why not."""
        packet = peer.connect
        if peer.state is not State.CHECKING or packet is None:  # gone meanwhile
            return
        if code:
            self._refuse(f"{peer}: {frames.refusal(frames.ConnAck(False, code), 5)}")
            self._crowd.leave(peer, refusal(packet, code))
        else:
            self._admit(peer, packet)

    def _admit(self, peer: Peer, packet: server_frames.Connect) -> None:
        limits, given = self._config.peer, ""
        if not packet.client_id:
            self._made += 1
            given = f"fenceline-{peer.fd}-{self._made}"
        session = (f"{peer.identity}\0{self._door.user(packet)}", packet.client_id or given)
        old = self._crowd.take_session(peer, session)
        if old is not None:
            self._dismiss(old, TAKEN_OVER, "its client connected again")
        own = packet.version == 5 and not 0 < packet.keepalive_s <= limits.keepalive_s_max
        keepalive_s = limits.keepalive_s_max if own else packet.keepalive_s
        peer.welcome(session, keepalive_s)
        peer.send(
            server_frames.connack(
                packet.version,
                receive_max=limits.unacked_messages_max,
                packet_bytes_max=limits.packet_bytes_max,
                client_id=given,
                keepalive_s=keepalive_s if own else None,
            )
        )
        peer.flush()
        self._crowd.attend(peer)

    def _dismiss(self, peer: Peer, code: int, why: str) -> None:
        """End a connection, with a reason where the version has one."""
        self._say(f"{peer}: {why}")
        admitted = peer.state is State.OPEN
        if code == UNSUPPORTED_VERSION and not admitted:
            farewell = server_frames.connack(4, 1)
        else:
            farewell = frames.disconnect(5, code) if admitted and peer.decoder.version == 5 else b""
        self._crowd.leave(peer, farewell)

    def _guarded(self, peer: Peer, step: Callable[[], None]) -> None:
        """Whatever a peer does wrong ends that peer alone."""
        try:
            step()
        except UnavailableError as e:
            if peer.state is not State.LEAVING:
                self._say(f"{peer}: {e}")
            self._crowd.drop(peer)
        except ContractError as e:
            self._dismiss(peer, e.code if isinstance(e, FrameError) else PROTOCOL_ERROR, str(e))

    # Messages.

    def _read(self) -> None:
        if not self._open.room:
            return
        now = time.monotonic()
        for peer in self._crowd.readable():
            if self._open.room:
                self._guarded(peer, functools.partial(self._take, peer, now))
            else:
                self._crowd.put_off(peer)

    def _take(self, peer: Peer, now: float) -> None:
        """Read a peer once."""
        if peer.state is State.TLS and not peer.shake_hands():
            return
        data = b"" if peer.more else peer.receive(self._buffer, now)
        if peer.state is State.LEAVING:
            return
        before = peer.decoder.held
        try:
            cut = peer.decode(data, self._open.room, now)
        finally:
            self._crowd.held += peer.decoder.held - before
        if cut.payloads:
            self._open.add(cut.topics, cut.payloads, cut.size)
            self._parts.append((peer, cut.acks, cut.size))
            peer.owe(len(cut.acks) // 4, cut.size)
        for packet in cut.packets:
            self._on_packet(peer, packet)
        if peer.state is State.OPEN:
            peer.flush()
        self._crowd.attend(peer)
        while self._crowd.held > self._config.held_bytes_max:
            greedy = self._crowd.greediest()
            self._dismiss(greedy, QUOTA_EXCEEDED, f"{greedy.decoder.held} bytes of packets that are not whole")

    def _on_packet(self, peer: Peer, packet: server_frames.Packet) -> None:
        version = peer.decoder.version
        match packet:
            case server_frames.Connect():
                self._on_connect(peer, packet)
            case server_frames.PingReq():
                peer.send(server_frames.PINGRESP)
            case server_frames.Subscribe():
                peer.send(server_frames.suback(version, packet))
            case server_frames.Unsubscribe():
                peer.send(server_frames.unsuback(version, packet))
            case server_frames.Leave():
                self._crowd.leave(peer, b"")

    def _hand_over(self) -> None:
        if not (self._inlet.room and self._open.ready(self._inlet.hungry)):
            return
        full, parts = self._open, self._parts
        self._open, self._parts = OpenBatch(self._inlet.limits), []
        batch = Batch(full.topics, full.payloads, full.received_us, functools.partial(self._release, parts))
        self._status = self._status.after(batch)
        self._inlet.put(batch)

    def _release(self, parts: list[_Part]) -> None:
        """Called by the data path: these messages are safe."""
        self._released.append(parts)
        self._thread.wake.set()

    def _acknowledge(self) -> None:
        paid: dict[Peer, None] = {}
        while self._released:
            for peer, acks, size in self._released.popleft():
                peer.pay(acks, size)
                paid[peer] = None
        for peer in paid:
            if peer.state is State.OPEN:
                self._flush(peer)

    def _flush(self, peer: Peer) -> None:
        self._guarded(peer, peer.flush)
        self._crowd.attend(peer)

    # Housekeeping.

    def _expire(self) -> None:
        now = time.monotonic()
        late_s = now - self._next_check
        if late_s < 0:
            return
        self._next_check = now + CHECK_S
        if late_s > CHECK_S:  # this thread did not run, or was busy with others: what has come lies unread
            self._crowd.resume(late_s)
        if self._accept_again and now >= self._accept_again:
            self._accept_again = 0.0
            self._poll.register(self._door.fileno(), select.POLLIN)
        for peer in self._crowd:
            if self._status.paused and peer.state is not State.LEAVING:
                continue
            late = peer.overdue(now)
            if late is None:
                continue
            if peer.state is State.OPEN:
                self._dismiss(peer, late[1], late[0])
            else:
                if peer.state is not State.LEAVING:
                    self._say(f"{peer}: {late[0]}")
                self._crowd.drop(peer)

    def _refuse(self, why: str) -> None:
        self._status = replace(self._status, refused=self._status.refused + 1)
        self._say(why)

    def _say(self, why: str) -> None:
        """Into the status; into the log too, but no client can fill it."""
        self._status = replace(self._status, last_lost=why)
        now = time.monotonic()
        if now < self._next_log:
            self._unsaid += 1
            return
        log.warning("sensor sent away or lost client=%s others_since=%d", why, self._unsaid)
        self._next_log, self._unsaid = now + LOG_S, 0

    def _close(self) -> None:
        self._status = self._status.ended()
        self._door.close()
        for peer in self._crowd:
            if peer.state is State.OPEN:
                peer.leave(frames.disconnect(5, SHUTTING_DOWN) if peer.decoder.version == 5 else b"", time.monotonic())
        self._crowd.close()
