"""Sensors connect to the agent itself: an MQTT 3.1.1 and 5 server that only takes messages in. One thread, hundreds of connections.

- PUBLISH with QoS 0 and 1. A PUBACK goes out after `Batch.release`: the message is on disk. There are no sessions (session
  present is always 0), no retained messages and no wills: they are accepted and dropped, as far as the standard lets us. QoS 2 and
  SUBSCRIBE are refused.
- Who may connect: everybody, or who has a password in `users_file`, or a certificate of `tls.ca_file`, or both where both are set.
  Passwords are hashed in a thread of their own; meanwhile only that client waits.
- A client that connects again under its client id ends its older connection; another user's client of that id stays.
- Messages of all clients share one open batch; how it is handed over is the inlet's rule. Back-pressure: while the inlet has no room and
  the batch is full, no client is read, and none is blamed for its silence.
- Every client has limits (`PeerLimits`), all of them together too; who breaks one, or the protocol, goes alone. What came before is kept.
- The thread waits in one place, always with a limit. Two epoll sets lie inside one poll: leaving one out stops reading all clients.
"""

from __future__ import annotations

import errno
import functools
import logging
import resource
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.mqtt import frames, server_frames
from edge_agent.mqtt.inlet import Batch, Inlet, OpenBatch, Wake
from edge_agent.mqtt.passwords import Users
from edge_agent.mqtt.peer import QUOTA_EXCEEDED, SHUTTING_DOWN, TAKEN_OVER, Peer, PeerLimits, State
from edge_agent.mqtt.tls import server_context
from edge_agent.mqtt.wire import PROTOCOL_ERROR, UNSUPPORTED_VERSION, FrameError

if TYPE_CHECKING:
    from edge_agent.addresses import Tls

log = logging.getLogger(__name__)

RECV_BYTES = 256 * 1024
SEND_BUFFER_BYTES = 64 * 1024  # in the kernel, for acknowledgements
BACKLOG = 512
ACCEPTS_MAX = 64  # per round, so that who is here already is served too
IDLE_S_MAX = 60.0
CHECK_S = 0.25  # how often deadlines are looked at
STOP_S_MAX = 10.0
CHECKS_MAX = 256  # passwords that wait for their hash
LOG_S = 1.0  # at most one line about clients in this time
ACCEPT_RETRY_S = 1.0
DESCRIPTORS_ELSEWHERE = 256  # what the rest of the agent may need

_BAD_PASSWORD, _CLIENT_ID, _BAD_METHOD, _RETAIN, _QOS, _BUSY = 0x86, 0x85, 0x8C, 0x9A, 0x9B, 0x89
_CODES_4 = {_BAD_PASSWORD: 4, _CLIENT_ID: 2, _BUSY: 3}
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
class ListenerStatus:
    """How the listener stands. `connected`: it listens. `last_lost`: which client was last sent away or lost, and why."""

    connected: bool = False
    error: str = ""
    last_lost: str = ""
    connections: int = 0
    accepted: int = 0
    refused: int = 0
    messages: int = 0
    batches: int = 0
    paused: bool = False
    last_received_us: int | None = None


class Listener:
    """Serves sensors in its own thread, from `start` to `stop`."""

    def __init__(self, config: ListenerConfig, inlet: Inlet) -> None:
        """Read the files; ConfigError if they cannot be used."""
        self._config = config
        self._inlet = inlet
        self._tls = None if config.tls is None else server_context(config.tls)
        self._users = None if config.users_file is None else Users(config.users_file)
        self._wake = Wake()
        self._stopping = threading.Event()
        self._status = ListenerStatus()
        self._server = socket.socket()
        self._server.close()
        self._peers: dict[int, Peer] = {}
        self._sessions: dict[tuple[str, str], Peer] = {}
        self._ready: dict[int, None] = {}  # peers to read though their sockets may not be readable
        self._open = OpenBatch(inlet.limits)
        self._parts: list[_Part] = []
        self._released: deque[list[_Part]] = deque()
        self._checked: deque[tuple[Peer, bool]] = deque()
        self._held = 0  # bytes in all decoders
        self._checking = 0  # passwords that are being checked, or wait for it
        self._made = 0  # client ids given out
        self._buffer = memoryview(bytearray(RECV_BYTES))
        self._next_check = self._next_log = self._accept_again = self._paused_at = 0.0
        self._unsaid = 0
        inlet.attach(self._wake.set)
        self._thread = threading.Thread(target=self._run, name="listener", daemon=True)

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be had.
            UnavailableError: the address is not there (yet).
        """
        config = self._config
        _have_descriptors(config.connections_max + DESCRIPTORS_ELSEWHERE)
        try:
            family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
            self._server = socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
            self._server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # inherited by every connection
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                raise UnavailableError(f"sensors.listen {config.host}:{config.port}: {e.strerror}; is the network up?") from e
            raise ConfigError(f"sensors.listen {config.host}:{config.port}: {e.strerror or e}; choose another address") from e
        self._server.setblocking(False)
        self._passwords = ThreadPoolExecutor(1, thread_name_prefix="passwords")
        self._readers, self._writers, self._poll = select.epoll(), select.epoll(), select.poll()
        for waited in (self._wake.fileno(), self._writers.fileno(), self._readers.fileno(), self._server.fileno()):
            self._poll.register(waited, select.POLLIN)
        self._status = replace(self._status, connected=True)
        self._thread.start()
        log.info("sensors listened address=%s:%d tls=%s", config.host, self.port, config.tls is not None)

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    @property
    def status(self) -> ListenerStatus:
        """A snapshot, from any thread."""
        return replace(self._status, connections=len(self._peers))

    def stop(self) -> None:
        """Send what was released, say goodbye, end the thread. What was not released comes again from the sensors."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S_MAX)
        if not self._thread.is_alive():
            self._wake.close()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._round()
            self._acknowledge()
        except BaseException as e:
            self._inlet.fail(e)
            raise
        finally:
            self._close()

    def _round(self) -> None:
        waiting = self._wait()
        self._acknowledge()
        self._admit_checked()
        if self._server.fileno() in waiting:
            self._accept()
        self._write()
        self._read()
        self._hand_over()
        self._expire()

    def _wait(self) -> set[int]:
        """Until something can be done; the file descriptors that say so."""
        paused = not self._open.room
        if paused != self._status.paused:
            self._pause(paused)
        now = time.monotonic()
        wait_s = max(0.0, self._next_check - now) if self._peers or self._accept_again else IDLE_S_MAX
        if self._inlet.hungry:
            wait_s = min(wait_s, self._open.due_s(now))
        if self._ready and not paused:
            wait_s = 0.0
        events = self._poll.poll(max(0.0, wait_s) * 1_000 + (0.5 if wait_s > 0 else 0))  # rounded up, or it would spin at the end
        if self._wake.fileno() in (fds := {fd for fd, _ in events}):
            self._wake.clear()
        return fds

    def _pause(self, paused: bool) -> None:
        """Read no client, or all of them again."""
        self._status = replace(self._status, paused=paused)
        now = time.monotonic()
        if paused:
            self._poll.unregister(self._readers.fileno())
            self._paused_at = now
            return
        self._poll.register(self._readers.fileno(), select.POLLIN)
        for peer in self._peers.values():
            peer.resume(now - self._paused_at, now)

    # Clients come and go.

    def _accept(self) -> None:
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = self._server.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as e:  # no file descriptors or memory left: others need them too, so wait
                self._say(f"no connection accepted: {e}")
                self._poll.unregister(self._server.fileno())
                self._accept_again = time.monotonic() + ACCEPT_RETRY_S
                return
            if len(self._peers) >= self._config.connections_max and not self._make_room():
                sock.close()
                self._refused(f"{address[0]}:{address[1]}: there are {len(self._peers)} connections already (connections_max)")
                continue
            self._greet(sock, f"{address[0]}:{address[1]}")

    def _make_room(self) -> bool:
        """Close the oldest connection that has not got as far as a password; False if there is none."""
        early = (State.TLS, State.CONNECTING, State.LEAVING)
        oldest = next((peer for peer in self._peers.values() if peer.state in early), None)
        if oldest is None:
            return False
        self._refused(f"{oldest}: {oldest.state.value}, closed for a newer connection (connections_max)")
        self._drop(oldest)
        return True

    def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for clients without MQTT's keepalive
            for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3)):
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=True)
        except OSError as e:  # gone already
            sock.close()
            self._say(f"{address}: {e}")
            return
        peer = Peer(sock, address, time.monotonic(), self._config.peer)
        self._peers[peer.fd] = peer
        self._status = replace(self._status, accepted=self._status.accepted + 1)
        self._attend(peer)

    def _on_connect(self, peer: Peer, packet: server_frames.Connect) -> None:
        peer.check(packet)
        code = _unfit(packet)
        if code:
            self._reject(peer, code)
        elif self._users is None:
            self._admit(peer)
        elif packet.username is None or packet.password is None:
            self._reject(peer, _BAD_PASSWORD)
        elif self._users.known(packet.username, packet.password):
            self._admit(peer)
        elif self._checking >= CHECKS_MAX:
            self._reject(peer, _BUSY)
        else:
            self._checking += 1
            asked = self._passwords.submit(self._users.verify, packet.username, packet.password)
            asked.add_done_callback(functools.partial(self._on_checked, peer))

    def _on_checked(self, peer: Peer, done: Future[bool]) -> None:
        """Called in the thread of the passwords, or by `stop`."""
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:  # no memory for the hash
            log.error("password not checked client=%s error=%r", peer, error)
        self._checked.append((peer, error is None and done.result()))
        self._wake.set()

    def _admit_checked(self) -> None:
        while self._checked:
            peer, right = self._checked.popleft()
            self._checking -= 1
            if peer.state is State.CHECKING:
                self._guarded(peer, functools.partial(self._admit, peer) if right else functools.partial(self._reject, peer, _BAD_PASSWORD))

    def _admit(self, peer: Peer) -> None:
        packet, limits = peer.connect, self._config.peer
        assert packet is not None
        given = ""
        if not packet.client_id:
            self._made += 1
            given = f"fenceline-{peer.fd}-{self._made}"
        session = (f"{peer.identity}\0{packet.username if self._users else ''}", packet.client_id or given)
        old = self._sessions.get(session)
        if old is not None:
            self._dismiss(old, TAKEN_OVER, "its client connected again")
        self._sessions[session] = peer
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
        self._attend(peer)

    def _reject(self, peer: Peer, code: int) -> None:
        packet = peer.connect
        assert packet is not None
        words = frames.refusal(frames.ConnAck(False, code), 5)
        self._refused(f"{peer}: {words}")
        self._leave(peer, server_frames.connack(packet.version, code if packet.version == 5 else _CODES_4.get(code, 5)))

    def _dismiss(self, peer: Peer, code: int, why: str) -> None:
        """End a connection, with a reason where the version has one."""
        self._say(f"{peer}: {why}")
        admitted = peer.state is State.OPEN
        if code == UNSUPPORTED_VERSION and not admitted:
            farewell = server_frames.connack(4, 1)
        else:
            farewell = frames.disconnect(5, code) if admitted and peer.decoder.version == 5 else b""
        self._leave(peer, farewell)

    def _leave(self, peer: Peer, farewell: bytes) -> None:
        self._forget_session(peer)
        if peer.state in (State.LEAVING, State.TLS):
            self._drop(peer)
            return
        peer.leave(farewell, time.monotonic())
        self._attend(peer)

    def _drop(self, peer: Peer) -> None:
        """Close at once."""
        self._forget_session(peer)
        if peer.state is State.CLOSED:
            return
        self._held -= peer.decoder.held
        del self._peers[peer.fd]
        self._ready.pop(peer.fd, None)
        if peer.reading:
            self._readers.unregister(peer.fd)
        if peer.writing:
            self._writers.unregister(peer.fd)
        peer.close()

    def _forget_session(self, peer: Peer) -> None:
        if peer.session is not None and self._sessions.get(peer.session) is peer:
            del self._sessions[peer.session]

    # Messages.

    def _read(self) -> None:
        if not self._open.room:
            return
        ready, self._ready = self._ready, {}
        ready |= dict.fromkeys(fd for fd, _ in self._readers.poll(0))
        now = time.monotonic()
        for fd in ready:
            peer = self._peers.get(fd)
            if peer is None or not peer.wants_reading:
                continue
            if self._open.room:
                self._guarded(peer, functools.partial(self._take, peer, now))
            else:
                self._ready[fd] = None

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
            self._held += peer.decoder.held - before
        if cut.payloads:
            size = self._open.add(cut.topics, cut.payloads)
            self._parts.append((peer, cut.acks, size))
            peer.owe(len(cut.acks) // 4, size)
        for packet in cut.packets:
            self._on_packet(peer, packet)
        if peer.state is State.OPEN:
            peer.flush()
        self._attend(peer)
        if self._held > self._config.held_bytes_max:
            greedy = max(self._peers.values(), key=lambda other: other.decoder.held)
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
                self._leave(peer, b"")

    def _hand_over(self) -> None:
        if not (self._inlet.room and self._open.ready(self._inlet.hungry)):
            return
        full, parts = self._open, self._parts
        self._open, self._parts = OpenBatch(self._inlet.limits), []
        batch = Batch(full.topics, full.payloads, full.received_us, functools.partial(self._release, parts))
        status = self._status
        self._status = replace(
            status, messages=status.messages + len(batch), batches=status.batches + 1, last_received_us=batch.received_us
        )
        self._inlet.put(batch)

    def _release(self, parts: list[_Part]) -> None:
        """Called by the data path: these messages are safe."""
        self._released.append(parts)
        self._wake.set()

    def _acknowledge(self) -> None:
        paid: dict[Peer, None] = {}
        while self._released:
            for peer, acks, size in self._released.popleft():
                peer.pay(acks, size)
                paid[peer] = None
        for peer in paid:
            if peer.state is State.OPEN:
                self._guarded(peer, peer.flush)
                self._attend(peer)

    def _write(self) -> None:
        for fd, _ in self._writers.poll(0):
            peer = self._peers.get(fd)
            if peer is not None:
                self._guarded(peer, peer.flush)
                self._attend(peer)

    # Housekeeping.

    def _guarded(self, peer: Peer, step: Callable[[], None]) -> None:
        """Whatever a peer does wrong ends that peer alone."""
        try:
            step()
        except UnavailableError as e:
            if peer.state is not State.LEAVING:
                self._say(f"{peer}: {e}")
            self._drop(peer)
        except ContractError as e:
            self._dismiss(peer, e.code if isinstance(e, FrameError) else PROTOCOL_ERROR, str(e))

    def _attend(self, peer: Peer) -> None:
        """Wait for a peer to become readable and writable, as it now stands."""
        if peer.state is State.CLOSED:
            return
        if peer.wants_reading != peer.reading:
            peer.reading = not peer.reading
            now = time.monotonic()
            if peer.reading:
                self._readers.register(peer.fd, select.EPOLLIN)
                peer.resume(now - peer.unread_since, now)
            else:
                self._readers.unregister(peer.fd)
                peer.unread_since = now
        if peer.wants_writing != peer.writing:
            peer.writing = not peer.writing
            if peer.writing:
                self._writers.register(peer.fd, select.EPOLLOUT)
            else:
                self._writers.unregister(peer.fd)
        if peer.reading and peer.ready:
            self._ready[peer.fd] = None

    def _expire(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_S
        if self._accept_again and now >= self._accept_again:
            self._accept_again = 0.0
            self._poll.register(self._server.fileno(), select.POLLIN)
        for peer in list(self._peers.values()):
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
                self._drop(peer)

    def _refused(self, why: str) -> None:
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
        self._status = replace(self._status, connected=False, paused=False)
        self._passwords.shutdown(wait=False, cancel_futures=True)
        self._server.close()
        for peer in list(self._peers.values()):
            if peer.state is State.OPEN:
                peer.leave(frames.disconnect(5, SHUTTING_DOWN) if peer.decoder.version == 5 else b"", time.monotonic())
            self._drop(peer)
        self._readers.close()
        self._writers.close()


def _unfit(packet: server_frames.Connect) -> int:
    """Why a client is not let in whoever it is; 0 if it may be."""
    if packet.auth_method is not None:
        return _BAD_METHOD
    if packet.version == 5 and packet.will_qos == 2:
        return _QOS
    if packet.version == 5 and packet.will_retain:
        return _RETAIN
    if packet.version == 4 and not packet.client_id and not packet.clean:
        return _CLIENT_ID
    return 0


def _have_descriptors(count: int) -> None:
    """Let the process have so many files and sockets open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ConfigError(f"sensors: connections_max needs {count} open files, the system allows {hard}; set LimitNOFILE= in the unit")
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
