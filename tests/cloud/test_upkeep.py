"""Dates, order within files, compaction, vacuum: what the lake's files look like, and that no row changes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cloud.lake
from cloud import cli, upkeep
from cloud.lake import Lake
from cloud.probe import probe
from cloud.quarantine import CheckedLake
from cloud.roots import Root
from cloud.rows import DATES_MAX, DAY_US, Contracts
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ConfigError
from tests.cloud.blocks import block, contract
from tests.cloud.test_lake import counts, open_lake
from tests.cloud.test_quarantine import bad

DAY0 = 20_000
"""2024-10-04"""


def at(sequence: int, times_us: list[int], pumps: list[str] | None = None, **header: object) -> tuple[BlockHeader, Table]:
    """A block with these event times."""
    found, table = block(sequence, rows=len(times_us), **header)  # type: ignore[arg-type]
    return found, {**table, "ts": np.array(times_us, np.int64), "pump": Strings.of(pumps or ["p1"] * len(times_us))}


def on(sequence: int, *days: int, **header: object) -> tuple[BlockHeader, Table]:
    """A block with a reading on each of these days."""
    return at(sequence, [(DAY0 + day) * DAY_US + sequence for day in days], **header)


def files(lake: Lake) -> list[pa.Table]:
    """The rows of each file, in the order in which they lie there."""
    dataset = lake.table("pump", "europe").to_pyarrow_dataset()
    return [fragment.to_table(schema=dataset.schema) for fragment in dataset.get_fragments()]


def in_order(rows: pa.Table) -> bool:
    keys = rows.select(["pump", "ts"])
    return bool(keys.equals(keys.sort_by([("pump", "ascending"), ("ts", "ascending")])))


def dates(lake: Lake) -> dict[date | None, tuple[int, int]]:
    """Files and rows of each event date."""
    return {p.day: (p.files, p.rows) for p in upkeep.partitions(lake.table("pump", "europe"))}


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.upkeep.QUIET_S", -60.0)


def test_rows_lie_in_their_event_date_late_ones_too(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(1, 1, 1, 1)])
    lake.append("eu", [on(2, 1, 0), on(3, 1)])  # across midnight, and late

    assert dates(lake) == {date(2024, 10, 4): (1, 1), date(2024, 10, 5): (2, 5)}
    assert sorted(p.name for p in (tmp_path / "europe/pump").iterdir()) == ["_delta_log", "event_date=2024-10-04", "event_date=2024-10-05"]
    rows = lake.read("pump")
    assert rows["ts"].cast(pa.date32()).equals(rows["event_date"])


def test_one_commit_makes_one_file_a_date_however_many_blocks_it_holds(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(n, 0, 1, device=f"d{n}") for n in range(1, 30)])
    assert [f for f, _ in dates(lake).values()] == [1, 1] and lake.versions("pump") == {"europe": 1}


def test_blocks_on_many_dates_are_stored_in_commits_of_few_dates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.portions.DATES_PER_COMMIT", 4)
    lake = open_lake(tmp_path)
    assert len(lake.append("eu", [on(n, n % 10, n % 10 + 1) for n in range(1, 21)]).committed) == 20
    assert lake.versions("pump") == {"europe": 4} and lake.read("pump").num_rows == 40


def test_times_without_a_date_and_blocks_of_too_many_dates_lie_apart_and_are_read(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    ends = [-(2**63), -62_135_596_800_000_000, 253_402_300_799_999_999, 253_402_300_800_000_000, 2**63 - 1]
    lake.append("eu", [at(1, ends)])
    lake.append("eu", [on(2, *range(DATES_MAX + 1)), on(3, *range(3))])

    found = dates(lake)
    assert found[None][1] == 3 + DATES_MAX + 1 and len(found) == 1 + 2 + 3
    assert found[date(1, 1, 1)] == (1, 1) and found[date(9999, 12, 31)] == (1, 1)
    assert lake.read("pump").num_rows == 5 + DATES_MAX + 1 + 3
    day = (DAY0 * DAY_US, (DAY0 + 1) * DAY_US)
    assert sorted(lake.read("pump", during_us=day)["sequence"].to_pylist()) == [2, 3]
    assert lake.read("pump", during_us=(ends[2], ends[2] + 1))["ts"].cast(pa.int64()).to_pylist() == [ends[2]]


def test_a_time_range_opens_only_the_files_of_its_dates(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(1, *range(6))])
    for path in (tmp_path / "europe/pump").glob("event_date=2024-10-0[5-9]/*.parquet"):
        path.unlink()

    rows = lake.read("pump", columns=["event_date"], during_us=(DAY0 * DAY_US, (DAY0 + 1) * DAY_US))
    assert rows["event_date"].to_pylist() == [date(2024, 10, 4)]


def test_each_file_is_sorted_by_entity_and_event_time(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    lake = open_lake(tmp_path)
    for commit in range(3):
        times = [(random.integers(0, 2 * DAY_US, 50) + DAY0 * DAY_US).tolist() for _ in range(4)]
        pumps = [random.choice(["b", "a", "é", "aa"], 50).tolist() for _ in range(4)]
        lake.append("eu", [at(commit * 4 + n, t, p) for n, (t, p) in enumerate(zip(times, pumps, strict=True), 1)])

    assert len(files(lake)) == 6 and all(map(in_order, files(lake)))
    assert set(counts(lake).values()) == {1} and len(counts(lake)) == 600


def test_quiet_dates_are_written_again_in_order_and_no_row_changes(tmp_path: Path, quiet: None) -> None:
    lake = open_lake(tmp_path)
    for n in range(1, 7):
        lake.append("eu", [at(n, [DAY0 * DAY_US + 10 - n, (DAY0 + n % 2) * DAY_US + n], ["a", "b"])])
    lake.append("eu", [at(7, [2**62, 2**62])])
    lake.append("eu", [at(8, [2**62 + 1, 2**62])])
    before, versions = lake.read("pump"), lake.versions("pump")

    while lake.compact(files_max=0):
        pass

    assert [f for f, _ in dates(lake).values()] == [1, 1, 1] and all(map(in_order, files(lake)))
    assert lake.read("pump").equals(before) and lake.read("pump", versions=versions).equals(before)
    assert open_lake(tmp_path).append("eu", [at(3, [1, 2]), at(8, [1, 2])]).committed == []


def test_a_quiet_date_whose_rows_are_too_large_to_sort_is_merged(tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text takes its room once in a file and in each row in memory: 384 rows in 100 MB of files took 8 GB."""
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0)])
    before, table = lake.read("pump"), lake.table("pump", "europe")
    monkeypatch.setattr("cloud.upkeep.SORT_BYTES_MAX", before.nbytes // 2)
    assert upkeep.compact(table, 0, dates_max=None) == upkeep.Compacted(removed=3, added=1) and lake.read("pump").equals(before)
    monkeypatch.setattr("cloud.upkeep.SORT_BYTES_MAX", before.nbytes * 2)
    assert upkeep.sort_date(table, date(2024, 10, 4)) and lake.read("pump").equals(before) and all(map(in_order, files(lake)))


def test_dates_that_are_written_to_are_merged_as_they_are(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    for n in range(1, 7):
        lake.append("eu", [on(n, 0)])
    before = lake.read("pump")
    assert lake.compact(files_max=3) == {"europe/pump": 6}
    assert dates(lake) == {date(2024, 10, 4): (1, 6)} and lake.read("pump").equals(before)
    assert lake.compact(files_max=3) == {}


def test_one_call_works_on_few_dates_those_with_most_files_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.upkeep.DATES_PER_CALL", 1)
    lake = open_lake(tmp_path)
    for n in range(1, 5):
        lake.append("eu", [on(n, 0, 1), on(n + 10, 1)] if n < 3 else [on(n, 1)])

    assert lake.compact(files_max=0) == {"europe/pump": 4}
    assert [f for f, _ in dates(lake).values()] == [2, 1]
    assert lake.compact(files_max=0) == {"europe/pump": 2}
    assert [f for f, _ in dates(lake).values()] == [1, 1]


@pytest.mark.parametrize("step", ["sort", "merge"])
def test_a_writer_that_commits_while_a_date_is_compacted_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """The other writer commits between reading the date and writing it again."""
    mine, other = open_lake(tmp_path), open_lake(tmp_path)
    for n in range(1, 5):
        mine.append("eu", [on(n, 0)])
    other.append("eu", [on(10, 1)])
    write: Callable[..., None] = cloud.upkeep.write_deltalake

    def late(*args: object, **kw: object) -> None:
        other.append("eu", [on(11, 0), on(12, 1), on(2, 0)])
        write(*args, **kw)

    if step == "sort":
        monkeypatch.setattr("cloud.upkeep.QUIET_S", -60.0)
        monkeypatch.setattr("cloud.upkeep.write_deltalake", late)
    else:
        other.append("eu", [on(11, 0), on(12, 1), on(2, 0)])
    mine.compact(files_max=0)
    monkeypatch.undo()

    assert other.append("eu", [on(13, 0), on(11, 0)]).committed == [("d1", "e1", "europe", 13)]
    assert mine.append("eu", [on(14, 0), on(13, 0)]).committed == [("d1", "e1", "europe", 14)]
    assert set(counts(mine).values()) == {1} and len(counts(mine)) == 9


@pytest.mark.parametrize("second", ["sort", "merge"])
@pytest.mark.parametrize("first", ["sort", "merge"])
def test_two_processes_that_compact_the_same_date_leave_each_row_once(tmp_path: Path, first: str, second: str) -> None:
    """Both saw the same files; delta-rs 1.6 lets two of its own compactions pass, and every row is there twice."""
    lake = open_lake(tmp_path)
    for n in range(1, 5):
        lake.append("eu", [on(n, 0)])
    tables = [lake.table("pump", "europe") for _ in range(2)]
    for how, table in zip((first, second), tables, strict=True):
        if how == "sort":
            upkeep.sort_date(table, date(2024, 10, 4))
        else:
            upkeep.merge_date(table, upkeep.partitions(table)[0])

    assert set(counts(lake).values()) == {1} and len(counts(lake)) == 4
    assert dates(lake) == {date(2024, 10, 4): (1, 4)}


def test_merging_leaves_large_files_of_earlier_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [at(n, [(DAY0 * DAY_US) + n * 1_000 + i for i in range(400)]) for n in range(1, 11)])
    large = lake.table("pump", "europe").file_uris()
    for n in range(11, 15):
        lake.append("eu", [on(n, 0)])
    sizes = sorted(p.bytes for p in upkeep.partitions(lake.table("pump", "europe")))
    monkeypatch.setattr("cloud.upkeep.FILE_BYTES", sizes[0] // 3)

    assert lake.compact(files_max=0) == {"europe/pump": 4}
    left = lake.table("pump", "europe").file_uris()
    assert set(large) < set(left) and len(left) == 2 and lake.read("pump").num_rows == 4_004


def test_compaction_that_fails_is_put_off_and_appends_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0)])

    def broken(table: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("cloud.upkeep.partitions", broken)
        assert lake.compact(files_max=0) == {}
    assert lake.append("eu", [on(3, 0), on(4, 0)]).committed == [("d1", "e1", "europe", 4)]


def test_dates_too_large_to_merge_are_left_alone_and_keep_no_other_table_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.upkeep.MERGE_ROWS_MAX", 3)
    lake = open_lake(tmp_path)
    for n in range(1, 5):
        lake.append("eu", [on(n, 0, 0)])  # eight rows on one date
    for n in range(1, 4):
        lake.append("eu", [on(n, 0, lane="canada")])
    version = lake.versions("pump")["europe"]
    assert [lake.compact(files_max=1) for _ in range(4)] == [{"europe/pump": 0}, {"canada/pump": 3}, {}, {}]
    assert lake.versions("pump")["europe"] == version and dates(lake) == {date(2024, 10, 4): (4, 8)}
    assert upkeep.compact(lake.table("pump", "europe"), 0, dates_max=None).removed == 4, "by hand it is merged"


def test_tables_that_go_on_to_be_crowded_are_compacted_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.upkeep.DATES_PER_CALL", 1)
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0, 1), on(n, 0, 1, lane="canada")])
    done = [table for _ in range(4) for table in lake.compact(files_max=0)]
    assert sorted(done[:2]) == sorted(done[2:]) == ["canada/pump", "europe/pump"]


def test_a_table_whose_compaction_the_engine_refuses_can_be_added_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0)])

    def refuse(*_: object) -> None:
        raise Exception("Cast error: what delta-rs raises")

    monkeypatch.setattr("cloud.upkeep.merge_date", refuse)
    assert lake.compact(files_max=0) == {} and "given up" in caplog.text
    assert lake.append("eu", [on(4, 0)]).committed == [("d1", "e1", "europe", 4)]


def test_more_text_than_one_column_can_sort_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(n, 0, 1) for n in range(1, 9)])
    whole = lake.read("pump")
    monkeypatch.setattr("cloud.reading.TAKE_BYTES_MAX", 40)
    parts = lake.read("pump")
    assert parts.equals(whole) and parts.schema.equals(whole.schema) and parts["device"].num_chunks > 4


def test_commands_show_compact_and_vacuum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fenceline.toml").write_text("")
    lake = open_lake(tmp_path / "state/lake")
    for n in range(1, 4):
        lake.append("eu", [on(n, 0, 1)])

    def run(*words: str) -> list[dict[str, object]]:
        assert cli.main(["--project", str(tmp_path), "--state", str(tmp_path / "state"), "lake", *words, "--json"]) == 0
        found: list[dict[str, object]] = json.loads(capsys.readouterr().out)
        return found

    assert {k: run("show")[0][k] for k in ("lane", "stream", "rows", "files", "dates", "first")} == {
        "lane": "europe",
        "stream": "pump",
        "rows": 6,
        "files": 6,
        "dates": 2,
        "first": "2024-10-04",
    }
    assert run("compact", "--lane", "europe")[0]["removed"] == 6
    assert cli.main(["--project", str(tmp_path), "--state", str(tmp_path / "state"), "lake", "compact", "--lane", "canada"]) == 2
    assert "no lane 'canada'; known: europe" in capsys.readouterr().err and run("show")[0]["files"] == 2
    assert run("vacuum", "--dry-run")[0]["files"] == []  # all of it is younger than that
    assert cli.main(["--project", str(tmp_path), "--state", str(tmp_path / "state"), "lake", "vacuum", "--hours", "1"]) == 2
    assert run("probe")[0]["single_winners"] == 10


def test_vacuum_removes_what_no_version_of_its_hours_needs(tmp_path: Path) -> None:
    lake = open_lake(tmp_path)
    for n in range(1, 4):
        lake.append("eu", [on(n, 0)])
    lake.compact(files_max=0)
    folder = tmp_path / "europe/pump/event_date=2024-10-04"
    orphan = folder / "part-00000-of-a-writer-that-was-killed.parquet"
    orphan.write_bytes(b"half")
    month_ago = time.time() - 30 * 86_400
    os.utime(orphan, (month_ago, month_ago))
    table = lake.table("pump", "europe")

    with pytest.raises(ConfigError, match="at least 168 hours, not 1"):
        upkeep.vacuum(table, 1, dry_run=False)
    assert len(upkeep.vacuum(table, 168, dry_run=True)) == 1 and orphan.exists()
    assert len(upkeep.vacuum(table, 168, dry_run=False)) == 1 and not orphan.exists()
    assert len(list(folder.iterdir())) == 4 and lake.read("pump").num_rows == 3  # what was merged a moment ago stays
    assert open_lake(tmp_path).append("eu", [on(3, 0), on(4, 0)]).committed == [("d1", "e1", "europe", 4)]


def orphans(root: Path, *tables: str) -> list[Path]:
    """A file of a month ago in each table, that no version needs."""
    found = [root / table / "event_date=2024-10-04/part-00000-nobody-needs-it.parquet" for table in tables]
    for path in found:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - 30 * 86_400,) * 2)
    return found


def test_ingest_vacuums_one_table_a_call_each_once_a_day_and_goes_on_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(1, 0), on(1, 0, lane="canada")])
    made = orphans(tmp_path, "europe/pump", "canada/pump")
    assert [lake.vacuum(168) for _ in range(3)] == [{"europe/pump": 1}, {"canada/pump": 1}, {}]
    assert not any(path.exists() for path in made)
    assert lake.append("eu", [on(1, 0), on(2, 0)]).committed == [("d1", "e1", "europe", 2)]
    orphans(tmp_path, "europe/pump")
    assert lake.vacuum(168) == {}  # its day is not over
    monkeypatch.setattr("cloud.upkeep.VACUUM_EVERY_S", 0.0)
    again = open_lake(tmp_path)
    assert again.append("eu", [on(2, 0), on(3, 0, lane="canada")]).committed == [("d1", "e1", "canada", 3)]
    assert [again.vacuum(168) for _ in range(3)] == [{"europe/pump": 1}, {"canada/pump": 0}, {"europe/pump": 0}]
    assert again.read("pump").num_rows == 4


@pytest.mark.parametrize("error", [OSError("storage is away"), Exception("what delta-rs raises")])
def test_a_vacuum_that_fails_is_put_off_and_appends_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    lake = open_lake(tmp_path)
    lake.append("eu", [on(1, 0)])
    with monkeypatch.context() as patch:

        def away(*_: object, **__: object) -> list[str]:
            raise error

        patch.setattr("cloud.upkeep.DeltaTable.vacuum", away)
        assert lake.vacuum(168) == {}
    assert lake.append("eu", [on(1, 0), on(2, 0)]).committed == [("d1", "e1", "europe", 2)]
    assert lake.vacuum(168) == {}


def test_commands_cover_the_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fenceline.toml").write_text("")
    lake = CheckedLake(Lake(tmp_path / "state/lake", Contracts([contract()])))
    for n in (1, 2):
        lake.append("eu", [bad(n, [1])])
    tables = ("europe/pump", "_quarantine/europe/pump")
    orphans(tmp_path / "state/lake", *tables)
    assert [set(lake.vacuum(168)) for _ in range(2)] == [set(tables), set()]
    orphans(tmp_path / "state/lake", *tables)
    for words, key, each in ((("show",), "files", 2), (("compact",), "removed", 2), (("vacuum", "--hours", "168"), "files", None)):
        assert cli.main(["--project", str(tmp_path), "--state", str(tmp_path / "state"), "lake", *words, "--json"]) == 0
        found = {f"{t['lane']}/{t['stream']}": t[key] for t in json.loads(capsys.readouterr().out)}
        assert set(found) == set(tables)
        assert all(number == each if each else len(number) == 1 for number in found.values())
    assert lake.append("eu", [bad(2, [1]), bad(3, [1])]).committed == [("d1", "e1", "europe", 3)]


def test_a_file_system_that_lets_one_writer_win_passes_the_probe(tmp_path: Path) -> None:
    began = time.monotonic()
    found = probe(Root(str(tmp_path)), rounds=3)
    assert found.safe and found.rounds == 3 and found.seconds <= time.monotonic() - began
    assert Lake(tmp_path).streams() == [] and list((tmp_path / "_probe").iterdir()) == []
