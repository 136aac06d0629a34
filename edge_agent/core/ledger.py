"""The loss ledger: rows of the stream `losses` that name what the device gave up or found damaged. Pure.

- A row names a range of sequences of one lane and stream; `blocks` says how many blocks of that range are gone. As long as
  `blocks` equals the length of the range, every one of them is meant, and the lake can tick them off.
- Neighbouring rows become one. Only beyond ROWS_MAX rows are ranges with others' sequences in between made one too.
- The count of readings is exact where the blocks' places were known; NaN where they were not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from edge_agent.contract.columns import Strings, Table
from edge_agent.core.topic_levels import STRING_CHARACTERS_MAX

ROWS_MAX = 32_768


@dataclass(frozen=True)
class Loss:
    """One row of the ledger; see contract.stream.LOSSES."""

    lost_at: int
    of_stream: str
    of_epoch: str
    of_lane: str
    first_sequence: int
    last_sequence: int
    blocks: int
    readings: float
    first_at: float
    last_at: float
    reason: str
    detail: str = ""

    @property
    def family(self) -> tuple[str, str, str, str]:
        """Rows of one family may become one."""
        return self.of_epoch, self.of_lane, self.of_stream, self.reason


def coalesce(losses: Iterable[Loss], rows_max: int = ROWS_MAX) -> list[Loss]:
    """Make neighbours of one family one row, and no more than `rows_max` rows (or one per family) in all."""
    rows = _joined(sorted(losses, key=lambda loss: (loss.family, loss.first_sequence)), gap_max=1)
    gap = 2
    while len(rows) > rows_max and gap < 2**60:
        rows = _joined(rows, gap_max=gap)
        gap *= 4
    return rows


def _joined(rows: list[Loss], gap_max: int) -> list[Loss]:
    out: list[Loss] = []
    for row in rows:
        if out and out[-1].family == row.family and row.first_sequence - out[-1].last_sequence <= gap_max:
            out[-1] = _join(out[-1], row)
        else:
            out.append(row)
    return out


def _join(a: Loss, b: Loss) -> Loss:
    twice = max(0, min(a.last_sequence, b.last_sequence) - b.first_sequence + 1)  # names that both may mean: never said to be two
    return replace(
        a,
        lost_at=min(a.lost_at, b.lost_at),
        last_sequence=max(a.last_sequence, b.last_sequence),
        blocks=max(a.blocks, b.blocks, a.blocks + b.blocks - twice),
        readings=a.readings + b.readings,
        first_at=_edge(min, a.first_at, b.first_at),
        last_at=_edge(max, a.last_at, b.last_at),
        detail=a.detail or b.detail,
    )


def _edge(pick: Callable[[list[float]], float], *edges: float) -> float:
    known = [edge for edge in edges if not math.isnan(edge)]
    return pick(known) if known else math.nan


def loss_table(losses: list[Loss]) -> Table:
    """Rows as columns of the stream `losses`; a detail is cut to what the cloud takes."""

    def texts(name: str) -> Strings:
        return Strings.of([getattr(loss, name) for loss in losses])

    def integers(name: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([getattr(loss, name) for loss in losses], np.int64)

    def floats(name: str) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array([getattr(loss, name) for loss in losses], np.float64)

    return {
        "lost_at": integers("lost_at"),
        **{name: texts(name) for name in ("of_stream", "of_epoch", "of_lane")},
        **{name: integers(name) for name in ("first_sequence", "last_sequence", "blocks")},
        **{name: floats(name) for name in ("readings", "first_at", "last_at")},
        "reason": texts("reason"),
        "detail": Strings.of([loss.detail[:STRING_CHARACTERS_MAX] for loss in losses]),
    }


def read_losses(table: Table) -> list[Loss]:
    """The inverse of `loss_table`; other columns are ignored."""
    names = list(Loss.__dataclass_fields__)
    return [Loss(*row) for row in zip(*(table[name].tolist() for name in names), strict=True)]
