"""Certificates for tests and benchmarks: an authority, servers and clients, made on the fly, valid for a day.

authority = Authority(tmp_path)
server = authority.issue("eu", address="127.0.0.1")
device = authority.issue("plane-01")
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VALID = timedelta(days=1)


@dataclass(frozen=True)
class Identity:
    """PEM files of a certificate and its key, and the authority's certificate."""

    name: str
    certificate: Path
    key: Path
    ca: Path


class Authority:
    """Signs certificates; files go to `folder`."""

    def __init__(self, folder: Path, name: str = "test devices") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.certificate = folder, folder / "ca.crt"
        self._name, self._key = _name(name), ec.generate_private_key(ec.SECP256R1())
        extensions = x509.BasicConstraints(ca=True, path_length=0), _usage(signs_certificates=True)
        self.certificate.write_bytes(_pem(self._sign(self._name, self._key.public_key(), extensions)))

    def issue(self, name: str, address: str | None = None) -> Identity:
        """A certificate for the client `name`, or for the server at `address`."""
        key = ec.generate_private_key(ec.SECP256R1())
        extensions: tuple[x509.ExtensionType, ...] = (x509.BasicConstraints(ca=False, path_length=None), _usage())
        if address is not None:
            extensions = (*extensions, x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]))
        identity = Identity(name, self.folder / f"{name}.crt", self.folder / f"{name}.key", self.certificate)
        identity.certificate.write_bytes(_pem(self._sign(_name(name), key.public_key(), extensions)))
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        identity.key.touch(0o600)
        identity.key.write_bytes(key.private_bytes(encoding, form, serialization.NoEncryption()))
        return identity

    def _sign(self, name: x509.Name, key: ec.EllipticCurvePublicKey, extensions: tuple[x509.ExtensionType, ...]) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = x509.CertificateBuilder().subject_name(name).issuer_name(self._name).public_key(key)
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(hours=1)).not_valid_after(now + VALID)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return builder.add_extension(issuer, critical=False).sign(self._key, hashes.SHA256())


def _usage(*, signs_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
