"""The checks of one batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from edge_agent.config import load
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import Encoding, Field, FieldType, StreamContract
from edge_agent.core.fix import Precision, Rules
from edge_agent.core.sparkplug_nodes import Nodes
from edge_agent.core.track import Track
from edge_agent.fence import Fence
from edge_agent.intake import WITHHELD, Intake, Intaken
from edge_agent.metrics import Metrics
from tests.edge_agent.gateway import START_S, reading
from tests.edge_agent.sparkplug_sender import DOUBLE, EdgeNode, encode
from tests.edge_agent.test_config import write

NOW = START_S * 1_000_000
POSITION, TURBOFAN = "sensors/plane-01/position", "sensors/plane-01/turbofan"


def make(folder: Path, location: Precision = Precision.ZONE_ONLY) -> Intake:
    config = load(write(folder))
    fence = Fence(Track(config.zones, Rules(speed_m_s_max=400_000.0)), {"turbofan": location}, Metrics(), lambda *_, **__: None)
    return Intake(config.contracts, POSITION, fence, 1_000)


def fix(second: int, lat: float, lon: float) -> bytes:
    return json.dumps({"ts": START_S + second, "lat": lat, "lon": lon}).encode()


def test_a_reject_stays_where_it_was_captured_though_the_device_moves_on_in_the_same_batch(tmp_path: Path) -> None:
    intake = make(tmp_path)
    europe, switzerland = fix(1, 50.0, 9.0), fix(2, 46.8, 8.2)
    odd = "sensors/plane-01/x"
    messages = [(TURBOFAN, b"0"), (POSITION, europe), (TURBOFAN, b"1"), (POSITION, switzerland), (odd, b"2"), (POSITION, b"3")]
    taken = intake.take([topic for topic, _ in messages], [payload for _, payload in messages], NOW)
    lanes = [(r.payload, r.lane) for r in taken.rejected]
    assert lanes == [(b"0", "nowhere"), (b"1", "europe"), (b"2", "switzerland"), (WITHHELD, "switzerland")]
    (later,) = intake.take([TURBOFAN], [b"4"], NOW).rejected
    assert later.lane == "switzerland"


def test_rejects_name_the_payload_and_leave_its_neighbours(tmp_path: Path) -> None:
    intake = make(tmp_path)
    payloads = [reading(1), b"not json", reading(2), reading(3, sensor_2=-400.0), reading(1)]
    taken = intake.take([TURBOFAN] * 5, payloads, NOW)
    assert [(r.reason, r.payload) for r in taken.rejected] == [(Reason.MALFORMED, payloads[1]), (Reason.OUT_OF_RANGE, payloads[3])]
    (readings,) = taken.readings
    assert np.array(readings.table["cycle"]).tolist() == [1, 2]
    assert taken.redelivered == {"turbofan": 1}


def test_a_topic_as_long_as_mqtt_allows_is_not_kept(tmp_path: Path) -> None:
    intake = make(tmp_path)
    (reject,) = intake.take(["x" * 65_000], [b""], NOW).rejected
    assert len(reject.detail) < 400
    assert intake._routes == {}


MOTOR = [("flow", 1, DOUBLE), ("level", 2, DOUBLE)]


def field(name: str, kind: FieldType = FieldType.NUMBER) -> Field:
    return Field(name, kind, required=kind is not FieldType.NUMBER)


def stream(name: str, topic: str, encoding: Encoding) -> StreamContract:
    fields = (field("at", FieldType.TIMESTAMP), field("unit", FieldType.STRING), field("flow"), field("level"))
    return StreamContract(name, "1", fields, ("unit", "at"), "at", "unit", topic, encoding)


def plant(folder: Path, nodes: Nodes | None = None) -> Intake:
    contracts = (
        stream("pump", "plant/{unit}/{field}", Encoding.VALUE),
        stream("motor", "spBv1.0/plant/+/edge-7/{unit}", Encoding.SPARKPLUG),
        stream("other", "spBv1.0/other/+/edge-7/{unit}", Encoding.SPARKPLUG),
    )
    return Intake(contracts, POSITION, make(folder).fence, 1_000, nodes)


def take(intake: Intake, *messages: tuple[str, bytes], now_us: int = NOW) -> Intaken:
    return intake.take([t for t, _ in messages], [p for _, p in messages], now_us)


def test_equal_values_of_a_single_value_topic_are_all_kept(tmp_path: Path) -> None:
    intake = plant(tmp_path)
    for _ in range(2):  # the same batch at the same moment: nothing can tell it from new readings
        taken = take(intake, *[("plant/p-1/flow", b"2")] * 3)
        assert [len(r) for r in taken.readings] == [3] and taken.redelivered == {}


def test_a_node_of_which_only_devices_have_a_stream_is_heard_and_not_refused(tmp_path: Path) -> None:
    intake, node = plant(tmp_path), EdgeNode()
    taken = take(intake, node.nbirth(), node.dbirth("m-1", MOTOR), node.data("m-1", flow=1.0), node.ndeath())
    assert taken.rejected == [] and taken.nodes_heard
    assert [len(r) for r in taken.readings] == [2]
    assert take(intake, node.data("m-1", flow=2.0)).rejected[0].reason is Reason.NO_BIRTH


def test_messages_of_one_node_count_on_though_another_stream_or_none_takes_them(tmp_path: Path) -> None:
    intake, node, other = plant(tmp_path), EdgeNode(), EdgeNode(group="other")
    node.types["x"] = MOTOR
    births = [node.nbirth(), other.nbirth(), node.dbirth("m-1", MOTOR), other.dbirth("m-9", MOTOR)]
    command = ("spBv1.0/plant/NCMD/edge-7", b"")
    data = [node.data("m-1", flow=1.0), other.data("m-9", level=1.0), node.dbirth("m-2", MOTOR), node.data("m-2", flow=2.0)]
    taken = take(intake, *births, *data, command, node.data("m-1", flow=3.0))
    assert taken.gaps == []
    assert {r.contract.stream: r.table["unit"].tolist() for r in taken.readings} == {
        "motor": ["m-1", "m-1", "m-2", "m-2", "m-1"],
        "other": ["m-9", "m-9"],
    }
    assert [(r.topic, r.reason) for r in taken.rejected] == [(command[0], Reason.UNKNOWN_TOPIC)]


def test_metrics_of_one_moment_in_two_messages_are_two_readings_and_a_copy_is_none(tmp_path: Path) -> None:
    intake, node = plant(tmp_path), EdgeNode()
    take(intake, node.nbirth(), node.dbirth("m-1", MOTOR))
    first = node.data("m-1", flow=1.0)
    node.now_ms -= 1_000  # the same moment
    second = node.data("m-1", level=2.0)
    taken = take(intake, first, second, first, second)
    assert [len(r) for r in taken.readings] == [2] and taken.redelivered == {"motor": 2}


def test_gaps_are_told(tmp_path: Path) -> None:
    intake, node = plant(tmp_path), EdgeNode()
    take(intake, node.nbirth(), node.dbirth("m-1", MOTOR))
    node.skip()
    taken = take(intake, node.data("m-1", flow=1.0))
    assert len(taken.gaps) == 1 and [r.reason for r in taken.rejected] == [Reason.SEQUENCE_GAP]
    assert take(intake, ("plant/p-1/flow", b"1")).gaps == []


def test_a_sparkplug_payload_with_many_readings_out_of_range_is_one_reject(tmp_path: Path) -> None:
    narrow = stream("motor", "spBv1.0/plant/+/edge-7/{unit}", Encoding.SPARKPLUG)
    narrow = replace(narrow, fields=(*narrow.fields[:2], replace(narrow.fields[2], maximum=5.0), narrow.fields[3]))
    intake, node = Intake((narrow,), POSITION, make(tmp_path).fence, 1_000), EdgeNode()
    take(intake, node.nbirth(), node.dbirth("m-1", MOTOR))
    node.skip()
    metrics = [{"alias": 1, "timestamp": n, "value": float(n)} for n in range(10)]
    taken = take(intake, (node.topic("DDATA", "m-1"), encode(node.now_ms, node.sequence, metrics)))
    assert [len(r) for r in taken.readings] == [6]
    assert [r.reason for r in taken.rejected] == [Reason.OUT_OF_RANGE]


def test_each_agent_hashes_keys_in_its_own_way(tmp_path: Path) -> None:
    """Or a sensor could compute a reading whose key passes for that of another's next one (test_dedupe.py)."""
    assert len({recent._secret for _ in range(2) for recent in plant(tmp_path)._recent.values()}) > 2
