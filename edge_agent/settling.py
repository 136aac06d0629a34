"""A receipt of the lake comes: the blocks that it names leave, or stay as history.

- A receipt for another epoch is about other blocks, whatever the numbers say.
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
        ranges = {(1, lane.cumulative), *lane.ranges}
        for first, last in sorted(_news(file, receipt.epoch, lane.lane, ranges)):
            settled += _settle(file, room, receipt.epoch, lane.lane, first, last)
        with file.lock:
            if receipt.epoch == file.catalogue.epoch:
                file.catalogue.receipts[lane.lane] = ranges
    return settled


def _news(file: OwnedFile, epoch: str, lane: str, ranges: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The ranges that the receipt before did not have; names that the file does not know are skipped."""
    with file.lock:
        file.recover()
        if epoch != file.catalogue.epoch:
            return set()
        top = max(last for _, last in ranges)
        if top > file.catalogue.sequences.get(lane, 0):
            file.skip_names(lane, top)
        return ranges - file.catalogue.receipts.get(lane, set())


def _settle(file: OwnedFile, room: Room, epoch: str, lane: str, first: int, last: int) -> int:
    with file.lock:
        file.recover()
        if epoch != file.catalogue.epoch:  # the file was made new meanwhile: these numbers are other blocks now
            return 0
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
