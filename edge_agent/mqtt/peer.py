"""One client of the listener: its socket, its decoder, what is to be sent to it, and what it may still cost.

- The listener's thread alone uses a peer. Nothing here blocks.
- A peer is not read while its password is checked, while it has too many messages that are not stored yet, and after it was dismissed
  (then what it sends is thrown away until it closes, so that it can read why).
- Times that ran while it was not read do not count against it.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_agent.contract.errors import UnavailableError
from edge_agent.mqtt import server_frames
from edge_agent.mqtt.cutter import PACKET_BYTES_MAX
from edge_agent.mqtt.wire import FrameError

RECEIVE_MAXIMUM_EXCEEDED, KEEPALIVE_TIMEOUT, TAKEN_OVER, SHUTTING_DOWN, QUOTA_EXCEEDED = 0x93, 0x8D, 0x8E, 0x8B, 0x97
LINGER_S = 1.0
KEEPALIVE_GRACE = 1.5  # MQTT: a client is gone after one and a half times its keepalive


@dataclass(frozen=True)
class PeerLimits:
    """What one client may cost. `packet_bytes_max`: see server_frames; it must be above `payload_bytes_max` of every contract."""

    packet_bytes_max: int = PACKET_BYTES_MAX
    handshake_s: float = 10.0
    packet_s: float = 30.0
    keepalive_s_max: int = 600
    unacked_messages_max: int = 16_384
    unacked_bytes_max: int = 4 * 1024 * 1024
    outbox_bytes_max: int = 128 * 1024


class State(enum.Enum):
    """How far a peer has come."""

    TLS = "TLS handshake"
    CONNECTING = "CONNECT awaited"
    CHECKING = "password being checked"
    OPEN = "connected"
    LEAVING = "dismissed"
    CLOSED = "closed"


class Peer:
    """One client, from accept to close."""

    def __init__(self, sock: socket.socket, address: str, now: float, limits: PeerLimits) -> None:
        self._socket = sock
        self._limits = limits
        self.address = address
        self.fd = sock.fileno()
        self.decoder = server_frames.Decoder(limits.packet_bytes_max)
        self.state = State.TLS if isinstance(sock, ssl.SSLSocket) else State.CONNECTING
        self.connect: server_frames.Connect | None = None
        self.session: tuple[str, str] | None = None
        self.identity = ""  # the name in its verified certificate
        self.more = False  # the decoder holds whole packets
        self.reading = self.writing = False  # whether the listener waits for it
        self.unread_since = now
        self._outbox = bytearray()
        self._wants_read = False  # TLS has to read before it can send
        self._unacked = self._unacked_bytes = 0
        self._heard = now
        self._partial_since: float | None = None
        self._keepalive_s = 0.0
        self._deadline = now + limits.handshake_s

    def __str__(self) -> str:
        client = f" client {self.connect.client_id[:64]!r}" if self.connect is not None else ""
        return f"{self.address}{client}"

    @property
    def wants_reading(self) -> bool:
        """Whether it may be read now."""
        crowded = self._unacked > self._limits.unacked_messages_max or self._unacked_bytes > self._limits.unacked_bytes_max
        return self.state not in (State.CHECKING, State.CLOSED) and not crowded

    @property
    def wants_writing(self) -> bool:
        """Whether something waits that its socket did not take."""
        return bool(self._outbox) and not self._wants_read and self.state is not State.CLOSED

    @property
    def ready(self) -> bool:
        """It has more to give without its socket becoming readable."""
        return self.more or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending() > 0)

    def shake_hands(self) -> bool:
        """Go on with the TLS handshake; True when it is done.

        Raises:
            UnavailableError: it failed.
        """
        assert isinstance(self._socket, ssl.SSLSocket)
        try:
            self._socket.do_handshake()
            self.identity = _name(self._socket.getpeercert())  # now: it cannot be asked for once the connection has ended
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLWantWriteError:  # a handshake fits a socket's buffer, unless the peer reads nothing at all
            raise UnavailableError("takes no TLS handshake") from None
        except (OSError, ValueError) as e:
            raise UnavailableError(f"TLS handshake failed: {e}") from e
        self.state = State.CONNECTING
        return True

    def receive(self, buffer: memoryview, now: float) -> bytes:
        """What has come, at most `buffer` full; empty if nothing has.

        Raises:
            UnavailableError: the connection has ended.
        """
        filled = 0
        self._wants_read = False
        try:
            while filled < len(buffer):
                count = self._socket.recv_into(buffer[filled:])
                if not count:
                    raise UnavailableError("closed the connection")
                filled += count
                if not isinstance(self._socket, ssl.SSLSocket):  # TLS gives one record at a time
                    break
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (OSError, ValueError) as e:
            raise UnavailableError(f"connection lost: {e}") from e
        except UnavailableError:
            if not filled:
                raise
        if filled:
            self._heard = now
        return bytes(buffer[:filled])

    def decode(self, data: bytes, packets_max: int, now: float) -> server_frames.Frames:
        """Cut what came.

        Raises:
            ContractError: the peer breaks the protocol.
        """
        frames = self.decoder.feed(data, packets_max)
        self.more = frames.more
        if self.more or not self.decoder.held:
            self._partial_since = None
        elif self._partial_since is None or frames.payloads or frames.packets:
            self._partial_since = now
        return frames

    def owe(self, messages: int, size: int) -> None:
        """So many of its messages wait to be stored.

        Raises:
            FrameError: more than it was told it may send (MQTT 5).
        """
        self._unacked += messages
        self._unacked_bytes += size
        if self._unacked > self._limits.unacked_messages_max and self.decoder.version == 5:
            raise FrameError(f"more than {self._limits.unacked_messages_max} messages without PUBACK", RECEIVE_MAXIMUM_EXCEEDED)

    def pay(self, acks: bytes, size: int) -> None:
        """So many of its messages are stored; `acks` is to be sent."""
        self._unacked -= len(acks) // 4
        self._unacked_bytes -= size
        if self.state is State.OPEN:
            self._outbox += acks

    def send(self, data: bytes) -> None:
        """Send, after what already waits. `flush` does it."""
        self._outbox += data

    def flush(self) -> None:
        """Send what the socket takes now.

        Raises:
            UnavailableError: the connection has ended, or the peer reads too little.
        """
        if not self._outbox or self._wants_read:
            return
        try:
            del self._outbox[: self._socket.send(self._outbox)]
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLWantReadError:
            self._wants_read = True
        except (OSError, ValueError) as e:
            raise UnavailableError(f"connection lost: {e}") from e
        if len(self._outbox) > self._limits.outbox_bytes_max:
            raise UnavailableError(f"takes no acknowledgements, {len(self._outbox)} bytes wait")

    def check(self, connect: server_frames.Connect) -> None:
        """It asks to be let in; it is not read until that is decided."""
        self.connect, self.state, self._deadline = connect, State.CHECKING, float("inf")

    def welcome(self, session: tuple[str, str], keepalive_s: int) -> None:
        """It is let in."""
        self.session, self.state = session, State.OPEN
        self._keepalive_s = KEEPALIVE_GRACE * keepalive_s

    def resume(self, seconds: float, now: float) -> None:
        """It is read again after so many seconds, which do not count."""
        self._heard = min(now, self._heard + seconds)
        self._deadline += seconds
        if self._partial_since is not None:
            self._partial_since = min(now, self._partial_since + seconds)

    def leave(self, farewell: bytes, now: float) -> None:
        """Say why, send no more, and wait a moment until the peer closes, so that it can read it."""
        self.state, self._deadline = State.LEAVING, now + LINGER_S
        self.more = False
        self._outbox += farewell
        with contextlib.suppress(OSError, ValueError, UnavailableError):  # it goes anyway
            self.flush()
            if isinstance(self._socket, ssl.SSLSocket):
                with contextlib.suppress(ssl.SSLError):  # its answer is not waited for
                    self._socket.unwrap()
            self._socket.shutdown(socket.SHUT_WR)
        self._outbox.clear()

    def close(self) -> None:
        """Let go of the socket; later acknowledgements have no effect."""
        self.state = State.CLOSED
        self._outbox.clear()
        self._socket.close()

    def overdue(self, now: float) -> tuple[str, int] | None:
        """Why its time is up, if it is, and MQTT 5's reason code for that."""
        if now > self._deadline:
            return f"not done in time: {self.state.value}", KEEPALIVE_TIMEOUT
        if self.state is State.OPEN and self.reading:
            if self._keepalive_s and now - self._heard > self._keepalive_s:
                return f"silent for {now - self._heard:.1f} s", KEEPALIVE_TIMEOUT
            if self._partial_since is not None and now - self._partial_since > self._limits.packet_s:
                return f"a packet not whole after {self._limits.packet_s} s", KEEPALIVE_TIMEOUT
        return None


def _name(certificate: Mapping[str, Any] | None) -> str:
    """The common name of a certificate, or else its whole subject; empty without one."""
    subject = (certificate or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return str(names[0] if names else subject or "")
