"""Files that several processes share: written whole, made once, changed by one at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_agent.contract.errors import ConfigError


def write_atomically(path: Path, data: bytes, *, private: bool = False) -> None:
    """Write a file that readers see whole or not at all, also after a power cut.

    Args:
        private: 0600 from its first byte. Otherwise a file that was there keeps its rights and its owner.

    Raises:
        OSError: the disk does not take it; the old file is as it was, and nothing lies beside it.
    """
    before = path.stat() if path.exists() and not private else None
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # what a process of this number left may have other rights
    mode = 0o600 if private or before else 0o666
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            if before:
                _take_after(file.fileno(), before)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _take_after(handle: int, before: os.stat_result) -> None:
    """Give an open file the rights of another, and its owner where one may: `sudo` takes no file away from its user."""
    if os.geteuid() == 0:
        os.fchown(handle, before.st_uid, before.st_gid)
    os.fchmod(handle, stat.S_IMODE(before.st_mode))


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """One process and thread at a time; waits for the others. The file stays."""
    with os.fdopen(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def secret(path: Path, length: int) -> str:
    """The secret in a file (0600), `length` random bytes in base64, made when first asked for.

    Raises:
        ConfigError: the file is empty, and an empty secret would open to everybody.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with held(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                write_atomically(path, f"{secrets.token_urlsafe(length)}\n".encode(), private=True)
    text = path.read_text().strip()
    if not text:
        raise ConfigError(f"{path} is empty; delete it, and what needs it makes a new one at the next start")
    return text
