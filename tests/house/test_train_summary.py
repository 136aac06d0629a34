"""The summary that the train workflow shows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / ".github" / "scripts" / "train_summary.py"
RESULT: dict[str, Any] = {
    "run_id": "abc123",
    "run_url": "https://mlflow.example.org/#/experiments/1/runs/abc123",
    "model": "turbofan-rul",
    "model_version": "3",
    "promoted": True,
    "champion_version": "3",
    "unchanged": False,
    "metrics": {"rmse": 14.2512, "mae": 10.5},
    "gate": {"passed": True, "reasons": []},
    "lake_version": {"europe": 12},
    "stages": {"snapshot": 2.5, "features": None},
    "seconds": 61.0,
}


def summary(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**RESULT, **changes}))
    return subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=True, timeout=30).stdout


def test_summary_links_the_run_and_lists_metrics_stages_and_lake_versions(tmp_path: Path) -> None:
    text = summary(tmp_path)
    assert "## turbofan-rul version 3: champion" in text
    assert f"[`abc123`]({RESULT['run_url']})" in text
    for row in ("| rmse | 14.25 |", "| mae | 10.5 |", "| snapshot | 2.5 |", "| features | unchanged |", "| europe | 12 |"):
        assert row in text


@pytest.mark.parametrize("url", ["http://127.0.0.1:5000/#/experiments/1/runs/abc123", "sqlite:////state/mlflow.db (look with: mlflow ui)"])
def test_run_that_others_cannot_reach_is_not_a_link(tmp_path: Path, url: str) -> None:
    text = summary(tmp_path, run_url=url)
    assert "](" not in text
    assert "artifact `mlflow`" in text


def test_reasons_of_a_refused_model_are_named(tmp_path: Path) -> None:
    text = summary(tmp_path, promoted=False, gate={"passed": False, "reasons": ["rmse 31.0 is above rmse_max 20.0"]})
    assert "challenger only" in text
    assert "not promoted: rmse 31.0 is above rmse_max 20.0" in text


@pytest.mark.parametrize(("champion", "says"), [("2", "champion is version 2"), (None, "champion is none")])
def test_a_model_whose_alias_somebody_took_away_is_not_called_champion(tmp_path: Path, champion: str | None, says: str) -> None:
    text = summary(tmp_path, promoted=False, champion_version=champion, unchanged=True)
    assert "version 3: not champion" in text and says in text
