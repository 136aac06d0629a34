"""The last believed position, over restarts of the agent: in memory, for this user only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from edge_agent import anchor
from edge_agent.anchor import Anchor
from edge_agent.core.fix import Position

HERE = Position(7, 50.0, 9.0, 5.0, "gpsd")


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(anchor, "SHARED_MEMORY", tmp_path / "shm")
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def test_a_position_is_there_for_the_next_agent_on_the_same_state_only(memory: Path, tmp_path: Path) -> None:
    Anchor("d", tmp_path / "a").write(HERE)
    assert Anchor("d", tmp_path / "a").read() == HERE
    assert Anchor("d", tmp_path / "b").read() is None and Anchor("e", tmp_path / "a").read() is None
    (file,) = memory.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_systemds_runtime_directory_is_preferred(memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path / 'run'}:/other")
    Anchor("d", tmp_path).write(HERE)
    assert len(list((tmp_path / "run").iterdir())) == 1 and list(memory.iterdir()) == []


def test_what_is_not_ours_or_damaged_is_not_believed(memory: Path, tmp_path: Path) -> None:
    Anchor("d", tmp_path).write(HERE)
    (file,) = memory.iterdir()
    target = tmp_path / "elsewhere"
    file.rename(target)
    file.symlink_to(target)
    assert Anchor("d", tmp_path).read() is None
    file.unlink()
    file.write_bytes(b"{")
    assert Anchor("d", tmp_path).read() is None
    file.unlink()
    os.mkfifo(file)
    assert Anchor("d", tmp_path).read() is None, "it waits for nobody to write"


def test_without_memory_nothing_is_kept_and_nothing_breaks(memory: Path, tmp_path: Path) -> None:
    memory.rmdir()
    lost = Anchor("d", tmp_path)
    lost.write(HERE)
    assert lost.read() is None
    memory.mkdir()
    full = Anchor("d", tmp_path)
    memory.rmdir()
    full.write(HERE)
    full.write(HERE)
    assert full.read() is None
