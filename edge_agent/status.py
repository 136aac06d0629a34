"""What the agent is doing, on request: a Unix socket in the state directory that answers with one JSON document.

The socket belongs to the agent's user alone (0600). Nothing is written to flash for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.contract.errors import UnavailableError

log = logging.getLogger(__name__)

SOCKET = "agent.sock"
TIMEOUT_S = 5.0
RETRY_S = 1.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024


class StatusServer:
    """Answers each connection with `describe()` as JSON, then closes it. A disk that does not take the socket is asked again."""

    def __init__(self, state_dir: Path, describe: Callable[[], dict[str, Any]]) -> None:
        self._path = state_dir / SOCKET
        self._describe = describe
        self._closing, self._tried = threading.Event(), threading.Event()
        self._listening = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._thread = threading.Thread(target=self._serve, name="status", daemon=True)
        self._thread.start()
        self._tried.wait(TIMEOUT_S)

    def close(self) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(TIMEOUT_S)
        with contextlib.suppress(OSError):  # the next agent here replaces it
            self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while True:
            try:
                self._listen()
                peer, _ = self._socket.accept()
            except OSError as e:
                if self._closing.is_set():
                    return
                log.warning("status not served error=%s retry_s=%s", e, RETRY_S)  # no room on the disk, no file descriptors left, for now
                self._tried.set()
                self._closing.wait(RETRY_S)
                continue
            with peer:
                peer.settimeout(TIMEOUT_S)
                try:
                    peer.sendall(msgspec.json.encode(self._describe()))
                except (OSError, UnavailableError) as e:  # the asker is gone, or the buffer cannot be read: the next may have luck
                    log.warning("status unanswered error=%s", e)

    def _listen(self) -> None:
        if not self._listening:
            self._path.unlink(missing_ok=True)
            os.fchmod(self._socket.fileno(), 0o600)  # of the file that `bind` makes: nobody else can open it for a moment
            with _address(self._path.parent) as address:
                self._socket.bind(address)
            self._socket.listen(4)
            self._listening = True
            self._tried.set()


def ask(state_dir: Path) -> dict[str, Any]:
    """The status of the agent that runs on `state_dir`.

    Raises:
        UnavailableError: no agent answers there, or not to the end.
    """
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.settimeout(TIMEOUT_S)
        try:
            with _address(state_dir) as address:
                s.connect(address)
            while (part := s.recv(1 << 16)) and len(answer) < ANSWER_BYTES_MAX:
                answer += part
        except OSError as e:
            raise UnavailableError(f"no agent answers at {state_dir / SOCKET}: {e.strerror or e}; start one with `edge-agent run`") from e
    try:
        return msgspec.json.decode(bytes(answer), type=dict[str, Any])
    except msgspec.MsgspecError as e:
        raise UnavailableError(f"the agent at {state_dir / SOCKET} broke off its answer: its log says why, or it has just ended") from e


@contextlib.contextmanager
def _address(state_dir: Path) -> Iterator[str]:
    """A name for the socket that fits the kernel's 107 bytes, however deep the directory lies."""
    directory = os.open(state_dir, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{directory}/{SOCKET}"
    finally:
        os.close(directory)
