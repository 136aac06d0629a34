"""What is on the device in the failover benchmark: sensors at a steady rate, and behind them the agent, or a Mosquitto bridge.

Both forwarders offer the same: `target` and `spare` (the endpoints that carry and that stand by, as far as it tells), `settled`
(everything is warm again), `moves` (how often it has changed the endpoint).
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from bench.failover_lake import READING
from bench.failover_site import (
    ALLOWED,
    BRIDGE,
    DEVICE,
    FOREIGN,
    PORT,
    SENSOR_PORT,
    WAIT_S,
    ZONE,
    PlacedBroker,
    Site,
    mosquitto_path,
    run_as,
)
from edge_agent.contract.errors import UnavailableError
from edge_agent.status import ask

STREAM = "pump"
BURST_S = 0.01
FAILBACK_S = 60.0
BACKOFF_S_MAX = 0.5
RECEIPT_TIMEOUT_S = 5.0
FRESH_S = 0.25
CONTRACT = f"""
apiVersion: v3.1.0
kind: DataContract
version: 1.0.0
schema:
  - name: {STREAM}
    customProperties:
      - {{property: topic, value: "sensors/{{device}}/{STREAM}"}}
      - {{property: eventTime, value: ts}}
      - {{property: entity, value: pump}}
    properties:
      - {{name: ts, logicalType: timestamp, required: true, primaryKey: true, primaryKeyPosition: 2}}
      - {{name: pump, logicalType: string, required: true, primaryKey: true, primaryKeyPosition: 1}}
      - {{name: {READING}, logicalType: integer, required: true}}
      - {{name: pressure, logicalType: number, required: true}}
      - {{name: flow, logicalType: number, required: true}}
"""


class Sensors:
    """Publishes numbered readings, QoS 1: `rate` a second, or one at a time. `published` holds the time of each."""

    def __init__(self, site: Site, device: str) -> None:
        self._topic = f"sensors/{device}/{STREAM}"
        self.published: list[float] = []
        self.rate = 0.0
        self._ended = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, f"sensors-of-{device}")
        self._client.max_inflight_messages_set(0)
        with site.device.entered():
            self._client.connect("127.0.0.1", SENSOR_PORT)
            self._client.loop_start()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def publish(self) -> int:
        """Publish one reading; returns its number."""
        number = len(self.published)
        self.published.append(time.monotonic())
        reading = {"ts": time.time(), "pump": "p1", READING: number, "pressure": 3.25 + number % 7 / 4, "flow": 41.5 + number % 11 / 2}
        self._client.publish(self._topic, json.dumps(reading).encode(), qos=1)
        return number

    def close(self) -> None:
        self._ended.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()

    def _run(self) -> None:
        due = 0.0
        while not self._ended.wait(BURST_S):
            due += self.rate * BURST_S
            while due >= 1.0:
                self.publish()
                due -= 1.0


class Agent:
    """The agent, a process of its own on the device."""

    name = DEVICE

    def __init__(self, site: Site, failback_s: float = FAILBACK_S) -> None:
        self._site, self._home = site, site.folder / "agent"
        self._home.mkdir()
        self._log = self._home / "agent.log"
        config = _agent_toml(site, self._home, failback_s)
        command = site.device.command([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)])
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stderr=log)
        wait_for(lambda: self.settled(), self.log, WAIT_S)

    def route(self) -> tuple[str | None, str | None]:
        """The endpoint that carries the zone's lane now, and its standby."""
        status = self.status()
        lane, endpoints = status["lanes"].get(ZONE), status["endpoints"]
        if lane is None:
            return None, None
        return lane["endpoint"], lane["standby"] if lane["standby"] and endpoints[lane["standby"]]["connected"] else None

    def settled(self) -> bool:
        """Both endpoints of the zone are connected, one of them carries the lane."""
        return None not in self.route()

    def moves(self) -> int:
        """Changes of the endpoint since the start, by the agent's own log."""
        return len(re.findall(r"lane moved lane=\S+ from=(?!None)", self.log()))

    def status(self) -> dict[str, Any]:
        try:
            return ask(self._home / "state")
        except UnavailableError:
            if self._process.poll() is not None:
                raise RuntimeError(f"the agent ended: {self.log()[-3_000:]}") from None
            return {"lanes": {}, "endpoints": {}}

    def memory_kib(self) -> int:
        """Resident memory of the agent's process."""
        text = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", text)[0])

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Bridge:
    """Mosquitto as a bridge with two addresses, in its quickest settings: keepalive 5 s (the least it takes), reconnect after 1 s."""

    name = BRIDGE

    def __init__(self, site: Site) -> None:
        self._site = site
        self._log = site.folder / "bridge.log"
        self._broker = PlacedBroker(_bridge(site), site.device, SENSOR_PORT, self._log, "127.0.0.1")
        site.sensors.kill()  # the bridge's own broker takes the sensors' messages
        self._broker.start()

    def route(self) -> tuple[str | None, str | None]:
        """Who brought the last readings; it returns to the first address by itself."""
        arrivals = self._site.lake.arrivals
        if not arrivals or time.monotonic() - arrivals[-1].at > FRESH_S:
            return None, None
        return arrivals[-1].endpoint, next(e for e in ALLOWED if e != arrivals[-1].endpoint)

    def settled(self) -> bool:
        return self.route()[0] == ALLOWED[0]

    def moves(self) -> int:
        """Changes of the endpoint, by where readings arrived."""
        where = [a.endpoint for a in self._site.lake.arrivals]
        return sum(a != b for a, b in itertools.pairwise(where))

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        self._broker.kill()


Forwarder = Agent | Bridge


def wait_for(done: Callable[[], bool], explain: Callable[[], str], timeout_s: float) -> None:
    """Wait until `done`.

    Raises:
        RuntimeError: it is not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not within {timeout_s:g} s: {explain()[-3_000:]}")
        time.sleep(0.03)


def _agent_toml(site: Site, home: Path, failback_s: float) -> Path:
    (home / f"{STREAM}.odcs.yaml").write_text(CONTRACT)
    identity = site.identity(DEVICE)
    lines = [f'device = "{DEVICE}"', 'state_dir = "state"', f'zones = "{site.zones}"', "[sensors]"]
    lines += [f'url = "mqtt://127.0.0.1:{SENSOR_PORT}"', f'subscribe = "sensors/{DEVICE}/#"']
    lines += ["[[streams]]", f'contract = "{STREAM}.odcs.yaml"', "[position]", 'source = "static"', "lat = 50.0", "lon = 9.0"]
    lines += ["[uplink]", f"failback_s = {failback_s}", f"receipt_timeout_s = {RECEIPT_TIMEOUT_S}", f"backoff_s_max = {BACKOFF_S_MAX}"]
    for name in (*ALLOWED, FOREIGN):
        lines += ["[[endpoints]]", f'name = "{name}"', f'url = "mqtts://{site.brokers[name].host}:{PORT}"']
        lines += [f'ca_file = "{identity.ca}"', f'cert_file = "{identity.certificate}"', f'key_file = "{identity.key}"']
    path = home / "agent.toml"
    path.write_text("\n".join([*lines, ""]))
    return path


def _bridge(site: Site) -> list[str]:
    home, identity = site.folder / "bridge", site.identity(BRIDGE)
    home.mkdir()
    lines = [f"listener {SENSOR_PORT} 127.0.0.1", "allow_anonymous true", run_as(), "set_tcp_nodelay true"]
    lines += ["persistence true", f"persistence_location {home}/", "max_queued_messages 1000000", "max_inflight_messages 0"]
    lines += ["connection region", f"addresses {' '.join(f'{site.brokers[e].host}:{PORT}' for e in ALLOWED)}", "round_robin false"]
    lines += [f"remote_clientid {BRIDGE}", "cleansession false", "notifications false", "bridge_protocol_version mqttv311"]
    lines += ["keepalive_interval 5", "restart_timeout 1"]
    lines += [f"bridge_cafile {identity.ca}", f"bridge_certfile {identity.certificate}", f"bridge_keyfile {identity.key}"]
    lines += [f"topic # out 1 sensors/{BRIDGE}/ fenceline/v1/{BRIDGE}/up/{ZONE}/"]
    (home / "mosquitto.conf").write_text("\n".join([*lines, ""]))
    return [mosquitto_path(), "-c", str(home / "mosquitto.conf")]
