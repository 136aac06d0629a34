"""Where a device was, as its disk, its blocks and its log tell it: no more exactly than each stream may say."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.contract.block import LATITUDE, LONGITUDE
from tests.brokers import nats_broker
from tests.edge_agent.gateway import START_S, Bench, reading, wait_for

LAT, LON = 47.123457, 8.765432  # Switzerland
JUMP = 46.987654, 7.654321


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        (tmp_path / "device").mkdir()
        made = Bench(tmp_path / "device", sensors, eu)
        made.replace('source = "static"\nlat = 50.0\nlon = 9.0', 'source = "mqtt"\ntopic = "sensors/plane-01/position"')
        yield made
        made.close()


def travel(bench: Bench, location: str) -> None:
    """One fix, readings, and an impossible jump; all of it stored, delivered, and the agent stopped."""
    bench.replace('contract = "turbofan.odcs.yaml"', f'contract = "turbofan.odcs.yaml"\nlocation = "{location}"')
    bench.start()
    bench.publish(position(1, LAT, LON), "position")
    for cycle in range(1, 6):
        bench.publish(reading(cycle))
    bench.publish(position(1, *JUMP), "position")
    wait_for(lambda: len(bench.cloud.readings()) == 5 and len(bench.cloud.quarantined()) == 1, bench.log)
    bench.kill()


def position(second: int, lat: float, lon: float) -> bytes:
    return json.dumps({"ts": START_S + second, "lat": lat, "lon": lon, "accuracy_m": 5.0}).encode()


def told(bench: Bench) -> bytes:
    """Everything that is on the device's disk, but for what only lies in memory on a real one; and what was sent."""
    files = [p for p in bench.path.rglob("*") if p.is_file() and p.suffix != ".position"]
    sent = [str(table).encode() for table in bench.cloud.tables.values()]
    return b"\n".join([*(p.read_bytes() for p in files), *sent])


def traces(lat: float, lon: float) -> list[bytes]:
    """A place as text and as numbers, to four digits and more."""
    texts = [f"{value:.4f}"[:-1].encode() for value in (lat, lon)]
    return [*texts, *(struct.pack("<d", value) for value in (lat, lon)), *(struct.pack(">d", value) for value in (lat, lon))]


@pytest.mark.parametrize("location", ["zone-only", "rounded", "exact"])
def test_no_trace_is_finer_than_the_stream_may_say(bench: Bench, location: str) -> None:
    travel(bench, location)
    found = [trace for trace in [*traces(LAT, LON), *traces(*JUMP)] if trace in told(bench)]
    assert bool(found) is (location == "exact"), found
    places = [(table.get(LATITUDE), table.get(LONGITUDE)) for table in bench.cloud.tables.values() if "cycle" in table]
    if location == "zone-only":
        assert all(lat is None and lon is None for lat, lon in places)
        return
    digits = 2 if location == "rounded" else 6
    for lat, lon in places:
        assert set(np.asarray(lat)[~np.isnan(np.asarray(lat))].tolist()) <= {round(LAT, digits)}
        assert set(np.asarray(lon)[~np.isnan(np.asarray(lon))].tolist()) <= {round(LON, digits)}
