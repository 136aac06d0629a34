"""Storing without giving up: while the buffer takes nothing, the data path waits here and the sensors' messages stay where they are.

- A full buffer and a failing disk end nothing: inference, control and the uplink go on, the operator is told once, and once more
  when it works again. The buffer itself reopens or salvages its file with each try.
- Housekeeping that fails is left for the next time: nothing acknowledged depends on it.
- What the buffer gave up or found damaged is counted by reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from edge_agent.buffer import Buffer, BufferFullError, Draft, StoredBlock
from edge_agent.clock import Clock
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import UnavailableError
from edge_agent.core.fix import Fix
from edge_agent.metrics import Metrics

log = logging.getLogger(__name__)

TIDY_S = 1.0


class Storing:
    """The buffer as the data path uses it.

    Args:
        tell: tells the operator: the name of an event, and its fields.
        pause: waits a moment; what it raises ends the wait.
    """

    def __init__(self, buffer: Buffer, clock: Clock, metrics: Metrics, tell: Callable[..., None], pause: Callable[[], None]) -> None:
        self._buffer, self._clock, self._metrics, self._tell, self._pause = buffer, clock, metrics, tell, pause
        self._tidy_due_us = 0
        self._told_blocks: dict[str, int] = {}
        self._told_readings: dict[str, float] = {}

    def append(self, drafts: list[Draft], fixes: list[Fix]) -> list[StoredBlock]:
        """Commit, however long it takes; returns what is on disk now, for the uplink."""
        event = ""
        while True:
            try:
                stored = self._buffer.append(drafts, fixes, self._clock.now())
                break
            except UnavailableError as e:
                event = self._hold(event, e)
                self._pause()
        if event:
            log.warning("buffer takes readings again after=%s", event)
            self._tell("buffer_recovered", detail=f"after {event}")
        return stored

    def tidy(self) -> list[StoredBlock]:
        """Housekeeping between batches, every TIDY_S; returns new blocks of the loss ledger."""
        now = self._clock.now()
        if now.monotonic_us < self._tidy_due_us:
            return []
        self._tidy_due_us = now.monotonic_us + int(TIDY_S * 1e6)
        try:
            ledger = self._buffer.tidy(now)
        except UnavailableError as e:
            log.warning("buffer not tidied error=%s", e)
            ledger = []
        self._count_losses()
        return ledger

    def history(self, stream: str, contract_version: str) -> Table | None:
        """The stored readings of a stream; None also while the disk gives none back."""
        try:
            return self._buffer.history(stream, contract_version)
        except UnavailableError as e:
            log.warning("history unavailable stream=%s error=%s", stream, e)
            return None

    def _hold(self, told: str, error: UnavailableError) -> str:
        """Count a refusal, and tell the operator of the first of its kind; returns the event that was told last."""
        self._metrics.full.inc()
        event = "buffer_full" if isinstance(error, BufferFullError) else "buffer_unavailable"
        if event != told:
            log.warning("%s, source held error=%s", event.replace("_", " "), error)
            self._tell(event, detail=str(error))
        return event

    def _count_losses(self) -> None:
        for reason, blocks in list(self._buffer.lost_blocks.items()):
            self._metrics.lost_blocks.labels(reason).inc(blocks - self._told_blocks.get(reason, 0))
            self._told_blocks[reason] = blocks
        for reason, readings in list(self._buffer.lost_readings.items()):
            self._metrics.lost_readings.labels(reason).inc(readings - self._told_readings.get(reason, 0.0))
            self._told_readings[reason] = readings
