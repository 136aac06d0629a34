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
        ("train.folds=1", "at least 2 folds"),
        ("features.aggregates=[median]", "median"),
        ("train.folds={", "not YAML"),
    ],
)
def test_wrong_override_is_refused_and_the_file_stays(project: Path, assignment: str, message: str) -> None:
    before = (project / "pipelines/params.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        override(project, ["train.seed=3", assignment])
    assert (project / "pipelines/params.yaml").read_text() == before


def test_unknown_key_is_refused(project: Path) -> None:
    path = project / "pipelines/params.yaml"
    path.write_text(path.read_text() + "\nmodel: big\n")
    with pytest.raises(ConfigError, match="unknown field `model`"):
        load_params(project)


def test_field_that_the_contract_lacks_is_refused(project: Path) -> None:
    override(project, ["features.fields=[sensor_2, sensor_99]"])
    with pytest.raises(ConfigError, match="sensor_99"):
        load_contract(project, load_params(project))


def test_missing_project_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--project DIR"):
        load_params(tmp_path)
