"""The blocks of the loss ledger: what leaves the buffer without a receipt is named in them.

- Every method runs inside the transaction in which the named blocks leave, with the catalogue's tail written; the blocks that it
  returns are inserted in the same one.
- A ledger block goes in the lane of what was lost. A lane whose ledger has become long gets it all in one new block, with rows that
  name the blocks it replaces.
"""

from __future__ import annotations

import math
from collections import Counter

from edge_agent.catalogue import Catalogue
from edge_agent.clock import Moment
from edge_agent.contract.block import FixQuality, decode_block
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, coalesce, loss_table, read_losses
from edge_agent.core.retention import Place
from edge_agent.draft import Draft, Sealed
from edge_agent.salvage import UNUSED
from edge_agent.sealed import Keys, open_stored
from edge_agent.sealing import Sealer
from edge_agent.slots import stored_blocks

LEDGER_SHARE = 16  # beyond this part of the limit, a lane's ledger blocks become one
LEDGER_BLOCKS_MAX = 256
_DETAIL = {Reason.EVICTED_FULL: "the buffer was full", Reason.EVICTED_AGE: "older than the buffer keeps", Reason.DAMAGED: "CRC"}


class LossLedger:
    """Seals ledger blocks, and counts by reason what they name since the start."""

    def __init__(self, sealer: Sealer, keys: Keys | None, bytes_max: int) -> None:
        self._sealer, self._keys, self._bytes_max = sealer, keys, bytes_max
        self.lost_blocks: Counter[str] = Counter()
        self.lost_readings: dict[str, float] = {}
        self._uncounted: list[Loss] = []

    def give_up(self, catalogue: Catalogue, victims: list[Place], incoming: list[Sealed], reason: Reason, now: Moment) -> list[Sealed]:
        """Take victims out of the file, or out of the blocks that are just coming; returns the ledger that names them."""
        never = {s.place.id for s in incoming}
        catalogue.remove([p for p in victims if p.id not in never])
        losses = []
        for place in victims:
            shelf = catalogue.shelves[place.shelf]
            if place.id in never:
                catalogue.leave(shelf.lane)
            times = (float(place.first_us), float(place.last_us))
            names = (catalogue.epoch, shelf.lane, place.sequence, place.sequence)
            losses.append(Loss(now.wall_us, shelf.stream, *names, 1, float(place.rows), *times, reason.value, _DETAIL[reason]))
        following = max((s.place.id for s in incoming), default=catalogue.next_id - 1) + 1
        for s in incoming:
            catalogue.sequences[s.stored.lane] = max(catalogue.sequences.get(s.stored.lane, 0), s.stored.sequence)
        return self.seal(catalogue, losses, following, now)

    def seal(self, catalogue: Catalogue, losses: list[Loss], number: int, now: Moment) -> list[Sealed]:
        """Blocks of these rows, one per lane, numbered from `number` on."""
        self._uncounted += losses
        sealed: list[Sealed] = []
        for lane in sorted({loss.of_lane for loss in losses}):
            rows = coalesce([*self._old_rows(catalogue, lane, now), *(loss for loss in losses if loss.of_lane == lane)])
            sequence = catalogue.sequences.get(lane, 0) + 1
            ordinal = catalogue.ordinals.get(LOSSES.stream, 0) + sum(s.stored.rows for s in sealed)
            policy, times = self._sealer.policy(lane), (min(r.lost_at for r in rows), max(r.lost_at for r in rows))
            draft = Draft(lane, LOSSES.stream, LOSSES.version, FixQuality.NONE, policy, loss_table(rows), len(rows), *times)
            numbers = {"sequence": sequence, "number": number + len(sealed), "base": ordinal, "following": ordinal}
            sealed.append(self._sealer.seal_one(catalogue, draft, now, **numbers))
        return sealed

    def count(self) -> None:
        """The transaction is on the disk: what it named is lost."""
        for loss in self._uncounted:
            if loss.of_stream == UNUSED:
                continue
            self.lost_blocks[loss.reason] += loss.blocks
            if not math.isnan(loss.readings):
                self.lost_readings[loss.reason] = self.lost_readings.get(loss.reason, 0.0) + loss.readings
        self._uncounted.clear()

    def forget(self) -> None:
        """The transaction failed."""
        self._uncounted.clear()

    def _old_rows(self, catalogue: Catalogue, lane: str, now: Moment) -> list[Loss]:
        """The rows of a lane's waiting ledger, taken out, if it has become long; and rows that name its blocks."""
        shelf = catalogue.shelf(lane, LOSSES.stream)
        if shelf.waiting < LEDGER_BLOCKS_MAX and shelf.waiting_bytes <= self._bytes_max // LEDGER_SHARE:
            return []
        places = list(catalogue.evictable(shelf))
        rows: list[Loss] = []
        for place in places:
            stored = stored_blocks(catalogue.store.execute, [place])
            name = (catalogue.epoch, lane, place.sequence, place.sequence, 1)
            try:
                rows += read_losses(decode_block(open_stored(stored[place.id], self._keys))[1])
                readings, why = 0.0, "its rows are in a later block of the ledger"
            except (ContractError, KeyError) as e:
                readings, why = float("nan"), f"damaged: {e}"
            times = (float(place.first_us), float(place.last_us))
            rows.append(Loss(now.wall_us, LOSSES.stream, *name, readings, *times, Reason.EVICTED_FULL.value, why))
        catalogue.remove(places)
        return rows
