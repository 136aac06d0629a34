"""fsck and export on real buffer files: whole, damaged, encrypted, of a running agent, of a dead device."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import apsw
import numpy as np
import pytest

from edge_agent.buffer import Buffer, Draft
from edge_agent.buffer_file import BufferFile
from edge_agent.cli import main
from edge_agent.clock import Moment
from edge_agent.contract.block import SCORE, FixQuality
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.export import export
from edge_agent.inspection import alone, inspect, repair
from edge_agent.sealed import Keys
from edge_agent.slots import HEAD_BYTES
from tests.edge_agent.test_config import write

NOW = Moment(1_700_000_000_000_000, 5_000_000, True)
KEY = bytes(range(32))


def open_buffer(path: Path, keys: Keys | None = None) -> Buffer:
    return Buffer(path, "plane-01", "boot", bytes_max=1 << 30, history_rows={"pump": 10}, keys=keys)


def draft(values: list[float], lane: str = "europe", stream: str = "pump", **columns: Any) -> Draft:
    table: Any = {"t": np.array(values), **columns}
    return Draft(lane, stream, "1.0.0", FixQuality.STATIC, "policy", table, len(values), 1, 2)


def settle(buffer: Buffer, cumulative: int) -> None:
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=cumulative, ranges=[])]))


def made(path: Path, keys: Keys | None = None, blocks: int = 6) -> Path:
    buffer = open_buffer(path, keys)
    for number in range(blocks):
        buffer.append([draft([number + 0.25, float("nan")]), draft([number + 0.5], "switzerland")], [], NOW)
    buffer.close()
    return path


def damage(path: Path, number: int) -> None:
    """One flipped bit in a stored block of a new file, where the first block lies in the first slot."""
    db = apsw.Connection(str(path))
    blob = bytearray(db.execute("SELECT block FROM slots WHERE slot = ?", (number,)).get)
    blob[HEAD_BYTES + 100] ^= 4
    db.execute("UPDATE slots SET block = ? WHERE slot = ?", (bytes(blob), number))
    db.close()


def lines(path: Path, **how: Any) -> list[dict[str, Any]]:
    out = io.StringIO()
    export(BufferFile(path, how.pop("keys", None)), out, as_csv=False, stream=how.get("stream"))
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_a_whole_buffer_is_clean_before_and_after_receipts(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db")
    found = inspect(path, None)
    assert found.clean and found.devices == ["plane-01"] and found.blocks == 12, found.problems
    assert {name: (lane.blocks, lane.waiting, lane.readings) for name, lane in found.lanes.items()} == {
        "europe": (6, 6, 12),
        "switzerland": (6, 6, 6),
    }
    buffer = open_buffer(path)
    settle(buffer, 4)
    buffer.close()
    found = inspect(path, None)
    assert found.clean and found.lanes["europe"].waiting == 2, found.problems


def test_a_log_that_is_not_in_the_file_yet_is_read_too(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "buffer.db")
    buffer.append([draft([1.0])], [], NOW)
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in ("buffer.db", "buffer.db-wal"):
        shutil.copy(tmp_path / part, copy)
    buffer.append([draft([2.0])], [], NOW)
    assert inspect(copy / "buffer.db", None).blocks == 1
    assert [row["t"] for row in lines(tmp_path / "buffer.db")] == [1.0, 2.0]  # of a running agent
    buffer.close()


def test_a_damaged_block_is_found_and_a_repair_names_it_in_the_ledger(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db")
    damage(path, 3)
    found = inspect(path, None)
    assert not found.clean and found.damaged_blocks == 1 and found.blocks == 11
    before = path.read_bytes()
    assert inspect(path, None).problems == found.problems and path.read_bytes() == before, "it only looks"

    assert repair(path, None).repaired
    again = inspect(path, None)
    assert again.clean and again.blocks == 11, again.problems
    assert len([p for p in tmp_path.glob("buffer.db.damaged-*") if not p.name.endswith(("-wal", "-shm"))]) == 1
    buffer = open_buffer(path)
    buffer.append([draft([9.0])], [], NOW)
    buffer.close()
    found = inspect(path, None)
    assert found.clean, found.problems
    assert sum(lane.named for lane in found.lanes.values()) == 1
    assert sorted(row["t"] for row in lines(path, stream="pump") if row["t"] == 9.0) == [9.0]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can leave files that the agent cannot open")
def test_what_root_repairs_stays_the_agents(tmp_path: Path) -> None:
    path, agent = made(tmp_path / "buffer.db"), 4711
    damage(path, 3)
    (tmp_path / "lock").unlink(missing_ok=True)
    for part in (tmp_path, *tmp_path.iterdir()):
        os.chown(part, agent, agent)
    assert repair(path, None).repaired and inspect(path, None).clean
    assert {part.name: part.stat().st_uid for part in tmp_path.iterdir() if part.stat().st_uid != agent} == {}


def test_no_link_in_the_place_of_the_lock_is_followed(tmp_path: Path) -> None:
    path, roots = made(tmp_path / "state" / "buffer.db"), tmp_path / "of root"
    damage(path, 3)
    roots.touch()
    path.with_name("lock").symlink_to(roots)
    if os.geteuid() == 0:
        os.chown(path.parent, 4711, 4711)
    with pytest.raises(UnavailableError, match="cannot lock"):
        repair(path, None)
    assert roots.stat().st_uid == os.geteuid()


def test_a_block_that_vanished_is_amiss_in_its_lane(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db")
    db = apsw.Connection(str(path))
    db.execute("DELETE FROM slots WHERE slot = 5")
    db.close()
    found = inspect(path, None)
    assert not found.clean and any("amiss" in problem for problem in found.problems), found.problems


def test_a_file_that_was_cut_off_is_damaged_and_its_repair_names_what_is_gone(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db", blocks=3)
    before = path.read_bytes()
    made(path, blocks=4)
    path.write_bytes(before)
    found = inspect(path, None)
    assert found.problems == [
        f"lane {lane!r} ends at 3; 7 were given out: the file was cut off, or an older one lies in its place"
        for lane in ("europe", "switzerland")
    ]

    assert repair(path, None).repaired and inspect(path, None).clean
    open_buffer(path).close()
    assert [lane.named for lane in inspect(path, None).lanes.values()] == [4, 4]


def test_flipped_bits_anywhere_are_problems_and_no_crash(tmp_path: Path, seed: int) -> None:
    chance, whole = random.Random(seed), made(tmp_path / "whole.db", blocks=3).read_bytes()
    for _ in range(100):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 8))):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
        (tmp_path / "changed.db").write_bytes(changed)
        inspect(tmp_path / "changed.db", None)
        lines(tmp_path / "changed.db")


def test_a_file_that_sqlite_cannot_follow_is_carved(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db")
    data = bytearray(path.read_bytes())
    data[:512] = os.urandom(512)
    path.write_bytes(bytes(data))
    found = inspect(path, None)
    assert not found.clean and found.blocks == 12
    assert len(lines(path)) == 18


def test_no_file_and_no_database_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing.db: No such file"):
        inspect(tmp_path / "nothing.db", None)
    (tmp_path / "text.db").write_text("not a database" * 1_000)
    found = inspect(tmp_path / "text.db", None)
    assert not found.clean and found.blocks == 0


def test_an_encrypted_buffer_needs_its_key(tmp_path: Path) -> None:
    path = made(tmp_path / "buffer.db", Keys([KEY]))
    with pytest.raises(ConfigError, match=r"set buffer\.key_file"):
        inspect(path, None)
    assert inspect(path, Keys([KEY])).clean
    assert len(lines(path, keys=Keys([KEY]))) == 18


def test_a_read_only_medium_is_read_from_a_copy(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path / "buffer.db")
    buffer.append([draft([1.0])], [], NOW)
    dead = tmp_path / "dead"
    dead.mkdir()
    for part in ("buffer.db", "buffer.db-wal"):
        shutil.copy(tmp_path / part, dead)
    buffer.close()
    before = {p.name: p.read_bytes() for p in dead.iterdir()}
    dead.chmod(0o500)
    assert [row["t"] for row in lines(dead / "buffer.db")] == [1.0]
    assert {p.name: p.read_bytes() for p in dead.iterdir() if not p.name.endswith("-shm")} == before


def test_fsck_waits_for_no_agent_but_refuses_beside_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    (tmp_path / "state").mkdir()
    path = made(tmp_path / "state" / "buffer.db")
    assert main(["fsck", "--config", str(config), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clean"] is True
    with alone(tmp_path / "state"):
        assert main(["fsck", "--config", str(config)]) == 2
        assert "stop it first" in capsys.readouterr().err
        assert main(["fsck", str(path), "--config", str(tmp_path / "none.toml")]) == 0  # as it is on disk, by its path
    damage(path, 2)
    assert main(["fsck", "--config", str(config)]) == 1
    assert main(["fsck", "--config", str(config), "--repair"]) == 1  # it was damaged
    assert main(["fsck", "--config", str(config)]) == 0


def test_export_gives_every_reading_with_its_name_and_null_for_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "buffer.db"
    buffer = open_buffer(path)
    scored: Any = {SCORE: np.array([0.5, np.nan])}
    buffer.append([draft([1.0, float("nan")], **scored), draft([float("inf")], "switzerland")], [], NOW)
    settle(buffer, 1)
    buffer.close()
    rows = lines(path)
    assert [(r["lane"], r["sequence"], r["row"], r["t"], r.get("score"), r["settled"]) for r in rows] == [
        ("europe", 1, 0, 1.0, 0.5, True),
        ("europe", 1, 1, None, None, True),
        ("switzerland", 1, 0, "inf", None, False),
    ]
    assert rows[0]["device"] == "plane-01" and rows[0]["epoch"] == buffer.epoch and rows[0]["sealed_at"].startswith("2023-11-14T22:13:20")


def test_export_keeps_a_field_that_is_called_like_a_column_of_the_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "buffer.db"
    buffer = open_buffer(path)
    buffer.append([draft([1.0], settled=np.array([7.5]))], [], NOW)
    buffer.close()
    (row,) = lines(path)
    assert row["settled"] == 7.5 and row["block_settled"] is False
    none = ["--config", str(tmp_path / "none.toml")]
    assert main(["export", str(path), "--csv", *none]) == 0
    (cells,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert cells["settled"] == "7.5" and cells["block_settled"] == "0"


def test_export_to_a_place_that_is_none_is_said_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, none = made(tmp_path / "buffer.db"), str(tmp_path / "none" / "x")
    assert main(["export", str(path), "--jsonl", "--config", none, "-o", none]) == 2
    assert f"export cannot write {none}: No such file or directory; name another file" in capsys.readouterr().err


def test_export_of_what_is_no_buffer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "zones.geojson", tmp_path / "out.csv"
    path.write_text("{}")
    for form in (["--jsonl"], ["--csv", "-o", str(out)]):
        assert main(["export", str(path), *form, "--config", str(tmp_path / "none.toml")]) == 2
        assert f"edge-agent: {path} holds no block; it is no buffer" in capsys.readouterr().err and not out.exists()


def test_export_as_csv_holds_one_stream_and_the_columns_of_all_its_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "buffer.db"
    buffer = open_buffer(path)
    scored: Any = {SCORE: np.array([0.5])}
    buffer.append([draft([1.0]), draft([2.0], stream="fan")], [], NOW)
    buffer.append([draft([3.0], **scored)], [], NOW)
    buffer.close()
    none = ["--config", str(tmp_path / "none.toml")]
    assert main(["export", str(path), "--csv", *none]) == 2
    assert "give --stream: the buffer holds fan, pump" in capsys.readouterr().err
    assert main(["export", str(path), "--csv", "--stream", "bump", *none]) == 2
    assert main(["export", str(path), "--csv", "--stream", "pump", "-o", str(tmp_path / "out.csv"), *none]) == 0
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert [(r["t"], r["score"], r["sequence"]) for r in rows] == [("1.0", "", "1"), ("3.0", "0.5", "3")]


def test_export_gives_what_is_whole_of_a_damaged_buffer_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made(tmp_path / "buffer.db")
    damage(path, 1)
    assert main(["export", str(path), "--jsonl", "--config", str(tmp_path / "none.toml")]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 16 and "1 blocks are damaged" in captured.err


@pytest.mark.parametrize("value", ["id = x''", "id = 'text'", "bytes = x''"])
def test_a_place_that_says_something_else_than_numbers_is_a_problem_and_no_crash(tmp_path: Path, value: str) -> None:
    path = made(tmp_path / "buffer.db")
    db = apsw.Connection(str(path))
    db.execute(f"UPDATE places SET {value} WHERE sequence = 4")
    db.close()
    found = inspect(path, None)
    assert not found.clean and found.blocks == 12
    assert len(lines(path)) == 18


def test_an_export_that_nobody_reads_on_does_not_make_the_log_grow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    buffer = Buffer(tmp_path / "buffer.db", "plane-01", "boot", bytes_max=1_000_000, history_rows={})
    noise = np.random.default_rng(1)
    for _ in range(30):
        buffer.append([draft(noise.random(2_000).tolist())], [], NOW)
    reading = BufferFile(tmp_path / "buffer.db").blocks()
    found = [next(reading).header.sequence]
    largest = 0
    for number in range(31, 300):
        buffer.append([draft(noise.random(2_000).tolist())], [], NOW)
        settle(buffer, number - 20)
        largest = max(largest, buffer._file.store.log_bytes())
    assert largest < 4 * buffer._file.log_bytes_max
    found.append(next(reading).header.sequence)
    assert found == [1, 2]
    rest = [block.header.sequence for block in reading]
    assert rest == sorted(rest) and (not rest or rest[-1] <= 30), "what came later is not in it"
    reading.close()
    assert "carved" not in caplog.text
    buffer.close()
