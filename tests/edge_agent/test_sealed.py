"""Blocks encrypted at rest, in a real buffer: what the file shows, keys that change, keys that are missing."""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

import numpy as np
import pytest

from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, read_header
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.receipt import LaneReceipt, Receipt
from edge_agent.sealed import Keys, load_keys, open_stored, stored_header

NOW = Moment(1_700_000_000_000_000, 5_000_000, True)
OLD, NEW, THIRD = (secrets.token_bytes(32) for _ in range(3))
SECRET = 123_456_789.25


def open_buffer(path: Path, keys: Keys | None) -> Buffer:
    return Buffer(path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={"pump": 100}, keys=keys)


def append(buffer: Buffer, value: float = SECRET) -> bytes:
    table = {"t": np.array([value])}
    return buffer.append([Draft("europe", "pump", "1.0.0", FixQuality.STATIC, "policy", table, 1, 1, 2)], [], NOW)[0].block


def on_disk(path: Path) -> bytes:
    return b"".join(p.read_bytes() for p in path.glob("buffer.db*"))


def test_an_encrypted_buffer_gives_back_what_went_in_and_shows_nothing_on_disk(tmp_path: Path) -> None:
    buffer = open_buffer(tmp_path, Keys([OLD]))
    block = append(buffer)
    columns = block[8 + int.from_bytes(block[4:8], "little") : -4]
    assert columns not in on_disk(tmp_path)
    buffer.close()
    buffer = open_buffer(tmp_path, Keys([OLD]))
    assert [b.block for b in buffer.pending("europe", 0, 10)] == [block]
    history = buffer.history("pump", "1.0.0")
    assert history is not None and history["t"].tolist() == [SECRET]


def test_an_open_buffer_may_be_continued_encrypted_and_under_a_new_key(tmp_path: Path) -> None:
    blocks = []
    for keys in (None, Keys([OLD]), Keys([NEW, OLD])):
        buffer = open_buffer(tmp_path, keys)
        blocks.append(append(buffer))
        buffer.close()
    buffer = open_buffer(tmp_path, Keys([NEW, OLD]))
    assert [b.block for b in buffer.pending("europe", 0, 10)] == blocks


@pytest.mark.parametrize("keys", [None, [NEW]])
def test_without_its_key_the_buffer_says_which_one_it_wants_and_deletes_nothing(tmp_path: Path, keys: list[bytes] | None) -> None:
    buffer = open_buffer(tmp_path, Keys([OLD]))
    block = append(buffer)
    buffer.close()
    with pytest.raises(ConfigError, match=f"{Keys([OLD]).main}.*nothing was deleted"):
        open_buffer(tmp_path, keys and Keys(keys))
    assert [b.block for b in open_buffer(tmp_path, Keys([OLD])).pending("europe", 0, 10)] == [block]


def test_a_key_is_asked_for_as_long_as_one_of_its_blocks_is_there(tmp_path: Path) -> None:
    for keys in (Keys([OLD]), Keys([NEW, OLD]), Keys([THIRD, NEW, OLD])):
        buffer = open_buffer(tmp_path, keys)
        append(buffer)
        buffer.close()
    with pytest.raises(ConfigError, match=Keys([NEW]).main):
        open_buffer(tmp_path, Keys([THIRD, OLD]))
    buffer = Buffer(tmp_path / "buffer.db", "plane-01", "boot", bytes_max=1 << 30, history_rows={}, keys=Keys([THIRD, NEW, OLD]))
    buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=2)]))
    buffer.close()
    assert len(open_buffer(tmp_path, Keys([THIRD])).pending("europe", 0, 10)) == 1


def test_a_crashed_encrypted_buffer_without_its_key_is_not_salvaged_away(tmp_path: Path) -> None:
    append(open_buffer(tmp_path, Keys([OLD])))
    with pytest.raises(ConfigError, match="nothing was deleted"):
        open_buffer(tmp_path, None)
    assert not list(tmp_path.glob("*.damaged-*"))


def test_a_salvage_keeps_which_key_sealed_which_blocks(tmp_path: Path) -> None:
    path = tmp_path / "buffer.db"
    for keys in ([OLD], [NEW, OLD], [OLD, NEW], [NEW, OLD]):
        buffer = Buffer(path, "plane-01", "boot", bytes_max=1 << 30, history_rows={}, keys=Keys(keys))
        append(buffer)
        buffer.close()
    path.write_bytes(path.read_bytes()[:18] + b"\x09" + path.read_bytes()[19:])
    buffer = Buffer(path, "plane-01", "boot", bytes_max=1 << 30, history_rows={}, keys=Keys([NEW, OLD]))
    assert buffer.settle(Receipt(device="plane-01", epoch=buffer.epoch, lanes=[LaneReceipt(lane="europe", cumulative=2)])) == 2
    buffer.close()
    with pytest.raises(ConfigError, match="blocks are sealed under the key"):
        open_buffer(tmp_path, Keys([NEW]))


def test_a_changed_bit_in_a_sealed_block_is_found_wherever_it_is(tmp_path: Path) -> None:
    block = append(open_buffer(tmp_path, None))
    keys = Keys([OLD])
    stored = keys.seal(block)
    assert open_stored(stored, keys) == block
    assert stored_header(stored) == read_header(block)
    for bit in range(8 * len(stored)):
        changed = bytearray(stored)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert read_header(open_stored(bytes(changed), keys)) is None
        except ContractError:
            continue
        except ConfigError as e:  # in the name of the key
            assert "key" in str(e) and 4 <= bit // 8 < 12


def test_the_same_block_is_never_sealed_the_same_way_twice(tmp_path: Path) -> None:
    block = append(open_buffer(tmp_path, None))
    keys = Keys([OLD])
    assert len({keys.seal(block) for _ in range(100)}) == 100


def test_keys_come_from_a_file_or_from_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert load_keys(None) is None
    file = tmp_path / "buffer.key"
    file.write_text(f"# ours\n{NEW.hex()}  # since May\n{base64.b64encode(OLD).decode()}\n")
    keys = load_keys(file)
    assert keys is not None and keys.main == Keys([NEW]).main and Keys([OLD]).main in keys
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    found = load_keys(None)
    assert found is not None and found.main == keys.main


@pytest.mark.parametrize("text", ["", "# nothing\n", "abc\n", "ab" * 31, "ä\n", "\n".join(["ab" * 32] * 17)])
def test_a_key_file_that_holds_something_else_is_a_config_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "k").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"buffer\.key_file"):
        load_keys(tmp_path / "k")
    with pytest.raises(ConfigError, match="cannot read"):
        load_keys(tmp_path / "absent")
