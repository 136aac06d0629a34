"""Materialisation into a real online store: whole, incremental, late data, crashes, and what the store has lost."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from edge_agent.contract.errors import ConfigError, UnavailableError
from pipelines import online_writer
from pipelines.feature_sources import Source, storage_of
from pipelines.feature_store import Repo
from pipelines.materialise import OVERLAP_S, Materialised, main, materialise
from tests.object_store import BUCKET, WRITER, ObjectStore, object_store  # noqa: F401
from tests.pipelines.repos import TIME, at, make_repo, redis_store, rows, served, write_source
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


def test_view_without_source_files_says_what_to_do(repo: Repo) -> None:
    with pytest.raises(ConfigError, match=r"source of view 'pumps' is not there .* make it first: fenceline train"):
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
    process = multiprocessing.get_context("fork").Process(target=main, args=(["--project", str(tmp_path)],))  # it has Feast imported
    process.start()
    wanted = 1 + random.Random(seed).randrange(3_000)
    deadline = time.monotonic() + 150
    while count(path) < wanted and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
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
    with pytest.raises(ConfigError, match="is not there"):
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
    with pytest.raises(UnavailableError, match="source of view 'pumps' does not read"):
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
