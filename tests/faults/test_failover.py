"""Faults on a real network, with real brokers, mTLS and the agent as a process: nothing is lost, stored twice, or sent abroad.

The site and the runs are the benchmark's (bench/failover_*.py). In `make test` each fault is made a few times and times are only
printed; the long tests make each FENCELINE_RUNS times (500) and check the promised times too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.failover_delta import DeltaLake
from bench.failover_device import FAILBACK_S, Agent, Sensors
from bench.failover_faults import FAULTS
from bench.failover_runs import SLOW_LOSS, SLOW_MS, Series, Trial
from bench.failover_site import ALLOWED, DEVICE, Site

pytestmark = [pytest.mark.needs_root, pytest.mark.needs_mosquitto]
RUNS = 2
RUNS_LONG = int(os.environ.get("FENCELINE_RUNS", "500"))
P99_MS = 100.0
ROUND_TRIP_MS = 1.0  # of the standby, on loopback
MEMORY_KIB_MAX = 16 * 1024


@contextmanager
def trial(folder: Path, broker: str, seed: int, lake: DeltaLake | None = None, failback_s: float = FAILBACK_S) -> Iterator[Trial]:
    """A site with the agent on it, warm."""
    with Site(folder / "site", broker, lake.writer if lake else None) as site:
        for name in ALLOWED:
            site.network.join_slow(site.device, site.brokers[name].place, delay_ms=SLOW_MS, loss=SLOW_LOSS, seed=seed)
        agent, sensors = Agent(site, failback_s), Sensors(site, DEVICE)
        try:
            yield Trial(site, agent, sensors, seed)
        finally:
            sensors.close()
            agent.close()
            print(agent.log()[-20_000:])


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    with trial(tmp_path_factory.mktemp("mosquitto"), "mosquitto", seed=1) as made:
        yield made


def check(series: Series) -> None:
    """What holds under every fault."""
    print(series.numbers())
    assert (series.lost, series.duplicates, series.foreign_bytes) == (0, 0, 0)
    assert series.runs and series.first_ms


@pytest.mark.parametrize("fault", FAULTS)
def test_an_endpoint_that_fails_under_load_loses_and_doubles_nothing(mosquitto: Trial, fault: str) -> None:
    check(mosquitto.series(fault, RUNS))


@pytest.mark.parametrize("fault", ["stop", "one_way"])
def test_an_endpoint_that_fails_in_silence_while_idle_loses_nothing(mosquitto: Trial, fault: str) -> None:
    check(mosquitto.series(fault, 1, idle=True))


def test_a_slow_lossy_link_is_not_left_and_costs_no_memory(mosquitto: Trial) -> None:
    series = mosquitto.series("lossy", RUNS)
    check(series)
    assert series.moves <= max(1, series.seconds / 60)
    assert series.memory_kib[1] - series.memory_kib[0] < MEMORY_KIB_MAX


def test_without_an_allowed_endpoint_readings_wait_and_none_goes_abroad(mosquitto: Trial) -> None:
    check(mosquitto.series("foreign_only", RUNS))


def test_the_embedded_broker_can_be_the_one_that_fails(tmp_path: Path, seed: int) -> None:
    with trial(tmp_path, "nats", seed) as nats:
        check(nats.series("kill", 1))
        check(nats.series("blackhole", 1))


def test_a_lane_goes_back_to_its_preferred_endpoint_when_that_has_proved_itself(tmp_path: Path, seed: int) -> None:
    with trial(tmp_path, "mosquitto", seed, failback_s=0.5) as made:
        for fault in ("blackhole", "kill"):
            made.wait_for_endpoint(ALLOWED[0])
            check(made.series(fault, 1))
        made.wait_for_endpoint(ALLOWED[0])
        check(made.series("stop", 1))


def test_a_delta_lake_that_two_regions_write_to_has_every_reading_once(tmp_path: Path, seed: int) -> None:
    lake = DeltaLake(tmp_path / "lake")
    with trial(tmp_path, "mosquitto", seed, lake) as made:
        for fault in ("one_way", "kill"):
            check(made.series(fault, 1))
        readings = made.readings
    assert lake.rows() == (readings, readings)


@pytest.mark.long
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("idle", [False, True], ids=["load", "idle"])
@pytest.mark.parametrize("broker", ["mosquitto", "nats"])
def test_every_fault_many_times_is_overcome_in_the_promised_time(tmp_path: Path, seed: int, broker: str, idle: bool) -> None:
    with trial(tmp_path, broker, seed) as made:
        for fault in FAULTS:
            series = made.series(fault, RUNS_LONG, idle=idle)
            check(series)
            assert series.memory_kib[1] - series.memory_kib[0] < MEMORY_KIB_MAX
            p99_ms = series.numbers()["p99_ms"]
            assert p99_ms < P99_MS + ROUND_TRIP_MS, f"{fault}: {p99_ms} ms"


@pytest.mark.long
@pytest.mark.timeout(14_400)
@pytest.mark.parametrize("broker", ["mosquitto", "nats"])
def test_a_lossy_link_for_long_and_many_outages_abroad(tmp_path: Path, seed: int, broker: str) -> None:
    with trial(tmp_path, broker, seed) as made:
        lossy = made.series("lossy", RUNS_LONG)
        check(lossy)
        assert lossy.moves <= max(1, lossy.seconds / 60)
        assert lossy.memory_kib[1] - lossy.memory_kib[0] < MEMORY_KIB_MAX
        check(made.series("foreign_only", RUNS_LONG))
