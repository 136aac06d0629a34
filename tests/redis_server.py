"""A real Redis server for tests: loopback, a free port, nothing kept."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import HOST, Server, free_port, running


@contextmanager
def redis_server(folder: Path, *options: str) -> Iterator[int]:
    """Start a server that keeps its files in `folder`; yields its port."""
    port = free_port()
    program = shutil.which("redis-server", path="/usr/bin:/usr/local/bin:/bin")
    assert program, "redis-server is not installed; mark the test needs_redis"
    command = [program, "--bind", HOST, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder), *options]
    with running(Server(command, folder / "redis.log", lambda: _answers(port))):
        yield port


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
