"""Who may connect to the listener: a file of users and hashed passwords.

- A line is `user:scrypt$LOG2_N$R$P$SALT$HASH` (base64); empty lines and lines that begin with `#` are skipped.
- The file is read again when it has changed, so a user can be added or removed while the agent runs; if it cannot be read then, the
  users known before stay, and the log says so.
- A password is hashed once per user and process: later connections are compared with a keyed digest in memory, which costs microseconds,
  so a storm of reconnecting sensors does not cost a hash each.
- An unknown user costs as much time as a wrong password.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from edge_agent.contract.errors import ConfigError
from edge_agent.whole_file import stamp

log = logging.getLogger(__name__)

LOG2_N, BLOCK, PARALLEL = 14, 8, 1  # 16 MiB and some 40 ms here: hundreds of sensors come back at once after a restart
LOG2_N_MAX, BLOCK_MAX, PARALLEL_MAX = 17, 16, 16
SALT_BYTES, HASH_BYTES = 16, 32
FILE_BYTES_MAX = 4 * 1024 * 1024
USER_CHARACTERS_MAX = 256
PASSWORD_BYTES_MAX = 1024


@dataclass(frozen=True)
class _Hash:
    log2_n: int
    block: int
    parallel: int
    salt: bytes
    digest: bytes

    def of(self, password: bytes) -> bytes:
        """The digest of another password, made the same way."""
        n = 1 << self.log2_n
        return hashlib.scrypt(
            password, salt=self.salt, n=n, r=self.block, p=self.parallel, maxmem=256 * n * self.block + (1 << 20), dklen=len(self.digest)
        )


_NOBODY = _Hash(LOG2_N, BLOCK, PARALLEL, bytes(SALT_BYTES), bytes(HASH_BYTES))


def hash_password(password: str, log2_n: int = LOG2_N, parallel: int = PARALLEL) -> str:
    """What stands after the colon of a user's line.

    Raises:
        ConfigError: the password is empty or too long.
    """
    raw = password.encode()
    if not 0 < len(raw) <= PASSWORD_BYTES_MAX:
        raise ConfigError(f"a password of {len(raw)} bytes; want 1 to {PASSWORD_BYTES_MAX}")
    empty = _Hash(log2_n, BLOCK, parallel, secrets.token_bytes(SALT_BYTES), bytes(HASH_BYTES))
    salt, digest = base64.b64encode(empty.salt).decode(), base64.b64encode(empty.of(raw)).decode()
    return f"scrypt${log2_n}${BLOCK}${parallel}${salt}${digest}"


def set_password(file: Path, user: str, password: str) -> bool:
    """Write the user's line into `file`, which is made if missing; True if the user is new. Other lines stay as they are.

    Raises:
        ConfigError: the name or the password cannot be used, or the file not be read or written.
    """
    one_line = user.splitlines() == [user]  # there are more line ends than those of a keyboard
    if not one_line or len(user) > USER_CHARACTERS_MAX or user != user.strip() or user.startswith("#") or set(user) & set(":\0"):
        raise ConfigError(f"user {user!r} must have 1 to {USER_CHARACTERS_MAX} characters, no colon or line end, no blank or # in front")
    line = f"{user}:{hash_password(password)}"
    try:
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [other for other in lines if other.partition(":")[0] != user]
        _replace(file, "\n".join([*kept, line]) + "\n")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"users file {file} cannot be changed: {e}") from e
    return len(kept) == len(lines)


class Users:
    """The users of one file, for one thread that checks (`verify`) and any that asks (`known`)."""

    def __init__(self, file: Path) -> None:
        """Read the file; ConfigError if it is not one of users."""
        self._file = file
        self._key = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._proved: dict[str, bytes] = {}
        self._stamp = stamp(file)
        self._users = _read(file)

    def known(self, user: str, password: bytes) -> bool:
        """Whether this password has been verified before; costs no hash. Reads the file if it has changed."""
        self._reload()
        proof = self._proof(user, password)
        with self._lock:
            return hmac.compare_digest(self._proved.get(user, b""), proof)

    def verify(self, user: str, password: bytes) -> bool:
        """Whether the password is the user's; takes as long as a hash."""
        stored = self._users.get(user)
        if len(password) > PASSWORD_BYTES_MAX:
            return False
        same = hmac.compare_digest((stored or _NOBODY).of(password), (stored or _NOBODY).digest)
        if stored is None or not same:
            return False
        with self._lock:
            if self._users.get(user) == stored:  # not changed meanwhile
                self._proved[user] = self._proof(user, password)
        return True

    def _proof(self, user: str, password: bytes) -> bytes:
        return hmac.digest(self._key, b"%d:" % len(password) + password + user.encode(), "sha256")

    def _reload(self) -> None:
        now = stamp(self._file)
        if now == self._stamp:
            return
        self._stamp = now
        try:
            users = _read(self._file)
        except ConfigError as e:
            log.error("users file not read, the users from before stay error=%s", e)
            return
        with self._lock:
            self._proved = {u: p for u, p in self._proved.items() if u in users and users[u] == self._users.get(u)}
            self._users = users
        log.info("users file read users=%d", len(users))


def _read(file: Path) -> dict[str, _Hash]:
    try:
        with file.open("rb") as stream:
            raw = stream.read(FILE_BYTES_MAX + 1)
        lines = raw.decode().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"users file {file} cannot be read: {e}; make it with: edge-agent passwd {file} USER") from e
    if len(raw) > FILE_BYTES_MAX:
        raise ConfigError(f"users file {file} is larger than {FILE_BYTES_MAX} bytes")
    users = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            user, _, text = line.partition(":")
            users[user] = _parse(text.strip(), f"{file} line {number}")
    return users


def _parse(text: str, where: str) -> _Hash:
    try:
        name, log2_n, block, parallel, salt, digest = text.split("$")
        hashed = _Hash(
            int(log2_n), int(block), int(parallel), base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True)
        )
    except (ValueError, binascii.Error) as e:
        raise ConfigError(f"users file {where}: want user:scrypt$…, as edge-agent passwd writes it") from e
    limits = 1 <= hashed.log2_n <= LOG2_N_MAX and 1 <= hashed.block <= BLOCK_MAX and 1 <= hashed.parallel <= PARALLEL_MAX
    if name != "scrypt" or not limits or len(hashed.digest) < HASH_BYTES // 2:
        raise ConfigError(f"users file {where}: want scrypt with at most 2**{LOG2_N_MAX}, {BLOCK_MAX}, {PARALLEL_MAX}, and a whole hash")
    return hashed


def _replace(file: Path, text: str) -> None:
    """Write whole or not at all, readable by the owner alone."""
    number, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        if file.exists():  # the agent's user may read it: that must stay so
            before = file.stat()
            os.fchown(number, before.st_uid, before.st_gid)
            os.fchmod(number, before.st_mode & 0o777)
        with os.fdopen(number, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
