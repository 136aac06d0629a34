"""The fleet: which devices there are, what each should run, and what each says it runs.

- One SQLite file (0600: it holds the devices' broker passwords), shared by the services and the commands.
- A device's desired version starts at 1 and rises by one with every change, for ever: a device refuses a lower one.
- Reported documents and events are kept as they came; of events the last EVENTS_MAX.

    fleet = Fleet(settings.fleet_path)
    fleet.add("plane-01")
    fleet.set_desired("plane-01", ref)
"""

from __future__ import annotations

import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec

from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.state import BundleRef, Desired, Reported, ZonesRef, decode_desired, decode_reported, encode_state
from edge_agent.contract.topics import check_name

BUSY_TIMEOUT_S = 10.0
EVENTS_MAX = 10_000
EVENT_BYTES_MAX = 16 * 1024
PASSWORD_BYTES = 24

_SCHEMA = """
CREATE TABLE IF NOT EXISTS devices (
    name TEXT PRIMARY KEY, password TEXT NOT NULL, added_us INTEGER NOT NULL,
    desired BLOB NOT NULL, reported BLOB, reported_us INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS policy (one INTEGER PRIMARY KEY CHECK (one = 1), ref BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER NOT NULL, device TEXT NOT NULL, body BLOB NOT NULL
) STRICT;
"""


class Event(msgspec.Struct, frozen=True):
    """What a device had to say; `body` is its JSON document, or text."""

    at_us: int
    device: str
    body: str


class Fleet:
    """The devices registry in `path`. Safe to use from several threads and processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(_SCHEMA)

    # Devices

    def add(self, device: str) -> str:
        """Register a device; its new broker password.

        Raises:
            ConfigError: the name is taken, or cannot be a device's.
        """
        try:
            check_name(device, "device")
        except ContractError as e:
            raise ConfigError(str(e)) from e
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        row = (device, password, _now_us(), encode_state(Desired(version=1, zones=self.zones())))
        with self._transaction() as db:
            if db.execute("SELECT 1 FROM devices WHERE name = ?", (device,)).fetchone():
                raise ConfigError(f"device {device!r} is there already; names are for ever")
            db.execute("INSERT INTO devices (name, password, added_us, desired) VALUES (?, ?, ?, ?)", row)
        return password

    def devices(self) -> list[str]:
        """The names of all devices, sorted."""
        return [name for (name,) in self._rows("SELECT name FROM devices ORDER BY name")]

    def passwords(self) -> dict[str, str]:
        """The broker password of each device."""
        return {str(name): str(password) for name, password in self._rows("SELECT name, password FROM devices ORDER BY name")}

    # State

    def desired(self, device: str) -> Desired:
        """What `device` should run, or ConfigError if there is no such device."""
        rows = self._rows("SELECT desired FROM devices WHERE name = ?", device)
        if not rows:
            raise ConfigError(f"there is no device {device!r}; fenceline device list shows all")
        return decode_desired(rows[0][0])

    def all_desired(self) -> dict[str, Desired]:
        """What each device should run."""
        return {str(name): decode_desired(document) for name, document in self._rows("SELECT name, desired FROM devices ORDER BY name")}

    def set_desired(self, device: str, bundle: BundleRef | None) -> Desired:
        """Ask `device` for a bundle, or for none: the new document, its version raised by one."""
        with self._transaction() as db:
            row = db.execute("SELECT desired FROM devices WHERE name = ?", (device,)).fetchone()
            if row is None:
                raise ConfigError(f"there is no device {device!r}; fenceline device list shows all")
            before = decode_desired(row[0])
            desired = Desired(version=before.version + 1, bundle=bundle, zones=before.zones)
            db.execute("UPDATE devices SET desired = ? WHERE name = ?", (encode_state(desired), device))
        return desired

    def zones(self) -> ZonesRef | None:
        """The zone policy that every device should have; None before the first publication."""
        rows = self._rows("SELECT ref FROM policy")
        return msgspec.json.decode(rows[0][0], type=ZonesRef) if rows else None

    def set_zones(self, ref: ZonesRef) -> None:
        """Ask every device, those to come too, for this zone policy; devices that are asked for it already hear nothing new."""
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO policy VALUES (1, ?)", (msgspec.json.encode(ref),))
            for name, document in db.execute("SELECT name, desired FROM devices").fetchall():
                before = decode_desired(document)
                if before.zones != ref:
                    desired = Desired(version=before.version + 1, bundle=before.bundle, zones=ref)
                    db.execute("UPDATE devices SET desired = ? WHERE name = ?", (encode_state(desired), name))

    def reported(self, device: str) -> Reported | None:
        """What `device` last said it runs; None before its first word."""
        rows = self._rows("SELECT reported FROM devices WHERE name = ?", device)
        return decode_reported(rows[0][0]) if rows and rows[0][0] is not None else None

    def all_reported(self) -> dict[str, tuple[Reported, int]]:
        """The last report of each device that sent one, and when it came (us)."""
        rows = self._rows("SELECT name, reported, reported_us FROM devices WHERE reported IS NOT NULL ORDER BY name")
        return {str(name): (decode_reported(document), int(at_us)) for name, document, at_us in rows}

    def record_reported(self, reported: Reported, *, retained: bool = False) -> bool:
        """Keep a report; False if the device is unknown, or the report is an old one.

        Each broker keeps the last report it got, and a device reports over one at a time. So a live report is the newest, whatever
        the device's clock says; a retained one counts only if it is newer than the one kept.
        """
        with self._transaction() as db:
            row = db.execute("SELECT reported FROM devices WHERE name = ?", (reported.device,)).fetchone()
            if row is None:
                return False
            kept = decode_reported(row[0]) if row[0] is not None else None
            if retained and kept is not None and (kept.desired_version, kept.at_us) >= (reported.desired_version, reported.at_us):
                return False
            db.execute(
                "UPDATE devices SET reported = ?, reported_us = ? WHERE name = ?", (encode_state(reported), _now_us(), reported.device)
            )
        return True

    # Events

    def record_event(self, device: str, body: bytes) -> None:
        """Keep what a device had to say, cut at EVENT_BYTES_MAX; the oldest beyond EVENTS_MAX go."""
        text = body[:EVENT_BYTES_MAX].decode(errors="replace")
        with self._transaction() as db:
            cursor = db.execute("INSERT INTO events (at_us, device, body) VALUES (?, ?, ?)", (_now_us(), device, text.encode()))
            db.execute("DELETE FROM events WHERE id <= ?", (int(cursor.lastrowid or 0) - EVENTS_MAX,))

    def events(self, limit: int = 100) -> list[Event]:
        """The last events, the newest first."""
        rows = self._rows("SELECT at_us, device, body FROM events ORDER BY id DESC LIMIT ?", limit)
        return [Event(at_us, device, body.decode()) for at_us, device, body in rows]

    # SQLite

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)

    def _rows(self, query: str, *arguments: object) -> list[tuple]:
        with closing(self._connect()) as db:
            return db.execute(query, arguments).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")


def _now_us() -> int:
    return time.time_ns() // 1_000
