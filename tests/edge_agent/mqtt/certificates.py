"""The PEM files of a test's TLS under short names: ca.pem, and NAME.pem and NAME.key for servers and clients on loopback."""

from __future__ import annotations

from pathlib import Path

from tests.certificates import Authority


def make(home: Path, *names: str) -> Path:
    """Write ca.pem, and NAME.pem and NAME.key for each of `names` (their CN), into `home`."""
    authority = Authority(home)
    authority.certificate.rename(home / "ca.pem")
    for name in names:
        authority.issue(name, address="127.0.0.1").certificate.rename(home / f"{name}.pem")
    return home
