"""Blocks for the cloud's tests: small, of a stream with one number."""

from __future__ import annotations

import numpy as np

from edge_agent.contract.block import ORDINAL, SCORE, BlockHeader, FixQuality, encode_block
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract

CONTRACT_YAML = """
apiVersion: v3.1.0
kind: DataContract
version: 1.0.0
schema:
  - name: pump
    customProperties:
      - {property: topic, value: "sensors/{device}/pump"}
      - {property: eventTime, value: ts}
      - {property: entity, value: pump}
    properties:
      - {name: ts, logicalType: timestamp, required: true, primaryKey: true, primaryKeyPosition: 2}
      - {name: pump, logicalType: string, required: true, primaryKey: true, primaryKeyPosition: 1}
      - {name: count, logicalType: integer, required: true}
      - {name: pressure, logicalType: number, required: false, logicalTypeOptions: {minimum: 0, maximum: 100}}
"""

ZONES_JSON = b"""{"type": "FeatureCollection", "features": [
 {"type": "Feature", "properties": {"zone": "europe", "endpoints": ["eu"]},
  "geometry": {"type": "Polygon", "coordinates": [[[0, 40], [20, 40], [20, 60], [0, 60], [0, 40]]]}},
 {"type": "Feature", "properties": {"zone": "canada", "endpoints": ["us", "eu"]},
  "geometry": {"type": "Polygon", "coordinates": [[[-120, 50], [-60, 50], [-60, 70], [-120, 70], [-120, 50]]]}}
]}"""


def contract() -> StreamContract:
    return parse_contract(CONTRACT_YAML)


def block(
    sequence: int, lane: str = "europe", device: str = "d1", epoch: str = "e1", rows: int = 3, **header: object
) -> tuple[BlockHeader, Table]:
    """A block whose readings count on from the sequence."""
    first = (sequence - 1) * rows
    base: dict[str, object] = {
        "device": device,
        "epoch": epoch,
        "lane": lane,
        "sequence": sequence,
        "stream": "pump",
        "contract_version": "1.0.0",
        "rows": rows,
        "first_us": first * 1_000_000,
        "last_us": (first + rows) * 1_000_000,
        "fix": FixQuality.STATIC,
        "policy": "p",
        "boot": "b",
        "monotonic_us": 1,
        "sealed_us": 2,
        "clock_synced": True,
    }
    count = np.arange(first, first + rows, dtype=np.int64)
    table: Table = {
        "ts": count * 1_000_000,
        "pump": Strings.of(["p1"] * rows),
        "count": count,
        "pressure": np.where(count % 3 == 1, np.nan, count / 4 % 100),  # all inside the contract
        ORDINAL: count.copy(),
        SCORE: np.full(rows, 0.5),
    }
    return BlockHeader(**{**base, **header}), table  # type: ignore[arg-type]


def block_bytes(sequence: int, **kw: object) -> bytes:
    return encode_block(*block(sequence, **kw))  # type: ignore[arg-type]
