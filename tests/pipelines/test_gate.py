"""The gate: what a model is compared with, and that none becomes champion over one that it never met. MLflow is real, on SQLite."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.functions import NO_FUNCTIONS, Function
from pipelines import cluster, register, repro, run, snapshot, stage, tracking
from pipelines.evaluate import Champion, judge, load_champion
from pipelines.stage import Context, load_context
from tests.edge_agent.models import bundle, linear
from tests.pipelines.lakes import ROOT
from tests.pipelines.repos import turbofan_project

pytestmark = pytest.mark.timeout(150)
TIME = pa.timestamp("us", "UTC")
ROWS, SECOND_US = 20, 1_000_000
NAME = "turbofan-rul"
PUMPS = StreamContract(
    stream="pump",
    version="1.0.0",
    fields=(Field("ts", FieldType.TIMESTAMP), Field("pump", FieldType.STRING), Field("v", FieldType.NUMBER)),
    key=("pump", "ts"),
    event_time="ts",
    entity="pump",
    topic="x",
)
SPEC = FeatureSpec(features=[Feature("v", "last")], window_rows=5, window_s=60.0)
VALUES = np.arange(ROWS, dtype=float)


def newest(values: Any) -> Any:
    return values[:, -1]


NEWEST = Function("newest", "1" * 64, newest)
OWN = FeatureSpec(features=[Feature("v", "newest")], window_rows=5, window_s=60.0, functions={"newest": "1" * 64})


@pytest.fixture
def gate_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The gate of a model that is off by 5, beside a champion that gives the newest value, which is the target."""
    monkeypatch.setattr(cluster, "run", lambda function, *arguments: function(*arguments))  # no Ray for one small task

    def gate(
        spec: FeatureSpec = SPEC,
        shift_us: int = 0,
        ttl_s: float = 1.0,
        trained_on: frozenset[str] = frozenset(),
        functions: Any = NO_FUNCTIONS,
        late_us: int | None = None,
    ) -> Any:
        times = pa.array(np.arange(ROWS) * SECOND_US)
        readings = {"device": ["d"] * ROWS, "epoch": ["e"] * ROWS, "pump": ["p"] * ROWS, "ts": times.cast(TIME), "v": VALUES}
        readings["arrived_at"] = pa.array(np.arange(ROWS) * SECOND_US + (late_us or 0)).cast(TIME)
        pq.write_table(pa.table(readings), tmp_path / "readings.parquet")
        at = pa.array(np.arange(ROWS) * SECOND_US + shift_us).cast(TIME)
        pq.write_table(pa.table({"pump": ["p"] * ROWS, "event_time": at}), tmp_path / "dataset.parquet")
        dataset = SimpleNamespace(label_max=125.0, ttl_s=ttl_s, known_by_then=late_us is not None)
        limits = SimpleNamespace(rmse_max=100.0, champion_slack=0.02)
        params = SimpleNamespace(evaluate=limits, dataset=dataset, functions=functions)
        context: Any = SimpleNamespace(
            params=params, contract=PUMPS, readings=tmp_path / "readings.parquet", dataset=tmp_path / "dataset.parquet"
        )
        manifest = bundle(stream="pump", features=spec).manifest
        champion = Champion("7", manifest, linear([1.0]), set(trained_on))
        return judge(context, champion, 5.0, np.array(["p"] * ROWS), VALUES, VALUES + 5)

    return gate


def test_labels_between_readings_get_the_champions_score_as_of_their_time(gate_of: Any) -> None:
    for shift_us in (0, SECOND_US // 2, SECOND_US - 1):
        gate = gate_of(shift_us=shift_us)
        assert not gate["passed"]
        assert (gate["champion_rmse"], gate["challenger_rmse"]) == (0.0, 5.0)


def test_labels_that_no_score_of_the_champion_reaches_are_the_reason_that_is_given(gate_of: Any) -> None:
    gate = gate_of(shift_us=SECOND_US // 2, ttl_s=0.25)
    assert gate["passed"] and "champion_rmse" not in gate
    assert gate["reasons"][-1].startswith("not compared with champion version 7: it has no score at most dataset.ttl_s 0.25 s older")


def test_champion_is_not_given_what_arrived_after_a_label_where_the_model_is_not(gate_of: Any) -> None:
    assert gate_of(late_us=0)["champion_rmse"] == 0.0
    assert gate_of(late_us=2 * SECOND_US, ttl_s=5.0)["champion_rmse"] == 2.0


def test_champion_with_own_functions_is_scored_with_them(gate_of: Any) -> None:
    assert gate_of(OWN, functions={"newest": NEWEST})["champion_rmse"] == 0.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"spec": OWN}, "function 'newest' is not installed here"),
        ({"spec": OWN, "functions": {"newest": Function("newest", "2" * 64, newest)}}, "another version here"),
        ({"spec": FeatureSpec(features=[Feature("w", "last")], window_rows=5, window_s=60.0)}, "the contract no longer has w"),
        ({"trained_on": {"p"}}, "no hold-out engine is new to it"),
    ],
)
def test_what_cannot_be_compared_says_why_and_does_not_stop_the_training(gate_of: Any, changes: Any, reason: str) -> None:
    gate = gate_of(**changes)
    assert gate["passed"] and gate["champion_version"] == "7"
    assert reason in gate["reasons"][-1]


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "FENCELINE_RUN_ID"):
            patch.delenv(name, raising=False)
        project = turbofan_project(tmp_path_factory.mktemp("project"))
        shutil.copy(ROOT / "pipelines/dvc.yaml", project / "pipelines")
        made = load_context(project, tmp_path_factory.mktemp("state"))
        made.folder("snapshot")
        yield made


def register_version(context: Context, weight: float, gate: dict[str, Any]) -> tuple[str, str]:
    """A registered version with the artifacts that the next gate reads; its number and run."""
    import mlflow

    store, run_id = tracking.client(context), tracking.open_run(context)
    if not store.search_registered_models(f"name = '{NAME}'"):
        store.create_registered_model(NAME)
    made = bundle(onnx=linear([weight]), features=context.params.spec)
    files = {"bundle/manifest.json": msgspec.json.encode(made.manifest), "bundle/model.onnx": made.model}
    files |= {"evaluate/gate.json": json.dumps(gate).encode(), "train/split.json": json.dumps({"train": []}).encode()}
    folder = context.folder(f"made-{run_id}")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with mlflow.start_run(run_id=run_id):
        mlflow.log_artifacts(str(folder))
    return str(store.create_model_version(NAME, f"runs:/{run_id}/model", run_id).version), run_id


def test_champion_that_this_pipeline_did_not_register_is_refused_with_what_to_do(context: Context) -> None:
    run_id = tracking.open_run(context)
    for foreign in ("", run_id):
        context.champion.write_text(json.dumps({"version": "9", "run_id": foreign}))
        with pytest.raises(ConfigError, match=f"champion version 9 of {NAME} has no bundle in its run.*fenceline train"):
            load_champion(context, b"")


def test_only_the_champion_that_the_gate_met_is_replaced(context: Context) -> None:
    store = tracking.client(context)
    snapshot.write_champion(context, store)
    assert json.loads(context.champion.read_text()) is None and load_champion(context, b"") is None
    first, first_run = register_version(context, 1.0, {})
    register.promote(context, store, first)
    second, _ = register_version(context, 2.0, {"champion_version": first})
    with pytest.raises(UnavailableError, match=f"the champion was none when it was judged and is version {first} now; train again"):
        register.promote(context, store, second)
    assert tracking.champion(store, NAME) == {"version": first, "run_id": first_run}
    snapshot.write_champion(context, store)
    register.promote(context, store, second)
    snapshot.write_champion(context, store)

    other, same = load_champion(context, linear([3.0])), load_champion(context, linear([2.0]))
    assert other is not None and other.version == second
    assert same is not None and same.version == first, "judged again as when it became champion"


def test_a_run_without_changes_says_who_is_champion_now(context: Context) -> None:
    store = tracking.client(context)
    (version, run_id), (other, _) = (register_version(context, weight, {}) for weight in (7.0, 8.0))
    for name, tree in (
        ("register/registered.json", {"model": NAME, "version": version, "run_id": run_id}),
        ("evaluate/gate.json", {"passed": True, "reasons": []}),
        ("evaluate/metrics.json", {}),
        ("snapshot/lake_version.json", {"lanes": {}}),
    ):
        stage.write_json(context.folder(name.split("/")[0]) / name.split("/")[1], tree)

    def told() -> tuple[bool, str | None]:
        result = run._result(context, dict.fromkeys(repro.STAGES))
        assert result.unchanged and result.model_version == version
        return result.promoted, result.champion_version

    store.set_registered_model_alias(NAME, tracking.CHAMPION, version)
    assert told() == (True, version)
    store.set_registered_model_alias(NAME, tracking.CHAMPION, other)
    assert told() == (False, other)
    store.delete_registered_model_alias(NAME, tracking.CHAMPION)
    assert told() == (False, None) and tracking.champion(store, NAME) is None


def test_registration_that_this_mlflow_does_not_know_is_forgotten(context: Context) -> None:
    store, path = tracking.client(context), context.folder("register") / "registered.json"
    version, run_id = register_version(context, 4.0, {})
    for known, last in (
        (True, {"model": NAME, "version": version, "run_id": run_id}),
        (False, {"model": NAME, "version": version, "run_id": "of another MLflow"}),
        (False, {"model": NAME, "version": "999", "run_id": run_id}),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(last))
        snapshot.forget_foreign_registration(context, store)
        assert path.exists() == known


def test_a_run_that_was_cut_off_is_ended_by_the_next_and_one_that_ended_stays_as_it_is(context: Context) -> None:
    store = tracking.client(context)
    cut_off = tracking.current_run(context)
    assert tracking.current_run(context) == cut_off
    tracking.leave_run(context)
    done = tracking.current_run(context)
    with tracking.resumed(context, done):
        pass
    tracking.leave_run(context)
    assert [store.get_run(run).info.status for run in (cut_off, done)] == ["FAILED", "FINISHED"]
    assert tracking.opened_run(context) is None


def test_spec_tells_other_functions_and_another_contract(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def written() -> str:
        snapshot.write_spec(load_context(context.project, context.state))
        return context.spec.read_text()

    before = written()
    contract = context.project / context.params.contract
    contract.write_text(contract.read_text() + "\n# a comment\n")
    assert written() != before

    params = context.project / "pipelines/params.yaml"
    text = params.read_text().replace("aggregates: [last, mean, slope]", "aggregates: [crest]\n  functions: own_functions")
    params.write_text(text)
    specs = set()
    for factor in (1, 2):
        (tmp_path / str(factor)).mkdir()
        (tmp_path / str(factor) / "own_functions.py").write_text(f"FUNCTIONS = {{'crest': lambda v: v.max(axis=1) * {factor}}}\n")
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / str(factor)))
            patch.delitem(sys.modules, "own_functions", raising=False)
            specs.add(written())
    assert len(specs) == 2
