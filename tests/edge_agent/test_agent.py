"""The whole agent as a process: a real sensor broker, a real regional broker, a cloud that answers with receipts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.brokers import nats_broker
from tests.edge_agent.gateway import START_S, Bench, reading, wait_for
from tests.edge_agent.test_gpsd import FIX_3D, POSITION_3D, Server


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        yield made
        made.close()


def test_every_reading_arrives_once_and_bad_payloads_arrive_in_quarantine(bench: Bench) -> None:
    bench.start()
    for cycle in range(1, 51):
        bench.publish(reading(cycle))
    bench.publish(reading(7))  # a sensor repeats itself
    bench.publish(b"not json")
    bench.publish(reading(51, sensor_2=-400.0))
    wait_for(lambda: len(bench.cloud.readings()) == 50 and len(bench.cloud.quarantined()) == 2, bench.log)
    assert sorted(bench.cloud.readings()) == [("europe", c) for c in range(1, 51)]
    reasons = dict(bench.cloud.quarantined())
    assert set(reasons) == {"malformed", "out_of_range"}
    assert "'sensor_2' is -400" in reasons["out_of_range"]
    wait_for(lambda: bench.status()["buffer"]["waiting_blocks"] == 0, bench.log)
    assert bench.kill(signal.SIGTERM) == 0


def test_kill_9_loses_nothing_and_doubles_nothing(bench: Bench) -> None:
    bench.start()
    cycle = 0
    for _ in range(4):
        for _ in range(40):
            cycle += 1
            bench.publish(reading(cycle))
        bench.kill()
        cycle += 1
        bench.publish(reading(cycle))
        bench.start()
    wait_for(lambda: len(set(bench.cloud.readings())) == cycle, bench.log)
    time.sleep(3.0)  # the broker delivers again what was not acknowledged
    assert sorted(bench.cloud.readings()) == [("europe", c) for c in range(1, cycle + 1)]


def test_without_a_receipt_blocks_stay_on_disk_over_a_restart(bench: Bench) -> None:
    bench.cloud.answering = False
    bench.start()
    bench.publish(reading(1))
    wait_for(lambda: bench.cloud.readings(), bench.log)
    assert bench.status()["buffer"]["waiting_blocks"] == 1
    bench.kill()
    bench.cloud.answering = True
    bench.start()
    wait_for(lambda: bench.status()["buffer"]["waiting_blocks"] == 0, bench.log)


def test_a_contract_that_was_changed_under_its_version_ends_nothing(bench: Bench) -> None:
    bench.start()
    bench.publish(reading(1))
    wait_for(lambda: bench.cloud.readings(), bench.log)
    bench.kill()
    contract = bench.path / "turbofan.odcs.yaml"
    text = contract.read_text()
    assert "- name: engine\n" in text and "value: engine}" in text
    contract.write_text(text.replace("- name: engine\n", "- name: motor\n").replace("value: engine}", "value: motor}"))
    bench.start()
    assert "readings that come again will not be known stream=turbofan" in bench.log()
    bench.publish(reading(2).replace(b'"engine"', b'"motor"'))
    wait_for(lambda: len(bench.cloud.readings()) == 2, bench.log)


def test_a_moving_device_stamps_each_reading_where_it_was_captured(bench: Bench) -> None:
    bench.replace('source = "static"\nlat = 50.0\nlon = 9.0', 'source = "mqtt"\ntopic = "sensors/plane-01/position"')
    bench.start()
    bench.publish(reading(1))  # no fix yet: it waits
    for cycle, (lat, lon) in enumerate([(50.0, 9.0), (46.8, 8.2), (50.0, 9.0)], 2):
        ts = START_S + 3_600 * cycle  # time enough to get there
        bench.publish(json.dumps({"ts": ts, "lat": lat, "lon": lon}).encode(), "position")
        bench.publish(reading(cycle, ts=ts))
    wait_for(lambda: len(bench.cloud.readings()) == 3, bench.log)
    assert sorted(bench.cloud.readings()) == [("europe", 2), ("europe", 4), ("switzerland", 3)]
    assert bench.status()["lanes"]["nowhere"]["held"] == "not_allowed"


def test_a_device_with_gpsd_stamps_readings_and_rounds_their_places(bench: Bench) -> None:
    server = Server([FIX_3D])
    bench.replace('source = "static"\nlat = 50.0\nlon = 9.0', f'source = "gpsd"\nurl = "gpsd://127.0.0.1:{server.port}"')
    bench.replace('contract = "turbofan.odcs.yaml"', 'contract = "turbofan.odcs.yaml"\nlocation = "rounded"')
    bench.start()
    wait_for(lambda: bench.status()["gpsd"]["fixes"] == 1, bench.log)
    bench.publish(reading(1, ts=POSITION_3D.time_us / 1e6 + 1.0))
    bench.publish(reading(2, ts=POSITION_3D.time_us / 1e6 - 1.0))  # before the first fix: it waits
    wait_for(lambda: bench.cloud.readings(), bench.log)
    assert bench.cloud.readings() == [("switzerland", 1)]
    (table,) = bench.cloud.tables.values()
    assert (np.array(table["latitude"]).tolist(), np.array(table["longitude"]).tolist()) == ([47.46], [8.56])
    server.close()


def test_a_full_buffer_holds_the_source_and_goes_on_after_receipts(bench: Bench) -> None:
    buffer = '[buffer]\nbytes_max = 80000\nwhen_full = "block"\nhistory_rows = 10\n[flush]\nms_max = 1.0\nbytes_max = 20000'
    bench.replace("[position]", f"{buffer}\n[position]")
    bench.cloud.answering = False
    bench.start()
    for cycle in range(1, 301):
        bench.publish(reading(cycle, sensor_2=600 + cycle / 7))
        time.sleep(0.005)  # so that they come in many small blocks
    wait_for(lambda: "buffer full, source held" in bench.log(), bench.log)
    bench.cloud.answering = True
    bench.kill()
    bench.start()
    wait_for(lambda: len(set(bench.cloud.readings())) == 300, bench.log, 60.0)


def test_a_second_agent_on_the_same_state_is_refused(bench: Bench) -> None:
    bench.start()
    second = subprocess.run([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(bench.config)], capture_output=True, timeout=90)
    assert second.returncode == 2
    assert b"another agent runs on" in second.stderr


def test_systemd_is_told_that_the_agent_is_ready_and_alive(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        address = f"\0fenceline-{os.getpid()}-{time.monotonic_ns()}"
        inbox.bind(address)
        inbox.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + address[1:])
        bench.start()
        assert {inbox.recv(100), inbox.recv(100)} == {b"READY=1", b"WATCHDOG=1"}
        bench.kill(signal.SIGTERM)
