"""Drafts become blocks: named, numbered, encoded and, with a key, encrypted. Nothing is stored here.

- A block's name is its epoch, lane and sequence. Sequences, ordinals and numbers go on from what the catalogue has stored.
- A block of the loss ledger goes under the policy of its lane's newest block.
"""

from __future__ import annotations

from edge_agent.catalogue import Catalogue
from edge_agent.clock import Moment
from edge_agent.contract.block import BlockHeader
from edge_agent.core.retention import Place
from edge_agent.draft import Draft, Sealed, StoredBlock, seal_block
from edge_agent.sealed import Keys


class Sealer:
    """Seals the blocks of one device, in one boot."""

    def __init__(self, device: str, boot: str, keys: Keys | None) -> None:
        self._device, self._boot, self._keys = device, boot, keys
        self._policies: dict[str, str] = {}

    def seal(self, catalogue: Catalogue, drafts: list[Draft], now: Moment) -> list[Sealed]:
        """Blocks of drafts, named and numbered from what is stored now."""
        sequences, ordinals = dict(catalogue.sequences), dict(catalogue.ordinals)
        sealed: list[Sealed] = []
        for draft in drafts:
            sequences[draft.lane] = sequence = sequences.get(draft.lane, 0) + 1
            base, following = catalogue.ordinals.get(draft.stream, 0), ordinals.get(draft.stream, 0)
            number = catalogue.next_id + len(sealed)
            sealed.append(self.seal_one(catalogue, draft, now, sequence=sequence, number=number, base=base, following=following))
            ordinals[draft.stream] = following + draft.rows
            self._policies[draft.lane] = draft.policy
        return sealed

    def seal_one(self, catalogue: Catalogue, draft: Draft, now: Moment, *, sequence: int, number: int, base: int, following: int) -> Sealed:
        """One block. `number`: its id in the file; `base`, `following`: ordinals as in `draft.seal_block`."""
        header = self._header(catalogue.epoch, draft, sequence, now)
        block, last_ordinal = seal_block(header, draft, base, following)
        on_disk = block if self._keys is None else self._keys.seal(block)
        shelf = catalogue.shelf(header.lane, header.stream)
        age_us = catalogue.age.at(now.monotonic_us)
        span = (header.first_us, header.last_us)
        place = Place(shelf.number, header.sequence, number, header.rows, len(on_disk), last_ordinal, *span, age_us)
        return Sealed(StoredBlock(header.lane, header.sequence, header.stream, header.rows, block), on_disk, place)

    def policy(self, lane: str) -> str:
        """The policy that the newest block of a lane was sealed under; empty if there was none since the start."""
        return self._policies.get(lane, "")

    def _header(self, epoch: str, draft: Draft, sequence: int, now: Moment) -> BlockHeader:
        return BlockHeader(
            device=self._device,
            epoch=epoch,
            lane=draft.lane,
            sequence=sequence,
            stream=draft.stream,
            contract_version=draft.contract_version,
            rows=draft.rows,
            first_us=draft.first_us,
            last_us=draft.last_us,
            fix=draft.fix,
            policy=draft.policy,
            boot=self._boot,
            monotonic_us=now.monotonic_us,
            sealed_us=now.wall_us,
            clock_synced=now.synced,
            model=draft.model,
            units=draft.units,
        )
