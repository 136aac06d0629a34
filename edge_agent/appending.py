"""One append: drafts are sealed, room is made, and blocks, ledger and fixes go to the disk in one transaction.

- A commit that failed may have reached the disk all the same. So what an append was about to store is remembered until it succeeds:
  the next call with the same drafts looks whether they are there, and stores them only if not.
"""

from __future__ import annotations

from edge_agent.clock import Moment
from edge_agent.contract.errors import Reason
from edge_agent.core.fix import Fix, to_text
from edge_agent.core.retention import Place
from edge_agent.core.track import FIXES_MAX
from edge_agent.draft import Draft, Sealed, StoredBlock
from edge_agent.eviction import Eviction
from edge_agent.loss_ledger import LossLedger
from edge_agent.owned_file import OwnedFile
from edge_agent.room import Room
from edge_agent.sealing import Sealer
from edge_agent.slots import stored_blocks
from edge_agent.store import bytes_on_disk


class Appender:
    """Appends to an owned file; its lock is held by the caller."""

    def __init__(self, file: OwnedFile, sealer: Sealer, room: Room, eviction: Eviction, ledger: LossLedger) -> None:
        self._file, self._sealer, self._room, self._eviction, self._ledger = file, sealer, room, eviction, ledger
        self._doubt: tuple[list[Draft], list[Sealed]] | None = None  # of an append that failed: its commit may be on the disk

    def append(self, drafts: list[Draft], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        """One try; see `Buffer.append`.

        Raises:
            DiskError, DamagedError: the file failed. Try again: it is opened anew first.
        """
        self._file.recover()
        landed = self._landed(drafts)
        if landed:
            return landed
        sealed, victims, ledger = self._fit(drafts, now)
        stored = [*ledger, *self._store(drafts, sealed, victims, fixes, now)]
        self._doubt = None
        return stored

    def _fit(self, drafts: list[Draft], now: Moment) -> tuple[list[Sealed], list[Place], list[StoredBlock]]:
        """The sealed drafts, what is given up so that they fit, and the ledger's blocks for what had to be given up before."""
        ledger: list[StoredBlock] = []
        while True:
            sealed = self._sealer.seal(self._file.catalogue, drafts, now)
            size = sum(bytes_on_disk(len(s.on_disk)) for s in sealed)
            with self._file.noting_faults():
                self._room.make(size)
                victims = self._eviction.victims(sealed, size)
            if victims is not None:
                return sealed, victims, ledger
            ledger += self._eviction.give_up_many(now)
            self._room.checkpoint()

    def _landed(self, drafts: list[Draft]) -> list[StoredBlock]:
        """The blocks of these drafts, if they are on the disk from a call that failed: its commit did reach it."""
        if self._doubt is None:
            return []
        before, sealed = self._doubt
        with self._file.noting_faults():
            found = stored_blocks(self._file.store.execute, [s.place._replace(slot=0) for s in sealed])  # as after a salvage
            found |= stored_blocks(self._file.store.execute, [s.place for s in sealed if s.place.id not in found])
        self._doubt = None
        if len(before) != len(drafts) or not all(a is b for a, b in zip(before, drafts, strict=True)):
            return []
        return [s.stored for s in sealed] if found == {s.place.id: s.on_disk for s in sealed} else []

    def _store(self, drafts: list[Draft], sealed: list[Sealed], victims: list[Place], fixes: list[Fix], now: Moment) -> list[StoredBlock]:
        given_up = {p.id for p in victims}
        kept = [s for s in sealed if s.place.id not in given_up]
        ledger: list[Sealed] = []
        with self._file.writing():
            if victims:
                ledger = self._ledger.give_up(self._file.catalogue, victims, sealed, Reason.EVICTED_FULL, now)
            sealed = self._file.insert([*kept, *ledger])
            self._doubt = (drafts, sealed)
            self._write_fixes(fixes)
        self._room.checkpoint()
        return [s.stored for s in sealed]

    def _write_fixes(self, fixes: list[Fix]) -> None:
        if fixes:
            self._file.store.execute_many("INSERT OR REPLACE INTO fixes VALUES (?, ?)", [(f.time_us, to_text(f)) for f in fixes])
            self._file.store.execute(
                "DELETE FROM fixes WHERE time_us <= (SELECT time_us FROM fixes ORDER BY time_us DESC LIMIT 1 OFFSET ?)", (FIXES_MAX,)
            )
