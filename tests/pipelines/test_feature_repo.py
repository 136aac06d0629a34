"""feature_repo/ as Feast's users use it: from a shell, with Feast's own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from edge_agent.contract.errors import ConfigError
from pipelines.feature_store import open_repo
from pipelines.features import CREATED_TIME, EVENT_TIME
from pipelines.marks import definition
from pipelines.materialise import materialise
from pipelines.params import load_params
from tests.pipelines.lakes import open_lake, readings, store, turbofan
from tests.pipelines.repos import TIME, at, make_repo, redefine, rows, turbofan_project, write_source


@pytest.fixture
def project(tmp_path: Path) -> Path:
    path = turbofan_project(tmp_path / "project")
    names = load_params(path).spec.names
    times = pa.array(np.array([1, 2, 3]) * 1_000_000 + 1_700_000_000_000_000).cast(TIME)
    columns = {"engine": ["e1", "e1", "e2"], EVENT_TIME: times, CREATED_TIME: times, **{name: [1.5, 2.5, 3.5] for name in names}}
    (path / "build/pipeline/features").mkdir(parents=True)
    pq.write_table(pa.table(columns), path / "build/pipeline/features/part-000.parquet")
    return path


def test_definitions_name_contract_units_owner_and_a_service_for_the_model(project: Path) -> None:
    repo = open_repo(project)
    params = load_params(project)
    assert repo.service.name == params.register.model
    assert [f.name for p in repo.service.feature_view_projections for f in p.features] == params.spec.names
    stored = repo.store.get_feature_view(params.view)
    assert (stored.tags["contract_version"], stored.owner) == (turbofan().version, "fenceline")
    assert stored.tags["contract"] == "5f0c6d5e-0b7d-4d5a-9a39-6d1f0e5f7a21"
    units = {f.name: f.tags["unit"] for f in stored.features}
    assert (units["sensor_4_mean"], units["sensor_4_slope"]) == (
        turbofan().field("sensor_4").unit,
        f"{turbofan().field('sensor_4').unit}/h",
    )
    assert stored.stream_source.name == f"{params.view}_push"


def test_definition_names_every_setting_of_the_windows_and_nothing_that_passes(project: Path) -> None:
    file = project / "pipelines/params.yaml"
    text, found = file.read_text(), []
    same = "windows: trailing"
    for windows in (same, "windows: tumbling", "windows: tumbling\n  lateness_s: 60.0", "windows: hopping\n  every_s: 86400.0", same):
        file.write_text(text.replace(same, windows))
        repo = open_repo(project)
        found.append(definition(repo, repo.views[repo.view.name]))
    assert found[0] == found[-1] and len(set(found)) == len(found) - 1


@pytest.mark.timeout(400)
def test_feasts_command_line_applies_lists_and_materialises(project: Path) -> None:
    """Its own commands, in one process, as importing Feast takes seconds."""
    commands = [
        ["apply"],
        ["feature-services", "list"],
        ["materialize", "2023-11-01T00:00:00", "2023-12-01T00:00:00"],
        ["materialize-incremental", "2023-12-02T00:00:00"],
    ]
    code = f"from feast.cli.cli import cli\nfor words in {commands}:\n    cli.main(words, prog_name='feast', standalone_mode=False)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project / "feature_repo", capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "turbofan-rul" in done.stdout
    repo = open_repo(project)
    found = repo.store.get_online_features(repo.service, entity_rows=[{"engine": "e1"}, {"engine": "e2"}]).to_dict()
    assert found["sensor_4_mean"] == [2.5, 3.5]
    assert materialise(repo, repo.views[repo.view.name]).written == 2


@pytest.mark.timeout(400)
def test_fenceline_features_live_once_pushes_what_the_lake_holds(project: Path, tmp_path: Path) -> None:
    (project / "fenceline.toml").write_text(f"state = '{tmp_path}/state'\n")
    table, _ = readings(["e1", "e2"], 3)
    store(open_lake(tmp_path / "state/lake"), "plane-1", table)
    command = [sys.executable, "-m", "cloud.cli", "--project", str(project), "features", "live", "--once", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=380)
    assert ended.returncode == 0, ended.stderr
    done = json.loads(ended.stdout)
    assert done["readings"] == len(table["ts"])
    assert sorted(done["seen"]) == ["europe", "united-states"]
    repo = open_repo(project)
    served = repo.store.get_online_features(repo.service, entity_rows=[{"engine": "e1"}]).to_dict()
    newest = np.flatnonzero(np.array(table["engine"].tolist()) == "e1")[-1]
    assert served["sensor_4_last"] == [np.asarray(table["sensor_4"])[newest]]


def test_unknown_view_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no feature view 'pumbs' .*pumps"):
        make_repo(tmp_path).named("pumbs")


ON_DEMAND = """
import pandas as pd
from feast.on_demand_feature_view import on_demand_feature_view
@on_demand_feature_view(sources=[view], schema=[Field(name="twice", dtype=Float64)])
def doubled(df: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": df["pressure_mean"] * 2})
"""


def test_on_demand_views_are_applied(tmp_path: Path) -> None:
    make_repo(tmp_path)
    write_source(tmp_path, "one", rows(("a", 1, 1, 1.5)))
    repo = redefine(tmp_path, ("service =", f"{ON_DEMAND}\nservice ="))
    asked = pa.table({"pump": ["a"], "event_timestamp": pa.array([at(2)], TIME)})
    assert repo.store.get_historical_features(asked, ["doubled:twice"]).to_df()["twice"].tolist() == [3.0]
    materialise(repo, repo.views["pumps"])
    assert repo.store.get_online_features(["doubled:twice"], [{"pump": "a"}]).to_dict()["twice"] == [3.0]


TWIN = 'twin = FeatureView(name="PUMPS", entities=[pump], schema=fields, source=source)'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("view = ", "view = = ", r"feature_definitions\.py: SyntaxError: .*line 11"),
        ("view = ", "import nothing_there\nview = ", r"feature_definitions\.py, line 11: ModuleNotFoundError: .*nothing_there"),
        ("hours=2", "seconds=float('inf')", r"feature_definitions\.py, line 11: OverflowError"),
        ("service = ", "service = 1\nother = ", "defines no 'service'"),
        ("service =", f"{TWIN}\nservice =", r"feature_definitions\.py cannot be applied: .*Conflicting.*PUMPS"),
    ],
)
def test_wrong_definitions_say_where(tmp_path: Path, old: str, new: str, message: str) -> None:
    make_repo(tmp_path)
    with pytest.raises(ConfigError, match=message):
        redefine(tmp_path, (old, new))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"feature_store\.yaml does not exist; copy feature_repo/"),
        ("project: test\nonline_store: {type: nope}\n", r"feature_store\.yaml: .*nope"),
        ("project: [test\n", r"feature_store\.yaml: "),
    ],
)
def test_wrong_settings_of_the_store_say_where(tmp_path: Path, text: str | None, message: str) -> None:
    make_repo(tmp_path)
    file = tmp_path / "feature_repo/feature_store.yaml"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_repo(tmp_path)


def test_definitions_without_a_service_are_refused(project: Path) -> None:
    file = project / "feature_repo/feature_definitions.py"
    file.write_text(file.read_text().replace("service = FeatureService(", "other = FeatureService("))
    with pytest.raises(ConfigError, match="defines no 'service'"):
        open_repo(project)
