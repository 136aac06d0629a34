"""Sensors of twenty engines, or of fifty pumps, on one MQTT connection, at a steady rate, QoS 1.

`python -m bench.sensors --port N --rate R --seconds S --out FILE [--stream vibration]`

Written for a light hand: raw packets, sent in time slices, so that it takes little of the machine that it measures. FILE gets what was
published and acknowledged, and the times from send to PUBACK.
"""

from __future__ import annotations

import argparse
import json
import select
import socket
import time
from pathlib import Path

from bench.peers import sensors as pumps
from edge_agent.mqtt import frames

ENGINES = 20
CYCLES = 1_000_000  # what the contract allows: a soak sends more readings than that
SLICE_S = 0.002
RETRY_S = 0.1
DRAIN_S = 120.0
UNACKED_MAX = 20_000  # more wait with the sensors themselves: packet ids come again after 65,535
_VALUES = [518.67, 641.82, 1589.7, 1400.6, 14.62, 21.61, 554.36, 2388.06, 9046.19, 1.3, 47.47, 521.66, 2388.02, 8138.62, 8.4195, 0.03]
_VALUES += [392, 2388, 100.0, 39.06, 23.419]


class Sensors:
    """One connection; `unacked` holds send time and packet of the ids that wait for their PUBACK: they go again after a reconnect."""

    def __init__(self, port: int, stream: str) -> None:
        self._topic, self._reading = STREAMS[stream]
        self._port = port
        self.sent = self.connections = 0
        self.first_us = self.last_us = 0
        self.unacked: dict[int, tuple[int, bytes]] = {}
        self.puback_us: list[int] = []
        self._rest = b""
        self._sock = self._connect()

    def publish(self, count: int) -> None:
        """Send `count` readings, each with its own time."""
        packets = []
        for _ in range(count):
            self.sent += 1
            now_us = time.time_ns() // 1_000
            now_us = self.last_us = max(now_us, self.last_us + 1)  # (engine, time) names a reading
            self.first_us = self.first_us or now_us
            id_ = self.sent % 65_535 + 1
            body = len(self._topic).to_bytes(2) + self._topic + id_.to_bytes(2) + self._reading(self.sent, now_us)
            self.unacked[id_] = now_us, length(len(body)) + body
            packets.append(b"\x32" + length(len(body)) + body)
        try:
            self._sock.sendall(b"".join(packets))
        except OSError:
            self._reconnect()

    def read(self, wait_s: float) -> None:
        """Take the PUBACKs that come within `wait_s`."""
        if not select.select([self._sock], [], [], max(0.0, wait_s))[0]:
            return
        try:
            new = self._sock.recv(1 << 18)
        except OSError:
            new = b""
        if not new:
            self._reconnect()
            return
        data = self._rest + new
        now_us = time.time_ns() // 1_000
        whole = len(data) // 4 * 4
        for i in range(0, whole, 4):
            assert data[i] == 0x40, data[i : i + 4].hex()
            sent_us, _ = self.unacked.pop(int.from_bytes(data[i + 2 : i + 4]))
            self.puback_us.append(now_us - sent_us)
        self._rest = data[whole:]

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self._port), 30.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(frames.connect(4, "bench-sensors", 600, clean=True))
        answer = sock.recv(4)
        if answer != b"\x20\x02\x00\x00":
            raise ConnectionError(f"broker answered {answer.hex()} to CONNECT")
        self.connections += 1
        return sock

    def _reconnect(self) -> None:
        """Connect again and send what was not acknowledged, marked as sent before."""
        self._sock.close()
        self._rest = b""
        deadline = time.monotonic() + DRAIN_S
        while True:
            try:
                self._sock = self._connect()
                self._sock.sendall(b"".join(b"\x3a" + packet for _, packet in self.unacked.values()))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)
            else:
                return


def reading(number: int, event_us: int) -> bytes:
    """One JSON message of 26 fields."""
    values: dict[str, object] = {"ts": event_us / 1e6, "engine": f"e{number % ENGINES}", "cycle": number % CYCLES + 1}
    values |= {"setting_1": 0.0, "setting_2": 0.0, "setting_3": 100.0}
    values |= {f"sensor_{i}": round(v + (number % 7) * 0.01, 4) for i, v in enumerate(_VALUES, 1)}
    return json.dumps(values).encode()


def vibration(number: int, event_us: int) -> bytes:
    """One JSON message of 5 fields, with this time."""
    return b'{"ts":%.6f,' % (event_us / 1e6) + pumps.payload(number).partition(b",")[2]


STREAMS = {"turbofan": (b"sensors/plane-01/turbofan", reading), "vibration": (b"sensors/p/vibration", vibration)}


def length(size: int) -> bytes:
    """MQTT's remaining length, up to two bytes."""
    return bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True, help="readings a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--stream", choices=STREAMS, default="turbofan")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sensors = Sensors(arguments.port, arguments.stream)
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < arguments.seconds:
        due = min(int(elapsed * arguments.rate) + 1 - sensors.sent, UNACKED_MAX - len(sensors.unacked))
        if due > 0:
            sensors.publish(due)
        next_s = start + sensors.sent / arguments.rate
        sensors.read(max(min(SLICE_S, next_s - time.monotonic()), 0.0002))
    deadline = time.monotonic() + DRAIN_S
    while sensors.unacked and time.monotonic() < deadline:
        sensors.read(0.1)
    report = {
        "sent": sensors.sent,
        "acked": len(sensors.puback_us),
        "connections": sensors.connections,
        "first_us": sensors.first_us,
        "last_us": sensors.last_us,
    }
    arguments.out.write_text(json.dumps({**report, "puback_us": sensors.puback_us}))


if __name__ == "__main__":
    main()
