"""What is settled: the names of blocks that the lake holds, and those that the loss ledger gives up. Receipts tell of both.

- `stored` are the blocks in the lake; only they make a copy a copy. A block that the ledger names and that comes all the same (it was
  under way when it was given up, or was rescued from a file) is stored like any other.
- A row of the ledger counts if it means every name of its range (`blocks` is the range's length), of its own device, epoch and lane, and
  only names that were given out before it. Ranges are kept as ranges: a row may name 2**20 at once.
- A device's names may not be parted into ranges without end: a block of its ledger that would is refused (`too_many`), and stays with the
  device. It comes again, and is taken when blocks in between have come.
- Names of another epoch are those of a file that was gone. If a receipt is ever asked for there, that file is back with its blocks: they
  must not be settled unsent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import pyarrow as pa

from cloud.stacks import Block
from edge_agent.contract.receipt import RANGES_MAX, SEQUENCE_MAX, LaneReceipt, Receipt, SequenceSet

Identity = tuple[str, str, str, int]
LaneKey = tuple[str, str, str]

_NAMED = ("of_epoch", "of_lane", "first_sequence", "last_sequence", "blocks")
LEDGER_COLUMNS = ("device", "epoch", "lane", "sequence", *_NAMED)

RANGES_HELD_MAX = 131_072
"""Ranges of one device's names that are held in memory, over all its lanes and epochs: four times what an agent writes into a ledger's
block (`edge_agent.core.ledger.ROWS_MAX`), some 20 MB."""


class SettledIndex:
    """The settled names by device, epoch and lane."""

    def __init__(self) -> None:
        self.stored: defaultdict[LaneKey, SequenceSet] = defaultdict(SequenceSet)
        self._named: defaultdict[LaneKey, SequenceSet] = defaultdict(SequenceSet)  # stored, or given up
        self._held: Counter[str] = Counter()  # ranges in `_named`, by device

    def __contains__(self, identity: Identity) -> bool:
        """Whether the lake holds a block."""
        return identity[3] in self.stored[identity[:3]]

    def add(self, identity: Identity) -> None:
        """Note that the lake holds a block."""
        self.stored[identity[:3]].add(identity[3])
        self.name(identity)

    def name(self, identity: Identity) -> None:
        """Note that a block is settled, though it does not lie here."""
        self._name(identity[:3], [(identity[3], identity[3])])

    def give_up(self, rows: pa.Table) -> None:
        """Take rows of the ledger, with LEDGER_COLUMNS at least."""
        distinct = rows.select(LEDGER_COLUMNS).group_by(list(LEDGER_COLUMNS)).aggregate([])
        found: defaultdict[LaneKey, list[tuple[int, int]]] = defaultdict(list)
        for device, epoch, lane, sequence, *row in zip(*(distinct[name].to_pylist() for name in LEDGER_COLUMNS), strict=True):
            if _counts((device, epoch, lane, sequence), *row):
                found[device, epoch, lane].append((row[2], row[3]))
        for key, ranges in found.items():
            self._name(key, ranges)

    def too_many(self, ledger: Iterable[Block]) -> dict[Identity, str]:
        """Those of new blocks of a ledger that would make a device's names more ranges, and more than RANGES_HELD_MAX, in words.

        A block that makes them fewer is never among them. So what a device keeps for now can be taken when the blocks in between are here.
        """
        found: dict[Identity, str] = {}
        after: dict[LaneKey, SequenceSet] = {}
        more: Counter[str] = Counter()
        for header, table in ledger:
            key = header.identity[:3]
            before = after.get(key) or self._named.get(key) or SequenceSet()
            names = SequenceSet(before.cumulative, before.ranges)
            rows = zip(*(table[name].tolist() for name in _NAMED), strict=True)
            names.add_ranges([(row[2], row[3]) for row in rows if _counts(header.identity, *row)])
            grown = len(names.ranges) - len(before.ranges)
            total = self._held[header.device] + more[header.device] + grown
            if grown > 0 and total > RANGES_HELD_MAX:
                found[header.identity] = f"with it the names of its device are {total} ranges; at most {RANGES_HELD_MAX} are held"
            else:
                after[key] = names
                more[header.device] += grown
        return found

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
        return [Receipt(device=device, epoch=epoch, lanes=list(found.values())) for (device, epoch), found in lanes.items()]

    def _name(self, key: LaneKey, ranges: Sequence[tuple[int, int]]) -> None:
        named = self._named[key]
        before = len(named.ranges)
        named.add_ranges(ranges)
        self._held[key[0]] += len(named.ranges) - before


def _counts(block: Identity, of_epoch: str, of_lane: str, first: int, last: int, blocks: int) -> bool:
    """Whether a row in this block of the ledger settles its range."""
    _, epoch, lane, sequence = block
    whole = 1 <= first <= last <= SEQUENCE_MAX and blocks == last - first + 1
    return whole and (of_epoch, of_lane) == (epoch, lane) and last < sequence
