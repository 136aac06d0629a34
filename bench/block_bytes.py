"""How many bytes a reading takes: our block, one JSON message per reading, and a zstd-compressed batch of JSON.

Payload bytes only, without MQTT, TLS and TCP. Every block is decoded again and compared bit for bit.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import zstandard

from bench.report import Cell, Report, main
from bench.streams import Stream, engines, pump
from edge_agent.contract.block import ORDINAL, BlockHeader, FixQuality, decode_block, encode_block
from edge_agent.contract.columns import Strings, Table, take

ROWS_PER_BLOCK = (1, 20, 200, 2_000)
ENGINES = 20
PUMP_ROWS = 6_000


def measure(arguments: argparse.Namespace) -> Report:
    """Bytes per reading of both streams, by rows per block."""
    rows: list[list[Cell]] = []
    numbers: dict[str, dict[str, float | bool]] = {}
    share = 10 if arguments.quick else 1
    for stream in (engines(ENGINES // share, arguments.cmapss), pump(PUMP_ROWS // share)):
        json_bytes = sum(map(len, stream.messages)) / len(stream.messages)
        for size in ROWS_PER_BLOCK:
            ours, batch = block_bytes(stream, size), json_batch_bytes(stream, size)
            rows.append([stream.name, size, json_bytes, batch, ours, 100 * ours / json_bytes, 100 * ours / batch])
        numbers[stream.name.partition(" ")[0]] = {
            "json_bytes": json_bytes,
            "zstd_json_bytes": batch,
            "block_bytes": ours,
            "ratio_to_json": ours / json_bytes,
            "ratio_to_zstd_json": ours / batch,
            "lossless": True,
        }
    columns = ["stream", "rows/block", "JSON", "zstd JSON", "block", "% of JSON", "% of zstd JSON"]
    notes = [
        "A block carries its header, and a number for each reading. Every block decodes to the same bits (checked).",
        "--json holds the last line of each stream.",
    ]
    return Report("Bytes per reading", columns, rows, dict(numbers), notes)


def block_bytes(stream: Stream, size: int) -> float:
    """Bytes per reading in blocks of `size` rows.

    Raises:
        AssertionError: a block does not decode to what went in.
    """
    total = 0
    count = len(stream.messages)
    numbered = {**stream.table, ORDINAL: np.arange(count)}
    for sequence, start in enumerate(range(0, count, size), 1):
        part = take(numbered, slice(start, start + size))
        block = encode_block(header(stream, sequence, start, len(part[ORDINAL])), part)
        check_equal(decode_block(block)[1], part)
        total += len(block)
    return total / count


def json_batch_bytes(stream: Stream, size: int) -> float:
    """Bytes per reading in batches of `size` JSON messages, one per line, compressed like a block."""
    compress = zstandard.ZstdCompressor(level=3).compress
    starts = range(0, len(stream.messages), size)
    return sum(len(compress(b"\n".join(stream.messages[s : s + size]))) for s in starts) / len(stream.messages)


def header(stream: Stream, sequence: int, start: int, rows: int) -> BlockHeader:
    """A header as a device writes it, with digests of full length."""
    times = stream.event_us[start : start + rows]
    return BlockHeader(
        device="plane-01",
        epoch="0123456789abcdef",
        lane="europe",
        sequence=sequence,
        stream=stream.name.partition(" ")[0],
        contract_version="1.0.0",
        rows=rows,
        first_us=int(times.min()),
        last_us=int(times.max()),
        fix=FixQuality.FIX,
        policy="0" * 64,
        boot="6b1f6d0e-8a41-4a0f-9a6e-0c2f3c1f9d55",
        monotonic_us=1_000_000,
        sealed_us=int(times.max()),
        clock_synced=True,
        model="0" * 64,
    )


def check_equal(got: Table, want: Table) -> None:
    """Raise AssertionError unless both tables hold the same bits."""
    assert got.keys() == want.keys(), f"columns {sorted(got)} came back for {sorted(want)}"
    for name, column in want.items():
        other = got[name]
        same = (
            column.tolist() == other.tolist()
            if isinstance(column, Strings) or isinstance(other, Strings)
            else np.array_equal(column.view(np.int64), other.view(np.int64))
        )
        assert same, f"column {name!r} came back changed"


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cmapss", type=Path, metavar="DIR", help="take NASA's FD001 files there instead of simulated engines")


if __name__ == "__main__":
    main(__doc__, measure, options)
