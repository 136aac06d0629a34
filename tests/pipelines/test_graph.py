"""What runs again, and what comes from DVC's cache: the real dvc.yaml and the real DVC, with stages that only write files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.lakes import ROOT

pytestmark = pytest.mark.timeout(300)  # each stage is a process

COMMON = """
import json, shutil
from pathlib import Path
import yaml
build, params = Path("build/pipeline"), yaml.safe_load(Path("pipelines/params.yaml").read_text())
registry = Path("registry.json")  # as MLflow: not an output of any stage
versions = json.loads(registry.read_text()) if registry.exists() else {"champion": None, "models": []}
def read(name):
    return json.loads((build / name).read_text())
def write(content, *names):
    for name in names:
        (build / name).parent.mkdir(parents=True, exist_ok=True)
        (build / name).write_text(json.dumps(content))
"""
STAGES = {
    "snapshot": """
if not versions["models"]:
    shutil.rmtree(build / "register", ignore_errors=True)
write("", "snapshot/readings.parquet", "snapshot/labels.parquet", "snapshot/lake_version.json")
write(versions["champion"], "snapshot/champion.json")
write(Path("functions.py").read_text(), "snapshot/spec.json")
write(Path("code.txt").read_text(), "snapshot/code.json")
""",
    "features": 'write(read("snapshot/spec.json"), "features/part")',
    "dataset": 'write(read("features/part"), "dataset/dataset.parquet", "dataset/dataset.json")',
    "train": """
write(params["train"]["search"][0]["max_iter"], "train/model.joblib")
write("", "train/split.json", "train/trials.json")
""",
    "evaluate": """
quality, champion = read("train/model.joblib"), read("snapshot/champion.json")
if champion is not None and versions["models"][champion - 1] == quality:
    champion = None  # judged when it became champion
best = 0 if champion is None else versions["models"][champion - 1]
write({"quality": quality, "passed": quality >= best}, "evaluate/gate.json")
names = ("predicted_vs_true.png", "residuals.png", "importance.png", "predictions.csv", "importance.csv", "metrics.json")
write(quality, *(f"evaluate/{name}" for name in names))
""",
    "export": """
write([read("train/model.joblib"), read("snapshot/spec.json"), params["export"]], "export/model.onnx", "export/manifest.json")
write("", "export/agreement.json")
""",
    "register": """
gate = read("evaluate/gate.json")
versions["models"].append(gate["quality"])
if gate["passed"]:
    versions["champion"] = len(versions["models"])
registry.write_text(json.dumps(versions))
write({"version": len(versions["models"])}, "register/registered.json")
""",
}


@dataclass
class Project:
    path: Path

    def repro(self, **changes: int) -> set[str]:
        """Train with these numbers in params.yaml; the stages that ran."""
        file = self.path / "pipelines/params.yaml"
        text = file.read_text()
        for name, value in changes.items():
            text = re.sub(rf"{name}: \d+", f"{name}: {value}", text, count=1)
        file.write_text(text)
        done = self.dvc("repro", "pipelines/dvc.yaml")
        assert done.returncode == 0, done.stderr
        return set(re.findall(r"Running stage '(?:[^']*:)?(\w+)'", done.stdout))

    def dvc(self, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": str(self.path / ".dvc/tmp/site")}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment.pop("PYTHONPATH", None)
        return subprocess.run(
            [sys.executable, "-m", "dvc", *words], cwd=self.path, env=environment, capture_output=True, text=True, timeout=200
        )

    @property
    def registry(self) -> dict[str, Any]:
        return json.loads((self.path / "registry.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    (tmp_path / "pipelines").mkdir()
    (tmp_path / "feature_repo").mkdir()
    for name in ("pipelines/dvc.yaml", "pipelines/params.yaml", "feature_repo/feature_definitions.py", "feature_repo/feature_store.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "pipelines/__init__.py").touch()
    for name, text in STAGES.items():
        (tmp_path / f"pipelines/{name}.py").write_text(COMMON + text)
    (tmp_path / "functions.py").write_text("first")
    (tmp_path / "code.txt").write_text("first")
    made = Project(tmp_path)
    assert made.dvc("init", "--no-scm", "-q").returncode == 0
    return made


def test_a_model_of_an_earlier_run_meets_the_champion_of_today(project: Project) -> None:
    project.repro(max_iter=3, golden_rows=80)
    project.repro(max_iter=200)
    assert project.registry == {"champion": 2, "models": [3, 200]}
    ran = project.repro(max_iter=3, golden_rows=40)
    assert "evaluate" in ran and "train" not in ran
    assert project.registry == {"champion": 2, "models": [3, 200, 3]}


def test_a_promotion_is_looked_at_once_more_and_registers_nothing(project: Project) -> None:
    assert project.repro() == set(STAGES)
    assert project.repro() == {"snapshot", "evaluate"}
    assert project.repro() == {"snapshot"}
    assert len(project.registry["models"]) == 1


def test_other_functions_or_another_contract_make_features_and_bundle_anew(project: Project) -> None:
    project.repro()
    (project.path / "functions.py").write_text("second")
    assert {"features", "dataset", "train", "evaluate", "export"} <= project.repro()


def test_another_version_of_the_code_computes_anew_and_registers_only_what_is_new(project: Project) -> None:
    project.repro()
    (project.path / "code.txt").write_text("second")
    assert project.repro() == {"snapshot", "features", "dataset", "train", "evaluate", "export"}
    assert len(project.registry["models"]) == 1
    assert project.repro() == {"snapshot"}


def test_nothing_gives_back_the_alias_that_somebody_took_away(project: Project) -> None:
    project.repro()
    project.repro()
    (project.path / "registry.json").write_text(json.dumps({**project.registry, "champion": None}))
    assert project.repro() == {"snapshot"}, "as judged before, so from the cache"
    assert project.registry["champion"] is None


def test_a_registration_that_is_not_there_is_made_again_and_not_taken_from_the_cache(project: Project) -> None:
    project.repro()
    (project.path / "registry.json").unlink()  # an empty MLflow; the snapshot stage takes register/ away
    assert "register" in project.repro()
    assert project.registry["models"]
