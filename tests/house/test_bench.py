"""Every benchmark runs as CONTRIBUTING.md says, prints a table and writes JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted(p for p in (ROOT / "bench").glob("*.py") if "main(__doc__, measure" in p.read_text() and p.stem != "report")


def needs(module: Path) -> list[pytest.MarkDecorator]:
    """A benchmark that breaks networks, or has real brokers, says so."""
    text = module.read_text()
    marks = {"Needs root": pytest.mark.needs_root, "Mosquitto": pytest.mark.needs_mosquitto, "Needs Redis": pytest.mark.needs_redis}
    return [mark for words, mark in marks.items() if words in text]


@pytest.mark.parametrize("name", [pytest.param(m.stem, marks=needs(m)) for m in MODULES])
def test_benchmark_prints_a_table_and_writes_json(name: str, tmp_path: Path) -> None:
    target = tmp_path / "out" / "numbers.json"
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--json", str(target)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    title, blank, header, rule, *rows = run.stdout.splitlines()
    assert title and not blank and header and set(rule) == {"-", " "} and rows
    numbers = json.loads(target.read_text())
    assert numbers["title"] == title
    assert numbers.keys() > {"title", "machine"}
