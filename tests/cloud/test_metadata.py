"""Fleet, rollouts and audit keep the same promises on SQLite and on PostgreSQL: one suite for both, on real databases."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cloud import rollout
from cloud.audit import Audit
from cloud.fleet import EVENTS_MAX, Fleet
from cloud.metadata import Database
from cloud.waves import Status
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.state import Desired, Phase, Reported, ZonesRef
from tests.cloud.refs import a_ref
from tests.postgres import Postgres, postgres

REF = a_ref(1)
WRITERS, EACH = 8, 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with postgres(tmp_path_factory.mktemp("metadata")) as running:
        yield running


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.needs_postgres)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Database:
    if request.param == "sqlite":
        return tmp_path / "state" / "metadata.db"
    running: Postgres = request.getfixturevalue("server")
    running.empty()
    return running.url


@dataclass
class Databases:
    rollouts_db: Database


def together(work: Callable[[int], object]) -> None:
    """WRITERS threads begin at the same moment."""
    start = threading.Barrier(WRITERS)

    def one(number: int) -> None:
        start.wait()
        work(number)

    with ThreadPoolExecutor(WRITERS) as pool:
        for done in [pool.submit(one, i) for i in range(WRITERS)]:
            done.result()


def test_the_audit_chain_holds_under_writers_that_all_begin_with_an_empty_database(database: Database) -> None:
    def write(number: int) -> None:
        audit = Audit(database)
        for i in range(EACH):
            audit.add("block_refused", region="eu", subject=f"d{number}", reason="corrupt", detail=str(i))

    together(write)
    audit = Audit(database)
    entries = audit.entries(WRITERS * EACH + 1)
    assert audit.verify() is None and audit.counts() == {"corrupt": WRITERS * EACH} and len(entries) == WRITERS * EACH
    for number in range(WRITERS):
        assert [e.detail for e in reversed(entries) if e.subject == f"d{number}"] == [str(i) for i in range(EACH)]


def test_a_devices_versions_rise_by_one_under_several_writers(database: Database) -> None:
    Fleet(database).add("d1")
    versions: list[int] = []
    together(lambda _: versions.extend(Fleet(database).set_desired("d1", REF).version for _ in range(5)))
    assert sorted(versions) == list(range(2, 2 + WRITERS * 5))


def test_a_name_is_given_once_however_many_ask_for_it(database: Database) -> None:
    refused: list[str] = []

    def add(number: int) -> None:
        try:
            Fleet(database).add("d1")
        except ConfigError as e:
            refused.append(str(e))

    together(add)
    assert Fleet(database).devices() == ["d1"] and len(refused) == WRITERS - 1


def test_what_the_fleet_says_and_is_asked_comes_back(database: Database) -> None:
    fleet = Fleet(database)
    assert fleet.zones() is None and fleet.events() == []
    password = fleet.add("d1")
    zones = ZonesRef(target="policy/1", sha256="1" * 64, version=1)
    fleet.set_zones(zones)
    fleet.set_zones(zones)
    fleet.add("d2")
    report = Reported(device="d1", agent_version="0", desired_version=2, phase=Phase.ACTIVE, at_us=5)
    assert fleet.record_reported(report) and not fleet.record_reported(report, retained=True)
    fleet.record_event("d1", b"\xff\0 odd")
    again = Fleet(database)
    assert again.passwords()["d1"] == password and again.zones() == zones
    assert again.all_desired() == {"d1": Desired(version=2, zones=zones), "d2": Desired(version=1, zones=zones)}
    assert {name: said for name, (said, _) in again.all_reported().items()} == {"d1": report}
    assert [(e.device, e.body) for e in again.events()] == [("d1", "\ufffd\0 odd")]


CHANGE_ALL = """
import sys
from pathlib import Path
from cloud import metadata
from cloud.fleet import Fleet
metadata.BUSY_S = 300.0  # a writer may be left without its turn for long on a busy machine
where, devices, times = sys.argv[1], sys.argv[2].split(), int(sys.argv[3])
fleet = Fleet(where if where.startswith("postgresql") else Path(where))
for _ in range(times):
    for device in devices:
        fleet.set_desired(device, None)
"""


def test_who_publishes_hears_of_every_change_of_other_processes_and_reads_nothing_else(database: Database) -> None:
    fleet = Fleet(database)
    names = [f"d{i}" for i in range(20)]
    for name in names:
        fleet.add(name)
    known, change = fleet.desired_since(None)
    told, stop = 0, False
    commands = [[sys.executable, "-c", CHANGE_ALL, str(database), " ".join(names[part:][:10]), "5"] for part in (0, 5, 10)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for command in commands]
    while not stop:
        stop = all(writer.poll() is not None for writer in writers)  # and one more look after that
        changed, change = fleet.desired_since(change)
        assert all(version(known[name]) < version(document) for name, document in changed.items()) or not isinstance(database, Path)
        known.update(changed)
        told += len(changed)
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert known == Fleet(database).all_desired() and sum(map(version, known.values())) == 20 + 150
    assert 20 <= told <= (150 if isinstance(database, Path) else 300), "what is committed during a look is told twice by PostgreSQL"
    assert fleet.desired_since(change) == ({}, change)
    fleet.add("late")
    assert list(fleet.desired_since(change)[0]) == ["late"]
    fleet.set_zones(ZonesRef(target="policy/1", sha256="1" * 64, version=1))
    changed, change = fleet.desired_since(change)
    assert len(changed) == 21
    fleet.remove("late")
    assert fleet.desired_since(change)[0] == {"late": None} and fleet.desired_since(None)[0]["late"] is None
    fleet.add("late")
    assert version(fleet.desired_since(change)[0]["late"]) == 4 and len(fleet.all_desired()) == 21


def version(document: Desired | None) -> int:
    assert document is not None
    return document.version


def test_devices_from_before_changes_had_numbers_are_published_and_counted_from_then_on(database: Database) -> None:
    old = Fleet(database)
    old.add("d1")
    with old._store.writing() as db:
        db.exec_driver_sql("DROP TABLE desired_changes")
        db.exec_driver_sql("DROP INDEX events_by_device")
    fleet = Fleet(database)
    assert fleet.desired_since(None) == ({"d1": Desired(version=1)}, 0)
    fleet.set_desired("d1", REF)
    assert fleet.desired_since(0) == ({"d1": Desired(version=2, bundle=REF)}, 1)
    with fleet._store.writing() as db:
        db.exec_driver_sql("DROP INDEX events_by_device")  # it was there again


def test_a_device_is_removed_once_however_many_ask_for_it_and_has_another_password_afterwards(database: Database) -> None:
    fleet, removed = Fleet(database), list[bool]()
    first = fleet.add("d1")
    second = fleet.renew("d1")
    assert Fleet(database).passwords() == {"d1": second} and second != first
    together(lambda _: removed.append(Fleet(database).remove("d1")))
    assert sorted(removed) == [False] * (WRITERS - 1) + [True]
    assert Fleet(database).passwords() == {} and Fleet(database).removals()["d1"].version == 2
    assert Fleet(database).add("d1") not in (first, second) and Fleet(database).desired("d1") == Desired(version=3)
    assert Fleet(database).removals()["d1"].back


def test_events_are_bounded_and_the_oldest_go(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EVENTS_MAX <= 10_000
    monkeypatch.setattr("cloud.fleet.EVENTS_MAX", 3)
    for i in range(5):
        Fleet(database).record_event("d1", str(i).encode())
    assert [e.body for e in Fleet(database).events()] == ["4", "3", "2"]


def test_a_chatty_device_pushes_out_no_events_but_its_own(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.fleet.EVENTS_MAX", 6)
    fleet = Fleet(database)
    for i in range(2):
        fleet.record_event("quiet", f"quiet {i}".encode())
    for i in range(20):
        fleet.record_event("chatty", f"chatty {i}".encode())
    fleet.record_event("other", b"other 0")
    assert [e.body for e in fleet.events()] == ["other 0", "chatty 19", "chatty 18", "chatty 17", "quiet 1", "quiet 0"]
    assert [e.body for e in fleet.events(device="quiet", limit=1)] == ["quiet 1"] and fleet.events(device="none") == []


def test_a_failed_change_leaves_nothing_behind(database: Database) -> None:
    fleet = Fleet(database)
    fleet.add("d1")
    with pytest.raises(ZeroDivisionError), fleet._store.writing() as db:
        db.exec_driver_sql("DELETE FROM devices")
        raise ZeroDivisionError
    assert fleet.devices() == ["d1"]


def test_rollouts_are_numbered_and_kept(database: Database) -> None:
    rollouts = database.with_name("rollouts.db") if isinstance(database, Path) else database  # as `cloud.config` has it
    fleet, where = Fleet(database), Databases(rollouts)
    for name in ("d1", "d2"):
        fleet.add(name)
    first = rollout.start(where, fleet, REF, now=time.time(), devices=["d1"])
    second = rollout.start(where, fleet, REF, now=time.time(), devices=["d2"])
    assert (first.id, second.id) == (1, 2) and rollout.status(where) == second
    assert [r.id for r in rollout.history(where)] == [1, 2] and fleet.desired("d1").bundle == REF
    assert rollout.undo(where, fleet, 1, now=time.time()).status is Status.UNDONE
    with pytest.raises(ConfigError, match="rollouts: 1, 2"):
        rollout.status(where, 9)


@pytest.mark.needs_postgres
def test_a_database_that_is_away_is_unavailable_and_used_again_when_it_is_back(server: Postgres) -> None:
    server.empty()
    audit = Audit(server.url)
    audit.add("a", region="eu", subject="", reason="", detail="")
    server.stop()
    try:
        with pytest.raises(UnavailableError, match=r"metadata database 127\.0\.0\.1"):
            audit.add("b", region="eu", subject="", reason="", detail="")
        late = Audit(server.url)  # a service starts while its database is away
        with pytest.raises(UnavailableError):
            late.entries()
    finally:
        server.start()
    late.add("b", region="eu", subject="", reason="", detail="")
    audit.add("c", region="eu", subject="", reason="", detail="")
    assert [e.kind for e in audit.entries()] == ["c", "b", "a"] and audit.verify() is None


def test_a_locked_sqlite_file_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.metadata.BUSY_S", 0.2)
    fleet = Fleet(tmp_path / "fleet.db")
    fleet.add("d1")
    with fleet._store.writing(), pytest.raises(UnavailableError, match="locked"):
        Fleet(tmp_path / "fleet.db").add("d2")
    assert fleet.devices() == ["d1"]


def test_a_message_about_a_database_holds_no_password() -> None:
    with pytest.raises(UnavailableError, match=r"metadata database 127\.0\.0\.1:1/d: ") as refused:
        Fleet("postgresql://me:s3cret@127.0.0.1:1/d?application_name=s3cret").devices()
    assert "s3cret" not in str(refused.value)


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "audit.db").write_bytes(b"not a database" * 1_000)
    with pytest.raises(UnavailableError, match=r"metadata database .*audit\.db: file is not a database"):
        Audit(tmp_path / "audit.db").entries()
