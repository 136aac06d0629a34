"""`edge-agent run --profile`: every step is named, counted once, and nothing is left behind."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent import profile
from edge_agent.contract.stream import QUARANTINE
from edge_agent.core.dedupe import RecentKeys
from edge_agent.profile import STEPS, Profile, Spent, Sum, report_regularly
from tests.brokers import nats_broker
from tests.edge_agent.gateway import Bench, reading, wait_for


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        yield made
        made.close()


def test_an_agent_with_a_profile_says_where_its_time_goes(bench: Bench) -> None:
    bench.start("--profile")
    for cycle in range(1, 21):
        bench.publish(reading(cycle))
    wait_for(lambda: len(bench.cloud.readings()) == 20, bench.log)
    spent = bench.status()["profile"]
    assert spent["readings"] == 20
    assert spent["steps"].keys() == {step for _, _, step in STEPS}
    for step in ("decode", "validate", "redelivery", "zone", "seal", "commit", "release", profile.REST):
        assert spent["steps"][step]["wall_s"] > 0, step
    assert spent["steps"]["windows"]["wall_s"] == 0  # there is no model
    assert spent["beside"]["source"]["cpu_s"] > 0
    assert spent["beside"]["uplink"]["cpu_s"] > 0
    bench.kill(signal.SIGTERM)
    last = bench.log().rpartition("in all, profile: ")[2]
    assert last.startswith("20 readings in ")
    assert "us/reading" in last and "  commit " in last
    assert float(last.partition("uplink (beside)")[2].split()[1]) > 0  # though its thread has ended


def test_a_step_is_not_charged_for_the_steps_inside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Work:
        def outer(self, rows: list[int]) -> None:
            time.sleep(0.02)
            self.inner()

        def inner(self) -> None:
            time.sleep(0.1)

    monkeypatch.setattr(profile, "STEPS", ((Work, "inner", "inner"), (Work, "outer", profile.REST)))
    with Profile() as running:
        Work().outer([1, 2, 3])
        found = running.sum()
    assert (found.batches, found.readings) == (1, 3)
    assert found.steps["inner"].wall_s >= 0.1
    assert 0.02 <= found.steps[profile.REST].wall_s < found.steps["inner"].wall_s


def test_other_threads_are_not_counted_and_the_functions_come_back() -> None:
    before = [getattr(owner, name) for owner, name, _ in STEPS]
    with Profile() as running:
        thread = threading.Thread(target=lambda: RecentKeys(8).remember(QUARANTINE, {}))
        thread.start()
        thread.join()
        assert [getattr(owner, name) for owner, name, _ in STEPS] != before
        assert all(s == Spent() for s in running.sum().steps.values())
    assert [getattr(owner, name) for owner, name, _ in STEPS] == before


def test_a_thread_that_has_ended_counts_as_far_as_it_was_seen() -> None:
    burnt, ended = threading.Event(), threading.Event()

    def burn() -> None:
        while time.thread_time() < 0.1:
            pass
        burnt.set()
        ended.wait()

    with Profile() as running:
        thread = threading.Thread(target=burn, name="uplink")
        thread.start()
        burnt.wait()
        seen = running.sum().beside["uplink"]
        ended.set()
        thread.join()
        assert 0.1 <= seen == running.sum().beside["uplink"]


def test_what_was_spent_in_between_is_the_difference() -> None:
    first = Sum(1.0, 1, 10, {"a": Spent(0.5, 0.25)}, {"uplink": 0.5})
    second = Sum(3.0, 3, 40, {"a": Spent(1.5, 0.75)}, {"uplink": 0.75})
    assert second.since(first) == Sum(2.0, 2, 30, {"a": Spent(1.0, 0.5)}, {"uplink": 0.25})
    assert "30 readings in 2 batches in 2.0 s, 15 a second" in second.since(first).text()


def test_nothing_is_said_while_nothing_comes_but_the_sum_at_the_end() -> None:
    said: list[str] = []
    with Profile() as running, report_regularly(running, said.append, every_s=0.01):
        time.sleep(0.1)
    assert len(said) == 1
    assert said[0].startswith("in all, profile: 0 readings")
