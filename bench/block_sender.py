"""Devices of `bench.ingest_lake` on one connection: blocks go out, receipts come back. A process of its own, with a light hand.

`python -m bench.block_sender --port N --devices D --blocks B --rows R --out FILE [--warm N] [--period S] [--again SHARE]`

Blocks are of the turbofan contract, scored, sealed beforehand. With `--period` each device sends a block every S seconds, all devices
spread over it; without, all go as fast as the broker takes them. `--again` sends that share of the blocks twice. The first `--warm` blocks
of each device go ahead, and what is timed begins when they have their receipts: the tables are there then. FILE gets what was timed.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import time
from pathlib import Path

import numpy as np

from bench.streams import engines
from edge_agent.contract.block import ORDINAL, SCORE, BlockHeader, FixQuality, encode_block
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.receipt import decode_receipt
from edge_agent.contract.topics import PREFIX, DeviceTopics, Kind
from edge_agent.mqtt import frames

LANE, STREAM, VERSION = "europe", "turbofan", "1.0.0"
START_US = 1_700_000_000_000_000
READING_US = 100_000  # ten readings a second
UNACKED_MAX = 4_096
UNRECEIPTED_MAX = 8_192
GIVE_UP_S = 60.0


class Fleet:
    """Sealed blocks of all devices, by (device number, sequence)."""

    def __init__(self, devices: int, blocks: int, rows: int) -> None:
        self.names = [f"gw-{i:04d}" for i in range(devices)]
        self._values = engines(20).table
        self._length = len(self._values["cycle"])
        self.blocks = {(d, s): self._seal(d, s, rows) for s in range(1, blocks + 1) for d in range(devices)}

    def _seal(self, device: int, sequence: int, rows: int) -> bytes:
        first = (sequence - 1) * rows
        where = (np.arange(first, first + rows) + 37 * device) % self._length
        ts = START_US + np.arange(first, first + rows, dtype=np.int64) * READING_US
        table: Table = {name: column[where] for name, column in self._values.items() if isinstance(column, np.ndarray)}
        table |= {"ts": ts, "engine": Strings.of([f"engine-{device:04d}"] * rows)}
        table |= {ORDINAL: np.arange(first, first + rows, dtype=np.int64), SCORE: np.round(125 - where / 50, 3)}
        header = BlockHeader(
            device=self.names[device],
            epoch="e1",
            lane=LANE,
            sequence=sequence,
            stream=STREAM,
            contract_version=VERSION,
            rows=rows,
            first_us=int(ts[0]),
            last_us=int(ts[-1]),
            fix=FixQuality.FIX,
            policy="p" * 64,
            boot="00000000-0000-0000-0000-000000000000",
            monotonic_us=1,
            sealed_us=int(ts[-1]),
            clock_synced=True,
            model="m" * 64,
        )
        return encode_block(header, table)

    def packet(self, device: int, sequence: int, packet_id: int) -> bytes:
        topic = DeviceTopics(self.names[device]).up(LANE, STREAM).encode()
        body = len(topic).to_bytes(2) + topic + packet_id.to_bytes(2) + self.blocks[device, sequence]
        return b"\x32" + _length(len(body)) + body


def _length(size: int) -> bytes:
    out = bytearray()
    while True:
        size, low = divmod(size, 128)
        out.append(low | 0x80 * bool(size))
        if not size:
            return bytes(out)


class Wire:
    """Two connections: one publishes and reads PUBACKs, the other hears receipts."""

    def __init__(self, port: int) -> None:
        self._up, self._down = _connect(port, "bench-up"), _connect(port, "bench-down")
        self._decoder = frames.Decoder(4)
        self._decoder.feed(b"\x20\x02\x00\x00")
        self._down.sendall(frames.subscribe(4, 1, f"{PREFIX}/+/{Kind.RECEIPTS}", 0))
        self.acked = self.sent = 0  # packets; their ids go round
        self._rest = b""

    def send(self, fleet: Fleet, blocks: list[tuple[int, int]]) -> None:
        self._up.sendall(b"".join([fleet.packet(*block, (self.sent + i) % 65_535 + 1) for i, block in enumerate(blocks)]))
        self.sent += len(blocks)

    def hear(self, wait_s: float) -> list[bytes]:
        """The receipts that come within `wait_s`; PUBACKs are counted."""
        ready = select.select([self._up, self._down], [], [], max(0.0, wait_s))[0]
        if self._up in ready:
            data = self._rest + self._read(self._up)
            whole = len(data) // 4 * 4
            self.acked, self._rest = self.acked + whole // 4, data[whole:]
        return list(self._decoder.feed(self._read(self._down)).payloads) if self._down in ready else []

    def _read(self, sock: socket.socket) -> bytes:
        data = sock.recv(1 << 18)
        if not data:
            raise ConnectionError("the broker has closed the connection")
        return data


def _connect(port: int, name: str) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), 10.0)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.sendall(frames.connect(4, name, 600, clean=True))
    answer = sock.recv(4)
    if answer != b"\x20\x02\x00\x00":
        raise ConnectionError(f"broker answered {answer.hex()} to CONNECT")
    return sock


def play(
    fleet: Fleet, wire: Wire, order: list[tuple[int, int]], period_s: float
) -> tuple[dict[tuple[int, int], float], dict[tuple[int, int], float]]:
    """Send blocks in this order until each has a receipt; when each was sent first, and when its receipt came."""
    numbers = {name: i for i, name in enumerate(fleet.names)}
    sent: dict[tuple[int, int], float] = {}
    settled: dict[tuple[int, int], float] = {}
    open_blocks: dict[int, set[int]] = {i: set() for i in numbers.values()}
    start, next_ = time.monotonic(), 0
    deadline = start + GIVE_UP_S + period_s * len(order) / len(fleet.names)
    wanted = len(set(order))
    while len(settled) < wanted and time.monotonic() < deadline:
        now = time.monotonic()
        due = len(order) if not period_s else min(len(order), int((now - start) / period_s * len(fleet.names)) + 1)
        room = min(UNACKED_MAX - (wire.sent - wire.acked), UNRECEIPTED_MAX - (len(sent) - len(settled)))
        batch = order[next_ : min(due, next_ + max(0, min(room, 64)))]
        if batch:
            wire.send(fleet, batch)
            for block in batch:
                if block not in sent:
                    sent[block] = now
                    open_blocks[block[0]].add(block[1])
            next_ += len(batch)
        for payload in wire.hear(0.0 if batch and not period_s else 0.001):
            receipt, heard = decode_receipt(payload), time.monotonic()
            device = numbers[receipt.device]
            done = receipt.lanes[0].settles()
            for sequence in [s for s in open_blocks[device] if s in done]:
                open_blocks[device].discard(sequence)
                settled[device, sequence] = heard
    return sent, settled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("port", "devices", "blocks", "rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--period", type=float, default=0.0)
    parser.add_argument("--again", type=float, default=0.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    fleet = Fleet(given.devices, given.blocks, given.rows)
    wire, warm = Wire(given.port), [block for block in fleet.blocks if block[1] <= given.warm]
    if len(play(fleet, wire, warm, 0.0)[1]) < len(warm):
        raise TimeoutError(f"not all of the first {len(warm)} blocks have a receipt after {GIVE_UP_S:.0f} s")
    order, chance = [block for block in fleet.blocks if block[1] > given.warm], random.Random(1)
    if given.again:
        order += [block for block in order if chance.random() < given.again]
    sent, settled = play(fleet, wire, order, given.period)
    latency = sorted(settled[block] - sent[block] for block in settled)
    document = {
        "sent": len(sent),
        "copies": len(order) - len(sent),
        "settled": len(settled),
        "block_bytes": sum(map(len, fleet.blocks.values())) / len(fleet.blocks),
        "seconds": max(settled.values(), default=0.0) - min(sent.values()),
        "latency_ms": [1e3 * s for s in latency],
    }
    given.out.write_text(json.dumps(document))


if __name__ == "__main__":
    main()
