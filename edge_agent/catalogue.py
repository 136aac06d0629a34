"""Which blocks the buffer holds, and where: the tables beside `blocks`, and what of them is not written yet.

- A place is written with every TAIL_BLOCKS_MAX-th block, not with each: until then it is in `tail`, in memory, and after a crash
  it is read again from the blocks' own headers. A settlement that only the tail knows may be forgotten: the block goes
  once more, and the lake removes the copy.
- `lanes.gone` counts what has left the file, so that blocks which vanish unasked are noticed when it is opened.
- Counts per shelf (the blocks of one lane and stream) are kept in memory; opening reads `places` once and no block of it.

Methods that change something run inside a transaction of the store. If that fails, the catalogue is loaded anew.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from edge_agent.core.retention import Age, Place
from edge_agent.slots import PLACED, Slots, placed_value
from edge_agent.store import SETTLED, TAIL_BLOCKS_MAX, Store, bytes_on_disk

READ_BLOCKS = 512
_PLACE = "shelf, sequence, id, rows, bytes, last_ordinal, first_us, last_us, stored_us, settled, slot"


@dataclass
class Shelf:
    """The blocks of one lane and stream. None before `first_waiting` waits; none before `first_settled` is settled."""

    number: int
    lane: str
    stream: str
    waiting: int = 0
    waiting_bytes: int = 0
    waiting_rows: int = 0
    first_waiting: int = 0
    first_settled: int | None = None
    settled_bytes: int = 0  # on the disk

    def count(self, place: Place, sign: int) -> None:
        """Count a waiting block in (+1) or out (-1)."""
        self.waiting += sign
        self.waiting_bytes += sign * place.bytes
        self.waiting_rows += sign * place.rows


@dataclass
class Catalogue:
    """See the module's rules; edge_agent.opening makes it from a file."""

    store: Store
    epoch: str
    slots: Slots
    shelves: dict[int, Shelf] = field(default_factory=dict)
    sequences: dict[str, int] = field(default_factory=dict)
    gone: Counter[str] = field(default_factory=Counter)
    ordinals: dict[str, int] = field(default_factory=dict)
    gaps: dict[str, tuple[int, int]] = field(default_factory=dict)  # by stream: where ordinals went on after a salvage, how many are unused
    tail: tuple[Place, ...] = ()
    next_id: int = 1
    committed_id: int = 0  # the tail beyond it is in a transaction under way: readers do not see it yet
    leaving: tuple[Place, ...] = ()  # of the tail: what that transaction has written into `places`, where readers do not see it yet
    lanes_changed: bool = False
    age: Age = field(default_factory=lambda: Age(0, 0))  # how much time the file has seen pass
    receipts: dict[str, set[tuple[int, int]]] = field(default_factory=dict)  # by lane: the ranges that the last receipt settled
    _numbers: dict[tuple[str, str], int] = field(default_factory=dict)

    def shelf(self, lane: str, stream: str) -> Shelf:
        """The shelf of a lane and stream, made if need be."""
        number = self._numbers.get((lane, stream))
        if number is None:
            number = max(self.shelves, default=0) + 1
            self.add_shelf(Shelf(number, lane, stream))
        return self.shelves[number]

    def add_shelf(self, shelf: Shelf) -> None:
        self.shelves[shelf.number] = shelf
        self._numbers[shelf.lane, shelf.stream] = shelf.number

    def of_lane(self, lane: str) -> list[Shelf]:
        return [s for s in list(self.shelves.values()) if s.lane == lane]

    def put(self, places: list[Place]) -> bool:
        """Take in blocks that were inserted in this transaction; True if the tail was long enough to be written."""
        self.put_tail(places)
        if len(self.tail) < TAIL_BLOCKS_MAX:
            return False
        self.write_tail()
        return True

    def put_tail(self, places: list[Place]) -> None:
        """Take in blocks whose places are not written yet."""
        for place in places:
            shelf = self.shelves[place.shelf]
            shelf.count(place, 1)
            self.sequences[shelf.lane] = max(self.sequences.get(shelf.lane, 0), place.sequence)
            self.ordinals[shelf.stream] = max(self.ordinals.get(shelf.stream, 0), place.last_ordinal + 1)
            self.next_id = max(self.next_id, place.id + 1)
        self.tail = (*self.tail, *places)

    def floor(self, stream: str, rows: int) -> int:
        """The ordinal of the reading before which `rows` newest ones of a stream end, or some more."""
        floor = self.ordinals.get(stream, 0) - rows
        start, unused = self.gaps.get(stream, (0, 0))
        return floor - unused if floor < start else floor

    def floors(self, rows: Mapping[str, int]) -> dict[str, int]:
        """The floor of each stream, for as many rows of it."""
        return {s.stream: self.floor(s.stream, rows.get(s.stream, 0)) for s in list(self.shelves.values())}

    def skip(self, lane: str, sequence: int) -> None:
        """Give out no name of this lane up to `sequence` any more."""
        self.leave(lane, sequence - self.sequences.get(lane, 0))
        self.sequences[lane] = sequence

    def leave(self, lane: str, count: int = 1) -> None:
        """Names of a lane that are not, or no longer, in the file; `write_lanes` must follow in the same transaction."""
        self.gone[lane] += count
        self.lanes_changed = True

    def write_tail(self) -> None:
        """Write the places of the tail, and the lanes' and streams' numbers."""
        rows = [(*place[:9], SETTLED if place.settled else 0, place.slot) for place in self.tail]
        shelves = [(s.number, s.lane, s.stream) for s in self.shelves.values()]
        self.store.execute_many("INSERT OR IGNORE INTO shelves VALUES (?, ?, ?)", shelves)
        self.store.execute_many(f"INSERT INTO places ({_PLACE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)
        self.store.execute_many("INSERT OR REPLACE INTO streams VALUES (?, ?)", list(self.ordinals.items()))
        self.store.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (PLACED, placed_value(self.next_id - 1)))
        self.write_lanes()
        self.leaving, self.tail = (*self.leaving, *self.tail), ()

    def give_back_slots(self, bytes_max: int | None = None) -> None:
        """Make free pages of the free slots beyond `bytes_max`, or beyond their limit."""
        gone = self.slots.give_back(bytes_max)
        if gone:
            self.store.execute_many("DELETE FROM slots WHERE slot = ?", [(slot,) for slot in gone])

    def note_commit(self) -> None:
        """The transaction is on disk: readers see in `places` what it has written there."""
        self.committed_id, self.leaving = self.next_id - 1, ()

    def committed(self) -> list[Place]:
        """Places on disk that readers may not see in `places` yet; look there afterwards, for what has been written meanwhile."""
        tail, leaving = self.tail, self.leaving  # in this order: what is not in the tail any more is among those that leave it
        return [p for p in (*leaving, *tail) if p.id <= self.committed_id]

    def waiting(self, lane: str, after: int, limit: int) -> list[Place]:
        """The next places of a lane that wait for a receipt, by rising sequence."""
        tail = [p for p in self.committed() if p.sequence > after and not p.settled and self.shelves[p.shelf].lane == lane]
        found = {p.sequence: p for p in tail}  # looked at before `places`: what is written in between is found twice, not missed
        for shelf in self.of_lane(lane):
            first = max(after + 1, shelf.first_waiting)
            query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence >= ? AND settled = 0 ORDER BY sequence LIMIT ?"
            found |= {row[1]: _place(row) for row in self.store.read(query, (shelf.number, first, limit))}
        return [found[n] for n in sorted(found)[:limit]]

    def first_waiting(self, lane: str) -> Place | None:
        """The waiting block of a lane that was stored first."""
        found = [p for p in self.committed() if not p.settled and self.shelves[p.shelf].lane == lane][:1]
        for shelf in self.of_lane(lane):
            query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence >= ? AND settled = 0 ORDER BY sequence LIMIT 1"
            found += [_place(row) for row in self.store.read(query, (shelf.number, shelf.first_waiting))]
        return min(found, key=attrgetter("id"), default=None)

    def still(self, places: list[Place]) -> list[Place]:
        """Those of `places` that are in the file; the tail must be written."""
        query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence = ? AND id = ?"
        return [_place(row) for p in places for row in self.store.execute(query, (p.shelf, p.sequence, p.id))]

    def numbered(self, number: int) -> list[Place]:
        """The places of the block with this id: one, in a whole file. Looked for among the newest of each shelf first."""
        newest = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence = (SELECT max(sequence) FROM places WHERE shelf = ?) AND id = ?"
        rows = [row for n in self.shelves for row in self.store.execute(newest, (n, n, number))]
        return [_place(row) for row in rows or self.store.execute(f"SELECT {_PLACE} FROM places WHERE id = ?", (number,))]

    def evictable(self, shelf: Shelf) -> Iterator[Place]:
        """The waiting places of a shelf, oldest first, in portions: inside a transaction, with the tail written."""
        after = shelf.first_waiting - 1
        query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence > ? AND settled = 0 ORDER BY sequence LIMIT ?"
        while rows := self.store.execute(query, (shelf.number, after, READ_BLOCKS)):
            yield from map(_place, rows)
            after = rows[-1][1]

    def settle(self, lane: str, first: int, last: int, floors: dict[str, int]) -> int:
        """Settle up to READ_BLOCKS blocks of a range (of each shelf), and those of the tail; returns how many it were.

        A block whose newest reading is below its stream's floor is not wanted as history either, and leaves at once.
        """
        settled = 0
        for shelf in self.of_lane(lane):
            start = max(first, shelf.first_waiting)
            query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence BETWEEN ? AND ? AND settled = 0 ORDER BY sequence LIMIT ?"
            places = [_place(row) for row in self.store.execute(query, (shelf.number, start, last, READ_BLOCKS))]
            old = [p for p in places if p.last_ordinal < floors[shelf.stream]]
            self.remove(old)
            keep = [p for p in places if p.last_ordinal >= floors[shelf.stream]]
            self._mark(shelf, keep)
            settled += len(places)
            if start <= shelf.first_waiting and len(places) < READ_BLOCKS:
                shelf.first_waiting = max(shelf.first_waiting, last + 1)
            elif places and start <= shelf.first_waiting:
                shelf.first_waiting = places[-1].sequence + 1
        return settled

    def settle_tail(self, lane: str, first: int, last: int) -> int:
        """Settle what only the tail knows, in memory; returns how many blocks it were."""
        mine = {s.number for s in self.of_lane(lane)}
        hit = [p for p in self.tail if not p.settled and first <= p.sequence <= last and p.shelf in mine]
        for place in hit:
            self._leave_waiting(self.shelves[place.shelf], place)
        if hit:
            done = {p.id for p in hit}
            self.tail = tuple(p._replace(settled=True) if p.id in done else p for p in self.tail)
        return len(hit)

    def trim(self, floors: dict[str, int]) -> int:
        """Remove settled blocks that are too old for history, up to READ_BLOCKS per shelf; the tail must be written."""
        removed = 0
        for shelf in list(self.shelves.values()):
            if shelf.first_settled is None:
                continue
            query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence >= ? ORDER BY sequence LIMIT ?"
            places = [_place(row) for row in self.store.execute(query, (shelf.number, shelf.first_settled, READ_BLOCKS))]
            old = [p for p in places if p.last_ordinal < floors[shelf.stream]]
            if len(old) < len(places):
                shelf.first_settled = places[len(old)].sequence
            else:
                shelf.first_settled = places[-1].sequence + 1 if len(places) == READ_BLOCKS else None
            settled = [p for p in old if p.settled]
            self.remove(settled)
            removed += len(settled)
        return removed

    def settled(self, limit: int) -> list[Place]:
        """The oldest settled blocks; the tail must be written."""
        query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence >= ? AND settled <> 0 ORDER BY sequence LIMIT ?"
        shelves = [s for s in self.shelves.values() if s.first_settled is not None]
        found = [map(_place, self.store.execute(query, (s.number, s.first_settled, limit))) for s in shelves]
        return list(heapq.merge(*found, key=attrgetter("id")))[:limit]

    def settled_bytes(self) -> int:
        """What settled blocks take on the disk."""
        return sum(s.settled_bytes for s in self.shelves.values())

    def newest(self, stream: str, floor: int) -> list[Place]:
        """Places of a stream whose newest reading is not below `floor`, settled or not, in the order stored."""
        found = [p for p in self.committed() if self.shelves[p.shelf].stream == stream and p.last_ordinal >= floor]
        query = f"SELECT {_PLACE} FROM places WHERE shelf = ? AND sequence < ? ORDER BY sequence DESC LIMIT ?"
        for shelf in [s for s in list(self.shelves.values()) if s.stream == stream]:
            before = 2**62
            while rows := self.store.read(query, (shelf.number, before, READ_BLOCKS)):
                found += [p for p in map(_place, rows) if p.last_ordinal >= floor]
                before = rows[-1][1]
                if rows[-1][5] < floor:
                    break
        return sorted({p.id: p for p in found}.values(), key=attrgetter("last_ordinal"))

    def remove(self, places: list[Place]) -> None:
        """Take blocks out of the file; the tail must be written, or not hold them."""
        if not places:
            return
        self.store.execute_many("DELETE FROM places WHERE shelf = ? AND sequence = ?", [(p.shelf, p.sequence) for p in places])
        self.store.execute_many("DELETE FROM blocks WHERE id = ?", [(p.id,) for p in places if not p.slot])
        for place in places:
            shelf = self.shelves[place.shelf]
            if place.settled:
                shelf.settled_bytes -= bytes_on_disk(place.bytes)
            else:
                shelf.count(place, -1)
            if place.slot:
                self.slots.release(place.slot)
            self.leave(shelf.lane)

    def _mark(self, shelf: Shelf, places: list[Place]) -> None:
        if not places:
            return
        query = "UPDATE places SET settled = ? WHERE shelf = ? AND sequence BETWEEN ? AND ? AND settled = 0"
        self.store.execute(query, (SETTLED, shelf.number, places[0].sequence, places[-1].sequence))
        for place in places:
            self._leave_waiting(shelf, place)

    def _leave_waiting(self, shelf: Shelf, place: Place) -> None:
        shelf.count(place, -1)
        shelf.settled_bytes += bytes_on_disk(place.bytes)
        shelf.first_settled = place.sequence if shelf.first_settled is None else min(shelf.first_settled, place.sequence)

    def write_lanes(self) -> None:
        """Write the lanes' numbers."""
        rows = [(lane, sequence, self.gone[lane]) for lane, sequence in self.sequences.items()]
        self.store.execute_many("INSERT OR REPLACE INTO lanes VALUES (?, ?, ?)", rows)
        self.lanes_changed = False


def _place(row: tuple[Any, ...]) -> Place:
    return Place._make((*row[:9], row[9] != 0, row[10]))
