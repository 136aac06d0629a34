"""A real PostgreSQL for tests: a cluster of its own in a temporary folder, on loopback, at a free port.

It refuses to run as root, so root starts it as the user `postgres`; anyone else as themselves.

    with postgres(tmp_path) as server:
        Fleet(server.url)
        server.stop()
        server.start()
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.brokers import HOST, free_port

WAIT_S = 60
USER, PASSWORD, DATABASE = "fenceline", "not a secret", "fenceline"
DEBIAN = Path("/usr/lib/postgresql")


def find_postgres() -> Path | None:
    """The folder with `postgres`, `initdb` and `pg_ctl`; the newest version that is installed."""
    found = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class Server:
    """A PostgreSQL that can be stopped, and started again with what it holds."""

    def __init__(self, programs: Path, folder: Path, port: int) -> None:
        self.port, self._programs, self._folder = port, programs, folder
        self.url = f"postgresql://{USER}:{PASSWORD.replace(' ', '%20')}@{HOST}:{port}/{DATABASE}"

    def create(self) -> None:
        self._folder.mkdir()
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self._folder, user.pw_uid, user.pw_gid)
            for parent in self._folder.parents:  # pytest's folders are for their owner alone
                if parent.stat().st_uid == 0 and parent.is_relative_to(Path(os.environ.get("TMPDIR", "/tmp"))):
                    parent.chmod(parent.stat().st_mode | 0o011)
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            os.chown(secret, user.pw_uid, user.pw_gid)
        data = str(self._folder / "data")
        self._run("initdb", "-D", data, "-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8")

    def start(self) -> None:
        options = f"-p {self.port} -h {HOST} -k {self._folder} -c fsync=off"
        self._control("start", "-o", options, "-l", str(self._folder / "log"))

    def stop(self) -> None:
        """As an operator ends it: sessions are cut off."""
        self._control("stop", "-m", "fast")

    def make_database(self) -> None:
        import psycopg

        with psycopg.connect(self.url.rpartition("/")[0] + "/postgres", autocommit=True) as db:
            db.execute(f"CREATE DATABASE {DATABASE}")

    def empty(self) -> None:
        """Drop every table."""
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute("DROP SCHEMA public CASCADE")
            db.execute("CREATE SCHEMA public")

    def _control(self, verb: str, *arguments: str) -> None:
        self._run("pg_ctl", verb, "-D", str(self._folder / "data"), "-w", "-t", str(WAIT_S), *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        if os.geteuid() == 0:
            command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *command]
        # Files, not pipes: the server that pg_ctl leaves behind would hold them open.
        with (self._folder / "commands.log").open("ab") as log:
            done = subprocess.run(command, stdout=log, stderr=log, cwd=self._folder, timeout=2 * WAIT_S, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} failed: {(self._folder / 'commands.log').read_text()[-2000:]}")


@contextmanager
def postgres(folder: Path) -> Iterator[Server]:
    """A running server with an empty database; skips the test where PostgreSQL is not installed."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (make system-deps)")
    server = Server(programs, folder / "postgres", free_port())
    server.create()
    server.start()
    try:
        server.make_database()
        yield server
    finally:
        server.stop()
