"""Refusals reach the audit trail once, with their number, also when its database was away."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cloud import refusals
from cloud.audit import Audit
from cloud.refusals import REFUSED, Entry, Kind, Refusals
from edge_agent.contract.errors import Reason, UnavailableError


class Flaky(Audit):
    """An audit trail whose database can be away."""

    away = False

    def add(self, *args: object, **kw: object) -> object:  # type: ignore[override]
        if self.away:
            raise UnavailableError("away")
        return super().add(*args, **kw)  # type: ignore[arg-type]


def kind(device: str, reason: Reason = Reason.CORRUPT) -> Kind:
    return Kind(REFUSED, device, "europe", "pump", reason)


def settle(found: Refusals, now: float) -> None:
    """Write, and take up what the writer says."""
    found.write(now)
    for _ in range(500):
        if found._writing is None or found._writing.done():
            break
        time.sleep(0.01)
    found.write(now)


def test_the_first_is_written_at_once_and_the_rest_of_its_kind_together_later(tmp_path: Path) -> None:
    audit, told = Audit(tmp_path / "audit.db"), list[Entry]()
    found = Refusals(audit, "eu", told.append)
    for now in (0.0, 1.0, 2.0):
        found.add(kind("d1"), f"at {now}", now)
        settle(found, now)
    assert [e.count for e in audit.entries()] == [1] and not found.written
    settle(found, refusals.ALARM_S)
    assert [(e.count, e.detail) for e in audit.entries()] == [(2, "at 2.0"), (1, "at 0.0")] and found.written
    assert [entry.times for entry in told] == [1, 2]
    found.close()


def test_what_cannot_be_written_is_counted_and_written_when_the_database_is_back(tmp_path: Path) -> None:
    audit, told = Flaky(tmp_path / "audit.db"), list[Entry]()
    found = Refusals(audit, "eu", told.append)
    audit.away = True
    for device in ("d1", "d2", "d1"):
        found.add(kind(device), "odd", 0.0)
    settle(found, 0.0)
    assert not found.available and not found.written and told == []
    audit.away = False
    settle(found, refusals.ALARM_S)
    assert found.available and found.written and audit.counts() == {"corrupt": 3} and len(audit.entries()) == 2
    found.close()


def test_kinds_are_bounded_and_nothing_is_left_out_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "KINDS_MAX", 3)
    audit = Audit(tmp_path / "audit.db")
    found = Refusals(audit, "eu", lambda entry: None)
    for i in range(10):
        found.add(kind(f"d{i}"), "odd", 0.0)
    found.close()
    assert audit.counts() == {"corrupt": 10}
    assert {e.subject for e in audit.entries()} == {"d0", "d1", "d2", ""}
