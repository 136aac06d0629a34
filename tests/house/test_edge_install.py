"""The agent stays light: no cloud library is loaded by it, and none is installed with the edge extra."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys

import pytest

import edge_agent

HEAVY = ("dask", "deltalake", "duckdb", "dvc", "feast", "mlflow", "pandas", "pyarrow", "ray", "scipy", "sklearn", "sqlalchemy", "starlette")


def modules() -> list[str]:
    found = pkgutil.walk_packages(edge_agent.__path__, "edge_agent.")
    return ["edge_agent", *(m.name for m in found if not m.name.endswith("__main__"))]


def test_no_module_of_the_agent_loads_a_cloud_library() -> None:
    code = f"import importlib, sys\nfor name in {modules()}:\n    importlib.import_module(name)\nprint(*sys.modules, sep='\\n')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    assert not {m.partition(".")[0] for m in run.stdout.split()} & {*HEAVY, "cloud", "pipelines"}


@pytest.mark.skipif(not os.environ.get("FENCELINE_EDGE_ONLY"), reason="for `make test-edge`, where only the edge extra is installed")
def test_edge_extra_installs_no_cloud_library() -> None:
    assert [name for name in HEAVY if importlib.util.find_spec(name)] == []
