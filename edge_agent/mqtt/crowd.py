"""All clients of the listener: which are waited for, which session is whose, what they hold together.

- Two epoll sets: `readers` and `writers`. The listener leaves `readers` out of its own poll to read nobody.
- A peer is in `readers` while it may be read, in `writers` while its socket did not take all; `attend` sees to it after every change.
- A session (user and client id) belongs to one peer at a time.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterator

from edge_agent.mqtt.peer import Peer, State

_EARLY = (State.TLS, State.CONNECTING, State.LEAVING)


class Crowd:
    """The peers of one listener, used by its thread; only `len` is for others."""

    def __init__(self) -> None:
        self.readers, self.writers = select.epoll(), select.epoll()
        self.held = 0  # bytes in all decoders
        self._peers: dict[int, Peer] = {}
        self._sessions: dict[tuple[str, str], Peer] = {}
        self._ready: dict[int, None] = {}  # to be read though their sockets may not be readable

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        """A copy: peers may be dropped on the way."""
        return iter(list(self._peers.values()))

    @property
    def ready(self) -> bool:
        """Somebody can be read at once."""
        return bool(self._ready)

    def add(self, peer: Peer) -> None:
        """A new connection."""
        self._peers[peer.fd] = peer
        self.attend(peer)

    def readable(self) -> Iterator[Peer]:
        """Who can be read now, each once; in turn, so that nobody waits for ever."""
        ready, self._ready = self._ready, {}
        ready |= dict.fromkeys(fd for fd, _ in self.readers.poll(0))
        for fd in ready:
            peer = self._peers.get(fd)
            if peer is not None and peer.wants_reading:
                yield peer

    def writable(self) -> Iterator[Peer]:
        """Whose socket takes more."""
        for fd, _ in self.writers.poll(0):
            peer = self._peers.get(fd)
            if peer is not None:
                yield peer

    def put_off(self, peer: Peer) -> None:
        """Give it out again by `readable`, before others."""
        self._ready[peer.fd] = None

    def attend(self, peer: Peer) -> None:
        """Wait for a peer to become readable and writable, as it now stands."""
        if peer.state is State.CLOSED:
            return
        if peer.wants_reading != peer.reading:
            peer.reading = not peer.reading
            now = time.monotonic()
            if peer.reading:
                self.readers.register(peer.fd, select.EPOLLIN)
                peer.resume(now - peer.unread_since, now)
            else:
                self.readers.unregister(peer.fd)
                peer.unread_since = now
        if peer.wants_writing != peer.writing:
            peer.writing = not peer.writing
            if peer.writing:
                self.writers.register(peer.fd, select.EPOLLOUT)
            else:
                self.writers.unregister(peer.fd)
        if peer.reading and peer.ready:
            self.put_off(peer)

    def take_session(self, peer: Peer, session: tuple[str, str]) -> Peer | None:
        """Give the session to a peer; returns whose it was."""
        old = self._sessions.get(session)
        self._sessions[session] = peer
        return old

    def leave(self, peer: Peer, farewell: bytes) -> None:
        """Say goodbye to a peer; it goes when it has read that, or soon."""
        self._forget_session(peer)
        if peer.state in (State.LEAVING, State.TLS):
            self.drop(peer)
            return
        self.held -= peer.decoder.held
        peer.decoder.discard()
        peer.leave(farewell, time.monotonic())
        self.attend(peer)

    def drop(self, peer: Peer) -> None:
        """Close at once."""
        self._forget_session(peer)
        if peer.state is State.CLOSED:
            return
        self.held -= peer.decoder.held
        del self._peers[peer.fd]
        self._ready.pop(peer.fd, None)
        if peer.reading:
            self.readers.unregister(peer.fd)
        if peer.writing:
            self.writers.unregister(peer.fd)
        peer.close()

    def early(self) -> Peer | None:
        """The oldest connection that has not got as far as a password."""
        return next((peer for peer in self._peers.values() if peer.state in _EARLY), None)

    def greediest(self) -> Peer:
        """Who holds most bytes of packets that are not whole."""
        return max(self._peers.values(), key=lambda peer: peer.decoder.held)

    def resume(self, seconds: float) -> None:
        """Nobody was read for so many seconds."""
        now = time.monotonic()
        for peer in self._peers.values():
            peer.resume(seconds, now)

    def close(self) -> None:
        """Drop everybody."""
        for peer in self:
            self.drop(peer)
        self.readers.close()
        self.writers.close()

    def _forget_session(self, peer: Peer) -> None:
        if peer.session is not None and self._sessions.get(peer.session) is peer:
            del self._sessions[peer.session]
