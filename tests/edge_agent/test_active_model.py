"""The active model and its worker when things go wrong: real processes, real ONNX Runtime, tiny models.

What every test asks besides its own question: the data path gets its answer in time, and readings without scores name no model.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from edge_agent import active_model, inference, scoring
from edge_agent.active_model import RESTARTS_MAX, ActiveModel
from edge_agent.contract.bundle import Bundle, Limits
from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.state import BundleRef
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.features import Windows
from edge_agent.intake import Readings
from edge_agent.metrics import Metrics
from edge_agent.updater import Activation
from tests.edge_agent import models

CONTRACT = StreamContract(
    stream="pump",
    version="1.0.0",
    fields=(Field("ts", FieldType.TIMESTAMP), Field("pump", FieldType.STRING), Field("t", FieldType.NUMBER)),
    key=("pump", "ts"),
    event_time="ts",
    entity="pump",
    topic="sensors/pump",
)
LINEAR = models.linear([1.0, 2.0])
ROOM = Limits(memory_mb=256, score_timeout_s=30.0)
PATIENCE_S = 0.3
BOUND_S = 10.0  # far above the patience, far below the limit of ROOM: this machine may be busy


class Path:
    """Readings of one pump, scored as the data path does it, and what came of each batch."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, str]]] = []
        self.metrics = Metrics()
        self.model = ActiveModel((CONTRACT,), lambda *_: None, self.metrics, lambda name, **fields: self.events.append((name, fields)))
        self.seen = 0
        self.scores: list[float] = []
        self.slowest_s = 0.0

    def activate(self, bundle: Bundle, digest: str = "aa", *, on_probation: bool = False) -> None:
        ref = BundleRef(target="x", model="pump-wear", model_version="1", sha256=digest)
        self.model.activate(Activation(ref, bundle, on_probation))

    def take(self, rows: int = 2) -> str | None:
        """One batch; returns the model named in its blocks."""
        values = np.arange(self.seen, self.seen + rows, dtype=np.float64)
        table: Table = {"ts": (values * 1e6).astype(np.int64), "pump": Strings.of(["p"] * rows), "t": values}
        readings = Readings(CONTRACT, table, Strings.of(["europe"] * rows))
        began = time.monotonic()
        self.model.swap()
        scores, digest = self.model.score(readings)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        assert (scores is None) == (digest is None)
        self.seen += rows
        self.scores += [np.nan] * rows if scores is None else scores.tolist()
        return digest

    def take_until(self, done: Callable[[], bool], timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            assert time.monotonic() < deadline, self.events
            self.take()
            time.sleep(0.02)

    def pid(self) -> int:
        worker = self.model._scoring._worker  # type: ignore[union-attr]
        assert worker is not None
        return worker.pid

    def told(self) -> list[tuple[str, str]]:
        return [(name, fields["reason"]) for name, fields in self.events]

    def right(self) -> Floats:
        """The scores of one pass over all readings."""
        values = np.arange(self.seen, dtype=np.float64)
        features = Windows(models.SPEC).push(Strings.of(["p"] * self.seen), (values * 1e6).astype(np.int64), {"t": values}).features
        return np.asarray((features.astype(np.float32) @ np.array([1, 2], np.float32)).astype(np.float64))

    def assert_scores_are_right_where_there_are_any(self) -> int:
        """Returns how many readings have none."""
        scores = np.array(self.scores)
        scored = ~np.isnan(scores)
        np.testing.assert_array_equal(scores[scored], self.right()[scored])
        return int((~scored).sum())


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(scoring, "PATIENCE_S", PATIENCE_S)
    made = Path()
    yield made
    made.model.close()


def bundle(onnx: bytes = LINEAR, **manifest: Any) -> Bundle:
    return models.bundle(onnx=onnx, **{"limits": ROOM, **manifest})


def test_a_proved_model_gets_a_new_worker_when_its_own_is_killed(path: Path) -> None:
    path.activate(bundle())
    assert path.take() == "aa"
    os.kill(path.pid(), signal.SIGKILL)
    assert path.take() is None
    path.take_until(lambda: path.take() == "aa")
    assert path.told() == [("model_restarted", "worker_died")]
    unscored = path.assert_scores_are_right_where_there_are_any()  # the windows went on meanwhile
    assert unscored >= 2
    assert path.metrics.unscored.labels("pump")._value.get() == unscored
    assert path.slowest_s < BOUND_S


def test_a_worker_that_keeps_dying_is_given_up(path: Path) -> None:
    path.activate(bundle())
    for _ in range(RESTARTS_MAX):
        path.take_until(lambda: path.take() == "aa")
        os.kill(path.pid(), signal.SIGKILL)
        assert path.take() is None
    path.take_until(lambda: path.take() == "aa")
    os.kill(path.pid(), signal.SIGKILL)
    assert path.take() is None
    assert path.told() == [("model_restarted", "worker_died")] * RESTARTS_MAX + [("model_failed", "worker_died")]
    path.assert_scores_are_right_where_there_are_any()


def test_old_restarts_are_forgiven(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(active_model, "RESTARTS_S", 0.0)
    path.activate(bundle())
    for _ in range(RESTARTS_MAX + 1):
        path.take_until(lambda: path.take() == "aa")
        os.kill(path.pid(), signal.SIGKILL)
        assert path.take() is None
    assert {name for name, _ in path.told()} == {"model_restarted"}


def test_a_model_on_probation_gets_no_second_worker(path: Path) -> None:
    path.activate(bundle(), on_probation=True)
    assert path.take() == "aa"
    os.kill(path.pid(), signal.SIGKILL)
    assert path.take() is None
    assert path.told() == [("model_failed", "worker_died")]


def test_a_frozen_worker_costs_the_path_its_patience_once_and_what_thaws_goes_on(path: Path) -> None:
    path.activate(bundle())
    assert path.take() == "aa"
    os.kill(path.pid(), signal.SIGSTOP)
    assert path.take() is None
    began = time.monotonic()
    assert [path.take() for _ in range(50)] == [None] * 50
    assert time.monotonic() - began < BOUND_S
    os.kill(path.pid(), signal.SIGCONT)
    path.take_until(lambda: path.take() == "aa")  # the late answer was for other readings and is thrown away
    assert path.told() == []
    assert path.assert_scores_are_right_where_there_are_any() >= 102
    assert path.slowest_s < BOUND_S


def test_a_worker_frozen_before_it_has_read_a_large_batch_does_not_hold_the_path(path: Path) -> None:
    path.activate(bundle())
    assert path.take() == "aa"
    os.kill(path.pid(), signal.SIGSTOP)
    assert path.take(rows=60_000) is None
    os.kill(path.pid(), signal.SIGCONT)
    path.take_until(lambda: path.take() == "aa")
    path.assert_scores_are_right_where_there_are_any()
    assert path.slowest_s < BOUND_S


def test_a_worker_that_is_late_every_time_is_asked_less_and_less_often(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PATIENCE_S", 0.05)
    monkeypatch.setattr(scoring, "PAUSE_S_MAX", 0.5)
    path.activate(bundle())
    assert path.take() == "aa"
    worker = path.model._scoring._worker  # type: ignore[union-attr]
    assert worker is not None
    asked: list[float] = []

    def late(features: Floats, patience_s: float) -> None:
        asked.append(time.monotonic())
        time.sleep(patience_s)

    monkeypatch.setattr(worker, "try_score", late)
    until = time.monotonic() + 3.0
    while time.monotonic() < until:
        assert path.take() is None
        time.sleep(0.005)
    pauses = np.diff(asked)
    assert len(asked) <= 9 and (pauses >= np.minimum(0.5, 0.05 * 2.0 ** np.arange(len(pauses)))).all()
    monkeypatch.undo()
    path.take_until(lambda: path.take() == "aa")
    path.assert_scores_are_right_where_there_are_any()


def test_a_hanging_model_on_probation_is_given_up_at_its_limit(path: Path) -> None:
    path.activate(bundle(models.endless(), limits=Limits(memory_mb=256, score_timeout_s=1.0)), on_probation=True)
    assert path.take() is None
    assert path.told() == []
    path.take_until(lambda: bool(path.events))
    assert path.told() == [("model_failed", "worker_timeout")]
    assert path.slowest_s < BOUND_S


def test_a_proved_model_that_hangs_is_started_again_then_given_up(path: Path) -> None:
    path.activate(bundle(models.endless(), limits=Limits(memory_mb=256, score_timeout_s=0.4)))
    path.take_until(lambda: len(path.events) > RESTARTS_MAX, timeout_s=60.0)
    assert path.told() == [("model_restarted", "worker_timeout")] * RESTARTS_MAX + [("model_failed", "worker_timeout")]
    assert path.take() is None
    assert path.slowest_s < BOUND_S


def test_a_model_that_takes_too_much_memory_is_started_again_then_given_up(path: Path) -> None:
    path.activate(bundle(models.hog(100_000_000)))
    path.take_until(lambda: len(path.events) > RESTARTS_MAX, timeout_s=60.0)
    assert path.told()[-1] == ("model_failed", "worker_died")


@pytest.mark.parametrize("onnx", [models.logarithm(), models.wide()], ids=["infinite", "shape"])
def test_scores_that_are_none_end_even_a_proved_model_at_once(path: Path, onnx: bytes) -> None:
    path.activate(bundle(onnx))
    assert path.take() is None
    assert path.told() == [("model_failed", "bad_scores")]
    assert path.take() is None


def test_a_swap_leaves_no_batch_without_scores(path: Path) -> None:
    path.activate(bundle())
    used = [path.take() for _ in range(5)]
    path.activate(bundle(), "bb")  # loads while the first one works
    used += [path.take() for _ in range(5)]
    assert used == ["aa"] * 5 + ["bb"] * 5


@pytest.mark.parametrize(
    "history",
    [
        {"ts": np.array([1, 2]), "pump": Strings.of(["p", "p"])},
        {"ts": np.array([1, 2]), "t": np.array([1.0, 2.0])},
    ],
    ids=["no field", "no entity"],
)
def test_stored_readings_with_other_fields_warm_nothing_and_end_nothing(path: Path, history: Table) -> None:
    path.model._history = lambda *_: history
    path.activate(bundle())
    assert path.take() == "aa"
    assert path.assert_scores_are_right_where_there_are_any() == 0


def test_a_worker_that_comes_back_after_a_swap_is_not_used(path: Path) -> None:
    path.activate(bundle())
    assert path.take() == "aa"
    os.kill(path.pid(), signal.SIGKILL)
    assert path.take() is None
    path.activate(bundle(), "bb")
    path.take_until(lambda: path.take() == "bb")
    time.sleep(1.5)  # the worker of the first model is there by now
    assert path.take() == "bb"


def test_models_that_nobody_takes_leave_no_processes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk takes nothing, the data path takes no model either, and a fleet may be given many."""
    start, started = inference._start, []

    def counted() -> Any:
        started.append(start())
        return started[-1]

    monkeypatch.setattr(inference, "_start", counted)
    path.activate(bundle())
    assert path.take() == "aa"
    for digest in ("bb", "cc", "dd"):
        path.activate(bundle(), digest)
    assert [process.poll() is None for _, process in started] == [True, False, False, True]
    assert path.take() == "dd"
    assert [process.poll() is None for _, process in started] == [False, False, False, True]
