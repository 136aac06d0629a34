"""The demonstration's own project: a copy of what defines one, nothing of the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloud import config
from cloud.demo.workspace import make_project
from edge_agent.contract.errors import ConfigError

PROJECT = Path(__file__).parents[3]


def test_the_copy_is_a_project_with_default_settings(tmp_path: Path) -> None:
    project = make_project(PROJECT, tmp_path / "project")
    settings = config.load(project, tmp_path / "state")
    assert settings.zones_path.read_bytes() == (PROJECT / "contracts/zones.geojson").read_bytes()
    assert (project / ".dvc").is_dir()
    assert not (project / "pipelines/train.py").exists(), "code is imported from where it is installed"


def test_what_is_no_project_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    with pytest.raises(ConfigError, match="contracts is missing"):
        make_project(tmp_path / "source", tmp_path / "project")
