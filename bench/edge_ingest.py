"""How many readings a second go through the edge, and what each costs: Fenceline against forwarders and a bridge.

Fifty pumps, each on its own connection, publish small JSON readings with QoS 1 to a real Mosquitto; from there they must reach a second
one, upstream.

- Fenceline runs as the agent does: checks, redelivery filter, zone, fsync before PUBACK, blocks, uplink, receipts; then again with a window
  model, and with the pumps connected to its own listener and no local broker. A light cloud takes the blocks upstream, sends receipts, and
  afterwards checks every value of every reading. `lost` counts those that never came.
- The limit is our bulk reader that only PUBACKs: nothing is decoded, stored or sent.
- The forwarders (paho, gmqtt) and the Mosquitto bridge pass each message on with QoS 1. Nothing is subscribed upstream but the last
  message, so that the peers do not pay for a cloud; the upstream broker's own count shows whether all came.
- Readings per second: from the first publish until the last reading is upstream. Processor time: user and system, of all processes
  named. "with broker" adds the local Mosquitto; the bridge is its own local broker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from bench import gateway
from bench.peers.sensors import MARKER_TOPIC
from bench.report import Cell, Report, main
from bench.running import Peer, cpu_s, mosquitto, peak_mb, peer, wait_for
from tests.brokers import Broker
from tests.servers import HOST, free_port

COUNTS = {"fast": 400_000, "gmqtt": 150_000, "paho": 25_000}
QUICK_COUNTS = {"fast": 5_000, "gmqtt": 2_000, "paho": 500}
START_S_MAX = 30.0
RUN_S_MAX = 120.0
UNSCORED_SHARE_MAX = 0.01
RECEIVED = "$SYS/broker/publish/messages/received"


@dataclass(frozen=True)
class Result:
    """One run: `cpu` and `broker_cpu` are seconds; `found` is what the receiver's check says."""

    count: int
    seconds: float
    cpu: float
    broker_cpu: float
    peak_mb: float = 0.0
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def per_s(self) -> float:
        return self.count / self.seconds

    @property
    def cpu_us(self) -> float:
        return self.cpu / self.count * 1e6

    @property
    def edge_us(self) -> float:
        return (self.cpu + self.broker_cpu) / self.count * 1e6


def measure(arguments: argparse.Namespace) -> Report:
    """Every way, one after the other."""
    counts = QUICK_COUNTS if arguments.quick else COUNTS
    profile = arguments.profile
    ways: dict[str, Callable[[Path], Result]] = {
        "limit": lambda home: limit(home, counts["fast"]),
        "fenceline": lambda home: fenceline(home, counts["fast"], profile=profile),
        "fenceline_model": lambda home: fenceline(home, counts["fast"], model=True, profile=profile),
        "fenceline_listener": lambda home: fenceline(home, counts["fast"], listener=True, profile=profile),
        "mosquitto_bridge": lambda home: bridge(home, counts["fast"]),
        "gmqtt_forwarder": lambda home: forwarder(home, "gmqtt", counts["gmqtt"]),
        "paho_forwarder": lambda home: forwarder(home, "paho", counts["paho"]),
    }
    wanted = arguments.only.split(",") if arguments.only else list(ways)
    results = {name: _best(ways[name], 1 if arguments.quick else arguments.rounds) for name in wanted}
    return _report(results)


def _best(way: Callable[[Path], Result], rounds: int) -> Result:
    """The fastest of several runs, each in a new directory on the disk; what any of them lost counts."""
    runs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="fenceline-bench-") as home:
            runs.append(way(Path(home)))
    best = max(runs, key=lambda r: r.per_s)
    best.found["lost"] = sum(int(r.found.get("lost", 0)) for r in runs)
    return best


def limit(home: Path, count: int) -> Result:
    """What broker, generator and a reader that does nothing leave possible."""
    with mosquitto(home, "local") as local, peer(home, "bench.peers.bulk_reader", "--port", local.port, "--count", count) as reader:
        reader.line(START_S_MAX)
        with _timed(count, reader, local) as run:
            run.started = _publish(home, local.port, count)
            run.ended = float(reader.line(RUN_S_MAX))
        return run.result()


def fenceline(home: Path, count: int, *, model: bool = False, listener: bool = False, profile: bool = False) -> Result:
    """The agent with everything on."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(mosquitto(home, "upstream"))
        local = None if listener else stack.enter_context(mosquitto(home, "local"))
        port = free_port() if local is None else local.port
        cloud = stack.enter_context(peer(home, "bench.peers.cloud", "--port", upstream.port, "--count", count))
        cloud.line(START_S_MAX)
        more = ["--profile"] if profile else []
        gateway.write(home, port, upstream.port, model=model, listener=listener)
        agent = stack.enter_context(peer(home, "edge_agent.cli", "run", "--config", home / "agent.toml", *more))
        gateway.wait_until_ready(home, agent, model=model)
        with _timed(count, agent, local) as run:
            run.started = _publish(home, port, count)
            run.ended = float(cloud.line(RUN_S_MAX))
            gateway.wait_until_settled(home)
        run.found = json.loads(cloud.line(RUN_S_MAX)) | {"profile": gateway.status(home).get("profile")}
        if not model:
            run.found["unscored"] = 0
        if run.found["repeated"] or run.found["wrong"] or run.found["other"] or run.found["unscored"] > UNSCORED_SHARE_MAX * count:
            raise AssertionError(f"not every reading came once and as it was sent: {run.found}\n{agent.log()}")
        return run.result()


def forwarder(home: Path, library: str, count: int) -> Result:
    """A forwarder over an MQTT library."""
    with contextlib.ExitStack() as stack:
        upstream, local = stack.enter_context(mosquitto(home, "upstream")), stack.enter_context(mosquitto(home, "local"))
        arrived = stack.enter_context(_marker(upstream))
        module = f"bench.peers.{library}_forwarder"
        running = stack.enter_context(peer(home, module, "--port", local.port, "--upstream", upstream.port))
        running.line(START_S_MAX)
        with _timed(count, running, local) as run:
            run.started = _publish(home, local.port, count, marker=True)
            run.ended = arrived(count)
        return run.result()


def bridge(home: Path, count: int) -> Result:
    """Mosquitto's own bridge, with persistence."""
    with mosquitto(home, "upstream") as upstream, _marker(upstream) as arrived:
        lines = ["connection up", f"address {HOST}:{upstream.port}", "topic sensors/# out 1", "bridge_protocol_version mqttv311"]
        with mosquitto(home, "local", *lines, "cleansession false", "restart_timeout 1") as local:
            time.sleep(1.5)  # the bridge connects
            with _timed(count, None, local) as run:
                run.started = _publish(home, local.port, count, marker=True)
                run.ended = arrived(count)
            return run.result()


class _Run:
    """The clock of one run."""

    def __init__(self, count: int, process: Peer | None, broker: Broker | None) -> None:
        self._count, self._process, self._broker = count, process, broker
        self.started = self.ended = self._cpu = self._broker_cpu = self._peak_mb = 0.0
        self.found: dict[str, Any] = {}

    def read(self, sign: int) -> None:
        """Begin (-1) or end (+1) to count processor time."""
        self._cpu += sign * (cpu_s(self._process.pid) if self._process else 0.0)
        self._broker_cpu += sign * (cpu_s(self._broker.pid) if self._broker else 0.0)
        if self._process and sign > 0:
            self._peak_mb = peak_mb(self._process.pid)

    def result(self) -> Result:
        return Result(self._count, self.ended - self.started, self._cpu, self._broker_cpu, self._peak_mb, self.found)


@contextlib.contextmanager
def _timed(count: int, process: Peer | None, broker: Broker | None) -> Iterator[_Run]:
    run = _Run(count, process, broker)
    run.read(-1)
    yield run
    run.read(+1)


def _publish(home: Path, port: int, count: int, *, marker: bool = False) -> float:
    """Run the pumps to the end; returns when they began."""
    more = ["--marker"] if marker else []
    with peer(home, "bench.peers.sensors", "--port", port, "--count", count, *more) as sensors:
        return float(json.loads(sensors.line(RUN_S_MAX))["started"])


@contextlib.contextmanager
def _marker(upstream: Broker) -> Iterator[Callable[[int], float]]:
    """A function that waits for the last message and gives its time; it raises if the broker has not counted `count` readings."""
    times: list[float] = []
    received: list[int] = []
    client = Client(CallbackAPIVersion.VERSION2, "marker")
    client.message_callback_add(MARKER_TOPIC, lambda *_: times.append(time.monotonic()))
    client.message_callback_add(RECEIVED, lambda _c, _d, message: received.append(int(message.payload)))
    client.on_connect = lambda c, *_: c.subscribe([(MARKER_TOPIC, 1), (RECEIVED, 0)])
    client.connect(HOST, upstream.port)
    client.loop_start()

    def wait(count: int) -> float:
        wait_for(lambda: bool(times), RUN_S_MAX, lambda: f"the last message did not come; {received[-1:]} of {count}")
        wait_for(lambda: bool(received) and received[-1] >= count, 10.0, lambda: f"only {received[-1:]} of {count} readings came")
        return times[0]

    try:
        yield wait
    finally:
        client.disconnect()
        client.loop_stop()


TITLES = {
    "limit": "bulk reader, PUBACK only (the limit)",
    "fenceline": "Fenceline",
    "fenceline_model": "Fenceline, with a window model",
    "fenceline_listener": "Fenceline, pumps at its listener",
    "mosquitto_bridge": "Mosquitto bridge with persistence",
    "gmqtt_forwarder": "gmqtt forwarder, no disk",
    "paho_forwarder": "paho forwarder, no disk",
}


def _profile_notes(name: str, profile: dict[str, Any]) -> list[str]:
    """Processor time by step, in words."""
    parts = [f"{step} {spent['cpu_us_per_reading']:.2f}" for step, spent in (profile["steps"] | profile["beside"]).items()]
    return [f"{TITLES[name]}, {profile['readings'] / max(1, profile['batches']):.0f} readings a batch, CPU µs: {', '.join(parts)}"]


def _report(results: dict[str, Result]) -> Report:
    rows: list[list[Cell]] = []
    for name, r in results.items():
        agent: Cell = r.cpu_us if r.cpu else "-"
        rows.append([TITLES[name], r.per_s, agent, r.edge_us, r.peak_mb or "-", r.found.get("lost", 0) if "blocks" in r.found else "-"])
    numbers: dict[str, Any] = {f"{name}_readings_per_s": r.per_s for name, r in results.items()}
    numbers |= {f"{name}_cpu_us_per_reading": r.edge_us for name, r in results.items() if name.endswith(("bridge", "forwarder"))}
    for name, cpu, edge in (
        ("fenceline", "cpu_us_per_reading", "edge_cpu_us_per_reading"),
        ("fenceline_model", "cpu_us_per_reading_with_model", "edge_cpu_us_per_reading_with_model"),
        ("fenceline_listener", "cpu_us_per_reading_listener", "edge_cpu_us_per_reading_listener"),
    ):
        if name in results:
            numbers |= {cpu: results[name].cpu_us, edge: results[name].edge_us}
    if "fenceline_listener" in results:
        numbers["listener_readings_per_s"] = numbers.pop("fenceline_listener_readings_per_s")
    numbers["lost"] = sum(int(r.found.get("lost", 0)) for r in results.values())
    numbers["unscored"] = sum(int(r.found.get("unscored", 0)) for r in results.values())
    numbers["readings"] = {name: r.count for name, r in results.items()}
    numbers["peak_mb"] = {name: r.peak_mb for name, r in results.items() if r.peak_mb}
    if "limit" in results and "fenceline" in results:
        numbers["share_of_limit"] = results["fenceline"].per_s / results["limit"].per_s
    columns = ["way", "readings/s", "CPU µs", "with broker", "peak MB", "lost"]
    notes = [
        "CPU in µs per reading. Lost: of Fenceline every value of every reading was compared; the others' messages were counted upstream."
    ]
    for name, r in results.items():
        notes += _profile_notes(name, r.found["profile"]) if r.found.get("profile") else []
    return Report("QoS 1 readings from sensors to an upstream broker", columns, rows, numbers, notes)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=2, help="the fastest of so many runs counts; default 2")
    parser.add_argument("--profile", action="store_true", help="run the agent with --profile and say where its time goes")
    parser.add_argument("--only", default="", help=f"some ways only, of {','.join(TITLES)}")


if __name__ == "__main__":
    main(__doc__, measure, options)
