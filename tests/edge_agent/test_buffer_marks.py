"""A buffer whose file was cut off, lost or put back to an older one: what is missing is named, no name is used twice."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import apsw
import numpy as np
import pytest

from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, decode_block
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, read_losses

NOW = Moment(1_700_000_000_000_000, 5_000_000, True)


def open_buffer(path: Path, history_rows: int = 100) -> Buffer:
    return Buffer(path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={"pump": history_rows})


def append(buffer: Buffer, first: int, last: int) -> None:
    for number in range(first, last + 1):
        draft = Draft("europe", "pump", "1.0.0", FixQuality.STATIC, "p", {"t": np.array([float(number)])}, 1, number, number)
        buffer.append([draft], [], NOW)


def ledger(buffer: Buffer) -> list[Loss]:
    blocks = [decode_block(b.block) for b in buffer.pending("europe", 0, 1_000)]
    return [loss for header, table in blocks if header.stream == LOSSES.stream for loss in read_losses(table)]


def put_back(path: Path, aside: Path) -> None:
    for name in ("buffer.db", "buffer.db-wal", "buffer.db-shm"):
        (path / name).unlink(missing_ok=True)
        if (aside / name).exists():
            shutil.copy(aside / name, path)


def test_an_older_file_in_its_place_is_noticed_and_the_rest_is_named(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    append(buffer, 1, 3)
    buffer.close()
    shutil.copytree(tmp_path, tmp_path / "aside")
    buffer = open_buffer(tmp_path)
    append(buffer, 4, 7)
    buffer.close()
    put_back(tmp_path, tmp_path / "aside")

    buffer = open_buffer(tmp_path)
    rows = {(loss.first_sequence, loss.last_sequence): loss for loss in ledger(buffer)}
    assert rows[4, 7].blocks == 4 and rows[4, 7].reason == "damaged" and math.isnan(rows[4, 7].readings)
    append(buffer, 8, 8)
    newest = buffer.pending("europe", 0, 1_000)[-1]
    assert newest.sequence > 7 and newest.stream == "pump"
    buffer.close()
    buffer = open_buffer(tmp_path)
    assert len(ledger(buffer)) == len(rows), "it is said once"
    buffer.close()


def test_a_file_that_is_gone_leaves_a_ledger_of_its_epoch(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    append(buffer, 1, 5)
    epoch = buffer.epoch
    buffer.close()
    (tmp_path / "buffer.db").unlink()
    buffer = open_buffer(tmp_path)
    (loss,) = ledger(buffer)
    assert (loss.of_epoch, loss.first_sequence, loss.last_sequence, loss.blocks) == (epoch, 1, 5, 5)
    assert buffer.epoch != epoch
    buffer.close()


def test_a_commit_that_kill_9_cut_in_half_is_no_damage(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    append(buffer, 1, 3)
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tmp_path / "buffer.db.marks", half)
    append(buffer, 4, 4)
    shutil.copy(tmp_path / "buffer.db", half)
    log = (tmp_path / "buffer.db-wal").read_bytes()
    buffer.close()
    # The head of the commit's last frame is there, its page holds the bytes of an earlier round: it was never acknowledged.
    (half / "buffer.db-wal").write_bytes(log[:-512] + os.urandom(512))
    buffer = open_buffer(half)
    assert ledger(buffer) == [] and [b.sequence for b in buffer.pending("europe", 0, 100)] == [1, 2, 3]
    assert not list(half.glob("*.damaged-*"))
    buffer.close()


def test_history_reaches_back_over_a_salvage(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, history_rows=10)
    append(buffer, 1, 20)
    buffer.close()
    db = apsw.Connection(str(tmp_path / "buffer.db"))
    db.execute("UPDATE lanes SET gone = 7")  # what the file says of itself does not fit
    db.close()
    buffer = open_buffer(tmp_path, history_rows=10)
    assert list(tmp_path.glob("*.damaged-*"))
    assert _seen(buffer) == list(range(11, 21))
    append(buffer, 21, 23)
    buffer.close()
    buffer = open_buffer(tmp_path, history_rows=10)
    assert _seen(buffer)[-10:] == list(range(14, 24))
    assert buffer.readings_stored() == 23 + len(ledger(buffer))
    buffer.close()


def _seen(buffer: Buffer) -> list[int]:
    history = buffer.history("pump", "1.0.0")
    assert history is not None
    return [int(t) for t in np.asarray(history["t"])]


def test_a_clock_that_went_back_does_not_make_the_newest_damaged_file_the_oldest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, year in enumerate((2030, 2031, 1970)):
        open_buffer(tmp_path).close()
        (tmp_path / "buffer.db").write_bytes(b"%d is no database" % number)
        monkeypatch.setattr(time, "time_ns", lambda year=year: (year - 1970) * 31_556_952 * 10**9 + 1)
        open_buffer(tmp_path).close()
    left = [path.read_bytes() for path in tmp_path.glob("buffer.db.damaged-*") if path.read_bytes().endswith(b"database")]
    assert sorted(left) == [b"1 is no database", b"2 is no database"]


def test_a_new_file_that_no_salvage_has_finished_is_not_taken_when_somebody_has_removed_the_old_one(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path)
    append(buffer, 1, 3)
    buffer.close()
    (tmp_path / "buffer.db").rename(tmp_path / "buffer.db.new")  # it is as good as half of one: nothing says that it is whole
    buffer = open_buffer(tmp_path)
    assert [(loss.first_sequence, loss.last_sequence) for loss in ledger(buffer)] == [(1, 3)]
    buffer.close()
    assert not (tmp_path / "buffer.db.new").exists()
