"""The audit trail shows when it was changed."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from cloud.audit import Audit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    audit = Audit(tmp_path / "audit.db")
    for i in range(5):
        audit.add("block_refused", region="eu", subject="d1", reason="corrupt", detail=str(i), count=i + 1)
    return tmp_path / "audit.db"


def test_entries_chain_and_count(path: Path) -> None:
    audit = Audit(path)
    assert audit.verify() is None and audit.counts() == {"corrupt": 15}
    assert [e.detail for e in audit.entries(2)] == ["4", "3"]


@pytest.mark.parametrize(
    ("change", "broken_at"),
    [
        ("UPDATE entries SET entry = CAST(replace(CAST(entry AS TEXT), 'corrupt', 'harmless') AS BLOB) WHERE id = 3", 3),
        ("DELETE FROM entries WHERE id = 2", 2),
        ("DELETE FROM entries WHERE id = 1", 1),
        ("UPDATE entries SET hash = 'x' WHERE id = 5", 5),
    ],
)
def test_a_changed_or_removed_entry_shows(path: Path, change: str, broken_at: int) -> None:
    with sqlite3.connect(path) as db:
        db.execute(change)
    assert Audit(path).verify() == broken_at


def test_an_entry_made_unreadable_shows_and_the_others_still_count(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("UPDATE entries SET entry = ?, hash = ? WHERE id = 5", (b"\xff{", hashlib.sha256(b"\xff{").hexdigest()))
    assert Audit(path).verify() == 5 and Audit(path).counts() == {"corrupt": 10}
    assert [e.detail for e in Audit(path).entries()] == ["3", "2", "1", "0"]


def test_refusals_are_counted_without_alarms_and_imports(path: Path) -> None:
    Audit(path).add("buffer_imported", region="", subject="d1", reason="imported", detail="a file")
    assert Audit(path).counts(("block_refused",)) == {"corrupt": 15}
