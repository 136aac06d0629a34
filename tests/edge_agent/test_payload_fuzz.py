"""Hostile sensors: whatever comes on whatever topic, each message becomes a reading or a reject with a reason, and nothing else happens.

Batches go through the real intake with a stream for every encoding and compression, and what comes out is sealed into blocks.
PAYLOADS in `make test`, PAYLOADS_LONG in `make test-long`.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from edge_agent.contract.block import ROWS_MAX, decode_block, encode_block
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import Compression, Encoding, Field, FieldType, StreamContract
from edge_agent.contract.topics import DeviceTopics, parse
from edge_agent.core.fix import Precision, Rules
from edge_agent.core.track import Track
from edge_agent.core.zones import parse_zones
from edge_agent.fence import Fence
from edge_agent.intake import Intake, Intaken
from edge_agent.metrics import Metrics
from tests.contract.tables import HEADER
from tests.edge_agent.sparkplug_sender import BOOLEAN, DOUBLE, INT64, EdgeNode, encode

PAYLOADS, PAYLOADS_LONG = 16_000, int(os.environ.get("FENCELINE_RUNS", "500000"))
BATCH, ROUND = 40, 20_000
MIB = 1024 * 1024
NOW_US = 1_700_000_000_000_000
ZONES = parse_zones((Path(__file__).parents[2] / "contracts" / "zones.geojson").read_bytes())
POSITION = "gw/position"

BARE = (
    Field("ts", FieldType.TIMESTAMP),
    Field("unit", FieldType.STRING),
    Field("flow", FieldType.NUMBER, required=False, minimum=-1e6, maximum=1e6),
    Field("level", FieldType.NUMBER, required=False),
)
FULL = (*BARE, Field("count", FieldType.INTEGER), Field("note", FieldType.STRING))


def contract(name: str, encoding: Encoding, topic: str, compression: Compression = Compression.NONE) -> StreamContract:
    fields = BARE if encoding in (Encoding.VALUE, Encoding.SPARKPLUG) else FULL
    return StreamContract(name, "1", fields, ("unit", "ts"), "ts", "unit", topic, encoding, 8_192, compression)


CONTRACTS = (
    *(contract(e.value, e, f"gw/{e.value}") for e in (Encoding.JSON, Encoding.MSGPACK, Encoding.CBOR)),
    *(contract(f"json-{c.value}", Encoding.JSON, f"gw/json-{c.value}/{{unit}}", c) for c in Compression),
    contract("value", Encoding.VALUE, "plant/{unit}/{field}"),
    contract("value-zstd", Encoding.VALUE, "packed/{unit}/{field}", Compression.ZSTD),
    contract("device", Encoding.SPARKPLUG, "spBv1.0/plant/+/edge-7/{unit}"),
    contract("node", Encoding.SPARKPLUG, "spBv1.0/other/+/{unit}"),
)
TREE: dict[str, Any] = {"ts": 1_700_000_000.5, "unit": "p-1", "flow": 2.5, "level": None, "count": 3, "note": "é"}
JSON = json.dumps(TREE).encode()
METRICS = [("flow", 1, DOUBLE), ("level", 2, INT64), ("on", 3, BOOLEAN)]


def spark() -> list[tuple[str, bytes]]:
    node, other = EdgeNode(), EdgeNode(group="other", node="n-1")
    births = [node.nbirth(), node.dbirth("m-1", METRICS), other.nbirth(METRICS)]
    data = [node.data("m-1", flow=1.5, level=-7), node.data("m-1", flow=None), other.data("", flow=2.0)]
    return [*births, *data, node.ddeath("m-1"), node.ndeath(), other.ndeath()]


SPARK = spark()
GOOD: list[tuple[str, bytes]] = [
    ("gw/json", JSON),
    ("gw/msgpack", msgspec.msgpack.encode(TREE)),
    ("gw/cbor", cbor2.dumps(TREE)),
    ("gw/json-gzip/p-1", gzip.compress(JSON)),
    ("gw/json-zlib/p-1", zlib.compress(JSON)),
    ("gw/json-zstd/p-1", zstandard.ZstdCompressor().compress(JSON)),
    ("gw/json-none/p-1", JSON),
    ("plant/p-1/flow", b"21.5"),
    ("packed/p-1/level", zstandard.ZstdCompressor().compress(b"-1e3")),
    (POSITION, json.dumps({"ts": 1_700_000_000, "lat": 50.0, "lon": 9.0}).encode()),
    *SPARK,
]
EVIL_TOPICS = [
    "plant/+/flow",
    "plant/#",
    "#",
    "plant/\0/flow",
    "plant//flow",
    "plant/../../etc/passwd",
    "plant/..\\..\\x/flow",
    "fenceline/v1/plane-01/up/europe/value",
    "plant/fenceline/v1/plane-01/up/flow",
    f"plant/{'x' * 1_025}/flow",
    "plant/" + "/".join("a" * 2_000) + "/flow",
    "x" * 65_000,
    "$SYS/broker",
    "plant/p-1/unit",
    "plant/p-1/humidity",
    "plant/\U0010ffff\u202e\ufeff/flow",
    "gw/json-gzip/",
    "spBv1.0/plant/DDATA/edge-7/" + "d" * 2_000,
    "spBv1.0/plant/NCMD/edge-7",
    "spBv1.0/STATE/scada",
    "spBv1.0/plant/DDATA/edge-7/m-1/x",
]
BOMB = b"\0" * 2_000_000
EVIL_PAYLOADS = [
    b"",
    b"\0",
    b"\xff\xfe\xed\xa0\x80",
    b"[" * 8_000,
    b'{"a":' * 1_600,
    b"\x91" * 8_000,
    b"\x81" * 8_000,
    b"\x9b" + b"\xff" * 8,
    b"\xd8\x1c\x81\xd8\x1d\x00",
    b"1" * 8_000,
    b"1e999999999",
    b"-" + b"9" * 400,
    b"x" * 9_000,
    gzip.compress(BOMB),
    zlib.compress(BOMB),
    zstandard.ZstdCompressor().compress(BOMB),
    gzip.compress(gzip.compress(BOMB)),
    JSON.replace(b"2.5", b"1e400"),
    JSON.replace(b"2.5", b"NaN"),
    JSON.replace(b"3", b"9" * 30),
    JSON.replace(b"p-1", b"\\ud800"),
    JSON.replace(b"p-1", b"\\u0000"),
    JSON.replace(b'"p-1"', b"[[]]"),
    JSON.replace(b"1700000000.5", b"-1"),
    JSON.replace(b"1700000000.5", b"1e18"),
    b"\x12" + b"\xff" * 9 + b"\x01",
    b"\x12\x00" * 4_000,
    b"\x08\x80\x80\x01\x18\x05" + b"\x12\x04\x10\x01\x18\x07" * 1_300,
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    raw = bytearray(draw(st.sampled_from(GOOD))[1])
    for at, byte in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)):
        if raw:
            raw[at % len(raw)] = byte
    return bytes(raw[: draw(st.sampled_from([None, None, 1, 7, 20, 60]))])


topics = st.one_of(
    st.sampled_from([t for t, _ in GOOD]), st.sampled_from(EVIL_TOPICS), st.text(max_size=12).map(lambda x: f"plant/{x}/flow")
)
payloads = st.one_of(st.sampled_from([p for _, p in GOOD]), mutated(), st.sampled_from(EVIL_PAYLOADS), st.binary(max_size=40))
messages = st.one_of(st.sampled_from(GOOD), st.tuples(topics, payloads), st.tuples(st.sampled_from([t for t, _ in GOOD]), payloads))
batches = st.lists(messages, min_size=BATCH, max_size=BATCH)


def make() -> Intake:
    fence = Fence(Track(ZONES, Rules()), {c.stream: Precision.ZONE_ONLY for c in CONTRACTS}, Metrics(), lambda *_, **__: None)
    return Intake(CONTRACTS, POSITION, fence, 100)


def check(intake: Intake, sent: list[tuple[str, bytes]]) -> Counter[str]:
    """Take a batch, seal what it gave, and count what became of its messages."""
    taken = intake.take([t for t, _ in sent], [p for _, p in sent], NOW_US)
    assert all(isinstance(r.reason, Reason) and 0 < len(r.detail) <= 400 and r.detail.encode() for r in taken.rejected)
    assert {(r.topic, r.payload) for r in taken.rejected if r.topic != POSITION} <= set(sent)
    seal(taken)
    plain = [t for t, _ in sent if not t.startswith("spBv1.0/") and t != POSITION]
    rejected = [r for r in taken.rejected if not r.topic.startswith("spBv1.0/") and r.topic != POSITION]
    whole = sum(len(r) for r in taken.readings if r.contract.encoding is not Encoding.SPARKPLUG)
    again = sum(n for s, n in taken.redelivered.items() if s not in ("device", "node"))
    assert len(plain) == whole + again + len(rejected)
    spark_rejects = sum(r.topic.startswith("spBv1.0/") for r in taken.rejected)
    assert spark_rejects <= sum(t.startswith("spBv1.0/") for t, _ in sent)
    return Counter(messages=len(sent), readings=sum(map(len, taken.readings)), rejects=len(taken.rejected))


def seal(taken: Intaken) -> None:
    topics = DeviceTopics("plane-01")
    for readings in taken.readings:
        rows, lanes = len(readings), readings.lanes
        assert rows <= ROWS_MAX
        for lane in lanes.values:
            where = parse(topics.up(lane, readings.contract.stream))
            assert (where.device, where.lane, where.stream) == ("plane-01", lane, readings.contract.stream)
        header = msgspec.structs.replace(HEADER, lane=lanes.values[0], stream=readings.contract.stream, rows=rows)
        back = decode_block(encode_block(header, readings.table))[1]
        for field in readings.contract.fields:
            if field.type is not FieldType.STRING:
                column = np.asarray(readings.table[field.name])
                assert np.array_equal(back[field.name], column, equal_nan=column.dtype == np.float64)
            else:
                assert back[field.name].tolist() == readings.table[field.name].tolist()


def fuzz(count: int) -> Counter[str]:
    total: Counter[str] = Counter()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @given(batches)
    @settings(max_examples=max(1, min(count, ROUND) // BATCH), suppress_health_check=list(HealthCheck), database=None)
    @example([(t, p) for p in EVIL_PAYLOADS for t, _ in GOOD])
    @example([(t, p) for t in EVIL_TOPICS for _, p in GOOD])
    @example(GOOD * 3)
    def run(sent: list[tuple[str, bytes]]) -> None:
        total.update(check(make(), sent))

    for _ in range(max(1, count // ROUND)):  # Hypothesis remembers what it has tried: many short rounds
        run()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) // 1024 < 400, "memory grew by more than 400 MiB"
    return total


def test_hostile_messages_become_readings_or_rejects() -> None:
    total = fuzz(PAYLOADS)
    print(dict(total))
    assert total["messages"] >= PAYLOADS * 0.9 and total["readings"] and total["rejects"]


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_half_a_million_hostile_messages_become_readings_or_rejects() -> None:
    total = fuzz(PAYLOADS_LONG)
    print(dict(total))
    assert total["messages"] >= PAYLOADS_LONG * 0.9


def test_one_intake_lives_through_all_of_it() -> None:
    """State that hostile messages leave behind (births, routes, keys) stays bounded, and good messages are still taken."""
    intake = make()
    for round_ in range(20):
        check(intake, [(f"plant/p-{round_}-{n}/flow", b"1") for n in range(700)])
        check(intake, [(t, p) for t in EVIL_TOPICS for p in EVIL_PAYLOADS])
    assert len(intake._routes) <= 10_000
    taken = intake.take([t for t, _ in SPARK], [p for _, p in SPARK], NOW_US)
    assert taken.rejected == [] and sum(map(len, taken.readings)) > 0


def test_a_full_batch_of_the_worst_payloads_stays_within_memory() -> None:
    """4 MiB of zip bombs, and of Sparkplug messages that are mostly empty cells."""
    intake = make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    full = gzip.compress(json.dumps({**TREE, "note": "x", "pad": "y" * 8_000}).encode())
    check(intake, [("gw/json-gzip/p-1", full)] * 4_096 + [("gw/json-gzip/p-1", gzip.compress(BOMB))] * 1_000)
    births = SPARK[:2]
    wide = EdgeNode(sequence=1, types={"m-1": METRICS}, now_ms=1_700_000_100_000)
    dense = [{"alias": 1, "timestamp": n, "value": float(n)} for n in range(400)]
    flood = [(wide.topic("DDATA", "m-1"), encode(wide._tick(), wide._next(), dense)) for _ in range(160)]
    got = check(intake, [*births, *flood])
    assert got["readings"] > 400
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < 300, "memory grew by more than 300 MiB"


def test_a_rejected_payload_can_be_written_down() -> None:
    intake = make()
    taken = intake.take(["gw/json"] * len(EVIL_PAYLOADS), EVIL_PAYLOADS, NOW_US)
    assert len(taken.rejected) == len(EVIL_PAYLOADS) - sum(map(len, taken.readings))
    for r in taken.rejected:
        base64.b64encode(r.payload)
