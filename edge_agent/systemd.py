"""Talking to systemd (`Type=notify`, watchdog): one datagram to the socket in NOTIFY_SOCKET. See sd_notify(3)."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


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
