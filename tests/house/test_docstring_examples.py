"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("edge_agent", "cloud", "pipelines", "bench")
FILES = sorted(p for room in ROOMS for p in (ROOT / room).rglob("*.py") if ">>> " in p.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", [str(p.relative_to(ROOT)) for p in FILES])
def test_examples_of(path: str) -> None:
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    assert not doctest.testmod(module).failed
