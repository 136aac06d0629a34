"""Is what devices captured in the lake? Counted by block, because blocks have numbers: a lane's sequences rise by one.

Of every number up to the highest that the lake has seen of a device's epoch and lane, itself or in a row of the ledger, one thing is known:

| state | the block |
| --- | --- |
| stored | is in the lake; some of its rows may be in quarantine, they are counted |
| quarantined | is in the lake, all its rows in quarantine |
| lost | is named in the device's loss ledger, with the reason |
| waiting | is not here, and the device says that it still holds so many |
| removed | is not here, and its device was removed from the fleet since: it is not expected any more |
| pending | is not here, but the next one, or word of a later one, came less than the grace time ago: blocks overtake each other |
| unaccounted | is not here, and nobody said why: an alarm |

- A number that the ledger says was never used is no block. A block that the ledger names and that came all the same is stored.
- A ledger row that means fewer blocks than its range has numbers accounts for what is missing there if that is no more.
- What a device captured and never numbered, or numbered above all that came and is named, the lake cannot know; `waiting` says what the
  device reports.
- Sequences are shared by the streams of a lane: whose block is missing is known from the ledger only. What nobody can tell whose it was
  counts for every stream that the lane has.
- Released rows are readings of their stream; in quarantine they are not counted any more.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from cloud.block_index import BlockIndex
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.quarantined import NAME, marks
from cloud.tables import contract_of, read_table
from edge_agent.contract.stream import LOSSES

GRACE_S = 300.0
UNUSED, UNKNOWN = "unused", "unknown"
"""In the ledger: the stream of numbers that were never used, and that of blocks of which nobody can say it any more."""

Ints = npt.NDArray[np.int64]
_NONE = np.zeros(0, np.int64)
Epoch = tuple[str, str]
LaneKey = tuple[str, str, str]


class State(StrEnum):
    """What is known of blocks that are not stored."""

    QUARANTINED = "quarantined"
    LOST = "lost"
    WAITING = "waiting"
    REMOVED = "removed"
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
    def due(self) -> int:
        """Blocks that devices are known to have made, without those that may still come, and those that went with their device."""
        return self.captured - sum(self.blocks[state] for state in (State.WAITING, State.REMOVED, State.PENDING))

    @property
    def share_due(self) -> float:
        """The share of those that is in the lake: what a service level is about."""
        return (self.stored + self.blocks[State.QUARANTINED]) / self.due if self.due else 1.0

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
    arrived_us: int

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

    def has(self, stream: str) -> bool:
        """Whether anything is known of a stream here."""
        held = any(of_stream == stream for of_stream, _, _ in self.quarantined.values())
        return stream in self.streams or held or any(loss.of_stream == stream for loss in self.ledger)


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
    removed: Mapping[str, int] | None = None,
) -> Completeness:
    """What of one device, one stream or everything is in the lake.

    Args:
        index: keep it between calls, and only new files are read.
        since_us: only blocks that came since then, and gaps that showed since then: by a block, or the ledger's word of one, above them.
        waiting: how many blocks each device and epoch says it still holds.
        removed: of devices that left the fleet, until when (us): gaps that showed later are those of a device that was added again.

    Raises:
        UnavailableError: the lake does not read.
    """
    lanes, old_us = _collect(lake, index, device), now_us - int(grace_s * 1e6)
    gaps = {key: list(_gaps(key, lane, old_us)) for key, lane in sorted(lanes.items())}
    late = Counter[Epoch]()  # of everything, whatever part of it is asked for: the device counts so
    for key, those in gaps.items():
        late[key[:2]] += sum(gap.blocks for gap, _ in those if gap.state is State.UNACCOUNTED)
    found = Completeness()
    for key, those in gaps.items():
        if stream is not None and not lanes[key].has(stream):
            continue
        _count_stored(lanes[key], stream, since_us, found)
        held = late[key[:2]] <= (waiting or {}).get(key[:2], 0)
        gone_us = (removed or {}).get(key[0], -1)
        for gap, shown_us in those:
            if (stream is None or gap.stream in ("", UNKNOWN, stream)) and (since_us is None or shown_us >= since_us):
                found.gaps.append(_excused(gap, held, shown_us <= gone_us))
    for gap in found.gaps:
        found.blocks[gap.state] += gap.blocks
        found.lost_readings += (gap.readings or 0.0) if gap.state is State.LOST else 0.0
    return found


def _excused(gap: Gap, held: bool, gone: bool) -> Gap:
    """A gap of which no block and no row of the ledger says anything, with what is known of its device."""
    if gap.state is not State.UNACCOUNTED or not (held or gone):
        return gap
    return replace(gap, state=State.WAITING if held else State.REMOVED)


def _collect(lake: CheckedLake, index: BlockIndex, device: str | None) -> dict[LaneKey, _Lane]:
    lanes: defaultdict[LaneKey, _Lane] = defaultdict(_Lane)
    for stream, name, blocks in _tables(lake.lake, index):
        for (dev, epoch), part in _by_epoch(blocks, device):
            lane = lanes[dev, epoch, name]
            lane.stored.append(part["sequence"].to_numpy())
            lane.arrived.append(part["arrived_us"].to_numpy())
            lane.streams[stream] = part
    released: dict[str, Counter[tuple[str, str, int]]] = {}
    for stream, name, blocks in _tables(lake.held, index):
        if name not in released:
            released[name] = _released(lake.held, name)
        for (dev, epoch), part in _by_epoch(blocks, device):
            lane = lanes[dev, epoch, name]
            for sequence, rows, arrived in zip(*(part[c].to_pylist() for c in ("sequence", "rows", "arrived_us")), strict=True):
                lane.quarantined[sequence] = (stream, rows - released[name][dev, epoch, sequence], arrived)
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
    devices, epochs = (np.array(blocks[name].to_pylist(), np.object_) for name in ("device", "epoch"))
    new = (devices[1:] != devices[:-1]) | (epochs[1:] != epochs[:-1])
    for start, stop in itertools.pairwise([0, *(np.flatnonzero(new) + 1).tolist(), len(devices)]):
        if device in (None, devices[start]):
            yield (devices[start], epochs[start]), blocks.slice(start, stop - start)


def _released(held: Lake, lane: str) -> Counter[tuple[str, str, int]]:
    """How many rows of each quarantined block are released, by device, epoch and sequence."""
    table = marks(held, lane)
    if table is None:
        return Counter()
    names = read_table(table, columns=list(NAME)).group_by(list(NAME)).aggregate([])  # once each: a mark may stand there twice
    return Counter(zip(*(names[column].to_pylist() for column in NAME[:3]), strict=True))


def _read_ledger(lake: Lake, lanes: defaultdict[LaneKey, _Lane], device: str | None) -> None:
    columns = ["device", "of_epoch", "of_lane", "of_stream", "first_sequence", "last_sequence", "blocks", "readings", "reason"]
    for name in lake.lanes(LOSSES.stream):
        table = read_table(lake.table(LOSSES.stream, name), columns=[*columns, "arrived_at"])
        arrived = table["arrived_at"].cast(pa.int64()).to_pylist()
        for dev, epoch, lane, *rest in zip(*(table[c].to_pylist() for c in columns), arrived, strict=True):
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


def _gaps(key: LaneKey, lane: _Lane, old_us: int) -> Iterable[tuple[Gap, int]]:
    """The ranges of numbers that have no block here, each with the time when it first showed (us)."""
    sequences, first = np.unique(np.concatenate([_NONE, *lane.stored]), return_index=True)
    arrived = np.concatenate([_NONE, *lane.arrived])[first]
    losses = [loss for loss in lane.ledger if loss.excuses(sequences)]
    above_us = np.minimum.accumulate(arrived[::-1])[::-1]  # when the first block from here on came
    before = np.concatenate([[0], sequences[:-1]])
    ranges = [(int(before[i]) + 1, int(sequences[i]) - 1, int(above_us[i])) for i in np.flatnonzero(sequences - before > 1)]
    highest = int(sequences[-1]) if len(sequences) else 0
    if beyond := [loss for loss in lane.ledger if loss.last_sequence > highest]:  # of a buffer that is gone nothing comes any more
        ranges.append((highest + 1, max(loss.last_sequence for loss in beyond), min(loss.arrived_us for loss in beyond)))
    for start, stop, shown_us, named in _parted(ranges, losses):
        if named is None:
            yield Gap(*key, start, stop, stop - start + 1, State.UNACCOUNTED if shown_us <= old_us else State.PENDING), shown_us
        elif named.of_stream != UNUSED:
            readings = named.readings if (named.first_sequence, named.last_sequence) == (start, stop) else None
            yield Gap(*key, start, stop, stop - start + 1, State.LOST, named.of_stream, named.reason, readings), shown_us


def _parted(ranges: list[tuple[int, int, int]], ledger: list[_Loss]) -> Iterable[tuple[int, int, int, _Loss | None]]:
    """The ranges, which rise, parted where rows of the ledger begin and end, each part with the first row that names it.

    One way through all of them: a device may have tens of thousands of rows.
    """
    cuts = {end for first, last, _ in ranges for end in (first, last + 1)}
    cuts |= {end for loss in ledger for end in (loss.first_sequence, loss.last_sequence + 1)}
    coming = sorted(enumerate(ledger), key=lambda row: -row[1].first_sequence)
    begun: list[tuple[int, _Loss]] = []  # a heap, by place in the ledger
    left = iter(ranges)
    first, last, shown_us = next(left, (0, -1, 0))
    for start, following in itertools.pairwise(sorted(cuts)):
        while coming and coming[-1][1].first_sequence <= start:
            heapq.heappush(begun, coming.pop())
        while begun and begun[0][1].last_sequence < start:
            heapq.heappop(begun)
        if start > last:
            first, last, shown_us = next(left, (first, last, shown_us))
        if first <= start <= last:
            yield start, following - 1, shown_us, begun[0][1] if begun else None
