"""The site of the failover benchmark: a device and three regional brokers, each in a place of its own on a network that can break.

- Two endpoints, `eu-1` and `eu-2`, may hold the device's zone; `us-1` may not, is reachable all the time, and its port is counted.
- Mosquitto runs with deploy/mosquitto/region.conf as it is (mTLS, name = user = client id, rights per zone); only paths, port and the
  user that it runs as differ. Or the NATS server, the embedded broker, with mTLS and the rights of cloud/brokers.py.
- `store` says where blocks are stored, by endpoint: in memory, or (bench/failover_delta.py) in a Delta lake.
- The device's own sensor broker is a plain Mosquitto on its loopback.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.failover_lake import PROBE, Ingest, Lake, Store, new_client
from cloud.brokers import device_rights, server_path
from cloud.rights import lanes_of, mosquitto_acl
from edge_agent.contract.topics import DeviceTopics
from edge_agent.core.zones import parse_zones
from tests.brokers import Broker
from tests.certificates import Authority, Identity
from tests.faults.network import Network, Place

DEPLOY = Path(__file__).parents[1] / "deploy" / "mosquitto"
DEVICE, BRIDGE, INGEST = "plane-01", "bridge-01", "ingest-1"
ALLOWED, FOREIGN = ("eu-1", "eu-2"), "us-1"
ZONE, FOREIGN_ZONE = "europe", "united-states"
PORT, SENSOR_PORT = 8883, 1883
WAIT_S = 20.0
PROBES = 50
PAYLOAD_BYTES_MAX = 8 * 1024 * 1024 + 64 * 1024


class PlacedBroker(Broker):
    """A broker that runs in a place; it can be killed, frozen and started again."""

    def __init__(self, command: list[str], place: Place, port: int, log: Path, address: str = "") -> None:
        super().__init__(place.command(command), port, log)
        self.host, self.place = address or place.address, place

    def _wait(self) -> None:
        with self.place.entered():
            super()._wait()


class Site:
    """Everything around the device; a context manager."""

    def __init__(self, folder: Path, kind: str = "mosquitto", store: Callable[[str, Lake], Store] | None = None) -> None:
        self.folder, self.kind, self._store = folder, kind, store
        self.authority = Authority(folder / "certificates")
        self.zones = _write_zones(folder / "zones.geojson")
        self.lake = Lake()
        self.network = Network()
        self.device = self.network.place("device")
        self.brokers: dict[str, PlacedBroker] = {}
        self.ingests: dict[str, Ingest] = {}

    def __enter__(self) -> Site:
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for ingest in self.ingests.values():
            ingest.close()
        for broker in [*self.brokers.values(), *([self.sensors] if hasattr(self, "sensors") else [])]:
            broker.kill()
        self.network.close()

    def identity(self, name: str) -> Identity:
        """The certificate of a client; made when first asked for."""
        folder = self.authority.folder
        found = Identity(name, folder / f"{name}.crt", folder / f"{name}.key", self.authority.certificate)
        return found if found.certificate.exists() else self.authority.issue(name)

    def start_ingests(self) -> None:
        """One ingest per endpoint, and wait until all have subscribed."""
        for name, broker in self.brokers.items():
            store = self._store(name, self.lake) if self._store is not None else None
            ingest = Ingest(self.lake, name, broker.place, PORT, self.identity(INGEST), frozenset({BRIDGE}), store)
            self.ingests[name] = ingest
            if not ingest.ready.wait(WAIT_S):
                raise RuntimeError(f"the ingest of {name} was not let in: {broker.log.read_text(errors='replace')[-2_000:]}")

    def foreign_bytes(self) -> int:
        """What has arrived at the foreign endpoint's port from outside."""
        return self.brokers[FOREIGN].place.counted_bytes(PORT)

    def slow_down(self, name: str, *, slow: bool) -> None:
        """Send what goes between the device and an endpoint over the slow, lossy cable, or over the good one again."""
        self.network.use(self.device, self.brokers[name].place, slow=slow)

    def puback_offset_ms(self, name: str) -> list[float]:
        """By how much a subscriber at the endpoint hears of a message later than its sender of the PUBACK: PROBES measurements, sorted."""
        broker, heard, acked = self.brokers[name], threading.Event(), threading.Event()
        times: dict[str, float] = {}

        def note(what: str, event: threading.Event) -> None:
            times[what] = time.monotonic()
            event.set()

        sender, listener = new_client(self.identity(PROBE)), new_client(self.identity("ingest-probe"))
        topic = DeviceTopics(PROBE).up(ZONE, PROBE)
        subscribed = threading.Event()
        listener.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        listener.on_subscribe = lambda *_: subscribed.set()
        listener.on_message = lambda *_: note("heard", heard)
        sender.on_publish = lambda *_: note("acked", acked)
        for client, place in ((listener, broker.place), (sender, self.device)):
            with place.entered():
                client.connect(broker.host, PORT)
                client.loop_start()
        if not subscribed.wait(WAIT_S):
            raise RuntimeError(f"{name} does not let the probe in")
        offsets = []
        for _ in range(PROBES):
            for event in (heard, acked):
                event.clear()
            sender.publish(topic, b"x" * 1_000, qos=1)
            if not (heard.wait(WAIT_S) and acked.wait(WAIT_S)):
                raise RuntimeError(f"{name} does not forward the probe")
            offsets.append((times["heard"] - times["acked"]) * 1e3)
        for client in (sender, listener):
            client.disconnect()
            client.loop_stop()
        return sorted(offsets)

    def _build(self) -> None:
        for name in (*ALLOWED, FOREIGN):
            place = self.network.place(name)
            self.network.join(self.device, place)
            self.authority.issue(name, place.address)
            write = _mosquitto if self.kind == "mosquitto" else _nats
            self.brokers[name] = PlacedBroker(write(self, name, place), place, PORT, self.folder / name / "broker.log")
            self.brokers[name].start()
        self.brokers[FOREIGN].place.count(PORT)
        self.sensors = PlacedBroker(_sensor_broker(self.folder), self.device, SENSOR_PORT, self.folder / "sensors.log", "127.0.0.1")
        self.sensors.start()
        self.start_ingests()


def mosquitto_path() -> str:
    """The Mosquitto of this machine."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise RuntimeError("mosquitto is not installed: make system-deps")
    return found


def run_as() -> str:
    """The line that lets Mosquitto keep the user that starts it."""
    return f"user {pwd.getpwuid(os.getuid()).pw_name}"


def _mosquitto(site: Site, name: str, place: Place) -> list[str]:
    """deploy's configuration with other paths, and the rights of this region."""
    home = site.folder / name
    home.mkdir()
    for file, source in (("ca.crt", "ca.crt"), ("server.crt", f"{name}.crt"), ("server.key", f"{name}.key")):
        shutil.copy(site.authority.folder / source, home / file)
    zones = parse_zones(site.zones.read_bytes())
    (home / "region.acl").write_text(mosquitto_acl(zones, name, [INGEST, "ingest-probe"]))
    text = (DEPLOY / "region.conf").read_text()
    text = text.replace("/etc/mosquitto/fenceline", str(home)).replace("/var/lib/mosquitto", str(home))
    (home / "mosquitto.conf").write_text(f"{text}\n{run_as()}\n")
    return [mosquitto_path(), "-c", str(home / "mosquitto.conf")]


def _nats(site: Site, name: str, place: Place) -> list[str]:
    """The embedded broker: who a client is follows from its certificate here too."""
    home, lanes = site.folder / name, lanes_of(parse_zones(site.zones.read_bytes()), name)
    home.mkdir()
    server = Identity(name, site.authority.folder / f"{name}.crt", site.authority.folder / f"{name}.key", site.authority.certificate)
    devices = [{"user": f"CN={d}", "permissions": device_rights(d, lanes)} for d in (DEVICE, BRIDGE, PROBE)]
    tls = {"cert_file": str(server.certificate), "key_file": str(server.key), "ca_file": str(server.ca), "verify_and_map": True}
    document = {
        "server_name": name,
        "listen": f"{place.address}:-1",
        "max_payload": PAYLOAD_BYTES_MAX,
        "max_pending": 8 * PAYLOAD_BYTES_MAX,
        "jetstream": {"store_dir": str(home / "store")},
        "mqtt": {"listen": f"0.0.0.0:{PORT}", "ack_wait": "2s", "max_ack_pending": 512, "tls": tls},
        "authorization": {"users": [*devices, {"user": f"CN={INGEST}"}, {"user": "CN=ingest-probe"}]},
    }
    (home / "nats.conf").write_text(json.dumps(document, indent=1))
    return [str(server_path()), "-c", str(home / "nats.conf")]


def _sensor_broker(folder: Path) -> list[str]:
    config = folder / "sensors.conf"
    lines = [f"listener {SENSOR_PORT} 127.0.0.1", "allow_anonymous true", "persistence false", run_as()]
    lines += ["max_queued_messages 1000000", "max_inflight_messages 0", "set_tcp_nodelay true"]
    config.write_text("\n".join([*lines, ""]))
    return [mosquitto_path(), "-c", str(config)]


def _write_zones(path: Path) -> Path:
    features = []
    for zone, west, endpoints in ((ZONE, 0, ALLOWED), (FOREIGN_ZONE, -100, (FOREIGN,))):
        ring = [[west, 40], [west + 20, 40], [west + 20, 60], [west, 60], [west, 40]]
        properties = {"zone": zone, "endpoints": list(endpoints)}
        features.append({"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": [ring]}})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path
