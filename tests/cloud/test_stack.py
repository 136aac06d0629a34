"""The development stack as `fenceline up` runs it: one for all tests of this file."""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from cloud import brokers, cli, config
from cloud.config import Settings
from cloud.enrol import enrol, renew
from cloud.fleet import Fleet
from cloud.removal import remove
from edge_agent.contract.state import Desired, Phase, Reported, decode_desired, encode_state
from edge_agent.contract.topics import DeviceTopics
from tests.cloud.refs import a_ref

ROOT = Path(__file__).parents[2]
WAIT_S = 30.0
REF = a_ref(1)


@dataclass
class Up:
    """A running `fenceline up`, and what it said when it was ready."""

    process: subprocess.Popen[str]
    said: dict[str, Any]
    state: Path

    @property
    def settings(self) -> Settings:
        return config.load(ROOT, self.state)

    @property
    def pids(self) -> dict[str, int]:
        return dict(json.loads((self.state / "stack.json").read_text())["pids"])


def start(state: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cloud.cli", "--project", str(ROOT), "--state", str(state), "up", "--json", *options]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_document(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.rstrip() == "}":
            break
    assert lines, process.stderr and process.stderr.read()
    return dict(json.loads("".join(lines)))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def family(pid: int) -> list[int]:
    """All descendants of a process."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(child): int(parent) for child, parent in (line.split() for line in found.splitlines())}
    children = [c for c, p in parents.items() if p == pid]
    return [*children, *(d for c in children for d in family(c))]


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    state = tmp_path_factory.mktemp("stack") / "state"
    assert cli.main(["--project", str(ROOT), "--state", str(state), "keys", "init"]) == 0
    process = start(state, "--free-ports")
    try:
        yield Up(process, read_document(process), state)
    finally:
        relatives = family(process.pid)
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        assert process.wait(WAIT_S) == 0 and time.monotonic() - started < 15
        assert [pid for pid in relatives if alive(pid)] == []
        assert not (state / "stack.json").exists()


class Client:
    """An MQTT client that keeps what it gets."""

    def __init__(self, settings: Settings, region: str, user: str, password: str, *filters: str) -> None:
        self.got: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self.lost = 0
        self.answers: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self.subscribed: list[bool] = []
        self.mqtt = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=user, clean_session=True)
        self.mqtt.username_pw_set(user, password)
        self.mqtt.on_connect = lambda client, data, flags, code, properties: self._take_answer(not code.is_failure, filters)
        self.mqtt.on_subscribe = lambda client, data, mid, codes, properties: self.subscribed.extend(not c.is_failure for c in codes)
        self.mqtt.on_message = lambda client, data, message: self.got.put((message.topic, bytes(message.payload)))
        self.mqtt.on_disconnect = self._count_loss
        self.mqtt.connect("127.0.0.1", settings.region(region).port)
        self.mqtt.loop_start()

    def _take_answer(self, accepted: bool, filters: Sequence[str]) -> None:
        self.answers.put(accepted)
        if accepted:
            self.mqtt.subscribe([(f, 1) for f in filters])

    def _count_loss(self, *_: object) -> None:
        self.lost += 1

    def close(self) -> None:
        self.mqtt.disconnect()
        self.mqtt.loop_stop()


def test_all_parts_are_ready_in_one_process_group_and_say_where(up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    assert up.said["ready"] is True
    assert set(up.pids) == {"broker-sensors", "broker-eu", "broker-us", "ingest-eu", "ingest-us", "release", "api", "mlflow"}
    assert {os.getpgid(pid) for pid in up.pids.values()} == {os.getpgid(up.process.pid)}
    assert httpx.get(f"{up.settings.mlflow_url}/health").status_code == 200
    assert cli.main(["--project", str(ROOT), "--state", str(up.state), "ui", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"url": up.settings.mlflow_url, "running": True}


def test_everything_listens_on_loopback_only(up: Up) -> None:
    pids = set(family(up.process.pid))
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True)
    if listening.returncode:
        pytest.skip("ss is not installed")
    ours = [line.split()[3] for line in listening.stdout.splitlines() if any(f"pid={pid}," in line for pid in pids)]
    assert len(ours) >= 6 and all(address.startswith("127.0.0.1:") for address in ours), ours


def test_the_api_wants_the_token_for_everything_but_health(up: Up) -> None:
    token = up.settings.token_path.read_text().strip()
    with httpx.Client(base_url=up.settings.api_url) as client:
        assert client.get("/healthz").json() == {"ok": True, "connected": True}
        for path in ("/v1/status", "/v1/devices", "/v1/audit", "/v1/rollouts", "/v1/events", "/metrics", "/nothing"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": f"Bearer {token}x"}).status_code == 401
        client.headers["Authorization"] = f"Bearer {token}"
        assert client.get("/v1/status").json()["stack"]["pid"] == up.process.pid
        assert client.get("/v1/audit").json() == {"broken_at": None, "entries": []}
        assert client.get("/v1/devices/nobody").status_code == 404
        assert client.get("/v1/audit", params={"limit": "-1"}).status_code == 400
        assert client.get("/v1/audit", params={"limit": "²"}).status_code == 400
        assert 'fenceline_ingest_connected{region="eu"} 1.0' in client.get("/metrics").text
    assert up.settings.token_path.stat().st_mode & 0o077 == 0


def test_the_release_server_serves_metadata_and_nothing_beside_it(up: Up) -> None:
    url = up.settings.release_url
    assert httpx.get(f"{url}/metadata/1.root.json").json()["signed"]["_type"] == "root"
    for path in (
        "/",
        "/metadata/",
        "/targets",
        "/keys/root.pem",
        "/metadata/../../keys/root.pem",
        "/metadata/%2e%2e/%2e%2e/api-token",
        "/metadata/.x",
    ):
        with socket.create_connection(("127.0.0.1", up.settings.release.port)) as raw:
            raw.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert b" 404 " in raw.recv(4096), path


def test_status_tells_the_same_as_the_stack(up: Up, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--project", str(ROOT), "--state", str(up.state), "status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stack"]["ports"] == up.said["ports"] and found["ingest"]["eu"]["connected"] is True
    assert cli.main(["--project", str(ROOT), "--state", str(up.state), "status"]) == 0
    assert up.settings.mlflow_url in capsys.readouterr().out


def test_a_device_added_while_the_stack_runs_connects_and_others_stay_connected(up: Up) -> None:
    settings, fleet = up.settings, Fleet(up.settings.fleet_db)
    enrol(settings, fleet, "old")
    wait_until(lambda: (up.state / "nats/eu.users.conf").read_text().count('"old"'))
    time.sleep(0.3)
    old = Client(settings, "eu", "old", fleet.passwords()["old"], DeviceTopics("old").desired)
    wait_until(lambda: old.subscribed == [True])
    agent_toml = enrol(settings, fleet, "new")
    time.sleep(0.3)
    new = Client(settings, "us", "new", fleet.passwords()["new"], DeviceTopics("new").desired, DeviceTopics("old").desired, "#")
    try:
        wait_until(lambda: len(new.subscribed) == 3)
        assert new.subscribed == [True, False, False], "a device hears only what is for it"
        topic, payload = new.got.get(timeout=WAIT_S)
        assert topic == DeviceTopics("new").desired and decode_desired(payload).version == 1
        assert old.lost == 0
    finally:
        old.close()
        new.close()

    check = subprocess.run(
        [sys.executable, "-m", "edge_agent.cli", "check", "--config", str(agent_toml)], cwd=ROOT, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr


def test_a_device_cannot_speak_for_another(up: Up) -> None:
    settings, fleet = up.settings, Fleet(up.settings.fleet_db)
    for name in ("honest", "forger"):
        enrol(settings, fleet, name)
    time.sleep(0.3)
    forger = Client(settings, "eu", "forger", fleet.passwords()["forger"], DeviceTopics("forger").desired)
    try:
        wait_until(lambda: forger.subscribed == [True])
        for name in ("honest", "forger"):
            report = Reported(device=name, agent_version="0", desired_version=1, phase=Phase.IDLE, at_us=1)
            forger.mqtt.publish(DeviceTopics(name).reported, encode_state(report), qos=1, retain=True)
        forger.mqtt.publish(
            DeviceTopics("forger").reported,
            encode_state(Reported(device="honest", agent_version="0", desired_version=1, phase=Phase.IDLE)),
            qos=1,
        )
        wait_until(lambda: "forger" in fleet.all_reported())
        time.sleep(0.5)
        assert "honest" not in fleet.all_reported()
    finally:
        forger.close()


def test_a_new_desired_document_reaches_the_device_in_every_region(up: Up) -> None:
    settings, fleet = up.settings, Fleet(up.settings.fleet_db)
    enrol(settings, fleet, "plane")
    time.sleep(0.3)
    clients = [Client(settings, region, "plane", fleet.passwords()["plane"], DeviceTopics("plane").desired) for region in ("eu", "us")]
    try:
        assert [decode_desired(c.got.get(timeout=WAIT_S)[1]).version for c in clients] == [1, 1]
        wanted = fleet.set_desired("plane", REF)
        assert [decode_desired(c.got.get(timeout=WAIT_S)[1]) for c in clients] == [wanted, wanted]
    finally:
        for client in clients:
            client.close()


def may_connect(settings: Settings, region: str, user: str, password: str) -> bool:
    client = Client(settings, region, user, password, DeviceTopics(user).desired)
    try:
        return client.answers.get(timeout=WAIT_S)
    finally:
        client.close()


def kept(settings: Settings, region: str, topic: str) -> bytes | None:
    """What the broker of a region has retained on a topic."""
    client = Client(settings, region, brokers.CLOUD_USER, brokers.password(settings, brokers.CLOUD_USER), topic)
    try:
        wait_until(lambda: client.subscribed == [True])
        return client.got.get(timeout=0.5)[1]
    except queue.Empty:
        return None
    finally:
        client.close()


def test_a_removed_device_is_cut_off_in_every_region_and_may_be_added_again(up: Up) -> None:
    settings, fleet, topics = up.settings, Fleet(up.settings.fleet_db), DeviceTopics("stolen")
    for name in ("stolen", "neighbour"):
        enrol(settings, fleet, name)
    fleet.set_desired("stolen", REF)
    time.sleep(0.3)
    secret, regions = fleet.passwords()["stolen"], ("eu", "us")
    neighbour = Client(settings, "eu", "neighbour", fleet.passwords()["neighbour"], DeviceTopics("neighbour").desired)
    clients = [Client(settings, region, "stolen", secret, topics.desired) for region in regions]
    try:
        wait_until(lambda: neighbour.subscribed == [True] and all(client.subscribed == [True] for client in clients))
        wait_until(lambda: all(kept(settings, region, topics.desired) for region in regions))
        remove(settings, fleet, "stolen", "me")
        wait_until(lambda: all(client.lost for client in clients))
        assert not any(may_connect(settings, region, "stolen", secret) for region in regions)
        wait_until(lambda: not any(kept(settings, region, topics.desired) for region in regions))
        assert neighbour.lost == 0 and kept(settings, "eu", DeviceTopics("neighbour").desired)
    finally:
        for client in (neighbour, *clients):
            client.close()
    enrol(settings, fleet, "stolen")
    time.sleep(0.3)
    assert not any(may_connect(settings, region, "stolen", secret) for region in regions)
    back = Client(settings, "us", "stolen", fleet.passwords()["stolen"], topics.desired)
    try:
        assert decode_desired(back.got.get(timeout=WAIT_S)[1]) == Desired(version=4)
    finally:
        back.close()


def test_a_removed_device_is_forgotten_by_a_broker_that_was_away_meanwhile(up: Up) -> None:
    settings, fleet, topic = up.settings, Fleet(up.settings.fleet_db), DeviceTopics("gone").desired
    enrol(settings, fleet, "gone")
    wait_until(lambda: kept(settings, "us", topic))
    before = up.pids["broker-us"]
    os.kill(before, signal.SIGKILL)
    remove(settings, fleet, "gone", "me")
    wait_until(lambda: up.pids.get("broker-us") not in (None, before))
    wait_until(lambda: httpx.get(f"{settings.api_url}/healthz").json()["connected"])
    wait_until(lambda: kept(settings, "us", topic) is None)


def test_a_new_password_ends_the_connections_of_the_old_one(up: Up) -> None:
    settings, fleet = up.settings, Fleet(up.settings.fleet_db)
    for name in ("rekeyed", "bystander"):
        enrol(settings, fleet, name)
    time.sleep(0.3)
    old = fleet.passwords()["rekeyed"]
    bystander = Client(settings, "eu", "bystander", fleet.passwords()["bystander"], DeviceTopics("bystander").desired)
    client = Client(settings, "eu", "rekeyed", old, DeviceTopics("rekeyed").desired)
    try:
        wait_until(lambda: bystander.subscribed == client.subscribed == [True])
        new = renew(settings, fleet, "rekeyed").read_text().strip()
        wait_until(lambda: client.lost)
        assert bystander.lost == 0
    finally:
        for each in (bystander, client):
            each.close()
    for region in ("eu", "us"):
        assert not may_connect(settings, region, "rekeyed", old) and may_connect(settings, region, "rekeyed", new)


def test_a_part_that_dies_is_started_again_and_counted(up: Up) -> None:
    before = up.pids["ingest-eu"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: up.pids.get("ingest-eu") not in (None, before))

    def back() -> bool:
        document = json.loads(up.settings.stack_path.read_text())
        return document["ready"] and document["restarts"]["ingest-eu"] == 1

    wait_until(back)


def test_a_killed_broker_comes_back_with_what_devices_should_run(up: Up) -> None:
    settings, fleet = up.settings, Fleet(up.settings.fleet_db)
    enrol(settings, fleet, "patient")
    before = up.pids["broker-us"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: up.pids.get("broker-us") not in (None, before))
    wait_until(lambda: httpx.get(f"{settings.api_url}/healthz").json()["connected"])
    client = Client(settings, "us", "patient", fleet.passwords()["patient"], DeviceTopics("patient").desired)
    try:
        assert decode_desired(client.got.get(timeout=WAIT_S)[1]).version == 1
    finally:
        client.close()


def test_a_second_stack_on_the_same_state_is_refused(up: Up) -> None:
    process = start(up.state, "--free-ports")
    said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 2 and "a stack runs on" in said
    assert config.running_stack(up.settings) is not None


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(tmp_path / "state", "--free-ports", "--ports", f"eu={port}")
        said = process.communicate(timeout=WAIT_S)[1]
    assert process.returncode == 2 and f"port {port} of eu is taken; give another: --ports eu=PORT" in said


def test_a_contract_that_does_not_read_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "contracts").mkdir()
    shutil.copy(ROOT / "contracts/zones.geojson", tmp_path / "contracts")
    (tmp_path / "fenceline.toml").write_text("contracts = ['contracts/turbofn.odcs.yaml']\n")
    command = [sys.executable, "-m", "cloud.cli", "--project", str(tmp_path), "up", "--free-ports"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"fenceline: cannot read {tmp_path}/contracts/turbofn.odcs.yaml: No such file" in done.stderr
    assert not list((tmp_path / ".fenceline/logs").iterdir())


def test_when_up_is_killed_its_children_end_too(tmp_path: Path) -> None:
    process = start(tmp_path / "state", "--free-ports")
    try:
        path = tmp_path / "state/stack.json"
        wait_until(lambda: path.exists() and len(json.loads(path.read_text())["pids"]) == 8)
        relatives = family(process.pid)
        assert len(relatives) >= 8
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not any(alive(pid) for pid in relatives))
