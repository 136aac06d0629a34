"""The train workflow's script, from nothing to a registered model: the README's walk-through without a person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / ".github" / "scripts"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_script_trains_a_model_and_leaves_the_checkout_as_it_was() -> None:
    before = checkout()
    env = {**os.environ, "ENGINES": "10", "SETTINGS": "train.folds=2"}
    run = subprocess.run(["bash", str(SCRIPTS / "train.sh")], env=env, capture_output=True, text=True, timeout=800, check=False)
    assert run.returncode == 0, run.stderr
    result = json.loads((ROOT / "build" / "train" / "result.json").read_text())
    assert result["model"] == "turbofan-rul"
    assert result["metrics"]["rmse"] < 20
    command = [sys.executable, str(SCRIPTS / "train_summary.py"), str(ROOT / "build" / "train" / "result.json")]
    assert "| rmse |" in subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert checkout() == before


def test_script_names_a_file_that_is_not_there() -> None:
    env = {**os.environ, "DATA": "data/train_FD009.txt"}
    run = subprocess.run(["bash", str(SCRIPTS / "train.sh")], env=env, capture_output=True, text=True, timeout=30, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == f"train.sh: no file data/train_FD009.txt in {ROOT}; leave DATA empty for simulated engines\n"


def checkout() -> str:
    return subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
