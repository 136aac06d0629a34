from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edge_agent.contract.errors import ConfigError
from pipelines.params import load_contract, load_params, override
from tests.pipelines.lakes import ROOT


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pipelines").mkdir()
    shutil.copy(ROOT / "pipelines/params.yaml", tmp_path / "pipelines")
    shutil.copytree(ROOT / "contracts", tmp_path / "contracts")
    return tmp_path


def test_committed_parameters_fit_their_contract() -> None:
    params = load_params(ROOT)
    assert load_contract(ROOT, params).stream == params.stream
    assert len(params.spec.names) == len(set(params.spec.names))


def test_override_changes_the_file_and_keeps_its_comments(project: Path) -> None:
    override(project, ["train.folds=4", "snapshot.lanes=[europe]", "features.window_rows=12"])
    params = load_params(project)
    assert (params.train.folds, params.snapshot.lanes, params.spec.window_rows) == (4, ["europe"], 12)
    assert "# by engine" in (project / "pipelines/params.yaml").read_text()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.flods=4", "with a key of"),
        ("train.folds", "want section.key=value"),
        ("nowhere.folds=4", "with a key of"),
        ("train.folds=many", "Expected `int`"),
        ("train.folds=1", r"`int` >= 2 - at `\$.train.folds`"),
        ("train.seed=-1", "`int` >= 0"),
        ("train.search=[]", "length >= 1"),
        ("train.search.0.max_iter=3", "with a key of"),
        (
            "train.search=[{learning_rate: -1.0, max_iter: 3, max_leaf_nodes: 2, min_samples_leaf: 10, l2_regularization: 0.0}]",
            "learning_rate",
        ),
        ("export.probation_rows=-1", "probation_rows"),
        ("dataset.ttl_s=.inf", "dataset.ttl_s: want a finite number"),
        ("dataset.ttl_s=.nan", "dataset.ttl_s"),
        ("dataset.label_max=.nan", "dataset.label_max"),
        ("evaluate.rmse_max=.nan", "evaluate.rmse_max"),
        ("features.window_s=.inf", "features.window_s: want a finite number"),
        ("features.fields=[sensor_2, sensor_2]", "sensor_2_last, sensor_2_mean, sensor_2_slope more than once"),
        ("features.aggregates=[median]", "median"),
        ("register.model=turbofan/rul", "register.model 'turbofan/rul' must match"),
        ("train.folds={", "not YAML"),
        ("features.fields=[sensor_99]", "sensor_99"),
        ("stream=pump", "is the contract of stream 'turbofan'"),
        ("contract=contracts", r"contract .*contracts does not read \(Is a directory\)"),
    ],
)
def test_wrong_override_is_refused_and_the_file_stays(project: Path, assignment: str, message: str) -> None:
    before = (project / "pipelines/params.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        override(project, ["train.seed=3", assignment])
    assert (project / "pipelines/params.yaml").read_text() == before


def test_override_takes_keys_that_the_file_leaves_out(project: Path) -> None:
    override(project, ["features.windows=hopping", "features.every_s=86400", "features.lateness_s=3600"])
    spec = load_params(project).spec
    assert (spec.kind, spec.every_s, spec.lateness_s) == ("hopping", 86_400.0, 3_600.0)
    with pytest.raises(ConfigError, match="module 'no_such_module' does not import"):
        override(project, ["features.functions=no_such_module"])


@pytest.mark.parametrize("text", ["a: [1", "stream: a\nstream: b\n", "\x00"])
def test_override_of_a_file_that_is_not_yaml_is_refused(project: Path, text: str) -> None:
    path = project / "pipelines/params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not YAML"):
        override(project, ["train.seed=3"])
    assert path.read_text() == text


def test_unknown_key_is_refused(project: Path) -> None:
    path = project / "pipelines/params.yaml"
    path.write_text(path.read_text() + "\nmodel: big\n")
    with pytest.raises(ConfigError, match="unknown field `model`"):
        load_params(project)


def test_field_that_the_contract_lacks_is_refused(project: Path) -> None:
    path = project / "pipelines/params.yaml"
    path.write_text(path.read_text().replace("fields: [sensor_2,", "fields: [sensor_99,"))
    with pytest.raises(ConfigError, match="sensor_99"):
        load_contract(project, load_params(project))


def test_field_that_holds_no_numbers_is_refused(project: Path) -> None:
    path = project / "pipelines/params.yaml"
    path.write_text(path.read_text().replace("fields: [sensor_2,", "fields: [engine, ts,"))
    with pytest.raises(ConfigError, match=r"engine \(string\), ts \(timestamp\) in .*; features are made of numbers"):
        load_contract(project, load_params(project))


def test_missing_project_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--project DIR"):
        load_params(tmp_path)
    with pytest.raises(ConfigError, match="--project DIR"):
        override(tmp_path, ["train.seed=3"])
