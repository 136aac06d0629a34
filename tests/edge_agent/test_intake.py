"""The checks of one batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from edge_agent.config import load
from edge_agent.contract.errors import Reason
from edge_agent.core.track import Precision, Rules, Track
from edge_agent.fence import Fence
from edge_agent.intake import WITHHELD, Intake
from edge_agent.metrics import Metrics
from tests.edge_agent.gateway import START_S, reading
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
