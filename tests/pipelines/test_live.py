"""Live features: what is pushed while readings arrive has the bits of the features stage, whatever order they come in."""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from cloud import brokers, config, ingest
from cloud.config import Settings
from cloud.follow import Follower
from cloud.lake import Lake
from edge_agent.contract.block import ORDINAL, SCORE, BlockHeader
from edge_agent.contract.columns import Strings, Table, take
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from pipelines.arrival import ARRIVED, Known
from pipelines.asof import newest
from pipelines.features import CREATED_TIME, EVENT_TIME, LakeWindows, windows_of
from pipelines.live import Live, build
from pipelines.online_writer import TIMES_US, Written
from pipelines.stage import load_context
from pipelines.tails import Tails
from tests.brokers import nats_broker
from tests.edge_agent.gateway import START_S, Bench, reading, wait_for
from tests.pipelines.lakes import ROOT, header_of, open_lake, readings, store, turbofan
from tests.pipelines.repos import redis_store, turbofan_project
from tests.redis_server import redis_server

SPEC = FeatureSpec(
    features=[Feature(f, a) for f in ("sensor_2", "sensor_3") for a in ("last", "mean", "std", "slope", "count")],
    window_rows=6,
    window_s=7_200.0,
)
COLUMNS = ["device", "epoch", "ordinal", "row", "engine", "ts", ARRIVED, "sensor_2", "sensor_3"]


def blocks(device: str, epoch: str, table: Table, random: np.random.Generator) -> list[tuple[BlockHeader, Table]]:
    """A device's readings in blocks of one to nine rows; a lane for the first half, then another."""
    out = []
    first, sequence = 0, 0
    rows = len(table["ts"])
    while first < rows:
        count = min(int(random.integers(1, 10)), rows - first)
        part = take(table, slice(first, first + count))
        part[ORDINAL], part[SCORE] = np.arange(first, first + count, dtype=np.int64), np.full(count, np.nan)
        sequence += 1
        lane = "europe" if first < rows / 2 else "united-states"
        header = header_of(device, epoch, lane, sequence, part)
        out.append((header, part))
        first += count
    return out


def fleet(random: np.random.Generator) -> list[tuple[BlockHeader, Table]]:
    """Blocks of three devices in random order: late, mixed, with event times that jump and values that miss; an engine changes device."""
    out = []
    for device, epoch, engines in (
        ("d0", "e0", ["a", "b"]),
        ("d1", "e1", ["c", "d"]),
        ("d1", "e2", ["c", "x"]),
        ("d2", "e3", ["a", "y", "z"]),
    ):
        table, _ = readings(engines, int(random.integers(1 << 30)), life=(10, 25))
        table["ts"] = np.asarray(table["ts"]) + random.integers(-2, 3, len(table["ts"])) * 2_000_000_000
        table["sensor_3"] = np.where(random.random(len(table["ts"])) < 0.2, np.nan, table["sensor_3"])
        out += blocks(device, epoch, table, random)
    return [out[i] for i in random.permutation(len(out))]


def offline(lake: Lake) -> dict[str, tuple[int, set[bytes]]]:
    """For each engine the newest event time, and the features of the readings that have it, in bits."""
    rows = lake.read("turbofan", columns=COLUMNS)
    features = windows_of(rows, turbofan(), SPEC).features
    found: dict[str, tuple[int, set[bytes]]] = {}
    for engine, event_us, values in zip(rows["engine"].to_pylist(), rows["ts"].cast(pa.int64()).to_pylist(), features, strict=True):
        at, bits = found.get(engine, (-1, set()))
        if event_us >= at:
            found[engine] = (event_us, {*(bits if event_us == at else ()), values.tobytes()})
    return found


class Online:
    """What a store that keeps the newest would hold."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, Any, bytes]] = {}

    def push(self, batch: pa.RecordBatch) -> Written:
        columns = batch.to_pydict()
        values = np.column_stack([np.asarray(batch[name]) for name in SPEC.names])
        for engine, event, created, mine in zip(columns["engine"], columns["event_time"], columns["created_time"], values, strict=True):
            if (event, created) >= self.held.get(engine, (event, created))[:2]:
                self.held[engine] = (event, created, mine.tobytes())
        return Written(batch.num_rows, 0)

    def check(self, lake: Lake) -> None:
        wanted = offline(lake)
        assert self.held.keys() == wanted.keys()
        for engine, (event, _, bits) in self.held.items():
            at, candidates = wanted[engine]
            assert round(event.timestamp() * 1e6) == at, engine
            assert bits in candidates, engine


def live(lake: Lake, online: Online, mark: Path, keys_max: int = 1_000, seen: dict[str, int] | None = None) -> Live:
    tails = Tails(turbofan(), SPEC, keys_max)
    return Live(Follower(lake, "turbofan", tails.columns, seen, lanes_s=0.0), tails, online.push, mark, "d")


def test_features_are_known_when_the_last_reading_of_their_window_has_arrived(seed: int) -> None:
    random = np.random.default_rng(seed)
    count, window_rows = 200, 4
    entity, arrived = random.integers(0, 3, count), random.integers(0, 1_000, count)
    names = Strings.of([f"e{i}" for i in entity])
    wanted = [max(arrived[np.flatnonzero(entity[: i + 1] == entity[i])[-window_rows:]]) for i in range(count)]
    known, cuts = Known(window_rows, entities_max=3), [0, *sorted(random.integers(0, count, 9).tolist()), count]
    parts = [known.push(names[start:stop], arrived[start:stop]) for start, stop in itertools.pairwise(cuts)]
    assert np.concatenate(parts).tolist() == wanted


@pytest.mark.parametrize("keys_max", [1_000, 4])
def test_late_and_mixed_arrivals_end_with_the_bits_of_the_features_stage(tmp_path: Path, seed: int, keys_max: int) -> None:
    arrive(tmp_path, seed, keys_max)


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_many_fleets_end_with_the_bits_of_the_features_stage(tmp_path: Path, seed: int) -> None:
    for run in range(int(os.environ.get("FENCELINE_RUNS", "100"))):
        print(f"fleet {run}: seed {seed + run}")
        arrive(tmp_path / str(run), seed + run, keys_max=(1_000, 4)[run % 2])


def arrive(tmp_path: Path, seed: int, keys_max: int) -> None:
    """Let a fleet's blocks arrive a few at a time, with restarts and compaction between, and compare after each time."""
    random = np.random.default_rng(seed)
    lake, online = open_lake(tmp_path / "lake"), Online()
    running = live(open_lake(tmp_path / "lake"), online, tmp_path / "mark", keys_max)
    waiting = fleet(random)
    while waiting:
        count = int(random.integers(1, 12))
        lake.append("eu", waiting[:count])
        waiting = waiting[count:]
        if random.random() < 0.2:  # a restart: what was noted is followed, tails are read from the lake
            running = live(open_lake(tmp_path / "lake"), online, tmp_path / "mark", keys_max, running.follower.seen)
        if random.random() < 0.2:
            lake.compact(0)
        running.step()
        online.check(lake)


def test_what_was_pushed_but_not_noted_is_pushed_again_and_changes_nothing(tmp_path: Path, seed: int) -> None:
    lake, online = open_lake(tmp_path / "lake"), Online()
    lake.append("eu", fleet(np.random.default_rng(seed)))
    first = live(lake, online, tmp_path / "mark")
    assert first.step() > 0
    before = dict(online.held)
    again = live(lake, online, tmp_path / "mark")
    assert again.step() == first.status.readings
    assert online.held == before
    assert again.step() == 0


@pytest.mark.parametrize("values", [(1.0, 2.0), (2.0, 1.0)])
def test_readings_of_one_time_are_settled_as_in_the_features_stage(tmp_path: Path, values: tuple[float, float]) -> None:
    lake, online = open_lake(tmp_path / "lake"), Online()
    table, _ = readings(["a"], 1, life=(10, 11))
    table["ts"], table["sensor_2"] = np.array(table["ts"]), np.array(table["sensor_2"])
    table["ts"][-1], table["sensor_2"][-2:] = table["ts"][-2], values
    store(lake, "plane", table)
    live(lake, online, tmp_path / "mark").step()
    made, _ = LakeWindows(turbofan(), SPEC).push(lake.read("turbofan", columns=COLUMNS))
    wanted = newest(pl.DataFrame(made), ["engine"], [EVENT_TIME, CREATED_TIME], SPEC.names)
    assert online.held["a"][2] == wanted.select(SPEC.names).to_numpy().tobytes()


@pytest.mark.parametrize("far_us", [-300_000_000_000_000_000, 300_000_000_000_000_000, TIMES_US[1] + 1])
def test_reading_of_a_time_that_feast_cannot_store_stops_nobody(tmp_path: Path, far_us: int) -> None:
    lake, online = open_lake(tmp_path / "lake"), Online()
    table, _ = readings(["a", "b"], 1)
    table["ts"] = np.where(np.arange(len(table["ts"])) == len(table["ts"]) - 1, far_us, table["ts"])
    store(lake, "plane", table)
    live(lake, online, tmp_path / "mark").step()
    assert {engine: event.year for engine, (event, _, _) in online.held.items()} == {"a": 2023, "b": 2023}


def test_step_ends_with_the_piece_at_hand_when_it_is_asked_to_stop(tmp_path: Path) -> None:
    lake, online, stop = open_lake(tmp_path / "lake"), Online(), threading.Event()
    table, _ = readings(["a", "b"], 1)
    store(lake, "plane", table)
    running = live(lake, online, tmp_path / "mark")
    stop.set()
    first = running.step(stop)
    assert 0 < first < len(table["ts"]) and len(running.follower.seen) == 1
    assert first + running.step() == len(table["ts"])


def test_log_and_files_that_were_cleaned_up_are_made_up_for_by_the_table_itself(tmp_path: Path, seed: int) -> None:
    lake, online = open_lake(tmp_path / "lake"), Online()
    waiting = fleet(np.random.default_rng(seed))
    for start in range(0, len(waiting), 5):
        lake.append("eu", waiting[start : start + 5])
    for lane in lake.lanes("turbofan"):
        table = lake.table("turbofan", lane)
        table.optimize.compact()
        table.vacuum(0, dry_run=False, enforce_retention_duration=False)
        table.create_checkpoint()
    running = live(lake, online, tmp_path / "mark")
    running.step()
    online.check(lake)
    assert running.follower.seen == lake.versions("turbofan")


@pytest.fixture(params=["sqlite", pytest.param("redis", marks=pytest.mark.needs_redis)])
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """The repository's own pipeline settings and feature definitions, with one of the online stores."""
    if request.param == "sqlite":
        yield turbofan_project(tmp_path / "project")
        return
    with redis_server(tmp_path) as port:
        yield turbofan_project(tmp_path / "project", redis_store(port))


def test_process_that_starts_again_takes_what_came_meanwhile_only(project: Path, tmp_path: Path) -> None:
    lake, state = open_lake(tmp_path / "state/lake"), tmp_path / "state"
    (project / "fenceline.toml").write_text(f"state = '{state}'\n")
    arriving = {name: readings([name], seed)[0] for seed, name in enumerate(["before", "while-it-runs", "while-it-is-down"])}
    store(lake, "plane-1", arriving["before"])
    running = build(load_context(project, state), skip_history=True)
    assert running.step() == 0
    store(lake, "plane-2", arriving["while-it-runs"])
    assert running.step() == len(arriving["while-it-runs"]["ts"])
    store(lake, "plane-3", arriving["while-it-is-down"])
    assert build(load_context(project, state), skip_history=True).step() == len(arriving["while-it-is-down"]["ts"])


def test_process_that_goes_on_with_an_old_definition_ends(project: Path, tmp_path: Path) -> None:
    state, file = tmp_path / "state", project / "pipelines/params.yaml"
    (project / "fenceline.toml").write_text(f"state = '{state}'\n")
    old = build(load_context(project, state))
    file.write_text(re.sub(r"window_rows: \d+", "window_rows: 7", file.read_text()))
    new = build(load_context(project, state))
    table, _ = readings(["e"], 1)
    store(open_lake(state / "lake"), "plane", table)
    assert new.step() == len(table["ts"])
    with pytest.raises(ConfigError, match="another definition than when this process started"):
        old.step()


@pytest.mark.timeout(300)
def test_reading_published_at_the_device_is_an_online_feature_within_seconds(project: Path, tmp_path: Path) -> None:
    """Sensor, agent, broker, ingest, lake, live process, Feast: all real; the bits are those of the features stage."""
    for name in ("sensors", "eu"):
        (tmp_path / name).mkdir()
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        (project / "fenceline.toml").write_text(f"state = '{tmp_path}/state'\n[[regions]]\nname = 'eu'\nport = {eu.port}\n")
        settings = config.load(project)
        brokers.password_path(settings, brokers.CLOUD_USER).parent.mkdir(parents=True)
        brokers.password_path(settings, brokers.CLOUD_USER).write_text("any")
        bench = Bench(tmp_path, sensors, eu)
        bench.cloud.answering = False  # ingest answers
        running = build(load_context(project, settings.state_dir))
        stop = threading.Event()
        threads = [threading.Thread(target=running.run, args=(stop, tmp_path / "live.json")), *ingesting(settings, stop)]
        for thread in threads:
            thread.start()
        try:
            bench.start()
            for cycle in range(1, 41):
                bench.publish(reading(cycle, sensor_4=1400.0 + cycle / 7))
            wait_for(lambda: running.status.readings == 40, lambda: f"{running.status} {bench.log()}", 60)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
            bench.close()
        rows = Lake(settings.lake).read("turbofan")
        spec = load_context(project, settings.state_dir).params.spec
        wanted = windows_of(rows, turbofan(), spec).features[-1]
        served = follow_the_page(project)
        assert np.array([served["features"][name][0] for name in spec.names]).tobytes() == wanted.tobytes()
        assert served["measured_at"] == START_S + 40
        freshness = sorted(running._freshness)
        print(f"arrival to online: p50 {np.quantile(freshness, 0.5):.3f} s, max {freshness[-1]:.3f} s over {len(freshness)} pushes")


def follow_the_page(project: Path) -> dict[str, Any]:
    """Run what docs/online-features.md tells a service to do."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/online-features.md").read_text(encoding="utf-8"), re.S)
    names: dict[str, Any] = {}
    exec(snippet.replace('"feature_repo")', f'"{project}/feature_repo")'), names)
    return names


def test_windows_that_close_are_refused_with_what_to_do_instead(tmp_path: Path) -> None:
    project = turbofan_project(tmp_path / "project")
    params = project / "pipelines/params.yaml"
    params.write_text(params.read_text().replace("windows: trailing", "windows: tumbling"))
    (project / "fenceline.toml").write_text(f"state = '{tmp_path}/state'\n[[regions]]\nname = 'eu'\nport = 18831\n")
    with pytest.raises(ConfigError, match=r"features\.windows is tumbling, .* fenceline features materialise"):
        build(load_context(project, tmp_path / "state"))


def ingesting(settings: Settings, stop: threading.Event) -> list[threading.Thread]:
    """Threads that run an ingest until `stop`."""
    work = ingest.build(settings, "eu")
    work.intake.open()

    def end() -> None:
        stop.wait()
        work.stop = True

    def run() -> None:
        try:
            work.run()
        finally:
            work.intake.close()

    return [threading.Thread(target=run), threading.Thread(target=end)]
