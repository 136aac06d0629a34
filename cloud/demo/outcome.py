"""What the lake holds, as the oracle and the report want it.

The lane of a row is the directory that it lies in, whatever its own column says.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from cloud.demo.journey import Key
from cloud.demo.oracle import LakeRow
from cloud.demo.simulator import FIELDS
from cloud.lake import Lake
from edge_agent.contract.stream import QUARANTINE

STREAM = "turbofan"
_NAMES = ("device", "engine", "ts", "cycle", "region", "score", "model")


def count_rows(lake: Lake, stream: str = STREAM) -> int:
    """Rows of a stream now."""
    return sum(lake.read(stream, lanes=[lane], columns=["row"]).num_rows for lane in lake.lanes(stream))


def count_quarantined(lake: Lake) -> int:
    """Payloads that the devices refused."""
    return count_rows(lake, QUARANTINE.stream)


def stored_by(lake: Lake) -> dict[Key, str]:
    """The region that stored each reading of the stream."""
    tables = [lake.read(STREAM, lanes=[lane], columns=["device", "engine", "ts", "region"]) for lane in lake.lanes(STREAM)]
    found: dict[Key, str] = {}
    for table in tables:
        times = pc.cast(table["ts"], pa.int64()).to_pylist()
        names = (table[name].to_pylist() for name in ("device", "engine", "region"))
        found |= {(device, engine, ts): region for ts, device, engine, region in zip(times, *names, strict=True)}
    return found


def read_rows(lake: Lake) -> list[LakeRow]:
    """Every row of the stream."""
    return [row for lane in lake.lanes(STREAM) for row in _rows(lake.read(STREAM, lanes=[lane], columns=[*_NAMES, *FIELDS]), lane)]


def _rows(table: pa.Table, lane: str) -> list[LakeRow]:
    times = pc.cast(table["ts"], pa.int64()).to_pylist()
    values = zip(*(table[name].to_pylist() for name in FIELDS), strict=True)
    rest = [table[name].to_pylist() for name in ("device", "engine", "cycle", "region", "score", "model")]
    return [
        LakeRow((device, engine, ts), cycle, lane, region, numbers, score, model)
        for ts, numbers, device, engine, cycle, region, score, model in zip(times, values, *rest, strict=True)
    ]
