"""Online features: how fast, and in how much memory, they are materialised, and how fresh live ones are. Needs Redis.

- Materialisation of the newest row of each entity into SQLite: ours, and Feast's own engine and store, which holds all rows in memory.
  Each runs in a process of its own; memory is what it grew by. Both must serve the same values (checked on a sample). Ours also with ten
  times as many entities: its memory stays below the limit of `pipelines.newest`, or the run fails.
- Live features: blocks go into a real lake at a steady pace, and the loop of `pipelines.live` follows it. Freshness is the time from the
  commit of a block to the moment when its features are read back from the online store; the values are compared in every bit with
  those of the features stage.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.report import Cell, Report, main
from cloud.follow import Follower
from edge_agent.contract.block import ORDINAL, SCORE
from edge_agent.contract.columns import Table, take
from pipelines.feature_store import Repo
from pipelines.features import CREATED_TIME, EVENT_TIME, windows_of
from pipelines.live import Live
from pipelines.online_writer import OnlineWriter
from pipelines.params import load_params
from pipelines.tails import Tails
from tests.pipelines.lakes import header_of, open_lake, readings, turbofan
from tests.pipelines.repos import FEAST_SQLITE, SQLITE, TIME, make_repo, redis_store, turbofan_project
from tests.redis_server import redis_server

ENTITIES, ENTITIES_QUICK = 100_000, 1_000
TIMES_MORE = 10
MEMORY_MB_MAX = 1_000 + 250  # what DuckDB may take, and a batch in Feast's messages
BLOCKS, BLOCKS_QUICK = 200, 12
BLOCK_ROWS = 16
PACE_S = 0.1
SAMPLE = 200
SEED = 11


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--entities", type=int, help=f"entities to materialise (default: {ENTITIES})")
    parser.add_argument("--no-peer", action="store_true", help="leave Feast's own engine out")


def measure(arguments: argparse.Namespace) -> Report:
    """Both parts, as one table."""
    quick = arguments.quick
    entities = arguments.entities or (ENTITIES_QUICK if quick else ENTITIES)
    numbers: dict[str, Any] = {"entities": entities, "materialise": {}, "materialise_more": {}, "freshness": {}}
    more = TIMES_MORE * entities
    for key, count, peer in (("materialise", entities, not arguments.no_peer), ("materialise_more", more, False)):
        with tempfile.TemporaryDirectory() as folder:
            numbers[key] = materialisations(Path(folder), count, peer)
    assert numbers["materialise_more"]["ours"]["memory_mb"] < MEMORY_MB_MAX, "materialising is not bounded"
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as port:
        for name, store in (("SQLite", SQLITE), ("Redis", redis_store(port))):
            numbers["freshness"][name] = freshness(Path(folder) / name, store, BLOCKS_QUICK if quick else BLOCKS)
    rows: list[list[Cell]] = [
        [f"materialise {count:,} entities, {name}", f["s"], f["entities_per_s"], f["memory_mb"], "-", "-"]
        for key, count in (("materialise", entities), ("materialise_more", more))
        for name, f in numbers[key].items()
    ]
    rows += [[f"live, {name}", "-", f["readings_per_s"], "-", f["p50_s"], f["p99_s"]] for name, f in numbers["freshness"].items()]
    notes = [
        "Live: from the commit of a block to its features read back from the online store, with the bits of the features stage (checked)."
    ]
    return Report("Online features", ["what", "s", "rows/s", "memory MB", "fresh p50 s", "p99 s"], rows, numbers, notes)


def materialisations(folder: Path, entities: int, peer: bool) -> dict[str, dict[str, float]]:
    """Ours, and Feast's own way with its own store."""
    ways: dict[str, tuple[str, Callable[[Repo], None]]] = {"ours": (SQLITE, ours)}
    if peer:
        ways["Feast"] = (FEAST_SQLITE, feasts)
    means = write_pumps(folder / "features", entities)
    sample = np.random.default_rng(SEED).integers(0, entities, min(SAMPLE, entities)).tolist()
    found = {}
    for name, (store, way) in ways.items():
        project = folder / name
        project.mkdir()
        (project / "features").symlink_to(folder / "features")
        found[name] = in_a_process(project, store, way, sample, [float(means[i]) for i in sample])
        found[name]["entities_per_s"] = entities / found[name]["s"]
    return found


def write_pumps(folder: Path, entities: int) -> np.ndarray:
    """Three rows of each entity, in parts; returns the newest mean of each."""
    folder.mkdir()
    random = np.random.default_rng(SEED)
    names = pa.array([f"p{i}" for i in range(entities)])
    means = random.normal(size=(3, entities))
    for turn in range(3):
        times = pa.array(np.full(entities, (1_700_000_000 + turn) * 1_000_000)).cast(TIME)
        counts = pa.array(np.full(entities, turn))
        columns = {"pump": names, EVENT_TIME: times, CREATED_TIME: times, "pressure_mean": pa.array(means[turn]), "pressure_count": counts}
        pq.write_table(pa.table(columns), folder / f"{turn}.parquet", row_group_size=65_536)
    return means[2]


def ours(repo: Repo) -> None:
    from pipelines.materialise import materialise

    materialise(repo, repo.views["pumps"])


def feasts(repo: Repo) -> None:
    start = datetime(2023, 1, 1, tzinfo=UTC)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
        repo.store.materialize(start_date=start, end_date=start + timedelta(days=365), feature_views=["pumps"])


def in_a_process(project: Path, store: str, way: Callable[[Repo], None], sample: list[int], wanted: list[float]) -> dict[str, float]:
    """Seconds and growth in MB of a way, in a child of this process: it has Feast imported already."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()

    def child() -> None:
        repo = make_repo(project, store)
        repo.store.get_online_features(features=repo.service, entity_rows=[{"pump": "nobody"}])  # imports what that needs
        before, start = resident_mb(), time.perf_counter()
        way(repo)
        seconds = time.perf_counter() - start
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        served = repo.store.get_online_features(features=repo.service, entity_rows=[{"pump": f"p{i}"} for i in sample]).to_dict()
        results.put({"s": seconds, "memory_mb": grown, "equal": served["pressure_mean"] == wanted})

    process = context.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0, f"{way.__name__} ended with {process.exitcode}"
    found: dict[str, float] = results.get()
    assert found.pop("equal"), f"{way.__name__} serves other values than were written"
    return found


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024 / 1024


def freshness(folder: Path, store: str, blocks: int) -> dict[str, float]:
    """Append blocks at a steady pace and take the time until each is online."""
    from pipelines.feature_store import open_repo

    project = turbofan_project(folder, store)
    repo, spec = open_repo(project), load_params(project).spec
    writer, tails = OnlineWriter(repo.store, repo.views[repo.view.name]), Tails(turbofan(), spec)
    online: dict[int, float] = {}

    def push(rows: pa.RecordBatch) -> Any:
        done = writer.push(f"{repo.view.name}_push", rows)
        now = time.time_ns() // 1_000
        for arrived in rows.column(CREATED_TIME).cast(pa.int64()).to_pylist():
            online.setdefault(arrived, (now - arrived) / 1e6)
        return done

    lake = open_lake(project / "lake")
    with following(Live(Follower(open_lake(project / "lake"), "turbofan", tails.columns), tails, push, project / "mark", "bench")) as live:
        start = time.perf_counter()
        for sequence, (header, table) in enumerate(stream(blocks), 1):
            lake.append("eu", [(header, table)])
            time.sleep(max(0.0, start + sequence * PACE_S - time.perf_counter()))
        deadline = time.monotonic() + 60
        while live.status.readings < blocks * BLOCK_ROWS and time.monotonic() < deadline:
            time.sleep(0.05)
        seconds = time.perf_counter() - start
    check(lake, repo, spec)
    p50, p99 = np.quantile(list(online.values()), [0.5, 0.99]).tolist()
    return {"p50_s": p50, "p99_s": p99, "blocks": blocks, "readings_per_s": blocks * BLOCK_ROWS / seconds}


def stream(blocks: int) -> Iterator[tuple[Any, Table]]:
    """Blocks of one device with four engines."""
    table, _ = readings([f"e{i}" for i in range(4)], SEED, life=(blocks * BLOCK_ROWS // 4, blocks * BLOCK_ROWS // 4 + 1))
    for sequence in range(1, blocks + 1):
        rows = slice((sequence - 1) * BLOCK_ROWS, sequence * BLOCK_ROWS)
        part = take(table, rows)
        part[ORDINAL], part[SCORE] = np.arange(rows.start, rows.stop, dtype=np.int64), np.full(BLOCK_ROWS, np.nan)
        yield header_of("plane-1", "epoch-1", "europe", sequence, part), part


@contextmanager
def following(live: Live) -> Iterator[Live]:
    """The loop in a thread."""
    stop = threading.Event()
    thread = threading.Thread(target=live.run, args=(stop, live.mark_path.with_name("status.json")))
    thread.start()
    try:
        yield live
    finally:
        stop.set()
        thread.join()


def check(lake: Any, repo: Repo, spec: Any) -> None:
    """The values online are those of the features stage, in every bit."""
    rows = lake.read("turbofan")
    features = windows_of(rows, turbofan(), spec).features
    for engine in sorted(set(rows["engine"].to_pylist())):
        newest = features[np.flatnonzero(np.array(rows["engine"].to_pylist()) == engine)[-1]]
        served = repo.store.get_online_features(features=repo.service, entity_rows=[{"engine": engine}]).to_dict()
        mine = np.array([np.nan if served[name][0] is None else served[name][0] for name in spec.names])
        assert np.array_equal(mine.view(np.int64), newest.view(np.int64)), f"{engine}: online and offline differ"


if __name__ == "__main__":
    main(__doc__, measure, options)
