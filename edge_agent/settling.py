"""A receipt of the lake comes: the blocks that it names leave, or stay as history.

- A receipt that names what this file never gave out tells that the file has gone back in time: those names are skipped.
- What the receipt before had settled already is not looked for again.
"""

from __future__ import annotations

from edge_agent.contract.receipt import Receipt
from edge_agent.owned_file import OwnedFile
from edge_agent.room import Room


def settle(file: OwnedFile, room: Room, receipt: Receipt) -> int:
    """Forget what the lake holds; returns how many blocks it settled."""
    settled = 0
    for lane in receipt.lanes:
        top = max((lane.cumulative, *(last for _, last in lane.ranges)))
        if top > file.catalogue.sequences.get(lane.lane, 0):
            file.skip_names(lane.lane, top)
        done = file.catalogue.receipts.get(lane.lane, set())
        ranges = {(1, lane.cumulative), *lane.ranges}
        for first, last in sorted(ranges - done):
            settled += _settle(file, room, lane.lane, first, last)
        file.catalogue.receipts[lane.lane] = ranges
    return settled


def _settle(file: OwnedFile, room: Room, lane: str, first: int, last: int) -> int:
    with file.lock:
        file.recover()
        settled = more = file.catalogue.settle_tail(lane, first, last)
        while True:
            with file.noting_faults():
                room.shrink_log()
            with file.writing():
                more = file.catalogue.settle(lane, first, last, file.floors())
            settled += more
            room.checkpoint()
            if not more:
                return settled
