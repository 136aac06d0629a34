"""Materialisation into a real online store: whole, incremental, late data, crashes, and what the store has lost."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from edge_agent.contract.errors import ConfigError, UnavailableError
from pipelines import newest, online_writer
from pipelines.feature_sources import Source, storage_of
from pipelines.feature_store import Repo, open_repo
from pipelines.materialise import OVERLAP_S, Materialised, main, materialise
from pipelines.online_writer import TIMES_US
from tests.object_store import BUCKET, WRITER, ObjectStore, object_store  # noqa: F401
from tests.pipelines.lakes import ROOT
from tests.pipelines.repos import TIME, at, make_repo, redefine, redis_store, rows, served, write_source
from tests.redis_server import redis_server

HOUR = 3_600.0
CREATED_LATER = 2 * OVERLAP_S  # beyond the overlap of runs


@pytest.fixture
def repo(tmp_path: Path) -> Repo:
    return make_repo(tmp_path)


def run(repo: Repo, **options: object) -> Materialised:
    return materialise(repo, repo.views["pumps"], **options)  # type: ignore[arg-type]


def test_newest_row_of_each_entity_goes_online(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 1, 1, 1.0), ("a", 3, 3, 3.0), ("a", 2, 2, 2.0), ("b", 1, 1, 4.0), (None, 9, 9, 9.0)))
    done = run(repo)
    assert (done.entities, done.written, done.older, done.without_key) == (2, 2, 0, 1)
    assert served(repo, ["a", "b"]) == [3.0, 4.0]
    assert served(repo, ["a"], "pressure_count") == [3]


def test_command_prints_one_document_for_all_views(repo: Repo, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_source(tmp_path, "one", rows(("a", 1, 1, 1.0)))
    second = 'second = FeatureView(name="seconds", entities=[pump], schema=fields, source=source)'
    redefine(tmp_path, ("service =", f"{second}\nservice ="))
    assert main(["--project", str(tmp_path), "--json"]) == 0
    assert {done["view"]: done["written"] for done in json.loads(capsys.readouterr().out)} == {"pumps": 1, "seconds": 1}


def test_next_run_takes_only_what_is_new(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(*((f"p{i}", 1, 1, 1.0) for i in range(50)), ("last", 1, CREATED_LATER, 1.0)))
    assert run(repo).full == "the first run"
    write_source(tmp_path, "two", rows(("p7", 9, 2 * CREATED_LATER, 7.0), ("new", 9, 2 * CREATED_LATER, 8.0)))
    done = run(repo)
    assert (done.full, done.entities, done.written) == ("", 3, 3)  # `last` lies in the overlap
    assert served(repo, ["p7", "new", "p8"]) == [7.0, 8.0, 1.0]
    assert run(repo).written == 2


def test_late_row_of_an_unseen_entity_is_not_missed_and_of_a_seen_one_replaces_nothing(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 10 * HOUR, 10 * HOUR, 10.0), ("last", HOUR, 10 * HOUR + CREATED_LATER, 1.0)))
    run(repo)
    late = 10 * HOUR + 2 * CREATED_LATER
    write_source(tmp_path, "late", rows(("a", HOUR, late, 1.0), ("b", HOUR, late, 2.0)))
    done = run(repo)
    assert (done.full, done.entities, done.written, done.older) == ("", 2 + 1, 2, 1)  # `last` lies in the overlap
    assert served(repo, ["a", "b"]) == [10.0, 2.0]


def test_late_correction_of_the_newest_row_goes_online(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", HOUR, HOUR, 1.0)))
    run(repo)
    write_source(tmp_path, "correction", rows(("a", HOUR, HOUR + CREATED_LATER, 2.0)))
    run(repo)
    assert served(repo, ["a"]) == [2.0]


def test_rows_beyond_until_come_with_the_next_run(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 1, 100 * HOUR, 1.0), ("a", 5, 2, 5.0), ("b", 6, 2, 6.0)))
    done = run(repo, until=at(4))
    assert (done.entities, served(repo, ["a", "b"])) == (1, [1.0, None])
    done = run(repo)
    assert (done.full, served(repo, ["a", "b"])) == ("", [5.0, 6.0])


def test_entities_that_left_the_source_stay_until_a_rebuild(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 5, 5, 5.0), ("gone", 5, 5, 5.0)))
    run(repo)
    write_source(tmp_path, "one", rows(("a", 4, 4, 4.0)))
    run(repo, full=True)
    assert served(repo, ["a", "gone"]) == [5.0, 5.0]
    assert run(repo, rebuild=True).written == 1
    assert served(repo, ["a", "gone"]) == [4.0, None]


def test_store_that_lost_its_values_gets_all_of_them_again(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 5, 5, 5.0), ("b", 5, 5, 5.0)))
    run(repo)
    with sqlite3.connect(tmp_path / "feature_repo/data/online.db") as connection:
        connection.execute("DELETE FROM test_pumps")
    write_source(tmp_path, "two", rows(("c", 6, 6 + CREATED_LATER, 6.0)))
    done = run(repo)
    assert (done.full, done.entities) == ("the store has lost 2 of 2 entities looked at", 3)
    assert served(repo, ["a", "b", "c"]) == [5.0, 5.0, 6.0]


def test_changed_view_is_written_whole(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 5, 5, 5.0)))
    run(repo)
    view = repo.views["pumps"]
    view.tags["window_rows"] = "31"
    assert run(repo).full == "the view or the store has changed"


def test_repository_that_is_opened_again_goes_on_where_the_last_run_ended(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 5, 5, 5.0), ("last", 5, 5 + CREATED_LATER, 5.0)))
    assert run(repo).full == "the first run"
    done = run(open_repo(tmp_path))
    assert (done.full, done.entities) == ("", 1)


def test_values_of_another_definition_are_taken_away_however_new_they_are(repo: Repo, tmp_path: Path) -> None:
    """The newest tumbling window ends before the newest trailing one; and the live process has nothing of `b` any more."""
    write_source(tmp_path, "one", rows(("a", 10, 10, 1.0), ("b", 10, 10, 1.0)))
    run(repo)
    write_source(tmp_path, "one", rows(("a", 9, 10, 2.0)))
    done = run(redefine(tmp_path, ("online=True)", 'online=True, tags={"spec": "other"})')))
    assert (done.full, done.written, done.older) == ("the view or the store has changed", 1, 0)
    assert served(repo, ["a", "b"]) == [2.0, None]
    write_source(tmp_path, "one", rows(("a", 8, 10, 3.0)))
    assert run(open_repo(tmp_path), full=True).older == 1  # the same definition: only what is newer


def test_feature_taken_out_of_a_view_is_gone_and_the_others_go_on(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 5, 5, 5.0), ("b", 5, 5, 5.0)))
    run(repo)
    repo = redefine(tmp_path, ('Field(name="pressure_count", dtype=Int64)', ""))
    write_source(tmp_path, "two", rows(("a", 9, 9, 9.0)))
    done = run(repo)
    assert (done.entities, done.written, done.older) == (2, 2, 0)
    found = repo.store.get_online_features(repo.service, [{"pump": "a"}]).to_dict(include_event_timestamps=True)
    assert (found["pressure_mean"], found["pressure_mean__ts"]) == ([9.0], [int(at(9).timestamp())])
    with sqlite3.connect(tmp_path / "feature_repo/data/online.db") as connection:
        assert connection.execute("SELECT DISTINCT feature_name FROM test_pumps").fetchall() == [("pressure_mean",)]


def test_row_with_a_time_that_feast_cannot_store_stops_nobody(repo: Repo, tmp_path: Path) -> None:
    first, last = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=us) for us in TIMES_US)
    assert (first, last) == (datetime(2, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC) - timedelta(microseconds=1))
    batch = rows(("a", 0, 0, 1.0), ("a", 1, 1, 2.0), ("b", 1, 1, 3.0), ("c", 1, 1, 4.0), ("d", 1, 1, 5.0))
    times = batch["event_time"].cast(pa.int64()).to_pylist()
    far = pa.array([times[0], TIMES_US[1] + 1, TIMES_US[0] - 1, TIMES_US[0], TIMES_US[1]]).cast(TIME)
    write_source(tmp_path, "far", batch.set_column(1, "event_time", far))
    done = run(repo)
    assert (done.entities, done.written, done.without_key) == (3, 3, 2)
    assert served(repo, "abcd") == [1.0, None, 4.0, 5.0]


def test_view_without_source_files_says_what_to_do(repo: Repo) -> None:
    with pytest.raises(ConfigError, match=r"data source 'pumps_source' at .*features does not exist; run the step that writes it"):
        run(repo)


def test_source_without_a_column_of_the_view_says_which(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 1, 1, 1.0)))
    repo = redefine(tmp_path, ('"pressure_count"', '"pressure_max"'))
    with pytest.raises(ConfigError, match=r"feature view 'pumps': .*features has no column 'pressure_max'"):
        run(repo)


def test_run_after_one_with_until_leaves_nobody_out(repo: Repo, tmp_path: Path) -> None:
    """`b` was created before the last row of the run with `until`, and is older than what a run before that brought online."""
    write_source(tmp_path, "one", rows(("a", 1_000, 1_000, 1.0)))
    run(repo)
    write_source(tmp_path, "two", rows(("b", 900, 2_000, 2.0), ("a", 500, 4_000, 3.0)))
    assert run(repo, until=at(800)).newest_us == round(at(1_000).timestamp() * 1e6)
    assert run(repo).full == ""
    assert served(repo, ["a", "b"]) == [1.0, 2.0]


def test_rows_without_a_created_time_are_taken_by_every_run(repo: Repo, tmp_path: Path) -> None:
    write_source(tmp_path, "one", rows(("a", 1_000, 1_000, 1.0)))
    run(repo)
    nobody_knows = rows(("b", 900, 0, 2.0), ("a", 1_000, 0, 2.0)).set_column(2, "created_time", pa.array([None, None], TIME))
    write_source(tmp_path, "two", nobody_knows)
    assert run(repo).full == ""
    assert served(repo, ["a", "b"]) == [1.0, 2.0]


MAPPED = (
    'timestamp_field="event_time", created_timestamp_column="created_time"',
    'timestamp_field="at", created_timestamp_column="known", field_mapping={"event_time": "at", "created_time": "known"}',
)
PINNED = (
    "timestamp_field=",
    'file_format=__import__("feast.data_format").data_format.DeltaFormat(), tags={"delta_version": "0"}, timestamp_field=',
)
COUNT = ("pressure_count", 'Field(name="pressure_count", dtype=Int64)')


@pytest.mark.parametrize("kind", ["mapped names", "hive partitions", "pinned Delta", "nanoseconds", "float32", "other files"])
def test_source_is_read_as_offline_joins_read_it(repo: Repo, tmp_path: Path, kind: str) -> None:
    table, folder = pa.Table.from_batches([rows(("a", 1, 1, 0.1), ("a", 2, 2, 0.2), ("b", 2, 2, 0.3))]), tmp_path / "features"
    folder.mkdir()
    if kind == "mapped names":
        repo = redefine(tmp_path, MAPPED)
    if kind == "hive partitions":
        repo = redefine(tmp_path, (COUNT[1], 'Field(name="site", dtype=Int64)'))
        table = table.drop_columns(COUNT[0]).append_column("site", pa.array([1, 2, 1]))
        pads.write_dataset(table, folder, format="parquet", partitioning=["site"], partitioning_flavor="hive")
    elif kind == "pinned Delta":
        repo = redefine(tmp_path, PINNED)
        for version in (table, pa.Table.from_batches([rows(("a", 3, 3, 0.9))])):
            write_deltalake(folder, version, mode="append")
    else:
        if kind == "nanoseconds":
            later = [round(at(s).timestamp()) * 10**9 + more for s, more in ((1, 100), (1, 200), (2, 0))]
            table = table.set_column(1, "event_time", pa.array(later).cast(pa.timestamp("ns", "UTC")))
        if kind == "float32":
            table = table.set_column(3, "pressure_mean", table["pressure_mean"].cast(pa.float32()))
        pq.write_table(table, folder / "part.parquet")
        (folder / ".part.parquet.crc").write_bytes(b"x")
    asked = pa.table({"pump": ["a", "b"], "event_timestamp": pa.array([at(100)] * 2, TIME)})
    names = [f"pumps:{f.name}" for f in repo.views["pumps"].features]
    offline = repo.store.get_historical_features(asked, names).to_arrow()
    assert run(repo).written == 2
    for name in names:
        feature = name.partition(":")[2]
        assert served(repo, ["a", "b"], feature) == offline[feature].to_pylist() != [None, None]


def test_full_ties_are_settled_as_in_offline_joins(repo: Repo, tmp_path: Path, seed: int) -> None:
    """Rows with the same times, in many batches: the content decides, missing values and NaN included."""
    random_ = np.random.default_rng(seed)
    count_, pumps_ = 150_000, 300
    means = random_.choice([0.0, 1.0, -1.0, np.nan, np.inf], count_)
    same = pa.array([at(int(s)) for s in random_.integers(0, 2, count_)], TIME)
    table = pa.table(
        {
            "pump": [f"p{i}" for i in random_.integers(0, pumps_, count_)],
            "event_time": same,
            "created_time": same,
            "pressure_mean": pa.array(means, mask=random_.random(count_) < 0.2),
            "pressure_count": random_.integers(0, 1_000_000, count_),
        }
    )
    (tmp_path / "features").mkdir()
    pq.write_table(table, tmp_path / "features/one.parquet", row_group_size=40_000)
    names = [f"p{i}" for i in range(pumps_)]
    asked = pa.table({"pump": names, "event_timestamp": pa.array([at(100)] * pumps_, TIME)})
    offline = repo.store.get_historical_features(asked, ["pumps:pressure_mean", "pumps:pressure_count"]).to_arrow()
    assert run(repo).written == pumps_
    assert served(repo, names, "pressure_count") == offline["pressure_count"].to_pylist()


def test_newest_rows_do_not_depend_on_memory(repo: Repo, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = pumps(200_000, seed)
    write_source(tmp_path, "one", source.set_column(0, "pump", pa.array([f"p{i % 5_000}" for i in range(200_000)])))
    found = []
    for size in (newest.BATCH_BYTES, 0):
        monkeypatch.setattr(newest, "BATCH_BYTES", size)
        with newest.newest_of(repo, repo.views["pumps"], newest.Wanted()) as rows_:
            batches = list(rows_.batches())
            assert rows_.entities == sum(b.num_rows for b in batches) == 5_000
            found.append(pa.Table.from_batches(batches).sort_by("pump"))
    assert found[0].equals(found[1])
    assert not list((tmp_path / "feature_repo/data/spill").iterdir())
    best = pl.from_arrow(source).with_columns(pump=pl.Series([f"p{i % 5_000}" for i in range(200_000)]))  # type: ignore[union-attr]
    wanted = best.sort("event_time").group_by("pump").last().sort("pump")
    assert found[0]["pressure_mean"].to_pylist() == wanted["pressure_mean"].to_list()


def test_view_without_entities_has_one_value(repo: Repo, tmp_path: Path) -> None:
    repo = redefine(tmp_path, ("entities=[pump], ", ""))
    write_source(tmp_path, "one", rows((None, 5, 5, 5.0), (None, 6, 6, 6.0)))
    assert run(repo).written == 1
    found = repo.store.get_online_features(["pumps:pressure_mean"], [{"__dummy_id": ""}]).to_dict()
    assert found["pressure_mean"] == [6.0]


def test_value_of_a_kind_that_cannot_be_stored_is_named(repo: Repo, tmp_path: Path) -> None:
    repo = redefine(tmp_path, ("import Float64, Int64", "import Float64, Int64, Map"), ("dtype=Int64", "dtype=Map"))
    batch = rows(("a", 5, 5, 5.0)).set_column(4, "pressure_count", pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())))
    write_source(tmp_path, "one", batch)
    with pytest.raises(ConfigError, match=r"view 'pumps' has values .* Expected dict for MAP type"):
        run(repo)


def test_run_that_breaks_off_is_done_again_and_ends_the_same(
    repo: Repo, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pumps(3_000, seed)
    write_source(tmp_path, "one", source)
    path = tmp_path / "feature_repo/data/online.db"
    rows_max = online_writer.BATCH_ROWS * 2 + 10
    with sqlite3.connect(path) as connection:
        connection.execute(
            f"CREATE TRIGGER full BEFORE INSERT ON test_pumps WHEN (SELECT count(*) FROM test_pumps) >= {rows_max} "
            "BEGIN SELECT RAISE(FAIL, 'disk full'); END"
        )
    with pytest.raises(UnavailableError, match="disk full"):
        run(repo)
    assert 0 < count(path) < 3_000
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER full")
    done = run(repo)
    assert (done.full, done.entities, done.written) == ("the first run", 3_000, 3_000)
    names = source["pump"].to_pylist()
    assert served(repo, names) == source["pressure_mean"].to_pylist()


def test_killed_run_is_done_again_and_ends_the_same(repo: Repo, tmp_path: Path, seed: int) -> None:
    source = pumps(6_000, seed)
    write_source(tmp_path, "one", source)
    path = tmp_path / "feature_repo/data/online.db"
    # A process of its own, as Polars' threads do not outlive a fork.
    process = subprocess.Popen([sys.executable, "-m", "pipelines.materialise", "--project", str(tmp_path)], cwd=ROOT)
    wanted = 1 + random.Random(seed).randrange(3_000)
    deadline = time.monotonic() + 150
    while count(path) < wanted and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "feature_repo/data/materialised/pumps.json").exists(), "it ended before it could be killed"
    assert run(repo).written == 6_000
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT count(DISTINCT entity_key), count(*) FROM test_pumps").fetchone() == (6_000, 12_000)


@pytest.mark.parametrize("delta", [False, True], ids=["parquet", "delta"])
def test_source_in_s3_is_read_like_one_on_disk(tmp_path: Path, object_store: ObjectStore, seed: int, delta: bool) -> None:  # noqa: F811
    path, tags = f"s3://{BUCKET}/materialise-{seed}-{delta}", f'tags={{"credentials": "{WRITER}"}}'
    stored = Source("pumps", path, delta, storage=storage_of(path, object_store.endpoint, WRITER))
    source = f'path="{path}", s3_endpoint_override="{object_store.endpoint}", {tags}' + ", file_format=DeltaFormat()" * delta
    repo = make_repo(tmp_path, source=source)
    with pytest.raises(ConfigError, match="does not exist"):
        run(repo)
    first = pumps(3_000, seed)
    stored.append(pa.Table.from_batches([first]))
    assert run(repo).written == 3_000
    stored.append(pa.Table.from_batches([rows(("p7", HOUR, HOUR + CREATED_LATER, 7.0), ("new", HOUR, HOUR + CREATED_LATER, 8.0))]))
    done = run(repo)
    assert (done.full, done.written) == ("", 3_001)  # the first lie in the overlap
    assert served(repo, ["p7", "new", "p8"]) == [7.0, 8.0, first["pressure_mean"][8].as_py()]


def test_delta_version_that_a_source_names_is_materialised(tmp_path: Path) -> None:
    stored = Source("pumps", str(tmp_path / "table"), delta=True)
    for mean in (1.0, 2.0, 3.0):
        stored.append(pa.Table.from_batches([rows(("a", mean, mean, mean))]))
    repo = make_repo(tmp_path, source=f'path="{tmp_path / "table"}", file_format=DeltaFormat(), tags={{"delta_version": "1"}}')
    run(repo)
    assert served(repo, ["a"]) == [2.0]


@pytest.mark.parametrize("format_", ["", ", file_format=DeltaFormat()"])
def test_s3_that_does_not_answer_is_unavailable_and_sets_no_mark(tmp_path: Path, format_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(UnavailableError, match=r"'pumps_source' at s3:.* could not be read"):
        run(make_repo(tmp_path, source=f'path="s3://nothing/here", s3_endpoint_override="http://127.0.0.1:9"{format_}'))
    assert not (tmp_path / "feature_repo/data/materialised/pumps.json").exists()


@pytest.mark.needs_redis
def test_redis_gets_the_same(tmp_path: Path, seed: int) -> None:
    source = pumps(2_500, seed)
    write_source(tmp_path, "one", source)
    with redis_server(tmp_path) as port:
        repo = make_repo(tmp_path, redis_store(port))
        assert run(repo).written == 2_500
        assert served(repo, source["pump"].to_pylist()) == source["pressure_mean"].to_pylist()


@pytest.mark.needs_redis
@pytest.mark.parametrize(("policy", "message"), [("noeviction", "used memory > 'maxmemory'"), ("allkeys-random", "does not give back")])
def test_redis_without_room_is_an_error_and_no_mark_is_set(tmp_path: Path, seed: int, policy: str, message: str) -> None:
    write_source(tmp_path, "one", pumps(6_000, seed))
    with (
        redis_server(tmp_path, "--maxmemory", "1500kb", "--maxmemory-policy", policy) as port,
        pytest.raises(UnavailableError, match=message),
    ):
        run(make_repo(tmp_path, redis_store(port)))
    assert not (tmp_path / "feature_repo/data/materialised/pumps.json").exists()


def pumps(count_: int, seed: int) -> pa.RecordBatch:
    random_ = np.random.default_rng(seed)
    times = pa.array([at(0) + timedelta(seconds=float(s)) for s in random_.uniform(0, 60, count_)], TIME)
    means = pa.array(random_.normal(size=count_))
    return pa.RecordBatch.from_pydict(
        {
            "pump": pa.array([f"p{i}" for i in range(count_)]),
            "event_time": times,
            "created_time": times,
            "pressure_mean": means,
            "pressure_count": pa.array(random_.integers(0, 30, count_)),
        }
    )


def count(path: Path) -> int:
    """Entities that other processes see in the store."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30) as connection:
        return int(connection.execute("SELECT count(DISTINCT entity_key) FROM test_pumps").fetchone()[0])
