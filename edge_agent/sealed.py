"""Encryption of blocks at rest: AES-256-GCM under a key from a file or a systemd credential.

- The header of a block stays readable (whose, which lane, which sequence): an operator without the key can still see what
  is there. The readings are encrypted, and the header is authenticated with them: a block cannot pass for another one.
- The nonce is 96 random bits: a block that is stored a second time after a disk error does not repeat one.
- The key file holds one key per line, 32 bytes as hex or base64. The first seals; all open. So a key is changed by putting
  a new line on top, and the old one may go when every block that it sealed has left.
- A stored block names the key that sealed it. Without that key nothing is deleted: the agent says which one it wants.

Layout: `b"FLS1"`, key id (8 bytes), nonce (12), the block's own first part (magic, header length, header), AES-GCM of the rest.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from edge_agent.contract.block import HEADER_BYTES_MAX, MAGIC, BlockHeader, peek_header
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.key_file import read_keys

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

SEALED_MAGIC = b"FLS1"
KEY_ID_BYTES = 8
CREDENTIAL = "buffer.key"
_NONCE_BYTES = 12
_PREFIX_BYTES = len(SEALED_MAGIC) + KEY_ID_BYTES + _NONCE_BYTES


class Keys:
    """The keys of one buffer; `main` is the id of the one that seals."""

    def __init__(self, keys: list[bytes]) -> None:
        """`keys`: 32 bytes each, the sealing one first. Loads `cryptography` now, not when the module is imported."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._ciphers: dict[str, AESGCM] = {_key_id(key): AESGCM(key) for key in keys}
        self.main = _key_id(keys[0])

    def __contains__(self, key_id: str) -> bool:
        return key_id in self._ciphers

    def seal(self, block: bytes) -> bytes:
        """A block as it is stored."""
        head = 8 + int.from_bytes(block[4:8], "little")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        prefix = SEALED_MAGIC + bytes.fromhex(self.main) + nonce + block[:head]
        return prefix + self._ciphers[self.main].encrypt(nonce, block[head:], prefix)

    def open(self, stored: bytes) -> bytes:
        """The inverse of `seal`.

        Raises:
            ConfigError: the key that sealed it is not here.
            ContractError: the bytes are damaged.
        """
        from cryptography.exceptions import InvalidTag

        key_id = sealed_under(stored)
        end = _PREFIX_BYTES + 8 + int.from_bytes(stored[_PREFIX_BYTES + 4 : _PREFIX_BYTES + 8], "little")
        if key_id not in self._ciphers:
            raise missing_key(str(key_id))
        if not _PREFIX_BYTES + 8 <= end <= min(len(stored), _PREFIX_BYTES + 8 + HEADER_BYTES_MAX):
            raise ContractError(f"sealed block of {len(stored)} bytes: its header is damaged")
        nonce = stored[len(SEALED_MAGIC) + KEY_ID_BYTES : _PREFIX_BYTES]
        try:
            rest = self._ciphers[str(key_id)].decrypt(nonce, stored[end:], stored[:end])
        except InvalidTag as e:
            raise ContractError(f"sealed block of {len(stored)} bytes: the bytes are damaged") from e
        return stored[_PREFIX_BYTES:end] + rest


def open_stored(stored: bytes, keys: Keys | None) -> bytes:
    """The block in what is stored, sealed or not.

    Raises:
        ConfigError: it is sealed under a key that is not here.
        ContractError: the bytes are damaged.
    """
    key_id = sealed_under(stored)
    if key_id is None:
        return stored
    if keys is None:
        raise missing_key(key_id)
    return keys.open(stored)


def missing_key(key_id: str) -> ConfigError:
    """What to say when a stored block needs a key that is not here."""
    return ConfigError(f"blocks are sealed under the key {key_id}: set buffer.key_file, or put its line back; nothing was deleted")


def sealed_under(stored: bytes) -> str | None:
    """The id of the key that sealed it; None for a block that is not sealed."""
    if stored[: len(SEALED_MAGIC)] != SEALED_MAGIC:
        return None
    return stored[len(SEALED_MAGIC) : len(SEALED_MAGIC) + KEY_ID_BYTES].hex()


def stored_header(stored: bytes) -> BlockHeader:
    """The header of what is stored, sealed or not, without a key and without proof that it is whole.

    Raises:
        ContractError: there is no header to read.
    """
    return peek_header(stored[_PREFIX_BYTES:] if sealed_under(stored) is not None else stored)


def is_stored_block(data: bytes) -> bool:
    """Whether these bytes start like a stored block."""
    return data[:4] in (MAGIC, SEALED_MAGIC)


def load_keys(key_file: Path | None) -> Keys | None:
    """The keys of `key_file`, or of the systemd credential `buffer.key`; None if there is neither.

    Raises:
        ConfigError: a file that is there cannot be read, or holds something else than keys.
    """
    keys = read_keys(key_file, CREDENTIAL, "buffer.key_file")
    return Keys(keys) if keys else None


def _key_id(key: bytes) -> str:
    return hashlib.sha256(b"fenceline buffer key" + key).hexdigest()[: 2 * KEY_ID_BYTES]
