"""What is given up when the buffer is full, or holds what is too old: the lowest priority first, then the oldest.

- core.retention decides; this asks the file what there is. The blocks of the loss ledger are never given up.
- Age counts only time that the device saw pass (core.retention.Age).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from edge_agent.clock import Moment
from edge_agent.contract.errors import Reason
from edge_agent.contract.stream import LOSSES
from edge_agent.core.retention import Place, choose, portion
from edge_agent.draft import Retention, Sealed, StoredBlock
from edge_agent.loss_ledger import LossLedger
from edge_agent.owned_file import OwnedFile
from edge_agent.room import Room
from edge_agent.store import BufferFullError
from edge_agent.waiting import lanes

BLOCKS_MAX = 16_384  # given up at a time
AGE_CHECK_S = 10.0


class Eviction:
    """Chooses among the waiting blocks of an owned file, as its limits say."""

    def __init__(self, file: OwnedFile, room: Room, limits: Retention, ledger: LossLedger) -> None:
        self._file, self._room, self._limits, self._ledger = file, room, limits, ledger
        self._age_due_us = 0

    def victims(self, sealed: list[Sealed], size: int) -> list[Place] | None:
        """What to give up so that sealed blocks of `size` bytes fit: stored ones, or some of these themselves.

        Returns:
            None if they are more than BLOCKS_MAX: `give_up_many` first, then ask again.

        Raises:
            BufferFullError: nothing may be given up, or not enough.
        """
        lack = self._room.lack_bytes(size)
        if lack <= 0:
            return []
        used, limit = self._file.used_bytes(), self._limits.bytes_max
        full = f"buffer holds {used} bytes and its log up to {self._file.log_bytes_max}, {size} more would pass the limit of {limit}"
        if self._limits.when_full == "block":
            raise BufferFullError(full)
        with self._file.writing():
            self._file.catalogue.write_tail()
        incoming = [s.place for s in sealed]
        needed = choose(self._classes(incoming), lack)
        worth = max((self._priority(p) for p in needed), default=0)  # what is worth more is not given up to have some room in hand
        spare = {priority: shelves for priority, shelves in self._classes(incoming).items() if priority <= worth}
        victims = choose(spare, portion(lack, limit))[:BLOCKS_MAX]
        if sum(p.bytes for p in victims) < lack:
            if len(victims) == BLOCKS_MAX:
                return None
            raise BufferFullError(f"{full}, and only {len(victims)} blocks may be given up")
        return victims

    def give_up_many(self, now: Moment) -> list[StoredBlock]:
        """Give up BLOCKS_MAX blocks of a file that is far beyond its limit, as one is that was lowered; returns the ledger's new blocks."""
        with self._file.writing():
            self._file.catalogue.write_tail()
            victims = choose(self._classes(), self._limits.bytes_max)[:BLOCKS_MAX]
            ledger = self._ledger.give_up(self._file.catalogue, victims, [], Reason.EVICTED_FULL, now)
            self._file.insert(ledger)
        return [s.stored for s in ledger]

    def give_up_old(self, now: Moment) -> list[StoredBlock]:
        """Give up what is older than the limit, looked at every AGE_CHECK_S; returns the ledger's new blocks."""
        if self._limits.age_s_max is None or now.monotonic_us < self._age_due_us:
            return []
        self._age_due_us = now.monotonic_us + int(AGE_CHECK_S * 1e6)
        age = self._file.catalogue.age
        oldest = age.at(now.monotonic_us) - int(self._limits.age_s_max * 1e6)
        ledger: list[Sealed] = []
        if any(age.base_us + s.oldest_us - age.monotonic_us < oldest for s in lanes(self._file)):
            with self._file.writing():
                self._file.catalogue.write_tail()
                series = [s for priority in self._classes().values() for s in priority]
                old = [p for shelf in series for p in _older(shelf, oldest)]
                if old:
                    ledger = self._ledger.give_up(self._file.catalogue, old, [], Reason.EVICTED_AGE, now)
                    self._file.insert(ledger)
        return [s.stored for s in ledger]

    def _priority(self, place: Place) -> int:
        return self._limits.priority(self._file.catalogue.shelves[place.shelf].stream)

    def _classes(self, incoming: Iterable[Place] = ()) -> dict[int, list[Iterable[Place]]]:
        """Blocks that may be given up: by priority, one series per shelf."""
        classes: dict[int, list[Iterable[Place]]] = {}
        for shelf in self._file.catalogue.shelves.values():
            if shelf.stream != LOSSES.stream:
                mine = [p for p in incoming if p.shelf == shelf.number]
                classes.setdefault(self._limits.priority(shelf.stream), []).extend([self._file.catalogue.evictable(shelf), mine])
        return classes


def _older(shelf: Iterable[Place], oldest_us: int) -> Iterator[Place]:
    """The blocks at a shelf's start that were stored before `oldest_us`, at most BLOCKS_MAX."""
    for count, place in enumerate(shelf):
        if place.stored_us >= oldest_us or count >= BLOCKS_MAX:
            return
        yield place
