"""The audit trail: what was refused and why, in a log that shows if it was changed.

- Entries are only added. Each holds the SHA-256 of the one before it and of itself, so a changed or removed entry breaks
  the chain from there on (`verify`). Keep the newest hash elsewhere and a cut at the end shows too.
- Several processes write to it; SQLite gives the order.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import msgspec

from edge_agent.contract.errors import UNREADABLE

BUSY_TIMEOUT_S = 10.0
DETAIL_CHARACTERS_MAX = 1_000
FIRST = "0" * 64

_SCHEMA = "CREATE TABLE IF NOT EXISTS entries (id INTEGER PRIMARY KEY, entry BLOB NOT NULL, hash TEXT NOT NULL) STRICT"


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One refusal or alarm. `subject` says who (a device), `count` how often since the last entry like it."""

    at_us: int
    kind: str
    region: str
    subject: str
    reason: str
    detail: str
    count: int
    previous: str


class Audit:
    """The audit trail in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        with closing(self._connect()) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute(_SCHEMA)

    def add(self, kind: str, *, region: str, subject: str, reason: str, detail: str, count: int = 1) -> Entry:
        """Append an entry, durably."""
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            last = db.execute("SELECT hash FROM entries ORDER BY id DESC LIMIT 1").fetchone()
            entry = Entry(
                at_us=time.time_ns() // 1_000,
                kind=kind,
                region=region,
                subject=subject,
                reason=reason,
                detail=detail[:DETAIL_CHARACTERS_MAX],
                count=count,
                previous=last[0] if last else FIRST,
            )
            data = msgspec.json.encode(entry)
            db.execute("INSERT INTO entries (entry, hash) VALUES (?, ?)", (data, hashlib.sha256(data).hexdigest()))
            db.execute("COMMIT")
        return entry

    def entries(self, limit: int = 100) -> list[Entry]:
        """The newest entries, the newest first."""
        with closing(self._connect()) as db:
            rows = db.execute("SELECT entry FROM entries ORDER BY id DESC LIMIT ?", (limit,)).fetchall()
        return [_decode(row[0]) for row in rows]

    def counts(self) -> dict[str, int]:
        """How often each reason was given; entries that are no refusals have none."""
        query = """
            WITH readable AS (SELECT CAST(entry AS TEXT) AS entry FROM entries WHERE json_valid(CAST(entry AS TEXT)))
            SELECT json_extract(entry, '$.reason') AS reason, sum(json_extract(entry, '$.count')) FROM readable
            WHERE reason <> '' GROUP BY reason
        """
        with closing(self._connect()) as db:
            return {str(reason): int(count) for reason, count in db.execute(query)}

    def verify(self) -> int | None:
        """The number of the first entry that does not fit the chain; None if all do."""
        previous = FIRST
        with closing(self._connect()) as db:
            for place, (number, data, digest) in enumerate(db.execute("SELECT id, entry, hash FROM entries ORDER BY id"), 1):
                if number != place or hashlib.sha256(data).hexdigest() != digest or _previous(data) != previous:
                    return place
                previous = digest
        return None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY_TIMEOUT_S, isolation_level=None)


_decode = msgspec.json.Decoder(Entry).decode


def _previous(data: bytes) -> str | None:
    """The hash that an entry names; None if it is no entry at all."""
    try:
        return _decode(data).previous
    except UNREADABLE:
        return None
