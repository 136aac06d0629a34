"""Key files on the device: one key per line, 32 bytes as hex or base64, `#` begins a comment; or a systemd credential of that form."""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path

from edge_agent.contract.errors import ConfigError

KEYS_MAX = 16
_KEY_BYTES = 32


def read_keys(key_file: Path | None, credential: str, setting: str) -> list[bytes]:
    """The keys of `key_file`, or of a systemd credential; none if there is neither.

    Args:
        credential: the credential's name; `setting`: what agent.toml calls the file, for messages.

    Raises:
        ConfigError: a file that is there cannot be read, or holds something else than keys.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    given = Path(directory) / credential if directory else None
    path = key_file or (given if given is not None and given.is_file() else None)
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{setting}: cannot read {path}: {e}") from e
    found = [(text, number) for number, line in enumerate(lines, 1) if (text := line.partition("#")[0].strip())]
    keys = [_parse(text, f"{setting}: {path} line {number}") for text, number in found]
    if not 1 <= len(keys) <= KEYS_MAX:
        raise ConfigError(f"{setting}: {path} holds {len(keys)} keys; 1 to {KEYS_MAX}, one per line (openssl rand -hex 32)")
    return keys


def _parse(text: str, where: str) -> bytes:
    for decode in (bytes.fromhex, lambda t: base64.b64decode(t, validate=True)):
        try:
            key: bytes = decode(text)
        except (ValueError, binascii.Error):
            continue
        if len(key) == _KEY_BYTES:
            return key
    raise ConfigError(f"{where} is not {_KEY_BYTES} bytes in hex or base64 (openssl rand -hex 32)")
