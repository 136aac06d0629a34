"""The lake on a real S3 server: conditional writes decide, refusals lose nothing, zones have buckets of their own."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError

from cloud.lake import Lake
from cloud.roots import Roots
from cloud.rows import Contracts
from cloud.sorting import sorted_rows
from edge_agent.contract.errors import ConfigError, UnavailableError
from tests.cloud.blocks import block, contract
from tests.cloud.test_lake import counts
from tests.object_store import READER, ObjectStore, credentials_in_environment, object_store, object_store_server

__all__ = ["object_store"]


@pytest.fixture
def roots(object_store: ObjectStore) -> Roots:
    return Roots(object_store.root(f"lake-{uuid.uuid4().hex[:8]}"))


def open_lake(roots: Roots) -> Lake:
    return Lake(roots, Contracts([contract()]))


def test_a_lake_on_s3_stores_reads_compacts_and_pins_versions(roots: Roots, tmp_path: Path) -> None:
    lake = open_lake(roots)
    assert lake.streams() == [] and lake.read("pump").num_rows == 0
    for sequence in range(1, 5):
        lake.append("eu", [block(sequence), block(sequence)])
    before = lake.versions("pump")

    assert lake.compact(files_max=1) == {"europe/pump": 4}
    again = open_lake(roots)
    assert again.append("eu", [block(2), block(5)]).committed == [("d1", "e1", "europe", 5)]

    assert (again.streams(), again.lanes("pump")) == (["pump"], ["europe"])
    assert again.read("pump", versions=before).num_rows == 12
    assert set(counts(again).values()) == {1} and len(counts(again)) == 15
    columns = ["ts", "lane", "ordinal"]
    parts = list(sorted_rows(again, "pump", again.versions("pump"), columns, 4, 256, tmp_path))
    assert [part.num_rows for part in parts] == [4, 4, 4, 3] and pa.concat_tables(parts).equals(again.read("pump", columns=columns))


def test_writers_that_race_for_a_version_on_s3_store_each_block_once(roots: Roots) -> None:
    start = threading.Barrier(3)

    def write(first: int) -> None:
        lake = open_lake(roots)
        start.wait()
        for n in range(8):
            lake.append("eu", [block(1 + (first + n) % 8), block(1 + n, device=f"own{first}")])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, (0, 3, 6)))

    found = counts(open_lake(roots))
    assert set(found.values()) == {1} and len(found) == 4 * 8 * 3


def test_of_many_writers_that_race_for_one_version_on_s3_one_wins(roots: Roots) -> None:
    """What the lake's exactly once rests on: the server lets only one of them write the commit."""
    lake, start = open_lake(roots), threading.Barrier(4)
    lake.append("eu", [block(1)])
    rows = lake.read("pump")

    def take(table: DeltaTable) -> bool:
        start.wait()
        try:
            write_deltalake(table, rows, mode="append", commit_properties=CommitProperties(app_transactions=[Transaction("the same", 1)]))
        except CommitFailedError:
            return False
        return True

    for round_ in range(1, 6):
        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(take, [lake.table("pump", "europe") for _ in range(4)]))

        assert sum(won) == 1, f"round {round_}: {won}"
        assert lake.versions("pump") == {"europe": 1 + round_} and lake.read("pump").num_rows == 3 * (1 + round_)


def test_who_may_only_read_cannot_append_and_nothing_is_settled(object_store: ObjectStore, roots: Roots) -> None:
    open_lake(roots).append("eu", [block(1)])
    reader = open_lake(Roots(object_store.root(roots.default.uri.rsplit("/", 1)[1], READER)))

    assert reader.read("pump").num_rows == 3
    with pytest.raises(UnavailableError, match="did not commit 1 blocks"):
        reader.append("eu", [block(2)])

    assert [i[3] for i in open_lake(roots).append("eu", [block(1), block(2)]).committed] == [2]


def test_zones_with_buckets_of_their_own_lie_apart(object_store: ObjectStore, tmp_path: Path) -> None:
    europe = object_store.root(f"eu-{uuid.uuid4().hex[:8]}")
    lake = open_lake(Roots(Roots.at(tmp_path).default, {"europe": europe}))
    lake.append("eu", [block(1), block(1, lane="canada")])

    assert lake.lanes("pump") == ["canada", "europe"] and lake.read("pump").num_rows == 6
    assert [p.name for p in tmp_path.iterdir()] == ["canada"]
    assert europe.folders() == ["europe"]


def test_missing_credentials_are_named(object_store: ObjectStore) -> None:
    with pytest.raises(ConfigError, match="NOBODY_AWS_ACCESS_KEY_ID"):
        open_lake(Roots(object_store.root("x", "NOBODY"))).append("eu", [block(1)])


@pytest.fixture
def own_store(tmp_path: Path) -> Iterator[ObjectStore]:
    with credentials_in_environment(), object_store_server(tmp_path) as store:
        yield store


def test_an_s3_server_that_is_gone_acknowledges_nothing_and_all_is_stored_when_it_is_back(
    own_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cloud.roots.LIMITS", {"connect_timeout": "1s", "timeout": "5s", "max_retries": "1", "retry_timeout": "2s"})
    lake = open_lake(Roots(own_store.root("lake")))
    lake.append("eu", [block(1)])
    own_store.kill()

    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(UnavailableError):
            lake.append("eu", [block(1), block(2)])
    assert time.monotonic() - began < 60

    own_store.start()
    settled = lake.append("eu", [block(1), block(2)])
    assert [i[3] for i in settled.committed] == [2] and settled.receipts[0].lanes[0].cumulative == 2
    assert set(counts(lake).values()) == {1}
