"""A TCP proxy on loopback that counts what it carries, both ways, and can be cut like a link."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

HOST = "127.0.0.1"


class Proxy:
    """Carries connections to `target`. `bytes` is what they carried, both ways, and may be set to 0."""

    def __init__(self, target: int) -> None:
        self.bytes = 0
        self._target = target
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._serve()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def cut(self) -> None:
        """End all connections and accept no more."""
        # shutdown(), because close() alone leaves a thread in accept(), and the port open, for one more connection.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def restore(self) -> None:
        """Accept connections again, on the same port."""
        self._listener = socket.create_server((HOST, self.port))
        self._serve()

    def settled(self, quiet_s: float = 1.0) -> int:
        """`bytes`, once nothing has been added for a while."""
        seen, since = -1, time.monotonic()
        while time.monotonic() - since < quiet_s:
            if self.bytes != seen:
                seen, since = self.bytes, time.monotonic()
            time.sleep(0.05)
        return seen

    def _serve(self) -> None:
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:  # cut
                return
            try:
                far = socket.create_connection((HOST, self._target))
            except OSError:  # the target is down: so is this connection
                near.close()
                continue
            with self._lock:
                self._open |= {near, far}
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one of both ends is gone: so is the other, below
            while data := source.recv(1 << 16):
                with self._lock:
                    self.bytes += len(data)
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            if source in self._open:  # the other direction's thread still reads from `sink`
                self._open.discard(source)
                source.close()
