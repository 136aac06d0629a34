"""Talking to systemd (`Type=notify`, watchdog): one datagram to the socket in NOTIFY_SOCKET. See sd_notify(3).

with patience():
    ...  # what may take minutes
notify("READY=1")
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator

log = logging.getLogger(__name__)

ASK_S = 10.0
ASKS_MAX = 360  # an hour: what takes longer hangs


def notify(state: str) -> None:
    """Send `state`, such as `READY=1` or `WATCHDOG=1`; does nothing outside systemd. Nobody listening there ends nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.connect(address)
            s.sendall(state.encode())
    except OSError as e:
        log.warning("systemd not told state=%s error=%s", state, e)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """Within it systemd is asked to wait on: a slow disk salvages a large buffer for minutes, and from the beginning if it is ended."""
    done = threading.Event()

    def ask() -> None:
        for _ in range(ASKS_MAX):
            if done.wait(ASK_S):
                return
            notify(f"EXTEND_TIMEOUT_USEC={round(6 * ASK_S * 1e6)}\nWATCHDOG=1")

    thread = threading.Thread(target=ask, name="systemd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
