"""Models on windows that close, and on functions of the user's own: where scores stand, restarts, and what the device refuses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_agent import scoring
from edge_agent.active_model import ActiveModel
from edge_agent.contract.bundle import Bundle, Golden, Limits, pack_bundle, read_bundle
from edge_agent.contract.columns import Floats, Strings, Table
from edge_agent.contract.errors import BundleError, ConfigError, Reason
from edge_agent.contract.feature_spec import Feature, FeatureSpec, WindowKind
from edge_agent.contract.state import BundleRef
from edge_agent.core.features import Windows
from edge_agent.core.functions import NO_FUNCTIONS, Function, Functions
from edge_agent.core.golden import golden_readings
from edge_agent.inference import self_test
from edge_agent.installed_functions import load_functions
from edge_agent.intake import Readings
from edge_agent.metrics import Metrics
from edge_agent.releases import RefusedError
from edge_agent.updater import Activation
from tests.edge_agent import models
from tests.edge_agent.test_active_model import CONTRACT

SECONDS = FeatureSpec(
    features=[Feature("t", "rms"), Feature("t", "count")], window_rows=99, window_s=1.0, kind=WindowKind.TUMBLING, lateness_s=0.25
)
WEIGHTS = (1.0, 2.0)
MODULE = """
import numpy as np

def crest(values):
    return np.abs(values).max(axis=1) / np.sqrt((values * values).mean(axis=1))

FUNCTIONS = {"crest": crest}
"""


def bundle(spec: FeatureSpec, functions: Functions = NO_FUNCTIONS) -> Bundle:
    golden = Golden(
        entity=["a"] * 20, event_us=[i * 300_000 for i in range(20)], fields={"t": [float(i) for i in range(20)]}, features=[], scores=[]
    )
    features = Windows(spec, functions).push(*golden_readings(golden)).features
    golden = msgspec.structs.replace(golden, features=features.tolist(), scores=(features @ np.array(WEIGHTS)).tolist())
    return models.bundle(
        weights=WEIGHTS, features=spec, golden=golden, format=spec.format, limits=Limits(memory_mb=256, score_timeout_s=60.0)
    )


class Agent:
    """The model of an agent, given one batch after the other."""

    def __init__(self, history: Table | None = None, functions: Functions = NO_FUNCTIONS) -> None:
        self.events: list[str] = []
        self.metrics = Metrics()
        self.model = ActiveModel(
            (CONTRACT,), lambda *_: history, self.metrics, lambda name, **fields: self.events.append(fields["detail"]), functions
        )

    def activate(self, bundle: Bundle) -> None:
        ref = BundleRef(target="x", model="pump-wear", model_version="1", sha256="aa")
        self.model.activate(Activation(ref, bundle, on_probation=False))
        self.model.swap()

    def score(self, table: Table) -> list[float | None] | None:
        scores, _ = self.model.score(Readings(CONTRACT, table, Strings.of(["europe"] * len(table["t"]))))
        return None if scores is None else [None if np.isnan(s) else float(s) for s in scores.tolist()]


@pytest.fixture
def agents(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Agent]]:
    monkeypatch.setattr(scoring, "PATIENCE_S", 60.0)
    made: list[Agent] = []
    yield made
    for agent in made:
        agent.model.close()


def table(times_s: list[float], values: list[float]) -> Table:
    return {"ts": np.round(np.array(times_s) * 1e6).astype(np.int64), "pump": Strings.of(["p"] * len(times_s)), "t": np.array(values)}


def test_a_windows_score_stands_on_the_reading_that_closed_it(agents: list[Agent]) -> None:
    agents.append(agent := Agent())
    agent.activate(bundle(SECONDS))
    assert agent.score(table([0.0, 0.5, 1.1], [3.0, 3.0, 9.0])) == [None, None, None]  # no window is done: nothing is scored, nothing wrong
    assert agent.score(table([1.2, 1.25, 1.5], [9.0, 9.0, 9.0])) == [None, 3.0 + 2.0 * 2, None]
    assert agent.metrics.scored.labels("pump")._value.get() == 1
    assert agent.metrics.unscored.labels("pump")._value.get() == 0


def test_a_reading_that_closes_several_windows_carries_the_newest(agents: list[Agent]) -> None:
    hopping = msgspec.structs.replace(SECONDS, kind=WindowKind.HOPPING, every_s=0.5, window_rows=98, lateness_s=0.0)
    agents.append(agent := Agent())
    agent.activate(bundle(hopping))
    # the second closes [-0.5, 0.5), the third [0, 1) and [0.5, 1.5)
    assert agent.score(table([0.1, 0.6, 7.0], [1.0, 4.0, 0.0])) == [None, 1.0 + 2.0 * 1, 4.0 + 2.0 * 1]


def test_after_a_restart_the_windows_go_on_from_the_buffer(agents: list[Agent]) -> None:
    times, values = [i * 0.3 for i in range(12)], [float(i % 5) for i in range(12)]
    agents.append(whole := Agent())
    whole.activate(bundle(SECONDS))
    want = whole.score(table(times, values))
    assert want is not None and sum(s is not None for s in want) >= 2
    agents.append(restarted := Agent(history=table(times[:7], values[:7])))
    restarted.activate(bundle(SECONDS))
    assert restarted.score(table(times[7:], values[7:])) == want[7:]


def test_a_bundle_on_windows_that_close_comes_through_its_file_and_self_test() -> None:
    made = bundle(SECONDS)
    assert made.manifest.format == 2
    read = read_bundle(pack_bundle(made))
    assert read == made
    self_test(read)
    fewer = msgspec.structs.replace(
        made.manifest.golden, features=made.manifest.golden.features[1:], scores=made.manifest.golden.scores[1:]
    )
    with pytest.raises(BundleError, match="golden windows; want"):
        self_test(Bundle(msgspec.structs.replace(made.manifest, golden=fewer), made.model))


def test_an_older_device_refuses_what_it_would_misread() -> None:
    made = bundle(SECONDS)
    with pytest.raises(BundleError, match="manifest format 1 has no such features; they need format 2"):
        read_bundle(pack_bundle(Bundle(msgspec.structs.replace(made.manifest, format=1), made.model)))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Functions]:
    (tmp_path / "pump_functions.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield load_functions("pump_functions")
    sys.modules.pop("pump_functions", None)


def crest_spec(functions: Functions) -> FeatureSpec:
    features = [Feature("t", "crest"), Feature("t", "rms")]
    return msgspec.structs.replace(SECONDS, features=features, functions={"crest": functions["crest"].digest})


def test_a_model_on_an_installed_function_runs(agents: list[Agent], installed: Functions) -> None:
    made = bundle(crest_spec(installed), installed)
    self_test(read_bundle(pack_bundle(made)), installed)
    agents.append(agent := Agent(functions=installed))
    agent.activate(made)
    assert agent.score(table([0.0, 0.5, 1.3], [2.0, 2.0, 0.0])) == [None, None, 1.0 + 2.0 * 2.0]


def test_a_device_without_the_function_or_with_another_one_refuses_the_bundle(agents: list[Agent], installed: Functions) -> None:
    made = bundle(crest_spec(installed), installed)
    other = {"crest": Function("crest", "f" * 64, installed["crest"].call)}
    for functions, message in ((NO_FUNCTIONS, "not installed here"), (other, "another version here")):
        with pytest.raises(BundleError, match=message):
            self_test(made, functions)
        agents.append(agent := Agent(functions=functions))
        with pytest.raises(RefusedError, match=message) as refused:
            agent.activate(made)
        assert refused.value.reason is Reason.FOREIGN


def test_a_function_that_looks_beyond_its_window_fails_the_self_test() -> None:
    greedy = {"crest": Function("crest", "e" * 64, lambda v: v.max(axis=1) + len(v))}
    with pytest.raises(BundleError, match="one reading at a time"):
        self_test(bundle(crest_spec(greedy), greedy), greedy)


def test_a_function_that_fails_at_work_takes_the_model_along_but_no_reading(agents: list[Agent], installed: Functions) -> None:
    failing = {"crest": Function("crest", installed["crest"].digest, lambda v: v.nothing)}
    agents.append(agent := Agent(functions=failing))
    agent.activate(bundle(crest_spec(installed), installed))
    assert agent.score(table([0.0, 0.5, 1.3], [2.0, 2.0, 0.0])) is None
    assert "function 'crest' failed" in agent.events[0]
    assert agent.score(table([2.0], [2.0])) is None


def test_what_is_told_of_a_model_that_fails_holds_no_value_of_a_reading(agents: list[Agent], installed: Functions) -> None:
    """It goes to any endpoint, also to one that may not have the reading."""

    def telling(values: Floats) -> Floats:
        raise ValueError(f"cannot take {values.max()}")

    failing = {"crest": Function("crest", installed["crest"].digest, telling)}
    out_of_bounds = bundle(SECONDS)
    out_of_bounds = replace(out_of_bounds, manifest=msgspec.structs.replace(out_of_bounds.manifest, score_max=4_000.0))
    for functions, made in ((failing, bundle(crest_spec(installed), installed)), (NO_FUNCTIONS, out_of_bounds)):
        agents.append(agent := Agent(functions=functions))
        agent.activate(made)
        assert agent.score(table([0.0, 0.5, 1.3], [4_711.0, 4_711.0, 0.0])) is None
        (told,) = agent.events
        assert "471" not in told and ("function 'crest' failed" in told or "1 of 1 scores are not within" in told)


def test_a_function_that_fails_on_history_ends_no_agent(agents: list[Agent], installed: Functions) -> None:
    failing = {"crest": Function("crest", installed["crest"].digest, lambda v: v.nothing)}
    agents.append(agent := Agent(history=table([0.0, 0.5, 1.3], [2.0, 2.0, 0.0]), functions=failing))
    agent.activate(bundle(crest_spec(installed), installed))
    assert agent.score(table([3.0], [2.0])) is None
    assert "function 'crest' failed" in agent.events[0]


@pytest.mark.parametrize("text", ["", "FUNCTIONS = 3", "FUNCTIONS = {'a': 1}", "raise ValueError('x')"])
def test_a_module_without_functions_is_a_mistake_of_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / "broken_functions.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("broken_functions", None)
    with pytest.raises(ConfigError, match="broken_functions"):
        load_functions("broken_functions")
    with pytest.raises(ConfigError, match="does not import"):
        load_functions("no_such_module_here")
    with pytest.raises(ConfigError, match="must be a file with FUNCTIONS"):
        load_functions("sys")
    assert load_functions(None) == {}
