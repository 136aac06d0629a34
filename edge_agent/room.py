"""Is there room? On the disk, and below the buffer's limit: file and log together.

- History gives way first, the oldest of it, and no more of it than is wanted: the newest tells readings that a sensor's broker sends
  again. The last of it, a part of what the file holds, stays; what waits for a receipt is given up instead (edge_agent.eviction).
- RESERVE_BYTES of the disk stay free, so that receipts can be noted when nothing else fits.
- The log is brought into the file when it has become long, or when the disk has no room for it to grow.
"""

from __future__ import annotations

import logging

from edge_agent.contract.errors import UnavailableError
from edge_agent.core.retention import portion
from edge_agent.owned_file import OwnedFile
from edge_agent.store import BufferFullError, bytes_on_disk

log = logging.getLogger(__name__)

RESERVE_BYTES = 256 * 1024
SHED_BLOCKS = 64  # history given up at a time, at most
SPARED_PART = 4  # of what the file holds, this part may be history that does not give way


class Room:
    """The room of an owned file that may take `bytes_max` in all."""

    def __init__(self, file: OwnedFile, bytes_max: int) -> None:
        self._file, self._bytes_max = file, bytes_max

    def make(self, size: int) -> None:
        """See to it that `size` bytes fit on the disk, and in the buffer as far as history can give way.

        Raises:
            BufferFullError: the disk has no room.
        """
        wanted = 2 * size + RESERVE_BYTES  # they go to the log first, then to free or new pages
        while True:
            self.shrink_log(wanted)
            free = self._file.store.free_bytes()
            if free < wanted:  # what the file gives up is room in the file, not on the disk
                raise self._no_room(free, wanted)
            # The file grows and never shrinks: leave room for the log of blocks to come.
            narrow = free < 2 * wanted and size > self._file.store.spare_bytes()
            if not narrow and self.lack_bytes(size) <= 0:
                return
            if narrow and self._file.catalogue.slots.free_bytes:  # they fit some blocks, free pages fit any
                with self._file.writing():
                    self._file.catalogue.give_back_slots(0)
                continue
            if not self._shed_history(portion(size if narrow else self.lack_bytes(size), self._bytes_max)):
                break
        if narrow:
            raise self._no_room(free, 2 * wanted)

    def lack_bytes(self, size: int) -> int:
        """How many bytes are too many if `size` come, the log at its largest; not above zero: they fit."""
        return self._file.used_bytes() + size + self._file.log_bytes_max - self._bytes_max

    def shrink_log(self, wanted: int = RESERVE_BYTES) -> None:
        """Bring the log into the file, unless the disk has room for it once more and for `wanted` bytes."""
        log_bytes = self._file.store.log_bytes()
        if log_bytes and self._file.store.free_bytes() < log_bytes + wanted:
            self._file.store.checkpoint(truncate=True)

    def checkpoint(self) -> None:
        """Bring the log into the file if it has become long. What was committed is safe in it: a failure is noted for the next call."""
        try:
            with self._file.noting_faults():
                if self._file.store.log_due():
                    self._file.store.checkpoint()
        except UnavailableError as e:
            log.error("buffer log not brought into the file error=%s", e)

    def _no_room(self, free: int, wanted: int) -> BufferFullError:
        return BufferFullError(f"disk of {self._file.path.parent} has {free} bytes free; {wanted} wanted")

    def _shed_history(self, wanted: int) -> int:
        """Give up the oldest settled blocks, for `wanted` bytes on the disk if there are so many to spare; returns how many blocks."""
        catalogue = self._file.catalogue
        wanted = min(wanted, catalogue.settled_bytes() - self._file.used_bytes() // SPARED_PART)
        if wanted <= 0:
            return 0
        with self._file.writing():
            catalogue.write_tail()
            old = []
            for place in catalogue.settled(SHED_BLOCKS):
                if wanted <= 0:
                    break
                old.append(place)
                wanted -= bytes_on_disk(place.bytes)
            catalogue.remove(old)
        return len(old)
