"""Is what devices captured in the lake? Counted by block, because blocks have numbers: a lane's sequences rise by one.

Of every number up to the highest that the lake has seen of a device's epoch and lane, one thing is known:

| state | the block |
| --- | --- |
| stored | is in the lake; some of its rows may be in quarantine, they are counted |
| quarantined | is in the lake, all its rows in quarantine |
| lost | is named in the device's loss ledger, with the reason |
| waiting | is not here, and the device says that it still holds so many |
| pending | is not here, but the next one came less than the grace time ago: blocks overtake each other |
| unaccounted | is not here, and nobody said why: an alarm |

- A number that the ledger says was never used is no block. A block that the ledger names and that came all the same is stored.
- A ledger row that means fewer blocks than its range has numbers accounts for what is missing there if that is no more.
- What a device captured and never numbered, or numbered above all that came, the lake cannot know; `waiting` says what the device reports.
- Sequences are shared by the streams of a lane: whose block is missing is known from the ledger only.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloud.block_index import BlockIndex
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.tables import contract_of, read_table
from edge_agent.contract.stream import LOSSES

GRACE_S = 300.0
UNUSED = "unused"
"""The stream of numbers that were never used, in the ledger."""

Ints = npt.NDArray[np.int64]
Epoch = tuple[str, str]
LaneKey = tuple[str, str, str]


class State(StrEnum):
    """What is known of blocks that are not stored."""

    QUARANTINED = "quarantined"
    LOST = "lost"
    WAITING = "waiting"
    PENDING = "pending"
    UNACCOUNTED = "unaccounted"


@dataclass(frozen=True)
class Gap:
    """Sequences `first` to `last` of a lane are not stored. `readings`: None if not known; `stream`: empty if not known."""

    device: str
    epoch: str
    lane: str
    first: int
    last: int
    blocks: int
    state: State
    stream: str = ""
    reason: str = ""
    readings: float | None = None


@dataclass
class Completeness:
    """What was found. Blocks are counted by state; `readings` are those in streams' tables, `quarantined_readings` those beside them."""

    stored: int = 0
    blocks: dict[State, int] = field(default_factory=lambda: dict.fromkeys(State, 0))
    readings: int = 0
    quarantined_readings: int = 0
    lost_readings: float = 0.0
    gaps: list[Gap] = field(default_factory=list)

    @property
    def captured(self) -> int:
        """Blocks that devices are known to have made."""
        return self.stored + sum(self.blocks.values())

    @property
    def share(self) -> float:
        """The share of them that is in the lake, quarantined ones too; 1 if there are none."""
        return (self.stored + self.blocks[State.QUARANTINED]) / self.captured if self.captured else 1.0

    @property
    def alarm(self) -> bool:
        return self.blocks[State.UNACCOUNTED] > 0


@dataclass(frozen=True)
class _Loss:
    """A row of the ledger; see contract.stream.LOSSES."""

    of_stream: str
    first_sequence: int
    last_sequence: int
    blocks: int
    readings: float | None
    reason: str

    def excuses(self, stored: Ints) -> bool:
        """Whether it means as many blocks as are missing in its range; `stored` are the sequences that are here, rising."""
        here = np.searchsorted(stored, self.last_sequence, "right") - np.searchsorted(stored, self.first_sequence)
        return bool(self.blocks >= self.last_sequence - self.first_sequence + 1 - here)


@dataclass
class _Lane:
    """What is known of one epoch of one device's lane."""

    stored: list[Ints] = field(default_factory=list)
    arrived: list[Ints] = field(default_factory=list)
    streams: dict[str, pa.Table] = field(default_factory=dict)
    quarantined: dict[int, tuple[str, int, int]] = field(default_factory=dict)  # stream, rows and arrival, by sequence
    ledger: list[_Loss] = field(default_factory=list)


def examine(
    lake: CheckedLake,
    index: BlockIndex,
    now_us: int,
    *,
    device: str | None = None,
    stream: str | None = None,
    since_us: int | None = None,
    grace_s: float = GRACE_S,
    waiting: Mapping[Epoch, int] | None = None,
) -> Completeness:
    """What of one device, one stream or everything is in the lake.

    Args:
        index: keep it between calls, and only new files are read.
        since_us: only blocks that came since then, and gaps below such a block.
        waiting: how many blocks each device and epoch says it still holds.

    Raises:
        UnavailableError: the lake does not read.
    """
    lanes = _collect(lake, index, device)
    found, late = Completeness(), defaultdict[Epoch, list[Gap]](list)
    for key, lane in sorted(lanes.items()):
        if stream is not None and stream not in lane.streams and not any(loss.of_stream == stream for loss in lane.ledger):
            continue
        _count_stored(lane, stream, since_us, found)
        for gap in _gaps(key, lane, now_us - int(grace_s * 1e6), since_us):
            if stream is None or gap.stream in ("", stream):
                (late[key[:2]] if gap.state is State.UNACCOUNTED else found.gaps).append(gap)
    for epoch, gaps in late.items():
        held = sum(gap.blocks for gap in gaps) <= (waiting or {}).get(epoch, 0)
        found.gaps += [replace(gap, state=State.WAITING) if held else gap for gap in gaps]
    for gap in found.gaps:
        found.blocks[gap.state] += gap.blocks
        found.lost_readings += (gap.readings or 0.0) if gap.state is State.LOST else 0.0
    found.gaps.sort(key=lambda gap: (gap.device, gap.epoch, gap.lane, gap.first))
    return found


def _collect(lake: CheckedLake, index: BlockIndex, device: str | None) -> dict[LaneKey, _Lane]:
    lanes: defaultdict[LaneKey, _Lane] = defaultdict(_Lane)
    for stream, name, blocks in _tables(lake.lake, index):
        for (dev, epoch), part in _by_epoch(blocks, device):
            lane = lanes[dev, epoch, name]
            lane.stored.append(part["sequence"].to_numpy())
            lane.arrived.append(part["arrived_us"].to_numpy())
            lane.streams[stream] = part
    for stream, name, blocks in _tables(lake.held, index):
        for (dev, epoch), part in _by_epoch(blocks, device):
            lane = lanes[dev, epoch, name]
            for sequence, rows, arrived in zip(*(part[c].to_pylist() for c in ("sequence", "rows", "arrived_us")), strict=True):
                lane.quarantined[sequence] = (stream, rows, arrived)
                lane.arrived.append(np.array([arrived]))
                lane.stored.append(np.array([sequence]))
    _read_ledger(lake.lake, lanes, device)
    return lanes


def _tables(lake: Lake, index: BlockIndex) -> Iterable[tuple[str, str, pa.Table]]:
    for stream in lake.streams():
        for name in lake.lanes(stream):
            table = lake.table(stream, name)
            yield stream, name, index.blocks(table, contract_of(table).event_time)


def _by_epoch(blocks: pa.Table, device: str | None) -> Iterable[tuple[Epoch, pa.Table]]:
    """The rows of each device and epoch; they are sorted by them."""
    if not blocks.num_rows:
        return
    names = np.array([f"{d}\n{e}" for d, e in zip(blocks["device"].to_pylist(), blocks["epoch"].to_pylist(), strict=True)])
    edges = [0, *(np.flatnonzero(names[1:] != names[:-1]) + 1).tolist(), len(names)]
    for start, stop in itertools.pairwise(edges):
        dev, epoch = str(names[start]).split("\n")
        if device in (None, dev):
            yield (dev, epoch), blocks.slice(start, stop - start)


def _read_ledger(lake: Lake, lanes: defaultdict[LaneKey, _Lane], device: str | None) -> None:
    columns = ["device", "of_epoch", "of_lane", "of_stream", "first_sequence", "last_sequence", "blocks", "readings", "reason"]
    for name in lake.lanes(LOSSES.stream):
        table = read_table(lake.table(LOSSES.stream, name), columns=columns)
        for dev, epoch, lane, *rest in zip(*(c.to_pylist() for c in table.columns), strict=True):
            loss = _Loss(*rest)
            if device in (None, dev) and 1 <= loss.first_sequence <= loss.last_sequence:
                lanes[dev, epoch, lane].ledger.append(loss)


def _count_stored(lane: _Lane, stream: str | None, since_us: int | None, found: Completeness) -> None:
    mine = [blocks for name, blocks in lane.streams.items() if stream in (None, name)]
    kept: set[int] = set()  # once each: a released row has the name of its block, in another stream's table
    for blocks in mine:
        new = np.ones(blocks.num_rows, np.bool_) if since_us is None else blocks["arrived_us"].to_numpy() >= since_us
        kept.update(blocks["sequence"].to_numpy()[new].tolist())
        found.readings += int(blocks["rows"].to_numpy()[new].sum())
    found.stored += len(kept)
    partly = {n for blocks in lane.streams.values() for n in blocks["sequence"].to_pylist()} if lane.quarantined else set()
    for sequence, (name, rows, arrived_us) in lane.quarantined.items():
        if stream in (None, name) and (since_us is None or arrived_us >= since_us):
            found.quarantined_readings += rows
            found.blocks[State.QUARANTINED] += sequence not in partly


def _gaps(key: LaneKey, lane: _Lane, old_us: int, since_us: int | None) -> Iterable[Gap]:
    """The ranges of numbers that have no block here."""
    if not lane.stored:
        return
    sequences, first = np.unique(np.concatenate(lane.stored), return_index=True)
    arrived = np.concatenate(lane.arrived)[first]
    losses = [loss for loss in lane.ledger if loss.excuses(sequences)]
    above_us = np.minimum.accumulate(arrived[::-1])[::-1]  # when the first block from here on came
    before = np.concatenate([[0], sequences[:-1]])
    for place in np.flatnonzero(sequences - before > 1).tolist():
        if since_us is not None and above_us[place] < since_us:
            continue
        state = State.UNACCOUNTED if above_us[place] <= old_us else State.PENDING
        yield from _accounted(key, losses, int(before[place]) + 1, int(sequences[place]) - 1, state)


def _accounted(key: LaneKey, ledger: list[_Loss], first: int, last: int, otherwise: State) -> Iterable[Gap]:
    """The gap, parted by what the ledger says of it."""
    losses = [loss for loss in ledger if loss.first_sequence <= last and loss.last_sequence >= first]
    cuts = {first, last + 1}
    for loss in losses:
        cuts |= {max(first, loss.first_sequence), min(last, loss.last_sequence) + 1}
    for start, following in itertools.pairwise(sorted(cuts)):
        stop = following - 1
        named = next((loss for loss in losses if loss.first_sequence <= start and stop <= loss.last_sequence), None)
        if named is None:
            yield Gap(*key, start, stop, following - start, otherwise)
        elif named.of_stream != UNUSED:
            readings = named.readings if (named.first_sequence, named.last_sequence) == (start, stop) else None
            yield Gap(*key, start, stop, following - start, State.LOST, named.of_stream, named.reason, readings)
