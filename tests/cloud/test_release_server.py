"""The release server towards clients that mean no good."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cloud import release_server
from cloud.release_server import open_server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "releases/targets").mkdir(parents=True)
    (tmp_path / "releases/targets/1.bundle").write_bytes(b"signed")
    return tmp_path / "releases"


@pytest.fixture
def port(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(release_server, "CONNECTIONS_MAX", 8)
    with open_server(directory, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


def get(port: int, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False)


def test_a_link_leads_to_nothing_outside(directory: Path, port: int) -> None:
    (directory.parent / "key.pem").write_text("private")
    (directory / "targets/2.bundle").symlink_to(directory.parent / "key.pem")
    assert get(port, "/targets/1.bundle").content == b"signed"
    assert get(port, "/targets/2.bundle").status_code == 404


def test_connections_that_say_nothing_take_a_bounded_number_of_threads_and_give_them_back(port: int) -> None:
    before = threading.active_count()
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    closed = 0
    for connection in silent[8:]:
        connection.settimeout(10.0)
        closed += connection.recv(1) == b""
    assert closed == 32 and threading.active_count() - before <= 8
    for connection in silent:
        connection.close()
    for _ in range(100):
        try:
            assert get(port, "/targets/1.bundle").content == b"signed"
            return
        except httpx.TransportError:  # the threads see one after the other that their clients have gone
            threading.Event().wait(0.05)
    pytest.fail("no thread came back")
