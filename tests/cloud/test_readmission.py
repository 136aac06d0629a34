"""Out of quarantine: once, audited, and only what keeps the contract or what a named person answers for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cloud import readmission
from cloud.audit import Audit
from cloud.block_index import BlockIndex
from cloud.completeness import State, examine
from cloud.quarantine import CheckedLake
from cloud.quarantined import Selection, describe, listing, parse_name, shelves
from cloud.readmission import Readmission
from cloud.rows import DATES_MAX, DAY_US
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import ConfigError, Reason, UnavailableError
from edge_agent.contract.privacy import Pii, PiiKind
from edge_agent.contract.stream import QUARANTINE, Encoding, Field, FieldType, StreamContract
from edge_agent.core.rejects import to_text
from tests.cloud.blocks import block, contract
from tests.cloud.test_quarantine import bad, checked, fail_at, rows, wider

PUMP = Selection(stream="pump")
TOPIC = "sensors/d1/pump"


def desk(path: Path, lake: CheckedLake) -> tuple[Readmission, Audit]:
    audit = Audit(path / "audit.db")
    return Readmission(lake, audit), audit


def payload(count: int, pressure: object = 50.0) -> bytes:
    return json.dumps({"ts": 1_700_000_000 + count, "pump": "p1", "count": count, "pressure": pressure}).encode()


def refused(sequence: int, payloads: list[bytes], topic: str = TOPIC) -> Any:
    """A block of payloads that the device refused."""
    header, _ = block(sequence, rows=len(payloads), stream=QUARANTINE.stream, contract_version=QUARANTINE.version)
    texts = [to_text(p) for p in payloads]
    return header, {
        "captured_at": np.full(len(payloads), 1_700_000_000_000_000, np.int64),
        "topic": Strings.of([topic] * len(payloads)),
        "reason": Strings.of([Reason.OUT_OF_RANGE.value] * len(payloads)),
        "detail": Strings.of(["field 'pressure' is 5000"] * len(payloads)),
        "payload": Strings.of(texts),
        ORDINAL: np.arange(len(payloads), dtype=np.int64),
    }


def test_rows_that_keep_the_contract_by_now_go_into_their_stream_once(tmp_path: Path) -> None:
    checked(tmp_path).append("eu", [block(1, rows=4), bad(2, [1, 3]), bad(3, [0, 1, 2, 3])])
    release, audit = desk(tmp_path, checked(tmp_path))
    still = release.release(PUMP, "anna")
    assert (still.released, still.already, still.complete) == (0, 0, False)
    assert dict(still.kept) == {"out_of_range: field 'pressure': 0 to 100 allowed": 6}
    lake = checked(tmp_path, wider())
    release, audit = desk(tmp_path, lake)
    one = release.release(Selection(name=parse_name("d1/e1/europe/2/3")), "anna")
    assert (one.released, one.complete) == (1, True)
    rest = release.release(PUMP, "anna")
    assert (rest.released, rest.already, rest.complete) == (5, 1, True)
    assert release.release(PUMP, "anna").already == 6
    assert rows(lake.lake) == [(s, r) for s in (1, 2, 3) for r in range(4)]
    stream = lake.lake.read("pump")
    assert set(stream["pressure"].to_pylist()[4:]) == {50.0, 1_000.0, 1_001.0, 1_002.0, 1_003.0} and len(stream["event_date"].unique()) == 1
    late, early = (next(row for row in stream.to_pylist() if row["sequence"] == n) for n in (3, 1))
    assert late["arrived_at"] > early["arrived_at"], "nobody knew it before"
    entries = audit.entries()
    assert [e.kind for e in entries] == ["quarantine_released"] * 2
    assert "5 rows of pump in europe released by contract 1.0.0 by anna" in entries[0].detail
    groups = listing(lake)
    assert [(g["origin"], g["stream"], g["device"], g["reason"], g["rows"], g["released"]) for g in groups] == [
        ("ingest", "pump", "d1", "out_of_range", 6, 6)
    ]
    again = checked(tmp_path).append("eu", [block(1, rows=4), bad(2, [1, 3]), bad(3, [0, 1, 2, 3])])
    assert again.committed == [] and len(rows(lake.lake)) == 12


def test_a_named_person_answers_for_rows_as_they_are(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    lake.append("eu", [bad(1, [0, 2])])
    release, audit = desk(tmp_path, lake)
    assert release.release(PUMP, "boss", as_is=True).released == 2
    assert len(rows(lake.lake)) == 4 and "as they are by boss" in audit.entries()[0].detail
    assert examine(lake, BlockIndex(), 2**60).stored == 1


def test_nobody_answers_for_a_personal_field_whatever_else_is_wrong_with_its_row(tmp_path: Path) -> None:
    fields = (*contract().fields, Field("operator", FieldType.STRING, pii=Pii(PiiKind.HASH)))
    lake = checked(tmp_path, replace(contract(), fields=fields))
    header, table = bad(1, [0, 2], count=3)
    name, treated = "Jane Doe", f"pii:{'0' * 8}:{'a' * 32}"
    lake.append("eu", [(header, {**table, "operator": Strings.of([name, name, treated])})])
    assert lake.held.read("pump", columns=["violation"])["violation"].to_pylist() == ["out_of_range", "not_private", "out_of_range"]
    done = desk(tmp_path, lake)[0].release(PUMP, "boss", as_is=True)
    assert done.released == 1 and dict(done.kept) == {"not_private: field 'operator': pii: hash is not done": 2}
    assert lake.lake.read("pump", columns=["operator"])["operator"].to_pylist() == [treated]


def test_what_the_audit_trail_cannot_tell_is_not_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = checked(tmp_path)
    lake.append("eu", [bad(1, [0, 2])])
    release, audit = desk(tmp_path, lake)

    def away(*_: object, **__: object) -> None:
        raise UnavailableError("the database does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(audit, "add", away)
        with pytest.raises(UnavailableError):
            release.release(PUMP, "boss", as_is=True)
    assert len(rows(lake.lake)) == 2 and audit.entries() == []
    assert release.release(PUMP, "boss", as_is=True).released == 2
    assert ["2 rows of pump in europe released as they are by boss" in e.detail for e in audit.entries()] == [True]


def test_rows_of_another_unit_stay_as_they_do_at_ingest(tmp_path: Path) -> None:
    """The settings hold the new contract alone; the table, or only the quarantine, is of the old one."""
    fields = (replace(f, unit="kPa", maximum=1e5) if f.name == "pressure" else replace(f) for f in contract().fields)
    other = replace(contract(), version="2.0.0", fields=tuple(fields))
    for folder, broken in (("some", [0, 2]), ("all", [0, 1, 2, 3])):
        checked(tmp_path / folder).append("eu", [bad(1, broken)])
        lake = checked(tmp_path / folder, other)
        before = rows(lake.lake)
        done = desk(tmp_path, lake)[0].release(PUMP, "anna")
        (why,) = done.kept
        assert (done.released, rows(lake.lake)) == (0, before) and "field 'pressure': unit '' became 'kPa'" in why
        assert desk(tmp_path, lake)[0].release(PUMP, "boss", as_is=True).released == 0, "nobody can answer for it either"


def test_payloads_that_look_like_marks_of_quarantine_stop_nothing(tmp_path: Path) -> None:
    lake = checked(tmp_path, wider())
    header, table = refused(1, [payload(7, 5_000), b"", b"", b""])
    texts = [payload(7, 5_000).decode(), "base64:abc", "base64:é", to_text(payload(8))]
    lake.append("eu", [(header, {**table, "payload": Strings.of(texts)})])
    done = desk(tmp_path, lake)[0].release(PUMP, "anna")
    assert done.released == 2 and sum(done.kept.values()) == 2 and all(why.startswith("malformed") for why in done.kept)


def test_a_row_of_a_block_that_is_not_settled_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Released, it would make the lake believe that it holds the block, and the good rows would never come."""
    with monkeypatch.context() as patch:
        fail_at(patch, lambda uri: "_quarantine" not in uri, landed=False)
        with pytest.raises(UnavailableError):
            checked(tmp_path).append("eu", [bad(1, [1])])
    lake = checked(tmp_path, wider())
    done = desk(tmp_path, lake)[0].release(PUMP, "anna")
    assert done.released == 0 and not done.complete and rows(lake.lake) == []
    lake.append("eu", [bad(1, [1])])
    assert desk(tmp_path, lake)[0].release(PUMP, "anna").released == 1
    assert rows(checked(tmp_path).lake) == [(1, r) for r in range(4)]


@pytest.mark.parametrize("landed", [False, True])
@pytest.mark.parametrize("which", ["pump", "_released"])
def test_a_release_that_was_cut_off_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, landed: bool
) -> None:
    lake = checked(tmp_path, wider())
    checked(tmp_path).append("eu", [bad(1, [0, 2]), bad(2, [1])])
    real = readmission.write_deltalake

    def write(table: Any, *args: Any, **kw: Any) -> None:
        wrong = str(getattr(table, "table_uri", table)).rstrip("/").endswith(which)
        if not wrong or landed:
            real(table, *args, **kw)
        if wrong:
            raise OSError("the storage has gone")

    with monkeypatch.context() as patch:
        patch.setattr(readmission, "write_deltalake", write)
        with pytest.raises(UnavailableError, match="release again"):
            desk(tmp_path, lake)[0].release(PUMP, "anna")
    done = desk(tmp_path, lake)[0].release(PUMP, "anna")
    assert done.complete and done.released + done.already == 3
    assert rows(lake.lake) == [(s, r) for s in (1, 2) for r in range(4)]
    assert [g["released"] for g in listing(lake)] == [3]


def test_payloads_that_the_device_refused_are_decoded_and_added_once_by_key(tmp_path: Path) -> None:
    lake = checked(tmp_path, wider())
    lake.append("eu", [block(1), refused(2, [payload(7, 5_000), payload(8), b"not json", payload(7, 5_000)]), refused(3, [payload(8)])])
    release, _ = desk(tmp_path, lake)
    done = release.release(PUMP, "anna")
    assert (done.released, done.already) == (2, 2) and next(iter(done.kept)).startswith("malformed")
    stream = lake.lake.read("pump")
    found = [row for row in stream.to_pylist() if row["sequence"] > 1]
    assert sorted((r["count"], r["pressure"], r["score"], r["device"], r["contract_version"]) for r in found) == [
        (7, 5_000.0, None, "d1", "1.0.0"),
        (8, 50.0, None, "d1", "1.0.0"),
    ]
    assert all(r["ordinal"] >= readmission.BEHIND for r in found) and release.release(PUMP, "anna").released == 0
    whole = examine(lake, BlockIndex(), 2**60)
    assert whole.stored == 3 and whole.blocks[State.UNACCOUNTED] == 0


def test_a_payload_in_another_encoding_or_of_no_stream(tmp_path: Path) -> None:
    packed: StreamContract = replace(contract(), encoding=Encoding.MSGPACK)
    lake = checked(tmp_path, packed)
    lake.append("eu", [refused(1, [msgspec.msgpack.encode(json.loads(payload(3)))]), refused(2, [b"{}"], topic="other/topic")])
    done = desk(tmp_path, lake)[0].release(Selection(device="d1"), "anna")
    assert done.released == 1 and dict(done.kept) == {"no contract has this topic or stream": 1}


def test_what_is_shown_says_values_and_limits(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    lake.append("eu", [bad(1, [2]), refused(2, [payload(1, 5_000)])])
    shown = [row for shelf in shelves(lake, Selection()) for row in describe(lake, shelf, 10)]
    assert [(row["name"], row["origin"]) for row in shown] == [("d1/e1/europe/2/0", "device"), ("d1/e1/europe/1/2", "ingest")]
    assert shown[0]["payload"] == payload(1, 5_000).decode() and shown[0]["topic"] == TOPIC
    assert shown[1]["values"]["pressure"] == 1_002.0 and shown[1]["broken"] == {"pressure": "0 to 100 allowed"}


def test_rows_whose_field_has_another_type_by_now_are_shown(tmp_path: Path) -> None:
    checked(tmp_path).append("eu", [bad(1, [2])])
    fields = tuple(replace(f, type=FieldType.STRING) if f.name == "pressure" else f for f in contract().fields)
    lake = checked(tmp_path, replace(contract(), version="2.0.0", fields=fields))
    (shown,) = [row for shelf in shelves(lake, Selection()) for row in describe(lake, shelf, 10)]
    assert shown["values"]["pressure"] == 1_002.0 and not shown["broken"]


def test_released_rows_of_a_block_with_too_many_dates_lie_apart_as_at_ingest(tmp_path: Path) -> None:
    days = DATES_MAX + 1
    (many, table), few = block(1, rows=days), bad(2, [0, 1])
    table = {**table, "ts": np.arange(days, dtype=np.int64)[::-1] * DAY_US, "pressure": np.full(days, 5_000.0)}
    checked(tmp_path).append("eu", [(many, table), few])
    assert desk(tmp_path, checked(tmp_path))[0].release(PUMP, "boss", as_is=True).released == days + 2
    read = checked(tmp_path).lake.read("pump", columns=["sequence", "event_date"])
    dates = dict(zip(*read.group_by("sequence").aggregate([("event_date", "count_distinct")]).to_pydict().values(), strict=True))
    assert len(read) == days + 4 and read["event_date"].null_count == days and dates == {1: 0, 2: 1}, dates


def test_nothing_to_release_is_said(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    with pytest.raises(ConfigError, match="no such row"):
        desk(tmp_path, lake)[0].release(PUMP, "anna")
    with pytest.raises(ConfigError, match="DEVICE/EPOCH/LANE/SEQUENCE/ROW"):
        parse_name("d1/e1/2")
