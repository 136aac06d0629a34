"""What is settled: the names of blocks that the lake holds, and those that the loss ledger gives up. Receipts tell of both.

- `stored` are the blocks in the lake; only they make a copy a copy. A block that the ledger names and that comes all the same (it was
  under way when it was given up, or was rescued from a file) is stored like any other.
- A row of the ledger counts if it means every name of its range (`blocks` is the range's length), of its own device, epoch and lane, and
  only names that were given out before it. Ranges are kept as ranges: a row may name 2**20 at once.
- Names of another epoch are those of a file that was gone. If a receipt is ever asked for there, that file is back with its blocks: they
  must not be settled unsent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pyarrow as pa

from edge_agent.contract.receipt import LANES_MAX, RANGES_MAX, SEQUENCE_MAX, LaneReceipt, Receipt, SequenceSet

Identity = tuple[str, str, str, int]
LaneKey = tuple[str, str, str]

LEDGER_COLUMNS = ("device", "epoch", "lane", "sequence", "of_epoch", "of_lane", "first_sequence", "last_sequence", "blocks")


class SettledIndex:
    """The settled names by device, epoch and lane."""

    def __init__(self) -> None:
        self.stored: defaultdict[LaneKey, SequenceSet] = defaultdict(SequenceSet)
        self._named: defaultdict[LaneKey, SequenceSet] = defaultdict(SequenceSet)  # stored, or given up

    def __contains__(self, identity: Identity) -> bool:
        """Whether the lake holds a block."""
        return identity[3] in self.stored[identity[:3]]

    def add(self, identity: Identity) -> None:
        """Note that the lake holds a block."""
        self.stored[identity[:3]].add(identity[3])
        self._named[identity[:3]].add(identity[3])

    def name(self, identity: Identity) -> None:
        """Note that a block is settled, though it does not lie here."""
        self._named[identity[:3]].add(identity[3])

    def give_up(self, rows: pa.Table) -> None:
        """Take rows of the ledger, with LEDGER_COLUMNS at least."""
        distinct = rows.select(LEDGER_COLUMNS).group_by(list(LEDGER_COLUMNS)).aggregate([])
        for device, epoch, lane, sequence, of_epoch, of_lane, first, last, blocks in zip(
            *(distinct[name].to_pylist() for name in LEDGER_COLUMNS), strict=True
        ):
            whole = 1 <= first <= last <= SEQUENCE_MAX and blocks == last - first + 1
            if whole and (of_epoch, of_lane) == (epoch, lane) and last < sequence:
                self._named[device, of_epoch, lane].add_range(first, last)

    def cut(self, identities: Iterable[Identity]) -> set[str]:
        """The lanes whose receipts have no room for all that is settled."""
        return {lane for device, epoch, lane, _ in identities if len(self._named[device, epoch, lane].ranges) > RANGES_MAX}

    def receipts(self, identities: Iterable[Identity]) -> list[Receipt]:
        """One receipt per device and epoch that sent something, for the lanes it was sent in."""
        lanes: defaultdict[tuple[str, str], dict[str, LaneReceipt]] = defaultdict(dict)
        for device, epoch, lane, _ in identities:
            if lane not in lanes[device, epoch]:
                named = self._named[device, epoch, lane]
                lanes[device, epoch][lane] = LaneReceipt(lane=lane, cumulative=named.cumulative, ranges=named.ranges[:RANGES_MAX])
        return [
            Receipt(device=device, epoch=epoch, lanes=part)
            for (device, epoch), found in lanes.items()
            for part in _chunks(list(found.values()), LANES_MAX)
        ]


def _chunks(items: list[LaneReceipt], size: int) -> list[list[LaneReceipt]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
