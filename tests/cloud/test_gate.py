"""The gate: what a region may store. Everything a device sends may be wrong."""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from cloud.gate import Gate, Refusal, Sealed
from cloud.rows import TEXT_CHARACTERS_MAX, Contracts
from edge_agent.contract.block import ORDINAL, decode_block, encode_block
from edge_agent.contract.columns import Strings
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import LOSSES
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.ledger import Loss, loss_table
from edge_agent.core.topic_levels import STRING_CHARACTERS_MAX
from edge_agent.core.zones import parse_zones
from tests.cloud.blocks import ZONES_JSON, block, block_bytes, contract

LOSS = Loss(1, "pump", "e1", "canada", 1, 1, 1, 3.0, 1.0, 2.0, "evicted_full", "the buffer was full")


@pytest.fixture
def gate() -> Gate:
    return Gate("us", Contracts([contract()]), parse_zones(ZONES_JSON))


def up(lane: str = "canada", device: str = "d1", stream: str = "pump") -> str:
    return DeviceTopics(device).up(lane, stream)


def _with(field: str, value: int) -> bytes:
    header, table = block(1, lane="canada")
    return encode_block(msgspec.structs.replace(header, **{field: value}), table)


def refusal(found: object) -> tuple[Reason, str]:
    assert isinstance(found, Refusal), found
    return found.reason, found.detail


def test_a_block_of_a_zone_that_this_region_may_hold_passes(gate: Gate) -> None:
    header, table = gate.inspect(up(), block_bytes(1, lane="canada"))  # type: ignore[misc]
    assert header.identity == ("d1", "e1", "canada", 1) and set(table) == {"ts", "pump", "count", "pressure", "ordinal", "score"}


@pytest.mark.parametrize("lane", ["europe", "canada_europe", "atlantis", "nowhere"])
def test_a_block_of_a_zone_that_this_region_may_not_hold_is_refused(gate: Gate, lane: str) -> None:
    reason, detail = refusal(gate.inspect(up(lane), block_bytes(1, lane=lane)))
    assert reason is Reason.WRONG_REGION and "'us'" in detail and lane in detail


def test_a_lane_too_long_for_a_folder_is_refused_instead_of_stopping_ingest(gate: Gate) -> None:
    lane = "_".join(f"zone-{letter}-{'x' * 38}" for letter in "abcdefg")
    reason, detail = refusal(gate.inspect(up(lane), block_bytes(1, lane=lane)))
    assert reason is Reason.UNKNOWN_TOPIC and "at most 255" in detail


@pytest.mark.parametrize("topic", [up("europe"), up(device="d2"), up(stream="turbofan"), DeviceTopics("d1").reported])
def test_a_header_that_does_not_say_what_the_topic_says_is_refused(gate: Gate, topic: str) -> None:
    assert refusal(gate.inspect(topic, block_bytes(1, lane="canada")))[0] is Reason.WRONG_DEVICE


@pytest.mark.parametrize("topic", ["x", "fenceline/v2/d1/up/canada/pump", "fenceline/v1/D1/up/canada/pump", "fenceline/v1/d1/up/b_a/pump"])
def test_a_topic_that_is_not_ours_is_refused(gate: Gate, topic: str) -> None:
    assert refusal(gate.inspect(topic, block_bytes(1)))[0] is Reason.UNKNOWN_TOPIC


@pytest.mark.parametrize("names", [{"epoch": "e-1"}, {"boot": "e-1"}])
def test_an_epoch_or_a_boot_of_two_lines_is_refused(gate: Gate, names: dict[str, str]) -> None:
    forged = block_bytes(1, lane="canada", **names)[:-4].replace(b"e-1", b"e\n1")
    reason, detail = refusal(gate.inspect(up(), forged + zlib.crc32(forged).to_bytes(4, "little")))
    assert reason is Reason.CORRUPT and "'e\\n1' must match" in detail


def test_a_contract_that_the_cloud_does_not_know_is_refused(gate: Gate) -> None:
    reason, detail = refusal(gate.inspect(up(), block_bytes(1, lane="canada", contract_version="2.0.0")))
    assert reason is Reason.UNKNOWN_STREAM and "'2.0.0'" in detail


@pytest.mark.parametrize(
    "change",
    [
        {"pressure": None},
        {"extra": np.zeros(3)},
        {"count": np.zeros(3)},
        {"pump": np.zeros(3)},
        {"score": Strings.of(["a"] * 3)},
        {"ordinal": None},
        {"latitude": np.zeros(3)},
        {"longitude": np.arange(3), "latitude": np.zeros(3)},
    ],
    ids=["missing", "extra", "float for integer", "float for text", "text for score", "no ordinal", "half a place", "integer for place"],
)
def test_columns_that_are_not_the_contracts_are_refused(gate: Gate, change: dict[str, object]) -> None:
    header, table = block(1, lane="canada")
    changed = {name: column for name, column in {**table, **change}.items() if column is not None}
    reason, detail = refusal(gate.inspect(up(), encode_block(header, changed)))  # type: ignore[arg-type]
    assert reason is Reason.CORRUPT and re.search("longitude" if "latitude" in change else next(iter(change)), detail)


@pytest.mark.parametrize("field", ["sequence", "sealed_us"])
def test_a_header_number_that_no_column_can_hold_is_refused_instead_of_stopping_ingest(gate: Gate, field: str) -> None:
    reason, detail = refusal(gate.inspect(up(), _with(field, 2**63)))
    assert reason is Reason.CORRUPT and str(2**63) in detail


def test_a_small_block_whose_rows_would_fill_the_memory_is_refused(gate: Gate) -> None:
    header, table = block(1, lane="canada", rows=65_536)
    bomb = encode_block(header, {**table, "pump": Strings(np.zeros(65_536, np.int32), ("x" * 65_536,))})
    assert len(bomb) < 512 * 1024
    reason, detail = refusal(gate.inspect(up(), bomb))
    assert reason is Reason.CORRUPT and "bytes of text" in detail


@pytest.mark.parametrize("stream", ["pump", "quarantine"])
def test_a_text_longer_than_any_message_is_refused_before_it_reaches_the_lake(gate: Gate, stream: str) -> None:
    version, names = ("1.0.0", ["pump"]) if stream == "pump" else ("1", ["topic", "reason", "detail", "payload"])
    header, table = block(1, lane="canada", rows=1, stream=stream, contract_version=version)
    base = table if stream == "pump" else {"captured_at": table["ts"], ORDINAL: table[ORDINAL]}
    for length, passes in ((TEXT_CHARACTERS_MAX, True), (TEXT_CHARACTERS_MAX + 1, False)):
        texts = {name: Strings.of(["x" * (length if name == names[-1] else 1)]) for name in names}
        found = gate.inspect(up(stream=stream), encode_block(header, {**base, **texts}))
        assert isinstance(found, tuple) if passes else refusal(found)[0] is Reason.CORRUPT


@pytest.mark.parametrize("name", ["detail", "reason", "of_stream", "of_epoch", "of_lane"])
def test_a_long_text_in_a_ledger_is_refused_block_by_block(gate: Gate, name: str) -> None:
    for length, passes in ((STRING_CHARACTERS_MAX, True), (STRING_CHARACTERS_MAX + 1, False)):
        header, table = block(1, "canada", stream=LOSSES.stream, contract_version=LOSSES.version)
        table = {**loss_table([LOSS] * header.rows), ORDINAL: table[ORDINAL], name: Strings.of(["a", "b", "x" * length])}
        found = gate.inspect(up(stream=LOSSES.stream), encode_block(header, table))
        if passes:
            assert isinstance(found, tuple)
        else:
            reason, detail = refusal(found)
            assert reason is Reason.CORRUPT and detail.endswith(f"a text of {length} characters; at most {STRING_CHARACTERS_MAX}")


def test_an_agents_ledger_passes_whatever_its_detail_says(gate: Gate) -> None:
    header, table = block(1, "canada", stream=LOSSES.stream, contract_version=LOSSES.version, rows=1)
    table = {**loss_table([replace(LOSS, detail="damaged: " + "x" * 100_000)]), ORDINAL: table[ORDINAL]}
    assert isinstance(gate.inspect(up(stream=LOSSES.stream), encode_block(header, table)), tuple)


def test_every_flipped_byte_of_a_block_is_refused_as_corrupt(gate: Gate) -> None:
    good = block_bytes(1, lane="canada")
    for place in range(len(good)):
        damaged = good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]
        assert refusal(gate.inspect(up(), damaged))[0] is Reason.CORRUPT


def test_bytes_with_a_right_crc_and_anything_inside_never_stop_ingest(gate: Gate) -> None:
    import zlib

    seed = random.randrange(10**9)
    chance = random.Random(seed)
    good = block_bytes(1, lane="canada")[:-4]
    for _ in range(2_000):
        body = bytearray(good)
        for _ in range(chance.randint(1, 6)):
            body[chance.randrange(8, len(body))] = chance.randrange(256)
        found = gate.inspect(up(), bytes(body) + zlib.crc32(body).to_bytes(4, "little"))
        assert isinstance(found, Refusal | tuple), f"seed {seed}"


def test_the_quarantine_needs_no_contract_of_the_project(gate: Gate) -> None:
    header, _ = block(1, lane="canada", stream="quarantine", contract_version="1")
    texts = Strings.of(["a", "b", "c"])
    table = {"captured_at": np.arange(3), "topic": texts, "reason": texts, "detail": texts, "payload": texts, "ordinal": np.arange(3)}
    payload = encode_block(header, table)
    assert decode_block(payload)[0] == header
    assert isinstance(gate.inspect(up(stream="quarantine"), payload), tuple)


def test_a_block_that_does_not_decode_is_refused_alone_and_the_others_of_its_batch_pass(gate: Gate) -> None:
    header, table = block(5, lane="canada")
    wrong_type = encode_block(header, {**table, "pressure": np.arange(3, dtype=np.int64)})
    missing = encode_block(msgspec.structs.replace(header, sequence=6), {k: v for k, v in table.items() if k != "pressure"})
    longer = block_bytes(7, lane="canada", rows=4)
    unscored = encode_block(msgspec.structs.replace(header, sequence=8), {k: v for k, v in table.items() if k != "score"})
    whole = [block_bytes(n, lane="canada") for n in range(10, 40)]
    batch = [*whole[:7], wrong_type, *whole[7:9], missing, longer, *whole[9:], unscored]
    sealed = [gate.admit(up(), data) for data in batch]
    stacks, refused = gate.unseal(one for one in sealed if isinstance(one, Sealed))
    assert {(r.reason, r.device, r.lane) for r in refused} == {(Reason.CORRUPT, "d1", "canada")} and len(refused) == 2
    passed = {h.identity: t for stack in stacks for h, t in stack.blocks()}
    assert {identity[3] for identity in passed} == {7, 8, *range(10, 40)}
    for data in [*whole, longer, unscored]:
        wanted, columns = decode_block(data)
        for name, column in columns.items():
            np.testing.assert_array_equal(passed[wanted.identity][name].tolist(), column.tolist())
