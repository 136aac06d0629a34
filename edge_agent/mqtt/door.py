"""The listener's door: its socket, its certificate, its users. Who knocks, and who may come in.

- Passwords are hashed in a thread of their own, at most CHECKS_MAX wait for it; meanwhile only the client that asked waits.
- What the standard wants refused whoever asks is refused before that.
- The sockets of clients have descriptors from DESCRIPTORS_ELSEWHERE on: those below stay for the rest of the agent, however many
  clients there are, and for paho, which waits with select() and so can use no number above 1023.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import logging
import os
import resource
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.mqtt import server_frames
from edge_agent.mqtt.passwords import Users
from edge_agent.mqtt.peer import Peer
from edge_agent.mqtt.tls import ServerTls

if TYPE_CHECKING:
    from edge_agent.addresses import Tls

log = logging.getLogger(__name__)

BACKLOG = 512
ACCEPTS_MAX = 64  # per round, so that who is here already is served too
CHECKS_MAX = 256  # passwords that wait for their hash
SEND_BUFFER_BYTES = 64 * 1024  # in the kernel, for acknowledgements
DESCRIPTORS_ELSEWHERE = 256  # what the rest of the agent may need

BAD_PASSWORD, BAD_CLIENT_ID, BAD_METHOD, NO_RETAIN, NO_QOS_2, BUSY = 0x86, 0x85, 0x8C, 0x9A, 0x9B, 0x89
_CODES_4 = {BAD_PASSWORD: 4, BAD_CLIENT_ID: 2, BUSY: 3}


class Door:
    """One listening socket. The listener's thread uses it; `wake` is called from another one when a password has been checked."""

    def __init__(self, tls: Tls | None, users_file: Path | None, wake: Callable[[], None]) -> None:
        """Read the files; ConfigError if they cannot be used."""
        self._tls = None if tls is None else ServerTls(tls)
        self._users = None if users_file is None else Users(users_file)
        self._wake = wake
        self._socket: socket.socket | None = None
        self._hasher: ThreadPoolExecutor | None = None
        self._checked: deque[tuple[Peer, bool]] = deque()
        self._checking = 0

    def open(self, host: str, port: int) -> None:
        """Listen. May be tried again.

        Raises:
            ConfigError: the address cannot be had.
            UnavailableError: the address is not there (yet).
        """
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            both = host == "::" and socket.has_dualstack_ipv6()
            self._socket = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # inherited by every connection
        except OSError as e:
            if e.errno == errno.EADDRNOTAVAIL:
                raise UnavailableError(f"sensors.listen {host}:{port}: {os.strerror(e.errno)}; is its network up?") from e
            raise ConfigError(f"sensors.listen {host}:{port}: {e.strerror or e}; choose another address") from e
        self._socket.setblocking(False)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="passwords")

    def fileno(self) -> int:
        """To wait on, for reading."""
        assert self._socket is not None
        return self._socket.fileno()

    @property
    def port(self) -> int:
        """Where it listens."""
        assert self._socket is not None
        return int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Nobody comes in any more."""
        if self._hasher is not None:
            self._hasher.shutdown(wait=False, cancel_futures=True)
        if self._socket is not None:
            self._socket.close()

    def accept(self) -> Iterator[tuple[socket.socket, str]]:
        """New connections with their addresses.

        Raises:
            UnavailableError: the system has no file descriptors or memory for one.
        """
        assert self._socket is not None
        for _ in range(ACCEPTS_MAX):
            try:
                sock, (host, port, *_) = _accept_high(self._socket)
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as e:
                raise UnavailableError(f"no connection accepted: {e}") from e
            try:
                yield self._prepared(sock), f"{host}:{port}"
            except OSError as e:
                sock.close()
                log.debug("connection gone at once address=%s:%s error=%s", host, port, e)

    def _prepared(self, sock: socket.socket) -> socket.socket | ssl.SSLSocket:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for clients without MQTT's keepalive
        for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 20), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        return sock if self._tls is None else self._tls.context().wrap_socket(sock, server_side=True, do_handshake_on_connect=False)

    def ask(self, peer: Peer, packet: server_frames.Connect) -> int | None:
        """Whether a client may come in: 0 if so, else MQTT 5's reason code; None if `answers` will tell."""
        code = _unfit(packet)
        if code or self._users is None:
            return code
        if packet.username is None or packet.password is None:
            return BAD_PASSWORD
        if self._users.known(packet.username, packet.password):
            return 0
        if self._checking >= CHECKS_MAX or self._hasher is None:
            return BUSY
        self._checking += 1
        asked = self._hasher.submit(self._users.verify, packet.username, packet.password)
        asked.add_done_callback(functools.partial(self._on_checked, peer))
        return None

    def answers(self) -> Iterator[tuple[Peer, int]]:
        """What became of earlier questions, as `ask` gives it."""
        while self._checked:
            peer, right = self._checked.popleft()
            self._checking -= 1
            yield peer, 0 if right else BAD_PASSWORD

    def user(self, packet: server_frames.Connect) -> str:
        """The user whose password was right; empty where nobody is asked."""
        return (packet.username or "") if self._users is not None else ""

    def _on_checked(self, peer: Peer, done: Future[bool]) -> None:
        """Called in the thread of the passwords, or by `close`."""
        if done.cancelled():
            return
        error = done.exception()
        if error is not None:  # no memory for the hash
            log.error("password not checked client=%s error=%r", peer, error)
        self._checked.append((peer, error is None and done.result()))
        self._wake()


def refusal(packet: server_frames.Connect, code: int) -> bytes:
    """CONNACK with MQTT 5's reason code, or 3.1.1's nearest."""
    return server_frames.connack(packet.version, code if packet.version == 5 else _CODES_4.get(code, 5))


def _unfit(packet: server_frames.Connect) -> int:
    if packet.auth_method is not None:
        return BAD_METHOD
    if packet.version == 5 and packet.will_qos == 2:
        return NO_QOS_2
    if packet.version == 5 and packet.will_retain:
        return NO_RETAIN
    if packet.version == 4 and not packet.client_id and not packet.clean:
        return BAD_CLIENT_ID
    return 0


def _accept_high(listening: socket.socket) -> tuple[socket.socket, Any]:
    """The next connection, with a descriptor from DESCRIPTORS_ELSEWHERE on. That is had first: without one the connection waits."""
    high = fcntl.fcntl(listening, fcntl.F_DUPFD_CLOEXEC, DESCRIPTORS_ELSEWHERE)
    try:
        low, address = listening.accept()
        with low:
            os.dup2(low.fileno(), high, inheritable=False)
    except BaseException:
        os.close(high)
        raise
    return socket.socket(listening.family, listening.type, fileno=high), address


def have_descriptors(connections_max: int) -> None:
    """Let the process have so many more sockets open than it may have now: there may be other listeners.

    Raises:
        ConfigError: the system does not allow so many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count, limited = DESCRIPTORS_ELSEWHERE + connections_max, hard != resource.RLIM_INFINITY
    if limited and hard < count:
        raise ConfigError(f"sensors: connections_max needs {count} open files, the system allows {hard}; set LimitNOFILE= in the unit")
    if soft != resource.RLIM_INFINITY:
        more = soft + connections_max
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(more, hard) if limited else more, hard))
