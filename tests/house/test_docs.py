"""What the documents point to exists: files, make targets, decisions."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHERS = re.compile(r"\.(?!github$)|build$|dist$|node_modules$")  # folders that are not ours, or only left behind: .venv is large


def documents(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not OTHERS.match(name)]
        yield from (Path(path) / name for name in files if name.endswith(".md"))


NAMES = sorted(str(path.relative_to(ROOT)) for path in documents(ROOT))
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
TARGET = re.compile(r"`(?:sudo )?make ([a-z][a-z-]*)|^(?:sudo )?make ([a-z][a-z-]*)", re.M)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files(name: str) -> None:
    document = ROOT / name
    dead = [link for link in LINK.findall(document.read_text(encoding="utf-8")) if not (document.parent / link).exists()]
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    named = {a or b for a, b in TARGET.findall((ROOT / name).read_text(encoding="utf-8"))}
    assert named <= targets


def test_index_of_decisions_names_each_once() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", (folder / "README.md").read_text(encoding="utf-8"))
    assert listed == sorted(p.name for p in folder.glob("[0-9]*.md"))


def test_make_help_names_every_target() -> None:
    targets = re.findall(r"^\.PHONY: ([a-z-]+)", (ROOT / "Makefile").read_text(), re.M)
    out = subprocess.run(["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30).stdout
    assert [line.split()[1] for line in out.splitlines()] == targets
