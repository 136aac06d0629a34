"""How contracts may change: one golden table, then what the lake does with a change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cloud.evolution import broken, check_versions, disagreement, stored
from cloud.follow import Follower
from cloud.lake import Lake
from cloud.rows import Contracts
from edge_agent.contract.block import ORDINAL, BlockHeader
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ConfigError, Reason
from edge_agent.contract.privacy import Pii, PiiKind
from edge_agent.contract.stream import Encoding, Field, FieldType, StreamContract
from tests.cloud.blocks import block, contract

INF = float("inf")
OLD = replace(contract(), fields=(*contract().fields, Field("flow", FieldType.NUMBER, required=True, unit="l/s", minimum=0, maximum=10)))


def with_field(name: str, /, **change: object) -> StreamContract:
    """The old contract with a field changed."""
    return replace(OLD, fields=tuple(replace(f, **change) if f.name == name else f for f in OLD.fields))  # type: ignore[arg-type]


def adding(*fields: Field) -> StreamContract:
    return replace(OLD, fields=(*OLD.fields, *fields))


def without(name: str) -> StreamContract:
    return replace(OLD, fields=tuple(f for f in OLD.fields if f.name != name))


ADDITIVE = {
    "nothing": OLD,
    "a new optional number": adding(Field("heat", FieldType.NUMBER, required=False, minimum=0)),
    "a wider range": with_field("flow", minimum=-1, maximum=11),
    "a range without an end": with_field("flow", minimum=-INF, maximum=INF),
    "a required number that becomes optional": with_field("flow", required=False),
    "a number that is rounded for privacy": with_field("flow", pii=Pii(PiiKind.ROUND, 0.5)),
    "another description": with_field("flow", description="litres"),
    "fields in another order": replace(OLD, fields=tuple(reversed(OLD.fields))),
    "another topic, encoding and size": replace(OLD, topic="x/{device}", encoding=Encoding.CBOR, payload_bytes_max=100),
}
BREAKING = {
    "a removed field": (without("flow"), "field 'flow' is gone"),
    "a renamed field": (with_field("flow", name="stream"), "field 'flow' is gone"),
    "another type": (with_field("count", type=FieldType.NUMBER), "field 'count': type integer became number"),
    "another unit": (with_field("flow", unit="l/min"), "field 'flow': unit 'l/s' became 'l/min'"),
    "a higher minimum": (with_field("flow", minimum=1), "minimum 0 became 1, a narrower range"),
    "a lower maximum": (with_field("flow", maximum=9), "maximum 10 became 9, a narrower range"),
    "a first limit": (with_field("count", maximum=9), "maximum none became 9, a narrower range"),
    "an optional field that becomes required": (with_field("pressure", required=True), "field 'pressure': optional became required"),
    "a new required number": (adding(Field("heat", FieldType.NUMBER)), "new field 'heat' is a required number"),
    "a new text": (adding(Field("site", FieldType.STRING)), "new field 'site' is a required string"),
    "a text that is hashed": (with_field("pump", pii=Pii(PiiKind.HASH)), "pii 'none' became 'hash'"),
    "another key": (replace(OLD, key=("ts",)), "primary key"),
    "another entity": (replace(OLD, entity="site"), "entity 'pump' became 'site'"),
    "another event time": (replace(OLD, event_time="taken_at"), "event time 'ts' became 'taken_at'"),
}


@pytest.mark.parametrize("change", ADDITIVE)
def test_additive_changes_share_a_table(change: str) -> None:
    assert broken(stored(OLD), stored(ADDITIVE[change])) == []
    check_versions([OLD, replace(ADDITIVE[change], version="1.1.0")])


@pytest.mark.parametrize("change", BREAKING)
def test_breaking_changes_are_refused_with_the_difference(change: str) -> None:
    newer, message = BREAKING[change]
    with pytest.raises(ConfigError, match=r"breaks with 1\.0\.0") as refused:
        check_versions([replace(newer, version="2.0.0"), OLD])
    assert message in str(refused.value)


def test_versions_are_compared_in_the_order_of_their_numbers() -> None:
    wider, widest = with_field("flow", maximum=20), with_field("flow", maximum=30)
    check_versions([replace(widest, version="1.10.0"), OLD, replace(wider, version="1.9.0")])
    with pytest.raises(ConfigError, match=r"1\.10\.0 breaks with 1\.9\.0"):
        check_versions([replace(widest, version="1.9.0"), replace(wider, version="1.10.0")])
    with pytest.raises(ConfigError, match=r"two contracts of version '1\.0\.0'"):
        check_versions([OLD, wider])


def test_a_version_may_be_written_in_any_characters() -> None:
    check_versions([replace(OLD, version="1.²"), OLD])


def flowing(sequence: int, stream: StreamContract, lane: str = "europe", **more: float) -> tuple[BlockHeader, Table]:
    header, table = block(sequence, lane=lane, contract_version=stream.version)
    return header, {**table, **{name: np.full(header.rows, value) for name, value in {"flow": 1.0, **more}.items()}}


def test_a_field_that_no_row_has_yet_is_null_for_all_readers(tmp_path: Path) -> None:
    newer = replace(adding(Field("heat", FieldType.NUMBER, required=False)), version="1.1.0")
    contracts = Contracts([OLD, newer])
    lake, columns = Lake(tmp_path, contracts), ["sequence", "heat"]
    lake.append("eu", [flowing(1, OLD), flowing(2, OLD, lane="canada")])
    read = lake.read("pump", columns=columns)
    assert read.to_pydict() == {"sequence": [1, 1, 1, 2, 2, 2], "heat": [None] * 6} and read.schema.field("heat").type == pa.float64()
    follower = Follower(lake, "pump", columns)
    for piece in follower.pieces():
        assert piece.rows["heat"].to_pylist() == [None] * 3
        follower.done(piece)
    assert [rows["heat"].to_pylist() for rows in follower.of_devices(["d1"])] == [[None] * 3] * 2
    lake.append("eu", [flowing(3, newer, heat=5.0)])
    assert lake.read("pump", columns=columns)["heat"].to_pylist() == [None] * 6 + [5.0] * 3
    assert [piece.rows["heat"].to_pylist() for piece in follower.pieces()] == [[5.0] * 3]


def test_a_table_remembers_the_contract_that_made_it_whichever_version_comes_first() -> None:
    newer = replace(with_field("flow", maximum=20), version="1.1.0")
    assert disagreement(stored(OLD), newer) is None and disagreement(stored(newer), OLD) is None
    assert "maximum 20 became 10" in (disagreement(stored(newer), replace(OLD, version="1.2.0")) or "")
    assert "1.0.0" in (disagreement(stored(OLD), replace(OLD, entity="site")) or "")  # the file was changed in place


def test_blocks_of_a_broken_contract_are_refused_and_the_others_flow_on(tmp_path: Path) -> None:
    Lake(tmp_path, Contracts([contract()])).append("eu", [block(1)])
    changed = replace(
        contract(), version="2.0.0", fields=tuple(replace(f, unit="kPa") if f.name == "pressure" else f for f in contract().fields)
    )
    other = replace(contract(), stream="fan")
    lake = Lake(tmp_path, Contracts([changed, other]))  # version 1.0.0 is no longer listed: only the table knows it

    settled = lake.append("eu", [block(2, contract_version="2.0.0"), block(3, stream="fan"), quarantined(4)])

    assert [(r.reason, r.device, r.lane, r.stream) for r in settled.refused] == [(Reason.CONTRACT_BROKEN, "d1", "europe", "pump")]
    assert "unit '' became 'kPa'" in settled.refused[0].detail
    assert sorted(i[3] for i in settled.committed) == [3, 4] and settled.duplicates == []
    assert settled.receipts[0].lanes[0].cumulative == 1 and settled.receipts[0].lanes[0].ranges == [(3, 4)]
    repaired = Lake(tmp_path, Contracts([contract(), other]))
    assert [i[3] for i in repaired.append("eu", [block(2), block(3, stream="fan")]).committed] == [2]


def quarantined(sequence: int) -> tuple[BlockHeader, Table]:
    header, _ = block(sequence, rows=1, stream="quarantine", contract_version="1")
    texts, numbers = Strings.of(["a"]), np.zeros(1, np.int64)
    return header, {"captured_at": numbers, "topic": texts, "reason": texts, "detail": texts, "payload": texts, ORDINAL: numbers}
