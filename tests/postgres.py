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
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from tests.servers import HOST, Server, free_port, running

WAIT_S = 60
USER, PASSWORD, DATABASE = "fenceline", "not a secret", "fenceline"
DEBIAN = Path("/usr/lib/postgresql")


def find_postgres() -> Path | None:
    """The folder with `postgres` and `initdb`; the newest version that is installed."""
    found = sorted(DEBIAN.glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).resolve().parent if on_path else None


class Postgres(Server):
    """A PostgreSQL that can be stopped, and started again with what it holds."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.port = free_port()
        self._programs, self._folder, self._data = programs, folder, folder / "data"
        command = [*self._command_of("postgres"), "-D", str(self._data), "-p", str(self.port), "-h", HOST, "-k", str(folder)]
        super().__init__([*command, "-c", "fsync=off"], folder / "log", self._accepts, start_s_max=WAIT_S)
        self._server_url = f"postgresql://{USER}:{PASSWORD.replace(' ', '%20')}@{HOST}:{self.port}"
        self.url = f"{self._server_url}/{DATABASE}"

    def create(self) -> None:
        self._folder.mkdir()
        secret = self._folder / "password"
        secret.write_text(PASSWORD)
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (self._folder, secret):
                os.chown(path, user.pw_uid, user.pw_gid)
            for parent in self._folder.parents:  # pytest's folders are for their owner alone
                if parent.stat().st_uid == 0 and parent.is_relative_to(Path(os.environ.get("TMPDIR", "/tmp"))):
                    parent.chmod(parent.stat().st_mode | 0o011)
        options = ["-U", USER, "-A", "scram-sha-256", f"--pwfile={secret}", "--no-sync", "-E", "UTF8"]
        with self.log.open("ab") as log:
            command = [*self._command_of("initdb"), "-D", str(self._data), *options]
            subprocess.run(command, stdout=log, stderr=log, cwd=self._folder, timeout=2 * WAIT_S, check=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """As an operator ends it: sessions are cut off."""
        super().stop(number)

    def kill(self) -> None:
        """At once, without writing anything down; by its own hand, as SIGKILL leaves shared memory behind."""
        if self._process is not None:
            self.stop(signal.SIGQUIT)

    def make_database(self) -> None:
        with psycopg.connect(f"{self._server_url}/postgres", autocommit=True) as db:
            db.execute(f"CREATE DATABASE {DATABASE}")

    def empty(self) -> None:
        """Drop every table."""
        with psycopg.connect(self.url, autocommit=True) as db:
            db.execute("DROP SCHEMA public CASCADE")
            db.execute("CREATE SCHEMA public")

    def _accepts(self) -> bool:
        try:
            psycopg.connect(f"{self._server_url}/postgres", connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _command_of(self, program: str) -> list[str]:
        become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        return [*become, str(self._programs / program)]


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A running server with an empty database; skips the test where PostgreSQL is not installed."""
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (make system-deps)")
    server = Postgres(programs, folder / "postgres")
    server.create()
    with running(server):
        server.make_database()
        yield server
