"""Bytes per reading on the uplink, counted at TCP level with TLS, both directions: the whole agent, and two usual ways to send.

- The agent reads a real Mosquitto and sends blocks of ROWS readings (five minutes at 1 Hz) over TLS to another, through a proxy that
  counts what TCP carries. Receipts come back the same way and count too. Every float64 is compared with what was published.
- One JSON message per reading, and zstd batches of ROWS JSON messages, go by paho, QoS 1, over the same TLS and proxy.
- Not counted, for nobody: TCP's own headers and the handshake. Readings go in as fast as they are taken, so what idle links cost
  (the agent's heartbeat, some 100 bytes every `heartbeat_s`, and keepalives) hardly shows: on a metered link, make `heartbeat_s` long.
"""

from __future__ import annotations

import argparse
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import zstandard
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from bench.block_bytes import check_equal
from bench.proxy import Proxy
from bench.report import Cell, Report, main
from bench.streams import Stream, engines, pump
from edge_agent.contract.block import ORDINAL, decode_block
from edge_agent.contract.columns import Table, concat, take
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import ALL_BLOCKS, DeviceTopics
from tests.brokers import Broker, ServerTls, mosquitto_broker
from tests.servers import HOST

ROOT = Path(__file__).parents[1]
CONTRACTS = {"turbofan": ROOT / "contracts" / "turbofan.odcs.yaml", "pump": ROOT / "bench" / "pump.odcs.yaml"}
DEVICE = "plane-01"
ROWS = 300
BLOCKS = 20
WAIT_S = 60.0


def measure(arguments: argparse.Namespace) -> Report:
    """Bytes per reading of both streams, in the three ways."""
    count = ROWS * (1 if arguments.quick else BLOCKS)
    rows: list[list[Cell]] = []
    numbers = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_certificate(folder)
        tls = ServerTls(folder / "server.crt", folder / "server.key")
        with mosquitto_broker(folder, name="region", tls=tls) as region, Proxy(region.port) as proxy:
            for stream in (first(engines(count // 150 + 1), count), first(pump(count), count)):
                ours = of_agent(folder / stream.name, stream, folder / "server.crt", region, proxy) / count
                batches = [b"\n".join(stream.messages[s : s + ROWS]) for s in range(0, count, ROWS)]
                compress = zstandard.ZstdCompressor(level=3).compress
                json_bytes = of_paho(stream.messages, folder / "server.crt", proxy) / count
                zstd_bytes = of_paho([compress(b) for b in batches], folder / "server.crt", proxy) / count
                rows.append([stream.name, json_bytes, zstd_bytes, ours, 100 * ours / json_bytes, 100 * ours / zstd_bytes])
                numbers[stream.name] = {
                    "ratio_to_json": ours / json_bytes,
                    "ratio_to_zstd_json": ours / zstd_bytes,
                    "lossless": True,
                    "bytes_per_reading": ours,
                    "json_bytes_per_reading": json_bytes,
                    "zstd_json_bytes_per_reading": zstd_bytes,
                }
    columns = ["stream", "JSON", "zstd JSON", "Fenceline", "% of JSON", "% of zstd JSON"]
    notes = [f"{count:,} readings each, {ROWS} to a block or batch. Every block decoded to the bits that were published (checked)."]
    return Report("Bytes per reading on the uplink: TCP payload with TLS, both directions", columns, rows, dict(numbers), notes)


def first(stream: Stream, count: int) -> Stream:
    """The first `count` readings."""
    return Stream(stream.name, stream.key, take(stream.table, slice(0, count)), stream.messages[:count])


def of_agent(folder: Path, stream: Stream, authority: Path, region: Broker, proxy: Proxy) -> int:
    """Bytes that the agent's uplink carried for all readings and their receipts.

    Raises:
        AssertionError: what arrived is not what was published.
    """
    folder.mkdir()
    with mosquitto_broker(folder, name="sensors") as sensors, Collector(region, authority, stream) as collector:
        config = write_config(folder, stream.name, authority, sensors.port, proxy.port)
        with (folder / "agent.log").open("wb") as log:
            agent = subprocess.Popen([sys.executable, "-m", "edge_agent.cli", "run", "--config", str(config)], stderr=log)
        try:
            wait_for_text(folder / "agent.log", "source connected", "endpoint connected")
            time.sleep(1.0)  # subscriptions and the retained documents of the start
            proxy.bytes = 0
            publish(stream.messages, f"sensors/{DEVICE}/{stream.name}", sensors.port)
            collector.wait()
            used = proxy.settled()
        finally:
            agent.send_signal(signal.SIGTERM)
            agent.wait(WAIT_S)
    got = concat(collector.tables)
    ordinals = got.pop(ORDINAL)
    assert isinstance(ordinals, np.ndarray)
    check_equal(take(got, np.argsort(ordinals)), stream.table)
    return used


def of_paho(payloads: list[bytes], authority: Path, proxy: Proxy) -> int:
    """Bytes that paho's connection carried for these messages and their PUBACKs."""
    client = Client(CallbackAPIVersion.VERSION2, "plain")
    client.tls_set(str(authority))
    client.connect(HOST, proxy.port)
    client.loop_start()
    deadline = time.monotonic() + WAIT_S
    while not client.is_connected() and time.monotonic() < deadline:
        time.sleep(0.01)
    proxy.settled()
    proxy.bytes = 0
    for payload in payloads:  # one by one: a busy client may share TLS records, one sensor a second cannot
        client.publish(f"sensors/{DEVICE}/readings", payload, qos=1).wait_for_publish(WAIT_S)
    used = proxy.settled()
    client.disconnect()
    client.loop_stop()
    return used


def publish(payloads: list[bytes], topic: str, port: int) -> None:
    client = Client(CallbackAPIVersion.VERSION2, "sensor")
    client.connect(HOST, port)
    client.loop_start()
    for info in [client.publish(topic, payload, qos=1) for payload in payloads]:
        info.wait_for_publish(WAIT_S)
    client.disconnect()
    client.loop_stop()


class Collector:
    """The cloud's end: keeps the blocks of a stream, answers each with a receipt."""

    def __init__(self, region: Broker, authority: Path, stream: Stream) -> None:
        self.tables: list[Table] = []
        self._stream, self._rows = stream, 0
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._settled: dict[str, SequenceSet] = {}
        self._client = Client(CallbackAPIVersion.VERSION2, "cloud")
        self._client.tls_set(str(authority))
        self._client.on_connect = lambda client, *_: client.subscribe(ALL_BLOCKS, 1)
        self._client.on_message = self._take
        self._client.connect(region.host, region.port)
        self._client.loop_start()

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def wait(self) -> None:
        self._done.get(timeout=WAIT_S)

    def _take(self, client: Client, _data: object, message: MQTTMessage) -> None:
        header, table = decode_block(bytes(message.payload))
        settled = self._settled.setdefault(header.epoch, SequenceSet())
        settled.add(header.sequence)
        lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
        receipt = Receipt(device=header.device, epoch=header.epoch, lanes=[lane])
        client.publish(DeviceTopics(header.device).receipts, encode_receipt(receipt), qos=0)
        if header.stream == self._stream.name:
            self.tables.append(table)
            self._rows += header.rows
            if self._rows >= len(self._stream.messages):
                self._done.put(None)


def write_config(folder: Path, stream: str, authority: Path, sensors_port: int, uplink_port: int) -> Path:
    shutil.copy(CONTRACTS[stream], folder / "stream.odcs.yaml")
    shutil.copy(ROOT / "contracts" / "zones.geojson", folder)
    path = folder / "agent.toml"
    path.write_text(
        f'device = "{DEVICE}"\nstate_dir = "state"\nzones = "zones.geojson"\n'
        f'[sensors]\nurl = "mqtt://{HOST}:{sensors_port}"\nsubscribe = "sensors/{DEVICE}/#"\n'
        '[[streams]]\ncontract = "stream.odcs.yaml"\n'
        '[position]\nsource = "static"\nlat = 50.0\nlon = 9.0\n'
        f'[[endpoints]]\nname = "eu"\nurl = "mqtts://{HOST}:{uplink_port}"\nca_file = "{authority}"\n'
        f"[flush]\nrows_max = {ROWS}\nms_max = 300_000\n\n"
    )
    return path


def make_certificate(folder: Path) -> None:
    """A self-signed certificate for loopback."""
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
    files = ["-keyout", str(folder / "server.key"), "-out", str(folder / "server.crt")]
    subject = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=IP:{HOST}"]
    subprocess.run(["openssl", "req", "-x509", *key, *subject, *files], check=True, capture_output=True, timeout=WAIT_S)


def wait_for_text(path: Path, *texts: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not all(text in path.read_text(errors="replace") for text in texts):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{texts} not in {path.read_text(errors='replace')[-2000:]}")
        time.sleep(0.05)


if __name__ == "__main__":
    main(__doc__, measure)
