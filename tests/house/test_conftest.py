"""The house rules of tests/conftest.py hold: seeds repeat, and CI does not pass a test that could not run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"
INI = "[pytest]\nmarkers =\n    needs_mosquitto: x\n    needs_root: x\n"
TESTS = """
import pytest

def test_not_installed():
    pytest.skip("mosquitto is not installed")

def test_import():
    pytest.importorskip("no_such_module")

def test_needs_package():
    pytest.skip("needs something: make system-deps")

def test_needs_root():
    pytest.skip("needs root")

def test_not_here():
    pytest.skip("for another environment")

def test_seed(seed):
    pass
"""
MODULE = "import pytest\npytest.importorskip('no_such_module')\ndef test_it():\n    pass\n"


def run(folder: Path, *options: str, **env: str) -> str:
    """What pytest prints about TESTS and MODULE under a copy of our conftest."""
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text(INI)
    (folder / "test_it.py").write_text(TESTS)
    (folder / "test_module.py").write_text(MODULE)
    clean = {k: v for k, v in os.environ.items() if k not in ("CI", "FENCELINE_SEED")}
    clean["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # those of our libraries take seconds to load
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "xdist", "-rA", "--continue-on-collection-errors", *options]
    return subprocess.run(command, cwd=folder, env={**clean, **env}, capture_output=True, text=True, timeout=60, check=False).stdout


def seed_line(out: str) -> str:
    return next(line for line in out.splitlines() if "from FENCELINE_SEED" in line)


def test_skip_for_a_missing_package_fails_in_ci_only(tmp_path: Path) -> None:
    desk, ci = run(tmp_path / "desk"), run(tmp_path / "ci", CI="true")
    assert "1 passed, 6 skipped" in desk
    assert "3 failed, 1 passed, 2 skipped, 1 error" in ci
    for name in ("test_not_installed", "test_import", "test_needs_package"):
        assert f"FAILED test_it.py::{name}" in ci


def test_seed_repeats_with_the_seed_of_the_header(tmp_path: Path) -> None:
    first, again, other = (run(tmp_path / str(i), FENCELINE_SEED=s) for i, s in enumerate(("7", "7", "8")))
    assert seed_line(first) == seed_line(again) != seed_line(other)
    assert "seed: 7 (repeat with FENCELINE_SEED=7)" in first


def test_processes_that_share_the_tests_have_the_seed_of_the_header(tmp_path: Path) -> None:
    out = run(tmp_path / "shared", "-n", "2")
    assert "1 passed, 6 skipped" in out
    assert f"(repeat with {seed_line(out).split(', from ')[1]})" in out
