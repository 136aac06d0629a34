"""Files that several processes share."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from cloud.files import secret, write_atomically
from edge_agent.contract.errors import ConfigError


def test_a_secret_is_private_made_once_and_the_same_for_all_who_ask_at_once(tmp_path: Path) -> None:
    path, found = tmp_path / "secrets/cloud.password", set[str]()
    threads = [threading.Thread(target=lambda: found.add(secret(path, 24))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {path.read_text().strip()} and len(path.read_text()) > 24
    assert path.stat().st_mode & 0o777 == 0o600


def test_an_empty_secret_opens_to_nobody(tmp_path: Path) -> None:
    """What a power cut or a full disk left."""
    path = tmp_path / "api-token"
    path.touch()
    with pytest.raises(ConfigError, match="api-token is empty; delete it"):
        secret(path, 24)


def test_a_private_file_takes_no_rights_from_what_a_process_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getpid", lambda: 7)
    (tmp_path / ".users.7").write_text("left")
    (tmp_path / ".users.7").chmod(0o644)
    write_atomically(tmp_path / "users", b"new", private=True)
    assert [p.name for p in tmp_path.iterdir()] == ["users"]
    assert (tmp_path / "users").read_bytes() == b"new" and (tmp_path / "users").stat().st_mode & 0o777 == 0o600
