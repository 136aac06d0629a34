"""A receipt of the lake comes: the blocks that it names leave, or stay as history.

- A receipt for another epoch is about other blocks, whatever the numbers say.
- A receipt that names what this file never gave out tells that the file has gone back in time: those names are skipped. Beyond
  SKIPPED_MAX nothing is believed, of that lane: the names after the skipped ones must be such that receipts and the file can hold them.
  Nor is a lane believed that the file does not know when it knows LANES_MAX: a region could name any number of them, each for the ledger.
- What the receipt before had settled already is not looked for again.
- The lock is given up after each portion: a receipt for a backlog of hundreds of thousands of blocks must hold no reading up for seconds.
"""

from __future__ import annotations

import logging
import time

from edge_agent.catalogue import READ_BLOCKS
from edge_agent.contract.receipt import SEQUENCE_MAX, Receipt
from edge_agent.owned_file import OwnedFile
from edge_agent.room import Room

log = logging.getLogger(__name__)

SKIPPED_MAX = SEQUENCE_MAX // 2
LANES_MAX = 64
YIELD_S = 0.001


def settle(file: OwnedFile, room: Room, receipt: Receipt) -> int:
    """Forget what the lake holds; returns how many blocks it settled."""
    settled = 0
    for lane in receipt.lanes:
        ranges = {(1, lane.cumulative), *lane.ranges}
        top = max(last for _, last in ranges)
        if not top or _is_false(file, lane.lane, top):
            continue
        news = _news(file, receipt.epoch, lane.lane, ranges)
        catalogue = file.catalogue
        for first, last in sorted(news):
            settled += _settle(file, room, receipt.epoch, lane.lane, first, last)
        if receipt.epoch == catalogue.epoch:  # if the file was opened again meanwhile, its catalogue does not know of this receipt
            catalogue.receipts[lane.lane] = ranges
    return settled


def _is_false(file: OwnedFile, lane: str, top: int) -> bool:
    sequences = file.catalogue.sequences
    known = sequences.get(lane, 0)
    if top <= known or (top <= SKIPPED_MAX and (known or len(sequences) < LANES_MAX)):
        return False
    log.error("receipt not believed lane=%s known=%s named=%s", lane, known, top)
    return True


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
    settled = 0
    while True:
        some = _settle_some(file, room, epoch, lane, first, last)
        settled += some
        if some < READ_BLOCKS:
            return settled
        time.sleep(YIELD_S)


def _settle_some(file: OwnedFile, room: Room, epoch: str, lane: str, first: int, last: int) -> int:
    """A portion of a range; less than READ_BLOCKS is all that was left of it."""
    with file.lock:
        file.recover()
        if epoch != file.catalogue.epoch:  # the file was made new meanwhile: these numbers are other blocks now
            return 0
        with file.noting_faults():
            room.shrink_log()
        some = file.catalogue.settle_tail(lane, first, last)  # anew each time: what only the tail knows, a fault forgets
        with file.writing():
            some += file.catalogue.settle(lane, first, last, file.floors())
        room.checkpoint()
        return some
