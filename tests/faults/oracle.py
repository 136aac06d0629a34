"""The promise, as a check: what was acknowledged is in the buffer with equal bytes, or named in the loss ledger.

- Every reading of these tests is a number that occurs once, so that a reading which was stored twice shows.
- Every block that the buffer gives out decodes: its CRC is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_agent.buffer import Buffer, Draft
from edge_agent.clock import Moment
from edge_agent.contract.block import BlockHeader, FixQuality, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.stream import LOSSES

DEVICE = "plane-01"
STREAM = "pump"
LANES = ("europe", "switzerland")
BLOCKS_MAX = 1_000_000

Name = tuple[str, str, int]  # epoch, lane, sequence


def open_buffer(path: Path, *, bytes_max: int = 1 << 30, history_rows: int = 0) -> Buffer:
    return Buffer(path, DEVICE, "boot", bytes_max=bytes_max, history_rows={STREAM: history_rows})


def moment(number: int) -> Moment:
    return Moment(1_700_000_000_000_000 + number, 5_000_000 + number, True)


def draft(number: int, rows: int = 3) -> Draft:
    """Readings `number*1000`, `number*1000 + 1`, …; the lanes take turns."""
    table: Table = {"t": number * 1_000.0 + np.arange(rows)}
    first = 1_700_000_000_000_000 + number * 1_000_000
    return Draft(LANES[number % len(LANES)], STREAM, "1.0.0", FixQuality.STATIC, "policy", table, rows, first, first + rows)


@dataclass
class Loss:
    """A row of the ledger."""

    stream: str
    epoch: str
    lane: str
    first: int
    last: int
    blocks: int
    readings: float
    detail: str

    def names(self, name: Name) -> bool:
        epoch, lane, sequence = name
        return self.epoch == epoch and self.lane == lane and self.first <= sequence <= self.last


@dataclass
class Found:
    """What a buffer holds and what it says it lost."""

    blocks: dict[Name, bytes] = field(default_factory=dict)
    readings: Counter[float] = field(default_factory=Counter)
    losses: list[Loss] = field(default_factory=list)


def look(buffer: Buffer) -> Found:
    """Everything that the buffer would send. Raises ContractError if it gives out a damaged block."""
    found = Found()
    for state in buffer.lanes():
        for stored in buffer.pending(state.lane, 0, BLOCKS_MAX):
            header, table = decode_block(stored.block)
            assert (header.lane, header.sequence, header.stream, header.rows) == (stored.lane, stored.sequence, stored.stream, stored.rows)
            name = (header.epoch, header.lane, header.sequence)
            assert name not in found.blocks, f"two blocks are called {name}"
            found.blocks[name] = stored.block
            if header.stream == LOSSES.stream:
                found.losses += read_losses(header, table)
            else:
                found.readings.update(np.asarray(table["t"]).tolist())
    return found


def read_losses(header: BlockHeader, table: Table) -> list[Loss]:
    """The rows of a ledger block."""

    names = ("of_stream", "of_epoch", "of_lane", "first_sequence", "last_sequence", "blocks", "readings", "detail")
    return [Loss(*row) for row in zip(*(table[n].tolist() for n in names), strict=True)]  # type: ignore[arg-type]


def check(buffer: Buffer, acknowledged: dict[Name, bytes], settled: Collection[Name] = ()) -> Found:
    """Assert the promise; blocks in `settled` may be gone."""
    found = look(buffer)
    doubled = [value for value, count in found.readings.items() if count > 1]
    assert not doubled, f"stored twice: {doubled}"
    for name, block in acknowledged.items():
        if name in found.blocks:
            assert found.blocks[name] == block, f"{name} was altered"
        elif name not in settled:
            assert any(loss.names(name) for loss in found.losses), f"{name} is gone and in no ledger: {found.losses}"
    return found
