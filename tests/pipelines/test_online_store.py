"""The newest value stays, whoever writes last: our SQLite and Redis online stores, the same tests for both."""

from __future__ import annotations

import copy
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract.errors import UnavailableError
from pipelines.feature_store import Repo
from pipelines.online_writer import OnlineWriter, Written
from tests.pipelines.repos import FEAST_SQLITE, SQLITE, at, make_repo, redefine, redis_store, rows, served
from tests.redis_server import redis_server


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.needs_redis)])
def repo(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repo]:
    if request.param == "sqlite":
        yield make_repo(tmp_path, SQLITE)
        return
    with redis_server(tmp_path) as port:
        yield make_repo(tmp_path, redis_store(port))


def write(repo: Repo, *values: tuple[str | None, float, float, float]) -> Written:
    return OnlineWriter(repo.store, repo.view).write(rows(*values))


def test_value_comes_back_in_every_bit_with_its_time_to_the_microsecond(repo: Repo) -> None:
    values = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308]
    names = [f"p{i}" for i in range(len(values))]
    batch = rows(*((name, 0.123457, 1, 0.0) for name in names))
    batch = batch.set_column(3, "pressure_mean", np.array(values))
    assert OnlineWriter(repo.store, repo.view).write(batch) == Written(len(values), 0)
    assert np.array_equal(np.array(served(repo, names)).view(np.int64), np.array(values).view(np.int64))
    found = repo.store.get_online_features(features=repo.service, entity_rows=[{"pump": "p0"}]).to_df(include_event_timestamps=True)
    assert found["pressure_mean__ts"][0] in (at(0.123457), at(0.123457).timestamp(), int(at(0.123457).timestamp()))


def test_older_value_never_replaces_a_newer_one_not_even_within_a_second(repo: Repo) -> None:
    assert write(repo, ("a", 10.000002, 11, 2.0)) == Written(1, 0)
    assert write(repo, ("a", 10.000001, 99, 1.0)) == Written(0, 1)
    assert served(repo, ["a"]) == [2.0]


def test_correction_with_the_same_event_time_replaces_what_was_created_before_it_only(repo: Repo) -> None:
    write(repo, ("a", 10, 11, 1.0))
    write(repo, ("a", 10, 12, 2.0))
    assert served(repo, ["a"]) == [2.0]
    write(repo, ("a", 10, 11, 1.0))
    assert served(repo, ["a"]) == [2.0]


def test_rows_of_one_entity_in_one_batch_end_with_the_newest_in_any_order(repo: Repo, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(40)
    write(repo, *(("a", float(i), 50.0, float(i)) for i in order))
    assert served(repo, ["a"]) == [39.0]


def test_unknown_entity_and_missing_value_are_null(repo: Repo) -> None:
    write(repo, ("a", 1, 1, 1.0))
    batch = rows(("b", 1, 1, 0.0)).set_column(3, "pressure_mean", np.array([np.nan]))
    assert OnlineWriter(repo.store, repo.view).write(batch) == Written(1, 0)
    assert served(repo, ["a", "b", "nobody"]) == [1.0, None, None]


def test_two_writers_at_once_leave_the_newest_of_both(repo: Repo, seed: int) -> None:
    random = np.random.default_rng(seed)
    events = random.integers(0, 10_000, (2, 25, 8))

    def writer(mine: np.ndarray) -> None:
        out = OnlineWriter(repo.store, repo.view)
        for turn in mine:
            out.write(rows(*((f"p{i}", float(event), 1.0, float(event)) for i, event in enumerate(turn))))

    threads = [threading.Thread(target=writer, args=(mine,)) for mine in events]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served(repo, [f"p{i}" for i in range(8)]) == events.max(axis=(0, 1)).astype(float).tolist()


def test_emptied_view_takes_old_values_again(repo: Repo) -> None:
    writer = OnlineWriter(repo.store, repo.view)
    write(repo, ("a", 10, 10, 10.0), ("b", 10, 10, 10.0))
    writer.empty()
    assert served(repo, ["a", "b"]) == [None, None]
    assert write(repo, ("a", 5, 5, 5.0)) == Written(1, 0)
    assert served(repo, ["a", "b"]) == [5.0, None]


def test_writer_that_knows_fewer_features_than_the_store_holds_is_content(repo: Repo) -> None:
    """Another process took `pressure_count` out of the view, or has not yet heard of it."""
    write(repo, ("a", 10, 10, 10.0))
    fewer = copy.deepcopy(repo.view)
    fewer.features = [f for f in fewer.features if f.name == "pressure_mean"]
    assert OnlineWriter(repo.store, fewer).write(
        rows(("a", 11, 11, 11.0)).select(["pump", "event_time", "created_time", "pressure_mean"])
    ) == Written(1, 0)
    assert served(repo, ["a"]) == [11.0]


def test_values_of_a_feature_that_was_taken_out_leave_the_sqlite_store(tmp_path: Path) -> None:
    write(make_repo(tmp_path), ("a", 10, 10, 10.0))
    redefine(tmp_path, ('Field(name="pressure_count", dtype=Int64)', ""))
    with sqlite3.connect(tmp_path / "feature_repo/data/online.db") as connection:
        assert connection.execute("SELECT feature_name FROM test_pumps").fetchall() == [("pressure_mean",)]


def test_store_made_by_feasts_own_class_is_made_new(tmp_path: Path) -> None:
    old = make_repo(tmp_path, FEAST_SQLITE)
    OnlineWriter(old.store, old.view).write(rows(("a", 10, 10, 10.0)))
    repo = make_repo(tmp_path, SQLITE)
    assert served(repo, ["a"]) == [None]
    assert write(repo, ("a", 5, 5, 5.0)) == Written(1, 0)


def test_store_that_keeps_less_than_it_took_is_an_error_that_names_entities(tmp_path: Path) -> None:
    repo = make_repo(tmp_path)
    connection = sqlite3.connect(tmp_path / "feature_repo/data/online.db")
    deletes = "BEGIN DELETE FROM test_pumps WHERE rowid = new.rowid; END"
    connection.execute(f"CREATE TRIGGER loses AFTER INSERT ON test_pumps WHEN new.event_ts % 2 = 1 {deletes}")
    connection.commit()
    with pytest.raises(UnavailableError, match=r"took 4 rows of view 'pumps' and does not give back 2 of them \(b, d\)"):
        write(repo, *((name, float(i), 9, 1.0) for i, name in enumerate("abcd")))


@pytest.mark.needs_redis
def test_store_that_went_away_is_unavailable(tmp_path: Path) -> None:
    with redis_server(tmp_path) as port:
        repo = make_repo(tmp_path, redis_store(port))
        write(repo, ("a", 1, 1, 1.0))
    with pytest.raises(UnavailableError, match="NewestRedisOnlineStore fails"):
        write(repo, ("a", 2, 2, 2.0))
