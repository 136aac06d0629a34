"""Users files: what is written is read, what is wrong is named, and a password is hashed once."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from edge_agent.cli import main
from edge_agent.contract.errors import ConfigError
from edge_agent.mqtt import passwords
from edge_agent.mqtt.passwords import Users, hash_password, set_password


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap hashes: the cost is not what is tested."""
    monkeypatch.setattr("edge_agent.mqtt.passwords.hash_password.__defaults__", (4, 1))


def test_what_is_set_is_verified(tmp_path: Path) -> None:
    file = tmp_path / "users"
    assert set_password(file, "pump", "sécret") and set_password(file, "fan", "x")
    file.write_text("# who may connect\n\n" + file.read_text())
    assert not set_password(file, "pump", "other")
    assert file.read_text().startswith("# who may connect\n\nfan:scrypt$") and file.stat().st_mode & 0o777 == 0o600
    users = Users(file)
    assert users.verify("pump", b"other") and users.verify("fan", b"x")
    for user, password in (("pump", "sécret"), ("pump", ""), ("fan", "other"), ("nobody", "x"), ("", ""), ("pump", "x" * 5_000)):
        assert not users.verify(user, password.encode())


def test_equal_passwords_have_different_hashes() -> None:
    assert hash_password("same") != hash_password("same")


def test_a_verified_password_is_known_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "users"
    set_password(file, "pump", "one")
    set_password(file, "fan", "two")
    users = Users(file)
    assert not users.known("pump", b"one") and users.verify("pump", b"one") and users.known("pump", b"one")
    assert not users.known("pump", b"two") and not users.known("fan", b"one")
    assert users.verify("fan", b"two")
    set_password(file, "pump", "three")
    assert not users.known("pump", b"one") and not users.verify("pump", b"one") and users.verify("pump", b"three")
    assert users.known("fan", b"two")  # whose line did not change


def test_the_owner_and_mode_of_the_file_stay(tmp_path: Path) -> None:
    file = tmp_path / "users"
    set_password(file, "pump", "one")
    file.chmod(0o640)
    set_password(file, "pump", "two")
    assert file.stat().st_mode & 0o777 == 0o640 and file.stat().st_uid == os.getuid()
    assert [f.name for f in tmp_path.iterdir()] == ["users"]


@pytest.mark.parametrize(
    "line",
    [
        *("pump", "pump:secret", "pump:scrypt$4$8$1$AAAA", "pump:scrypt$4$8$1$AA==$AAAA", "pump:scrypt$40$8$1$AAAA$" + "A" * 44),
        *("pump:scrypt$x$8$1$AAAA$AAAA", "pump:bcrypt$4$8$1$AAAA$" + "A" * 44),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "users"
    file.write_text(f"fan:{hash_password('x')}\n{line}\n")
    with pytest.raises(ConfigError, match="users line 2"):
        Users(file)


@pytest.mark.parametrize("user", ["", "a:b", " a", "#a", "a\nb", "a\x85b", "a\u2028b", "x" * 300])
def test_a_name_that_cannot_stand_in_the_file_is_refused(tmp_path: Path, user: str) -> None:
    with pytest.raises(ConfigError, match="must have 1 to 256 characters"):
        set_password(tmp_path / "users", user, "x")


def test_the_command_reads_the_password_from_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "users"
    for says in ("added", "changed"):
        monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
        assert main(["passwd", str(file), "pump"]) == 0
        assert capsys.readouterr().out == f"{file}: user pump {says}\n"
    assert Users(file).verify("pump", b"secret")
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["passwd", str(file), "pump"]) == 2
    assert "a password of 0 bytes" in capsys.readouterr().err


def test_the_default_hash_is_not_cheap() -> None:
    assert (1 << passwords.LOG2_N) * 128 * passwords.BLOCK >= 16 * 1024 * 1024
