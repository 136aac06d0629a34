"""The marks beside the buffer: what they tell after a cut, a torn write and a full disk."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edge_agent.marks import SLOT_BYTES, Marked, Marks


def test_the_newest_mark_is_read_back_by_another_process(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "buffer.db")
    assert marks.read() is None
    for last in range(1, 6):
        marks.write("e1", {"europe": 1}, {"europe": last, "canada": 7})
    assert Marks(tmp_path / "buffer.db").read() == Marked(5, "e1", {"europe": (1, 5), "canada": (8, 7)})


def test_a_torn_mark_leaves_the_one_before(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "buffer.db")
    for last in (1, 2):
        marks.write("e1", {}, {"europe": last})
    path = tmp_path / "buffer.db.marks"
    data = path.read_bytes()
    for slot in (0, SLOT_BYTES):
        for byte in range(slot, min(slot + 40, len(data))):
            path.write_bytes(data[:byte] + bytes([data[byte] ^ 16]) + data[byte + 1 :])
            found = Marks(tmp_path / "buffer.db").read()
            assert found is not None and found.lanes["europe"][1] in (1, 2)
    path.write_bytes(os.urandom(len(data)))
    assert Marks(tmp_path / "buffer.db").read() is None


def test_marks_go_on_after_a_restart_and_write_only_what_changed(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "buffer.db")
    marks.write("e1", {}, {"europe": 1})
    marks.write("e1", {}, {"europe": 1})
    marks.close()
    marks = Marks(tmp_path / "buffer.db")
    assert marks.read() == Marked(1, "e1", {"europe": (2, 1)})
    marks.write("e1", {}, {"europe": 2})
    assert marks.read() == Marked(2, "e1", {"europe": (3, 2)})


@pytest.mark.needs_root
def test_a_disk_without_room_for_marks_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(tmp_path)], check=True)
    try:
        (tmp_path / "full").write_bytes(bytes(8_192))
        marks = Marks(tmp_path / "buffer.db")
        for last in (1, 2, 3):
            marks.write("e1", {}, {"europe": last})
        assert caplog.text.count("buffer mark not written") == 1
        (tmp_path / "full").unlink()
        marks.write("e1", {}, {"europe": 4})
        assert (found := marks.read()) is not None and found.lanes == {"europe": (5, 4)}
        marks.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_mark_of_a_new_epoch_is_written_though_its_numbers_are_the_same(tmp_path: Path) -> None:
    marks = Marks(tmp_path / "buffer.db")
    for epoch in ("e1", "e2"):
        marks.write(epoch, {}, {"europe": 1})
    assert Marks(tmp_path / "buffer.db").read() == Marked(2, "e2", {"europe": (2, 1)})
