"""Fifty pumps that publish small JSON readings over MQTT 3.1.1 with QoS 1, as fast as they are acknowledged.

- Reading `i` is a pure function of `i` (`payload`), so that a receiver can check every value of all of them (`check`).
- All packets are made before the clock starts, and go out in bulk: on a shared machine the generator must cost next to nothing.
- At most `window` readings are without PUBACK. Each pump has its own connection, unless `--connections` says fewer; its readings
  all go over one, so their order is kept.
- With `--marker`, one last message goes to MARKER_TOPIC when everything is acknowledged: whoever forwards in order forwards it last.

    python -m bench.peers.sensors --port 1883 --count 100000

prints one JSON line, `{"started": …, "acked": …}`: seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import time
from dataclasses import dataclass

import numpy as np

from edge_agent.contract.columns import Ints, Strings, Table
from edge_agent.mqtt import frames

PUMPS = 50
START_S = 1_763_800_000
US_PER_READING = 1_000
MARKER_TOPIC = "sensors/end"
STREAM = "vibration"
SEND_BYTES = 64 * 1024
SILENCE_S_MAX = 60.0
_KEEPALIVE_S = 600
CONTRACT = """
apiVersion: v3.1.0
kind: DataContract
version: 1.0.0
schema:
  - name: vibration
    customProperties:
      - {property: topic, value: sensors/+/vibration}
      - {property: eventTime, value: ts}
      - {property: entity, value: pump}
    properties:
      - {name: ts, logicalType: timestamp, required: true, primaryKey: true, primaryKeyPosition: 2}
      - {name: pump, logicalType: string, required: true, primaryKey: true, primaryKeyPosition: 1}
      - {name: temperature, logicalType: number, required: true, logicalTypeOptions: {minimum: -40, maximum: 150}}
      - {name: vibration, logicalType: number, required: true, logicalTypeOptions: {minimum: 0, maximum: 50}}
      - {name: pressure, logicalType: number, required: true, logicalTypeOptions: {minimum: 0, maximum: 16}}
"""
_CHANNELS = {
    "temperature": np.array([float(f"{20 + i * 0.01:.2f}") for i in range(997)]),
    "vibration": np.array([float(f"{i * 0.0013:.4f}") for i in range(773)]),
    "pressure": np.array([float(f"{1 + i * 0.002:.3f}") for i in range(431)]),
}


def payload(i: int) -> bytes:
    """Reading `i`, about 95 bytes of JSON."""
    return b'{"ts":%.3f,"pump":"pump-%02d","temperature":%.2f,"vibration":%.4f,"pressure":%.3f}' % (
        START_S + i * US_PER_READING / 1e6,
        i % PUMPS,
        20 + i % 997 * 0.01,
        i % 773 * 0.0013,
        1 + i % 431 * 0.002,
    )


@dataclass(frozen=True)
class Checked:
    """What came of the readings published: how many never came, came more than once, or came with another value."""

    lost: int
    repeated: int
    wrong: int


def check(tables: list[Table], count: int) -> Checked:
    """Compare what arrived with readings 0 to `count` - 1: each exactly once, every value bit for bit."""
    seen = np.zeros(count, np.int64)
    wrong = 0
    for table in tables:
        ts = table["ts"]
        assert isinstance(ts, np.ndarray)
        i = (ts.astype(np.int64) - START_S * 1_000_000) // US_PER_READING
        right = (i >= 0) & (i < count) & _equal(table, i)
        wrong += int(np.count_nonzero(~right))
        np.add.at(seen, i[right], 1)
    return Checked(int(np.count_nonzero(seen == 0)), int(np.count_nonzero(seen > 1)), wrong)


def _equal(table: Table, i: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    pump = table["pump"]
    assert isinstance(pump, Strings)
    numbers = np.array([int(name.removeprefix("pump-")) for name in pump.values])
    same = numbers[pump.codes] == i % PUMPS
    for name, values in _CHANNELS.items():
        same &= np.asarray(table[name]) == values[i % len(values)]
    return same


class _Connection:
    """The readings of some of the pumps, over one connection."""

    def __init__(self, port: int, name: str, numbers: range) -> None:
        packets = [_publish(i, place % 65_535 + 1) for place, i in enumerate(numbers)]
        self._ends = np.cumsum([0, *map(len, packets)])
        self._data = memoryview(b"".join(packets))
        self._at = self._half = 0
        self.acked, self.count = 0, len(packets)
        self.socket = socket.create_connection(("127.0.0.1", port), 10.0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.sendall(frames.connect(4, name, _KEEPALIVE_S, clean=True))
        answer = self.socket.recv(4)
        assert answer == b"\x20\x02\x00\x00", f"the broker answers {answer.hex()} to CONNECT"
        self.socket.setblocking(False)

    def send(self, window: int) -> bool:
        """Send what the window and the socket allow; True if only the socket is in the way."""
        stop = int(self._ends[min(self.count, self.acked + window)])
        while self._at < stop:
            try:
                self._at += self.socket.send(self._data[self._at : min(stop, self._at + SEND_BYTES)])
            except BlockingIOError:
                return True
        return False

    def receive(self) -> None:
        """Count PUBACKs: four bytes each, and nothing else comes here."""
        got = self.socket.recv(SEND_BYTES)
        assert got, "the broker closed the connection"
        self._half += len(got)
        self.acked += self._half // 4
        self._half %= 4

    def mark(self) -> None:
        self.socket.setblocking(True)
        topic = MARKER_TOPIC.encode()
        self.socket.sendall(_packet(topic, 1, b"end"))
        assert self.socket.recv(4), "the broker closed the connection"


def _publish(i: int, packet_id: int) -> bytes:
    return _packet(b"sensors/pump-%02d/vibration" % (i % PUMPS), packet_id, payload(i))


def _packet(topic: bytes, packet_id: int, body: bytes) -> bytes:
    size = 4 + len(topic) + len(body)
    length = bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])
    return b"".join([b"\x32", length, len(topic).to_bytes(2), topic, packet_id.to_bytes(2), body])


def publish(connections: list[_Connection], window: int) -> None:
    """Publish all, and return when all are acknowledged."""
    each = max(1, window // len(connections))
    with selectors.DefaultSelector() as selector:
        for c in connections:
            selector.register(c.socket, selectors.EVENT_READ, c)
            _turn(selector, c, each)
        while any(c.acked < c.count for c in connections):
            events = selector.select(SILENCE_S_MAX)
            assert events, f"no PUBACK for {SILENCE_S_MAX:g} s"
            for key, mask in events:
                if mask & selectors.EVENT_READ:
                    key.data.receive()
                _turn(selector, key.data, each)


def _turn(selector: selectors.BaseSelector, connection: _Connection, window: int) -> None:
    blocked = connection.send(window)
    selector.modify(connection.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if blocked else 0), connection)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--window", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=PUMPS, choices=(1, 2, 5, 10, 25, PUMPS))
    parser.add_argument("--marker", action="store_true")
    arguments = parser.parse_args()
    step = arguments.connections
    connections = [_Connection(arguments.port, f"pumps-{c}", range(c, arguments.count, step)) for c in range(step)]
    started = time.monotonic()
    publish(connections, arguments.window)
    acked = time.monotonic()
    if arguments.marker:
        connections[0].mark()
    print(json.dumps({"started": started, "acked": acked}), flush=True)


if __name__ == "__main__":
    main()
