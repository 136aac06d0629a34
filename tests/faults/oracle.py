"""The promise, as a check: what was acknowledged is in the buffer with equal bytes, or named in the loss ledger.

- Every reading of these tests is a number that occurs once, so that a reading which was stored twice shows.
- Every block that the buffer gives out decodes: its CRC is right.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from edge_agent.buffer import Buffer, Draft, StoredBlock
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, read_losses
from edge_agent.salvage import UNUSED

DEVICE = "plane-01"
STREAM = "pump"
LANES = ("europe", "switzerland")
BLOCKS_AT_ONCE = 64
ATTEMPTS_MAX = 3

Name = tuple[str, str, int]  # epoch, lane, sequence
_decode = functools.lru_cache(4_096)(decode_block)  # these tests see the same few blocks thousands of times


def open_buffer(path: Path, *, bytes_max: int = 1 << 30, history_rows: int = 0) -> Buffer:
    return Buffer(path, DEVICE, "boot", bytes_max=bytes_max, history_rows={STREAM: history_rows})


def moment(number: int) -> Moment:
    return Moment(1_700_000_000_000_000 + number, 5_000_000 + number, True)


def draft(number: int, rows: int = 3) -> Draft:
    """Readings of between `number*1000 + i` and one more, which no compression makes small; the lanes take turns."""
    table: Table = {"t": number * 1_000.0 + np.arange(rows) + np.random.default_rng(number).random(rows)}
    first = 1_700_000_000_000_000 + number * 1_000_000
    return Draft(LANES[number % len(LANES)], STREAM, "1.0.0", FixQuality.STATIC, "policy", table, rows, first, first + rows)


@dataclass
class Found:
    """What a buffer holds and what it says it lost."""

    blocks: dict[Name, bytes] = field(default_factory=dict)
    readings: Counter[float] = field(default_factory=Counter)
    losses: list[Loss] = field(default_factory=list)


def look(buffer: Buffer) -> Found:
    """Everything that the buffer would send, as the uplink asks for it: what cannot be read now is asked for again.

    Raises:
        ContractError: it gives out a damaged block.
    """
    for _ in range(ATTEMPTS_MAX):
        try:
            return _look(buffer)
        except UnavailableError as e:
            error = e
    raise error


def _look(buffer: Buffer) -> Found:
    found, last = Found(), dict.fromkeys((state.lane for state in buffer.lanes()), 0)
    while last:
        for lane, after in list(last.items()):
            blocks = buffer.pending(lane, after, BLOCKS_AT_ONCE)
            if not blocks:
                del last[lane]  # the ledger of what was found damaged on the way is at its end
            for stored in blocks:
                _take(found, stored)
                last[lane] = stored.sequence
    return found


def _take(found: Found, stored: StoredBlock) -> None:
    header, table = _decode(stored.block)
    assert (header.lane, header.sequence, header.stream, header.rows) == (stored.lane, stored.sequence, stored.stream, stored.rows)
    name = (header.epoch, header.lane, header.sequence)
    assert name not in found.blocks, f"two blocks are called {name}"
    found.blocks[name] = stored.block
    if header.stream == LOSSES.stream:
        found.losses += read_losses(table)
    else:
        found.readings.update(np.asarray(table["t"]).tolist())


def names(loss: Loss, name: Name) -> bool:
    """Whether a row of the ledger is about a block."""
    return (loss.of_epoch, loss.of_lane) == name[:2] and loss.first_sequence <= name[2] <= loss.last_sequence


def is_skip(loss: Loss) -> bool:
    """Whether a row of the ledger only says that names are not given out: nothing had them."""
    return loss.of_stream == UNUSED


def check(buffer: Buffer, acknowledged: dict[Name, bytes], settled: Collection[Name] = ()) -> Found:
    """Assert the promise; blocks in `settled` may be gone."""
    found = look(buffer)
    doubled = [value for value, count in found.readings.items() if count > 1]
    assert not doubled, f"stored twice: {doubled}"
    for name, block in acknowledged.items():
        if name in found.blocks:
            assert found.blocks[name] == block, f"{name} was altered"
        elif name not in settled:
            assert any(names(loss, name) for loss in found.losses), f"{name} is gone and in no ledger: {found.losses}"
    return found
