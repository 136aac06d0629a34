"""Reading stored blocks: each is checked; a damaged one is taken out, kept for study and named in the loss ledger.

- A block whose CRC or key does not fit is damaged. One that is whole but lies where another should means that the file is: it is salvaged.
- After a fault of the file it is opened again, and read once more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from edge_agent.catalogue import Catalogue
from edge_agent.clock import Moment
from edge_agent.contract.block import ORDINAL, BlockHeader, decode_block, read_header
from edge_agent.contract.columns import Strings, Table, concat, take
from edge_agent.contract.errors import ContractError, Reason, UnavailableError
from edge_agent.core.fix import Fix, from_text
from edge_agent.core.retention import Place
from edge_agent.draft import StoredBlock
from edge_agent.loss_ledger import LossLedger
from edge_agent.owned_file import OwnedFile
from edge_agent.sealed import Keys, open_stored
from edge_agent.slots import Read, stored_blocks
from edge_agent.store import DamagedError, DiskError

log = logging.getLogger(__name__)

READ_ATTEMPTS = 3
DAMAGED_BLOCKS_MAX = 64  # kept for study

T = TypeVar("T")


class Reader:
    """Reads the blocks of an owned file; see the module's rules."""

    def __init__(self, file: OwnedFile, ledger: LossLedger, keys: Keys | None, clock: Callable[[], Moment]) -> None:
        self._file, self._ledger, self._keys, self._clock = file, ledger, keys, clock

    def waiting(self, lane: str, after_sequence: int, limit: int) -> list[StoredBlock]:
        """The next unsettled blocks of a lane, by rising sequence."""
        for _ in range(READ_ATTEMPTS):
            blocks, damaged = self._look(lambda catalogue: catalogue.waiting(lane, after_sequence, limit))
            if not damaged or not self._bury(damaged):
                break  # else a block of the ledger has come instead
        return [StoredBlock(lane, header.sequence, header.stream, header.rows, block) for header, block in blocks]

    def newest(self, stream: str, contract_version: str) -> Table | None:
        """The newest readings of a stream, in the order seen; None if there are none of this contract version."""
        blocks, damaged = self._look(lambda catalogue: catalogue.newest(stream, self._file.floors().get(stream, 0)))
        if damaged:
            self._bury(damaged)
        tables = [table for header, table in (decode_block(b) for _, b in blocks) if header.contract_version == contract_version]
        if not tables:
            return None
        kinds = [{(name, isinstance(column, Strings)) for name, column in table.items()} for table in tables]
        shared = {name for name, _ in kinds[0].intersection(*kinds)}  # blocks without a model have no scores; contracts are changed by hand
        rows = concat([{name: column for name, column in table.items() if name in shared} for table in tables])
        ordinals = rows[ORDINAL]
        assert isinstance(ordinals, np.ndarray)
        return take(rows, np.argsort(ordinals, kind="stable"))

    def fixes(self) -> list[Fix]:
        """The newest stored position fixes, oldest first; damaged ones are left out: the fix before them ages, its circle grows."""
        rows = self._twice(lambda: self._file.store.read("SELECT time_us, CAST(lane AS BLOB) FROM fixes ORDER BY time_us"))
        fixes = [from_text(time_us, (text or b"").decode(errors="replace")) for time_us, text in rows]
        whole = [fix for fix in fixes if fix is not None]
        if len(whole) < len(fixes):
            log.warning("stored fixes damaged, not used count=%s of=%s", len(fixes) - len(whole), len(fixes))
        return whole

    def _look(self, find: Callable[[Catalogue], list[Place]]) -> tuple[list[tuple[BlockHeader, bytes]], list[Place]]:
        """What `find` finds, read by the same catalogue: another thread may open the file again meanwhile."""

        def look() -> tuple[list[tuple[BlockHeader, bytes]], list[Place]]:
            catalogue = self._file.catalogue
            return self._read_blocks(catalogue, find(catalogue))

        return self._twice(look)

    def _twice(self, read: Callable[[], T]) -> T:
        """What `read` reads; after a fault of the file once more, when it is open again."""
        try:
            self._file.recover()
            with self._file.noting_faults():
                return read()
        except (DiskError, DamagedError) as e:
            log.error("buffer cannot be read, opened again error=%s", e)
            self._file.recover()
            with self._file.noting_faults():
                return read()

    def _read_blocks(
        self, catalogue: Catalogue, places: list[Place], read: Read | None = None
    ) -> tuple[list[tuple[BlockHeader, bytes]], list[Place]]:
        """The blocks of places, and the places whose blocks are damaged, or gone meanwhile. `read` is for who holds the lock.

        Raises:
            DamagedError: with `read`: a block is whole, but another one than its place says; or it is not there at all.
        """
        found = stored_blocks(read or catalogue.store.read, places)
        whole, damaged = [], []
        for place in places:
            shelf = catalogue.shelves[place.shelf]
            if read and place.id not in found:  # blocks do not vanish one by one: the tables are damaged
                raise DamagedError(f"block {place.id} of {shelf.lane} {place.sequence} is not there")
            try:
                block = open_stored(found[place.id], self._keys)
                header = read_header(block)
            except (ContractError, KeyError, TypeError):  # TypeError: no blob at all
                damaged.append(place)
                continue
            named = (header.epoch, header.lane, header.sequence, header.stream, header.rows)
            if named != (catalogue.epoch, shelf.lane, place.sequence, shelf.stream, place.rows):
                if not read:  # its slot may hold another block by now
                    damaged.append(place)
                    continue
                raise DamagedError(f"block {header.identity} lies where {shelf.lane} {place.sequence} should")
            whole.append((header, block))
        return whole, damaged

    def _bury(self, damaged: list[Place]) -> bool:
        """Take damaged blocks out; whether to look again. A disk that is full must not hold up the blocks that are whole."""
        try:
            self._take_out(damaged)
        except UnavailableError as e:
            log.error("damaged blocks not taken out blocks=%s error=%s", len(damaged), e)
            return isinstance(e, (DiskError, DamagedError))  # the file will be opened again, or salvaged, before it is read
        return True

    def _take_out(self, damaged: list[Place]) -> None:
        """Keep what can be read of damaged blocks, and name in the ledger those that the lake does not hold."""
        now = self._clock()
        with self._file.writing():
            catalogue = self._file.catalogue
            catalogue.write_tail()
            # Memory knows of blocks a moment before they are committed: only what is not whole now is damaged.
            _, there = self._read_blocks(catalogue, catalogue.still(damaged), catalogue.store.execute)
            for place in there:
                self._keep_for_study(place, now)
            self._file.store.execute("DELETE FROM damaged WHERE id <= (SELECT max(id) FROM damaged) - ?", (DAMAGED_BLOCKS_MAX,))
            catalogue.remove([p for p in there if p.settled])
            waiting = [p for p in there if not p.settled]
            if waiting:
                self._file.insert(self._ledger.give_up(catalogue, waiting, [], Reason.DAMAGED, now))

    def _keep_for_study(self, place: Place, now: Moment) -> None:
        shelf = self._file.catalogue.shelves[place.shelf]
        log.error("stored block damaged lane=%s sequence=%s stream=%s", shelf.lane, place.sequence, shelf.stream)
        stored = stored_blocks(self._file.store.execute, [place]).get(place.id)
        query = "INSERT INTO damaged (lane, stream, sequence, rows, found_us, block) VALUES (?, ?, ?, ?, ?, ?)"
        self._file.store.execute(query, (shelf.lane, shelf.stream, place.sequence, place.rows, now.wall_us, stored))
