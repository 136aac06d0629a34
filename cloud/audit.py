"""The audit trail: what was refused and why, in a log that shows if it was changed.

- Entries are only added. Each holds the SHA-256 of the one before it and of itself, so a changed or removed entry breaks
  the chain from there on (`verify`). Keep the newest hash elsewhere and a cut at the end shows too.
- Several processes write to it; the database gives the order: one writer at a time, on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection

import msgspec
from sqlalchemy import BigInteger, Column, Integer, LargeBinary, MetaData, Table, Text, insert, select

from cloud.metadata import Database, Store
from edge_agent.contract.errors import UNREADABLE

DETAIL_CHARACTERS_MAX = 1_000
FIRST = "0" * 64
READ_ROWS = 1_000  # at a time, when the whole trail is read

_TABLES = MetaData()
_ENTRIES = Table(
    "entries",
    _TABLES,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("entry", LargeBinary, nullable=False),
    Column("hash", Text, nullable=False),
)


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
    """The audit trail in `database`."""

    def __init__(self, database: Database) -> None:
        self._store = Store(database, _TABLES)

    def add(self, kind: str, *, region: str, subject: str, reason: str, detail: str, count: int = 1) -> Entry:
        """Append an entry, durably.

        Raises:
            UnavailableError: the database does not answer; the entry may have been written all the same.
        """
        with self._store.writing() as db:
            last = db.execute(select(_ENTRIES.c.id, _ENTRIES.c.hash).order_by(_ENTRIES.c.id.desc()).limit(1)).first()
            entry = Entry(
                at_us=time.time_ns() // 1_000,
                kind=kind,
                region=region,
                subject=subject[:DETAIL_CHARACTERS_MAX],
                reason=reason,
                detail=detail[:DETAIL_CHARACTERS_MAX],
                count=count,
                previous=last.hash if last else FIRST,
            )
            data = msgspec.json.encode(entry)
            number = last.id + 1 if last else 1  # not the database's own count: that has gaps
            db.execute(insert(_ENTRIES).values(id=number, entry=data, hash=hashlib.sha256(data).hexdigest()))
        return entry

    def entries(self, limit: int = 100) -> list[Entry]:
        """The newest entries, the newest first; those that nobody can read any more are left out, and `verify` names the first."""
        with self._store.reading() as db:
            rows = db.execute(select(_ENTRIES.c.entry).order_by(_ENTRIES.c.id.desc()).limit(limit)).all()
        return [entry for row in rows if (entry := _readable(row.entry)) is not None]

    def counts(self, kinds: Collection[str] | None = None) -> dict[str, int]:
        """How often each reason was given, in entries of `kinds` (None: of any); entries that need none have none."""
        counts: dict[str, int] = {}
        with self._store.reading() as db:
            for row in db.execute(select(_ENTRIES.c.entry).order_by(_ENTRIES.c.id)).yield_per(READ_ROWS):
                entry = _readable(row.entry)
                if entry is not None and entry.reason and (kinds is None or entry.kind in kinds):
                    counts[entry.reason] = counts.get(entry.reason, 0) + entry.count
        return counts

    def verify(self) -> int | None:
        """The number of the first entry that does not fit the chain; None if all do."""
        previous = FIRST
        with self._store.reading() as db:
            rows = db.execute(select(_ENTRIES).order_by(_ENTRIES.c.id)).yield_per(READ_ROWS)
            for place, (number, data, digest) in enumerate(rows, 1):
                entry = _readable(data)
                if number != place or hashlib.sha256(data).hexdigest() != digest or entry is None or entry.previous != previous:
                    return place
                previous = digest
        return None


_decode = msgspec.json.Decoder(Entry).decode


def _readable(data: bytes) -> Entry | None:
    """An entry; None if it is none any more."""
    try:
        return _decode(data)
    except UNREADABLE:
        return None
