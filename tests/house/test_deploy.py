"""The files in deploy/ work: systemd accepts the unit, and Mosquitto keeps devices apart."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import paho.mqtt.client as mqtt
import pytest

from cloud.rights import CLOUD, mosquitto_acl
from edge_agent.core.zones import parse_zones
from tests.brokers import Broker
from tests.servers import HOST, free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
UNIT = DEPLOY / "systemd" / "fenceline-edge-agent.service"
EXPOSURE_MAX = 2.0
WAIT_S = 10.0


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_accepts_the_unit_and_finds_it_little_exposed(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/fenceline/bin/edge-agent", "/bin/true"))
    verify = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=30, check=False)
    assert (verify.returncode, verify.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE_MAX * 10:.0f}", str(unit)]
    security = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert security.returncode == 0, security.stdout


@pytest.mark.needs_mosquitto
def test_region_broker_lets_a_device_write_under_its_own_name_only(tmp_path: Path) -> None:
    with broker(tmp_path, "region", ["plane-01", "plane-02", "ingest-1"]) as port:
        ingest, device = certified(tmp_path, "ingest-1", port), certified(tmp_path, "plane-01", port)
        seen = collect(ingest, "fenceline/v1/+/up/+/+", count=1)
        device.publish("fenceline/v1/plane-02/up/europe/turbofan", b"forged", qos=1).wait_for_publish(WAIT_S)
        device.publish("fenceline/v1/plane-01/up/europe/turbofan", b"own", qos=1).wait_for_publish(WAIT_S)
        assert seen() == [("fenceline/v1/plane-01/up/europe/turbofan", b"own")]
        receipts = collect(device, "fenceline/v1/+/receipts", count=1)
        for name in ("plane-02", "plane-01"):
            ingest.publish(f"fenceline/v1/{name}/receipts", name.encode(), qos=1).wait_for_publish(WAIT_S)
        assert receipts() == [("fenceline/v1/plane-01/receipts", b"plane-01")]


@pytest.mark.needs_mosquitto
def test_region_broker_takes_only_lanes_that_its_region_may_hold(tmp_path: Path) -> None:
    with broker(tmp_path, "region", ["plane-01", "ingest-1"]) as port:
        ingest, device = certified(tmp_path, "ingest-1", port), certified(tmp_path, "plane-01", port)
        seen = collect(ingest, "fenceline/v1/+/up/+/+", count=2)
        for lane in ("united-states", "atlantic_united-states", "nowhere", "atlantic_europe", "europe"):
            device.publish(f"fenceline/v1/plane-01/up/{lane}/turbofan", lane.encode(), qos=1).wait_for_publish(WAIT_S)
        assert [payload for _, payload in seen()] == [b"atlantic_europe", b"europe"]


@pytest.mark.needs_mosquitto
def test_region_broker_does_not_let_a_device_write_receipts_or_desired_state(tmp_path: Path) -> None:
    with broker(tmp_path, "region", ["plane-01", "plane-02", "ingest-1"]) as port:
        ingest, device = certified(tmp_path, "ingest-1", port), certified(tmp_path, "plane-01", port)
        victim = certified(tmp_path, "plane-02", port)
        seen = collect(victim, "fenceline/v1/plane-02/#", count=1)
        for kind in ("receipts", "desired"):
            device.publish(f"fenceline/v1/plane-02/{kind}", b"forged", qos=1).wait_for_publish(WAIT_S)
        ingest.publish("fenceline/v1/plane-02/receipts", b"real", qos=1).wait_for_publish(WAIT_S)
        assert seen() == [("fenceline/v1/plane-02/receipts", b"real")]


@pytest.mark.needs_mosquitto
def test_region_broker_refuses_a_client_without_certificate(tmp_path: Path) -> None:
    with broker(tmp_path, "region", ["plane-01"]) as port:
        client = new_client("plane-01")
        client.tls_set(str(tmp_path / "ca.crt"))
        with pytest.raises(ConnectionRefusedError):
            connect(client, port)


@pytest.mark.needs_mosquitto
def test_region_broker_does_not_let_one_certificate_end_anothers_session(tmp_path: Path) -> None:
    with broker(tmp_path, "region", ["plane-01", "plane-02"]) as port:
        lost = threading.Event()
        victim = certified(tmp_path, "plane-01", port)
        victim.on_disconnect = lambda *_: lost.set()
        certified(tmp_path, "plane-02", port, client_id="plane-01")
        victim.publish("fenceline/v1/plane-01/events", b"still here", qos=1).wait_for_publish(WAIT_S)
        assert not lost.is_set()


@pytest.mark.needs_mosquitto
def test_region_broker_that_is_told_of_a_removed_device_denies_it_everything_and_lets_it_in_no_more(tmp_path: Path) -> None:
    make_list, revoke = (
        block for block in re.findall(r"```sh\n(.*?)```", (DEPLOY / "README.md").read_text(), re.S) if "revoked.pem" in block
    )
    with mosquitto(tmp_path, "region", ["plane-01", "plane-02", "ingest-1"], revoked=make_list) as running:
        ingest, other, lost = (certified(tmp_path, name, running.port) for name in ("ingest-1", "plane-02", "plane-01"))
        stored, heard = collect(ingest, "fenceline/v1/+/up/+/+", count=2), collect(lost, "fenceline/v1/plane-01/receipts", count=1)
        send = partial(lost.publish, "fenceline/v1/plane-01/up/europe/turbofan", qos=1)
        send(b"before").wait_for_publish(WAIT_S)
        ingest.publish("fenceline/v1/plane-01/receipts", b"before", qos=1).wait_for_publish(WAIT_S)
        heard()
        zones = parse_zones((DEPLOY.parent / "contracts" / "zones.geojson").read_bytes())
        (tmp_path / "region.acl").write_text(mosquitto_acl(zones, "eu", CLOUD, removed=["plane-01"]))
        subprocess.run(["bash", "-ec", revoke], cwd=tmp_path, check=True, capture_output=True, timeout=WAIT_S)
        os.kill(running.pid, signal.SIGHUP)
        wait_for_line(running.log, "Reloading config.")
        send(b"after").wait_for_publish(WAIT_S)
        ingest.publish("fenceline/v1/plane-01/receipts", b"after", qos=1).wait_for_publish(WAIT_S)
        other.publish("fenceline/v1/plane-02/up/europe/turbofan", b"other", qos=1).wait_for_publish(WAIT_S)
        assert [payload for _, payload in stored()] == [b"before", b"other"]
        lost.publish("fenceline/v1/plane-01/events", b"x", qos=1).wait_for_publish(WAIT_S)  # what was for it would have come before this
        assert [payload for _, payload in heard()] == [b"before"]
        with pytest.raises(ConnectionRefusedError):
            certified(tmp_path, "plane-01", running.port)
        certified(tmp_path, "plane-02", running.port)


@pytest.mark.needs_mosquitto
def test_sensor_broker_takes_readings_from_sensors_and_gives_them_to_the_agent(tmp_path: Path) -> None:
    with broker(tmp_path, "sensors", []) as port:
        agent, sensor = named(tmp_path, "agent", port), named(tmp_path, "sensor", port)
        seen = collect(agent, "sensors/#", count=1)
        agent.publish("sensors/plane-01/turbofan", b"the agent does not write", qos=1).wait_for_publish(WAIT_S)
        sensor.publish("sensors/plane-01/turbofan", b"{}", qos=1).wait_for_publish(WAIT_S)
        assert seen() == [("sensors/plane-01/turbofan", b"{}")]
        with pytest.raises(ConnectionRefusedError):
            named(tmp_path, "sensor", port, password="wrong")


def wait_for_line(log: Path, text: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while text not in log.read_text(errors="replace"):
        assert time.monotonic() < deadline, f"{text!r} is not in {log}"
        time.sleep(0.05)


@contextmanager
def broker(folder: Path, kind: str, names: list[str], acl: str | None = None) -> Iterator[int]:
    """The port of a `mosquitto`."""
    with mosquitto(folder, kind, names, acl) as running:
        yield running.port


@contextmanager
def mosquitto(folder: Path, kind: str, names: list[str], acl: str | None = None, revoked: str = "") -> Iterator[Broker]:
    """Mosquitto with deploy's configuration; only the paths, the port, the user that it runs as and the rights, if given, differ.

    `revoked`: the commands that make a list of revoked certificates, which it then goes by.
    """
    make_certificates(folder, names)
    subprocess.run(["bash", "-ec", revoked], cwd=folder, check=True, capture_output=True, timeout=WAIT_S)
    (folder / f"{kind}.acl").write_text(acl or (DEPLOY / "mosquitto" / f"{kind}.acl").read_text())
    (folder / "passwords").write_text("agent:agent-password\nsensor:sensor-password\n")
    subprocess.run(["mosquitto_passwd", "-U", str(folder / "passwords")], check=True, timeout=WAIT_S)
    text = (DEPLOY / "mosquitto" / f"{kind}.conf").read_text()
    text = text.replace("#crlfile", "crlfile" if revoked else "#crlfile")
    text = text.replace("/etc/mosquitto/fenceline", str(folder)).replace("/var/lib/mosquitto", str(folder))
    port = free_port()
    text = text.replace("listener 8883 127.0.0.1", "listener 8883").replace("listener 8883", f"listener {port} {HOST}")
    config = folder / "mosquitto.conf"
    config.write_text(f"{text}\nuser {pwd.getpwuid(os.getuid()).pw_name}\n")
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program
    running = Broker([program, "-c", str(config)], port, folder / "mosquitto.log")
    running.start()
    try:
        yield running
    finally:
        running.kill()


def make_certificates(folder: Path, names: list[str]) -> None:
    """An authority, the broker's certificate for loopback, and one client certificate per name."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    openssl = ["openssl", "req", "-x509", *key]
    signed = ["-CA", str(folder / "ca.crt"), "-CAkey", str(folder / "ca.key")]
    certificates = [("ca", "test devices", []), ("server", HOST, [*signed, "-addext", f"subjectAltName=IP:{HOST}"])]
    certificates += [(name, name, [*signed, "-addext", "basicConstraints=critical,CA:FALSE"]) for name in names]
    for file, subject, more in certificates:
        target = ["-subj", f"/CN={subject}", "-keyout", str(folder / f"{file}.key"), "-out", str(folder / f"{file}.crt")]
        subprocess.run([*openssl, *target, *more], check=True, capture_output=True, timeout=WAIT_S)


def new_client(client_id: str) -> mqtt.Client:
    return mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, reconnect_on_failure=False)


def certified(folder: Path, name: str, port: int, client_id: str | None = None) -> mqtt.Client:
    client = new_client(client_id or name)
    client.tls_set(str(folder / "ca.crt"), str(folder / f"{name}.crt"), str(folder / f"{name}.key"))
    return connect(client, port)


def named(folder: Path, name: str, port: int, password: str | None = None) -> mqtt.Client:
    client = new_client(name)
    client.tls_set(str(folder / "ca.crt"))
    client.username_pw_set(name, password or f"{name}-password")
    return connect(client, port)


def connect(client: mqtt.Client, port: int) -> mqtt.Client:
    """Connect and wait for the broker's answer."""
    answers: SimpleQueue[bool] = SimpleQueue()
    client.on_connect = lambda _client, _data, _flags, reason, _properties: answers.put(not reason.is_failure)
    client.on_disconnect = lambda *_: answers.put(False)
    client.connect(HOST, port)
    client.loop_start()
    if not answers.get(timeout=WAIT_S):
        raise ConnectionRefusedError("the broker refused the connection")
    return client


def collect(client: mqtt.Client, topic: str, count: int) -> Callable[[], list[tuple[str, bytes]]]:
    """Subscribe; the result waits for `count` messages and gives all that came."""
    messages: list[tuple[str, bytes]] = []
    enough, subscribed = threading.Event(), threading.Event()

    def on_message(_client: mqtt.Client, _data: object, message: mqtt.MQTTMessage) -> None:
        messages.append((message.topic, message.payload))
        if len(messages) >= count:
            enough.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe(topic, qos=1)
    assert subscribed.wait(WAIT_S)

    def wait() -> list[tuple[str, bytes]]:
        assert enough.wait(WAIT_S), f"only {messages} came"
        return messages

    return wait
