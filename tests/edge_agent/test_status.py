"""The status socket and systemd's, when they cannot do what they are there for."""

from __future__ import annotations

import resource
import socket
import time
from pathlib import Path

import pytest

from edge_agent import status, systemd
from edge_agent.contract.errors import UnavailableError
from edge_agent.status import SOCKET, StatusServer, ask


def test_status_is_served_again_after_file_descriptors_ran_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(status, "RETRY_S", 0.05)
    server = StatusServer(tmp_path, lambda: {"device": "plane-01"})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asker:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            try:
                asker.connect(str(tmp_path / SOCKET))  # still served: the kernel took the descriptor when the server began to wait
                deadline = time.monotonic() + 10.0
                while "status not served" not in caplog.text and time.monotonic() < deadline:
                    time.sleep(0.01)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert "status not served" in caplog.text
        assert ask(tmp_path) == {"device": "plane-01"}
    finally:
        server.close()
    assert not server._thread.is_alive()


def test_status_waits_for_a_disk_that_does_not_take_its_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "RETRY_S", 0.05)
    (tmp_path / SOCKET).mkdir()
    server = StatusServer(tmp_path, lambda: {"device": "plane-01"})
    try:
        with pytest.raises(UnavailableError, match="no agent answers"):
            ask(tmp_path)
        (tmp_path / SOCKET).rmdir()
        deadline = time.monotonic() + 10.0
        while not (tmp_path / SOCKET).is_socket():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (tmp_path / SOCKET).stat().st_mode & 0o777 == 0o600
        assert ask(tmp_path) == {"device": "plane-01"}
    finally:
        server.close()
    assert not (tmp_path / SOCKET).exists()


def test_an_answer_that_breaks_off_is_no_answer(tmp_path: Path) -> None:
    def describe() -> dict[str, str]:
        raise UnavailableError("the buffer cannot be read")

    server = StatusServer(tmp_path, describe)
    try:
        with pytest.raises(UnavailableError, match="broke off its answer"):
            ask(tmp_path)
    finally:
        server.close()


def test_notify_socket_on_which_nobody_listens_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.notify("WATCHDOG=1")
    assert "systemd not told state=WATCHDOG=1" in caplog.text


def test_systemd_is_asked_to_wait_while_something_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "ASK_S", 0.05)
    monkeypatch.setattr(systemd, "ASKS_MAX", 2)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10.0)
        with systemd.patience():
            assert [listener.recv(100) for _ in range(2)] == [b"EXTEND_TIMEOUT_USEC=300000\nWATCHDOG=1"] * 2
            listener.settimeout(0.3)
            with pytest.raises(TimeoutError):  # what hangs is ended in the end
                listener.recv(100)
