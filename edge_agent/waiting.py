"""What waits for a receipt, lane by lane: counts from memory, and how long the oldest block has waited."""

from __future__ import annotations

import logging

from edge_agent.catalogue import Catalogue
from edge_agent.contract.errors import UnavailableError
from edge_agent.draft import LaneState
from edge_agent.owned_file import OwnedFile

log = logging.getLogger(__name__)


def lanes(file: OwnedFile) -> list[LaneState]:
    """Every lane that has blocks waiting. A file that cannot be read gives the counts all the same."""
    catalogue = file.catalogue
    states = []
    for lane in sorted({s.lane for s in list(catalogue.shelves.values()) if s.waiting}):
        shelves = catalogue.of_lane(lane)
        blocks, size, rows = (sum(getattr(s, n) for s in shelves) for n in ("waiting", "waiting_bytes", "waiting_rows"))
        states.append(LaneState(lane, blocks, size, rows, _oldest_us(file, catalogue, lane)))
    return states


def _oldest_us(file: OwnedFile, catalogue: Catalogue, lane: str) -> int:
    """When the oldest waiting block of a lane was stored, on this boot's monotonic clock."""
    first = None
    if file.fault is None:
        try:
            with file.noting_faults():
                first = catalogue.first_waiting(lane)
        except UnavailableError as e:
            log.error("buffer cannot be read error=%s", e)
    return catalogue.age.monotonic_us + (0 if first is None else first.stored_us - catalogue.age.base_us)
