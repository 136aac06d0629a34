"""A cloud that costs next to nothing: takes blocks from a broker, answers each with a receipt at once, and checks them when all are there.

It stands in for `cloud.ingest`, which would want the processor for itself: what is measured here is the edge. Blocks are kept in memory,
so the check of every value of every reading comes after the clock has stopped.

Prints `ready`, then the monotonic time at which reading number `--count` arrived, then one JSON line with what the check found.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from queue import SimpleQueue
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion

from bench.peers.sensors import STREAM, check
from edge_agent.contract.block import BlockHeader, decode_block, read_header
from edge_agent.contract.receipt import LaneReceipt, Receipt, SequenceSet, encode_receipt
from edge_agent.contract.topics import ALL_BLOCKS, DeviceTopics


class Cloud:
    """The blocks that arrived, each once, and what of every lane is settled."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[str, str, str, int], bytes] = {}
        self.readings = self.other = self.copies = self.unscored = 0
        self.last_at = 0.0
        self._settled: dict[tuple[str, str], SequenceSet] = {}

    def take(self, block: bytes) -> tuple[str, bytes]:
        """Note a block; returns the topic and bytes of its receipt."""
        header = read_header(block)
        if header.identity in self.blocks:
            self.copies += 1
        elif header.stream == STREAM:
            self.readings += header.rows
            self.unscored += header.rows if header.model is None else 0
        else:
            self.other += header.rows
        self.blocks[header.identity] = block
        self.last_at = time.monotonic()
        return DeviceTopics(header.device).receipts, self._receipt(header)

    def _receipt(self, header: BlockHeader) -> bytes:
        settled = self._settled.setdefault((header.epoch, header.lane), SequenceSet())
        settled.add(header.sequence)
        lane = LaneReceipt(lane=header.lane, cumulative=settled.cumulative, ranges=settled.ranges)
        return encode_receipt(Receipt(device=header.device, epoch=header.epoch, lanes=[lane]))

    def result(self, count: int) -> dict[str, Any]:
        tables = [decode_block(b)[1] for name, b in self.blocks.items() if read_header(b).stream == STREAM]
        bytes_ = sum(map(len, self.blocks.values()))
        found = {"blocks": len(self.blocks), "block_bytes": bytes_, "other": self.other, "copies": self.copies, "unscored": self.unscored}
        return {**asdict(check(tables, count)), **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--silence", type=float, default=30.0, help="seconds without a block after which the rest counts as lost")
    arguments = parser.parse_args()
    cloud, arrived = Cloud(), SimpleQueue[float]()
    client = Client(CallbackAPIVersion.VERSION2, "cloud", clean_session=False)
    client.on_connect = lambda c, *_: c.subscribe(ALL_BLOCKS, qos=1)
    client.on_subscribe = lambda *_: print("ready", flush=True)

    def on_message(c: Client, _data: Any, message: MQTTMessage) -> None:
        c.publish(*cloud.take(bytes(message.payload)), qos=1)
        if cloud.readings >= arguments.count:
            arrived.put(cloud.last_at)

    client.on_message = on_message
    client.connect("127.0.0.1", arguments.port)
    client.loop_start()
    while cloud.readings < arguments.count and (not cloud.last_at or time.monotonic() - cloud.last_at < arguments.silence):
        time.sleep(0.05)
    print(cloud.last_at if arrived.empty() else arrived.get(), flush=True)
    print(json.dumps(cloud.result(arguments.count)), flush=True)
    time.sleep(3600.0)  # receipts go on while the device settles its last blocks


if __name__ == "__main__":
    main()
