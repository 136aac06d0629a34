"""Replay against a real broker: what a gateway would receive."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import msgspec
import paho.mqtt.client as mqtt
import pandas as pd
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, cli, config
from cloud.fleet import Fleet
from cloud.mapping import ColumnMapping, EntityRule, TimeRule, load_mapping, read_rows, same_names
from cloud.replay import Assignment, SensorBroker, messages, replay
from edge_agent.contract.errors import ConfigError, ContractError, UnavailableError
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.state import Phase, Reported
from edge_agent.contract.stream import Encoding, StreamContract
from tests.brokers import Broker, User, nats_broker
from tests.cloud.blocks import CONTRACT_YAML, contract
from tests.cloud.test_labels import HOUR_US, PROJECT, START_US, cmapss_line
from tests.servers import free_port


@pytest.fixture
def cmapss() -> ColumnMapping:
    return load_mapping("cmapss", PROJECT)


@pytest.fixture
def turbofan() -> StreamContract:
    return parse_contract((PROJECT / "contracts/turbofan.odcs.yaml").read_text())


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    with nats_broker(tmp_path_factory.mktemp("sensors"), [User("sensor", "secret")]) as running:
        yield running


@contextmanager
def gateway(broker: Broker) -> Iterator[list[tuple[str, bytes]]]:
    """What arrives at the sensor broker, in order of arrival."""
    received: list[tuple[str, bytes]] = []
    subscribed = threading.Event()
    client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="gateway", clean_session=False)
    client.username_pw_set("sensor", "secret")
    client.on_connect = lambda c, *_: c.subscribe("sensors/#", qos=1)
    client.on_subscribe = lambda *_: subscribed.set()
    client.on_message = lambda c, u, message: received.append((message.topic, message.payload))
    client.reconnect_delay_set(1, 1)
    client.connect(broker.host, broker.port)
    client.loop_start()
    try:
        assert subscribed.wait(10)
        yield received
    finally:
        client.disconnect()
        client.loop_stop()


def wait_for(received: list[Any], count: int, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while len(received) < count and time.monotonic() < deadline:
        time.sleep(0.02)


def account(broker: Broker) -> SensorBroker:
    return SensorBroker(broker.host, broker.port, "sensor", "secret")


def cmapss_file(tmp_path: Path, engines: int, cycles: int) -> Path:
    path = tmp_path / "rows.txt"
    path.write_text("".join(cmapss_line(unit, cycle) for unit in range(1, engines + 1) for cycle in range(1, cycles + 1)))
    return path


def test_rows_arrive_as_messages_of_the_contract(broker: Broker, tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    told: list[tuple[int, int]] = []
    with gateway(broker) as received:
        done = replay(cmapss_file(tmp_path, 3, 2), cmapss, turbofan, account(broker), ["gw-a", "gw-b"], progress=lambda *p: told.append(p))
        wait_for(received, 6)
    assert (done.rows, done.acknowledged) == (6, 6)
    assert done.entities == {"gw-a": ["engine-001", "engine-003"], "gw-b": ["engine-002"]}
    assert told[-1] == (6, 6)
    assert [t for t, _ in received] == [f"sensors/{d}/turbofan" for d in ("gw-a", "gw-a", "gw-b", "gw-b", "gw-a", "gw-a")]
    first = msgspec.json.decode(received[0][1])
    assert list(first) == ["ts", "engine", *cmapss.fields]
    assert first["ts"] == (START_US + HOUR_US) // 1_000_000
    assert (first["engine"], first["cycle"], first["setting_1"], first["sensor_21"]) == ("engine-001", 1, -0.0007, 21.25)
    assert isinstance(first["cycle"], int)
    assert set(first) == {f.name for f in turbofan.fields}


def test_broker_that_restarts_in_the_middle_loses_nothing(tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    rows = 3_000
    with nats_broker(tmp_path, [User("sensor", "secret")]) as broker, gateway(broker) as received:
        killed = threading.Event()

        def restart_once(acknowledged: int, total: int) -> None:
            if acknowledged >= 300 and not killed.is_set():
                killed.set()
                broker.restart()

        done = replay(
            cmapss_file(tmp_path, 1, rows), cmapss, turbofan, account(broker), ["gw"], rows_per_s=4_000, window=100, progress=restart_once
        )
        wait_for(received, rows)
        deadline = time.monotonic() + 20
        while len({payload for _, payload in received}) < rows and time.monotonic() < deadline:
            time.sleep(0.05)
    assert killed.is_set()
    assert done.acknowledged == rows
    assert {msgspec.json.decode(p)["cycle"] for _, p in received} == set(range(1, rows + 1))


def test_speed_is_kept_and_rows_max_stops(broker: Broker, tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    path = cmapss_file(tmp_path, 1, 100)
    done = replay(path, cmapss, turbofan, account(broker), ["gw"], rows_per_s=100.0, rows_max=31)
    assert done.rows == 31
    assert 0.3 <= done.seconds < 3.0


def test_rows_that_break_the_contract_are_sent_as_they_are(tmp_path: Path, turbofan: StreamContract) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("tail,when,cycle,s1\nx,1.5,1,n/a\nx,2,,hot\nx,3,2.5,-1e30\n")
    mapping = ColumnMapping(entity=EntityRule("tail"), time=TimeRule(column="when"), fields={"cycle": "cycle", "sensor_1": "s1"})
    sent = [msgspec.json.decode(p) for _, p in messages(read_rows(path, mapping), mapping, turbofan, Assignment(["gw"]))]
    assert sent == [
        {"ts": 1.5, "engine": "x", "cycle": 1},
        {"ts": 2, "engine": "x", "sensor_1": "hot"},
        {"ts": 3, "engine": "x", "cycle": 2.5, "sensor_1": "-1e30"},
    ]


@pytest.mark.parametrize(("encoding", "decode"), [(Encoding.MSGPACK, msgspec.msgpack.decode), (Encoding.CBOR, cbor2.loads)])
def test_messages_follow_the_encoding_of_the_contract(
    tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract, encoding: Encoding, decode: Any
) -> None:
    contract = replace(turbofan, encoding=encoding)
    chunks = read_rows(cmapss_file(tmp_path, 1, 1), cmapss)
    ((topic, payload),) = messages(chunks, cmapss, contract, Assignment(["gw"]))
    assert topic == "sensors/gw/turbofan"
    assert decode(payload)["sensor_2"] == 2.25


def test_wrong_password_and_absent_broker_say_so(broker: Broker, tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    path = cmapss_file(tmp_path, 1, 1)
    with pytest.raises(ConfigError, match="refuses user 'sensor'"):
        replay(path, cmapss, turbofan, replace(account(broker), password="wrong"), ["gw"])
    with pytest.raises(UnavailableError, match="does not answer"):
        replay(path, cmapss, turbofan, SensorBroker("127.0.0.1", free_port()), ["gw"])


def test_devices_are_checked_before_anything_is_sent() -> None:
    with pytest.raises(ConfigError, match="each once"):
        Assignment(["a", "a"])
    with pytest.raises(ContractError, match="device 'A B'"):
        Assignment(["A B"])


def test_a_negative_limit_is_refused(tmp_path: Path, cmapss: ColumnMapping, turbofan: StreamContract) -> None:
    with pytest.raises(ConfigError, match="-5 rows"):
        replay(cmapss_file(tmp_path, 1, 1), cmapss, turbofan, SensorBroker("127.0.0.1", 1), ["gw"], rows_max=-5)


def parquet(tmp_path: Path, **columns: Any) -> Path:
    frame = pd.DataFrame({"ts": [1.0, 2.0], "pump": ["a", "b"], "count": [1, 2], "pressure": [1.0, 2.0], **columns})
    frame.to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def sent(path: Path, stream: StreamContract) -> list[Any]:
    mapping = same_names(stream)
    return [msgspec.json.decode(payload) for _, payload in messages(read_rows(path, mapping), mapping, stream, Assignment(["d1"]))]


def test_missing_values_of_every_column_type_are_left_out(tmp_path: Path) -> None:
    path = parquet(tmp_path, count=pd.array([1, None], dtype="Int64"), pressure=pd.array([None, 2.5], dtype="Float64"))
    assert sent(path, contract()) == [{"ts": 1, "pump": "a", "count": 1}, {"ts": 2, "pump": "b", "pressure": 2.5}]


def test_times_beside_the_event_time_go_out_in_seconds_and_what_no_message_holds_is_named(tmp_path: Path) -> None:
    field = "      - {name: serviced, logicalType: timestamp, required: true}\n"
    path = parquet(tmp_path, serviced=pd.to_datetime(["2026-01-01T00:00:00.5", None]))
    assert [row.get("serviced") for row in sent(path, parse_contract(CONTRACT_YAML + field))] == [1_767_225_600.5, None]
    path = parquet(tmp_path, pressure=[[1.0], [2.0]])
    with pytest.raises(ConfigError, match=r"field 'pressure', value array\(\[1\.\]\).*json"):
        sent(path, contract())


def test_command_says_of_a_device_that_nobody_may_have_listened(broker: Broker, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(PROJECT / "contracts", tmp_path / "contracts")
    (tmp_path / "fenceline.toml").write_text(f"[sensors]\nport = {broker.port}\n")
    settings = config.load(tmp_path)
    password = brokers.password_path(settings, brokers.SENSOR_USER)
    password.parent.mkdir(parents=True)
    password.write_text("secret")
    fleet = Fleet(settings.fleet_db)
    fleet.add("plane-01")
    (tmp_path / "rows.txt").write_text(cmapss_line(1, 1))
    command = ["--project", str(tmp_path), "replay", str(tmp_path / "rows.txt"), "--mapping", "cmapss"]
    assert cli.main(command) == 0
    assert "device 'plane-01' has never reported" in capsys.readouterr().err
    fleet.record_reported(Reported(device="plane-01", agent_version="1", desired_version=1, phase=Phase.IDLE))
    assert cli.main(command) == 0
    assert "has never reported" not in capsys.readouterr().err
