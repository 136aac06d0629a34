"""The signing keys of the release repository, and its first metadata.

- One ed25519 key per TUF role. Files are 0600 in a directory of 0700, PEM (PKCS#8), outside the project's repository.
- Keys are never overwritten: a device trusts the root it was given, a new one would cut it off.
- `init` makes keys and the repository's first metadata together: no half of it is of use.
- Whoever holds all keys can run code on every gateway. Keep `root.pem` offline after `init`; releases need the other three.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp  # type: ignore[attr-defined]

from cloud.files import write_atomically
from edge_agent.contract.errors import ConfigError

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = "root", "targets", "snapshot", "timestamp"
ROLES = (ROOT, TARGETS, SNAPSHOT, TIMESTAMP)
LIFETIME = {
    ROOT: timedelta(days=365),
    TARGETS: timedelta(days=90),
    SNAPSHOT: timedelta(days=90),
    TIMESTAMP: timedelta(days=7),
}
INIT_COMMAND = "fenceline keys init"


def init(keys_dir: Path, releases_dir: Path, now: datetime) -> Path:
    """Make the keys of every role and the first metadata of an empty repository.

    Returns:
        The root document that devices are given (`root_path`).

    Raises:
        ConfigError: keys or metadata are already there; nothing is changed.
    """
    metadata_dir = releases_dir / "metadata"
    present = [p for p in (*(key_path(keys_dir, role) for role in ROLES), metadata_dir / "timestamp.json") if p.exists()]
    if present:
        raise ConfigError(f"{present[0]} exists: keys are never overwritten; move {keys_dir} and {releases_dir} away first")
    keys_dir.mkdir(parents=True, exist_ok=True)
    keys_dir.chmod(0o700)
    signers = {role: _create(key_path(keys_dir, role)) for role in ROLES}
    (releases_dir / "targets").mkdir(parents=True, exist_ok=True)
    metadata_dir.mkdir(parents=True, exist_ok=True)
    for name, document in _first_metadata(signers, now):
        write_atomically(metadata_dir / name, document)
    return root_path(releases_dir)


def is_initialised(keys_dir: Path, releases_dir: Path) -> bool:
    """Whether `init` has been run."""
    return key_path(keys_dir, TIMESTAMP).exists() and (releases_dir / "metadata/timestamp.json").exists()


def root_path(releases_dir: Path) -> Path:
    """The first root document: what a device's `bootstrap` root is copied from. Later roots follow from it."""
    return releases_dir / "metadata" / "1.root.json"


def key_path(keys_dir: Path, role: str) -> Path:
    """Where the private key of `role` lies."""
    return keys_dir / f"{role}.pem"


def load_signer(keys_dir: Path, role: str) -> CryptoSigner:
    """The signer of `role`.

    Raises:
        ConfigError: the key is not there, or cannot be read.
    """
    path = key_path(keys_dir, role)
    try:
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except FileNotFoundError as e:
        raise ConfigError(f"no {role} key at {path}; make the keys with: {INIT_COMMAND}") from e
    except (OSError, ValueError, TypeError) as e:
        raise ConfigError(f"{role} key at {path} does not read: {e}") from e


def _create(path: Path) -> CryptoSigner:
    signer = CryptoSigner.generate_ed25519()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(signer.private_bytes)
        file.flush()
        os.fsync(file.fileno())
    return signer


def _first_metadata(signers: dict[str, CryptoSigner], now: datetime) -> Sequence[tuple[str, bytes]]:
    """File names and contents, in the order in which they must appear: the timestamp last."""
    now = now.replace(microsecond=0)
    root = Root(expires=now + LIFETIME[ROOT], consistent_snapshot=True)
    for role, signer in signers.items():
        root.add_key(signer.public_key, role)
    snapshot = Snapshot(expires=now + LIFETIME[SNAPSHOT], meta={"targets.json": MetaFile(version=1)})
    documents: list[tuple[str, str, Any]] = [
        ("1.root.json", ROOT, root),
        ("1.targets.json", TARGETS, Targets(expires=now + LIFETIME[TARGETS])),
        ("1.snapshot.json", SNAPSHOT, snapshot),
        ("timestamp.json", TIMESTAMP, Timestamp(expires=now + LIFETIME[TIMESTAMP], snapshot_meta=MetaFile(version=1))),
    ]
    return [(name, signed_bytes(document, signers[role])) for name, role, document in documents]


def signed_bytes(document: Any, signer: CryptoSigner) -> bytes:
    """A TUF document, signed by `signer` alone, as a file."""
    metadata: Metadata[Any] = Metadata(document)
    metadata.sign(signer)
    return metadata.to_bytes()
