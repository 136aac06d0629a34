"""What goes into the buffer and what comes out: drafts of blocks, stored blocks, limits, counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from edge_agent.contract.block import ORDINAL, BlockHeader, FixQuality, encode_block
from edge_agent.contract.columns import Ints, Table
from edge_agent.core.retention import Place


@dataclass(frozen=True)
class Draft:
    """Readings of one stream and lane, ready to be sealed into a block.

    `order` is the place of each reading among those of its stream in the same `append`; None means: as they come.
    """

    lane: str
    stream: str
    contract_version: str
    fix: FixQuality
    policy: str
    table: Table
    rows: int
    first_us: int
    last_us: int
    order: Ints | None = None
    model: str | None = None
    units: str = ""


@dataclass(frozen=True)
class StoredBlock:
    """A block that is on disk."""

    lane: str
    sequence: int
    stream: str
    rows: int
    block: bytes


@dataclass(frozen=True)
class LaneState:
    """What of one lane waits for a receipt; `oldest_us`: when its oldest block was stored, on this boot's monotonic clock.

    Time before this boot counts on backwards from its start, below zero, as far as the device saw it pass.
    """

    lane: str
    blocks: int
    bytes: int
    rows: int
    oldest_us: int


@dataclass(frozen=True)
class Retention:
    """What the buffer may hold: bytes of file and log, seconds (None: any), what happens when it is full, streams' priorities."""

    bytes_max: int
    age_s_max: float | None = None
    when_full: Literal["drop_oldest", "block"] = "drop_oldest"
    priorities: Mapping[str, int] = field(default_factory=dict)

    def priority(self, stream: str) -> int:
        """Higher is kept longer."""
        return self.priorities.get(stream, 0)


@dataclass(frozen=True)
class BufferState:
    """Counts for status and metrics; `lost`: blocks and readings given up or found damaged since start, by reason."""

    used_bytes: int
    bytes_max: int
    file_bytes: int
    log_bytes: int
    waiting_blocks: int
    waiting_bytes: int
    history_blocks: int
    oldest_s: float
    time_to_full_s: float | None
    lost_blocks: dict[str, int]
    lost_readings: dict[str, float]


@dataclass(frozen=True)
class Sealed:
    """A block on its way to the disk: what is sent, what is stored, and where it will be."""

    stored: StoredBlock
    on_disk: bytes
    place: Place


def seal_block(header: BlockHeader, draft: Draft, base: int, following: int) -> tuple[bytes, int]:
    """The bytes of a draft and its last ordinal.

    Args:
        base: the stream's next ordinal before this append.
        following: the same after the drafts before this one.
    """
    ordinals = np.arange(following, following + draft.rows) if draft.order is None else base + draft.order
    return encode_block(header, {**draft.table, ORDINAL: ordinals}), int(ordinals.max())
