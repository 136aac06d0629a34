"""A TUF repository for tests: made with python-tuf's metadata API, served over HTTP on loopback.

It is written apart from the product's own release code, so that the two check each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edge_agent.contract.bundle import Bundle, pack_bundle
from edge_agent.contract.state import BundleRef, ZonesRef

ROLES = ("root", "timestamp", "snapshot", "targets")


class TufRepository:
    """Metadata and targets in `path`; `start` serves them. Consistent snapshots, one ed25519 key per role."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "metadata").mkdir(parents=True)
        (path / "targets").mkdir()
        self.signers = {role: CryptoSigner.generate_ed25519() for role in ROLES}
        self.expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
        root = Root(expires=self.expires, consistent_snapshot=True)
        for role, signer in self.signers.items():
            root.add_key(signer.public_key, role)
        signed = Metadata(root)
        signed.sign(self.signers["root"])
        self.root = signed.to_bytes()
        (path / "metadata" / "1.root.json").write_bytes(self.root)
        self.targets = Targets(expires=self.expires)
        self.snapshot = Snapshot(expires=self.expires)
        self.timestamp = Timestamp(expires=self.expires)
        self.server: ThreadingHTTPServer | None = None
        self.port = 0
        self.requests: list[str] = []
        self.publish()

    def add(self, bundle: Bundle) -> BundleRef:
        """Sign and publish a bundle."""
        manifest = bundle.manifest
        target = f"bundles/{manifest.model}/{manifest.model_version}.bundle"
        ref = self.add_bytes(target, pack_bundle(bundle))
        return BundleRef(target=target, model=manifest.model, model_version=manifest.model_version, sha256=ref)

    def add_zones(self, document: bytes, version: int) -> ZonesRef:
        """Sign and publish a zone policy."""
        target = "zones/zones.geojson"
        return ZonesRef(target=target, version=version, sha256=self.add_bytes(target, document, {"version": version}))

    def add_bytes(self, target: str, data: bytes, custom: dict[str, Any] | None = None) -> str:
        info = TargetFile.from_data(target, data, ["sha256"])
        if custom is not None:
            info.unrecognized_fields["custom"] = custom
        self.targets.targets[target] = info
        folder, _, _name = target.rpartition("/")
        (self.path / "targets" / folder).mkdir(parents=True, exist_ok=True)
        self.target_path(target, info.hashes["sha256"]).write_bytes(data)
        self.publish()
        return info.hashes["sha256"]

    def target_path(self, target: str, sha256: str) -> Path:
        folder, _, name = target.rpartition("/")
        return self.path / "targets" / folder / f"{sha256}.{name}"

    def publish(self, *, versions: bool = True, signers: dict[str, CryptoSigner] | None = None) -> None:
        """Write targets, snapshot and timestamp with the next versions."""
        signers = {**self.signers, **(signers or {})}
        if versions and (self.path / "metadata" / "timestamp.json").exists():
            for document in (self.targets, self.snapshot, self.timestamp):
                document.version += 1
        self.snapshot.meta["targets.json"] = MetaFile(self.targets.version)
        self.timestamp.snapshot_meta = MetaFile(self.snapshot.version)
        names = {"targets": f"{self.targets.version}.targets", "snapshot": f"{self.snapshot.version}.snapshot", "timestamp": "timestamp"}
        documents: dict[str, Any] = {"targets": self.targets, "snapshot": self.snapshot, "timestamp": self.timestamp}
        for role, document in documents.items():
            signed = Metadata(document)
            signed.sign(signers[role])
            (self.path / "metadata" / f"{names[role]}.json").write_bytes(signed.to_bytes())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, handler: Callable[..., SimpleHTTPRequestHandler] | None = None) -> None:
        """Serve; the port stays the same over a stop."""
        requests = self.requests

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *values: Any) -> None:
                requests.append(self.path)

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), handler or partial(Handler, directory=str(self.path)))
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.server = None
