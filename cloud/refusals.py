"""Refusals of an ingest, on their way into the audit trail: the first of a kind at once, then one entry in ALARM_S with their number.

- A kind is (by whom, device, lane, stream, reason). Beyond KINDS_MAX kinds only the reason is kept apart.
- They are written by a thread of their own. While the metadata database is away they are counted in memory, and written when it is back:
  blocks are stored and receipted meanwhile. An ingest that is killed then forgets these counts, not what they were of: a device keeps a
  refused block and sends it again, and what the broker refused is read from its log again (`written` says how far it is safe).
- An entry whose writing was cut off may stand there twice. None is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from cloud.audit import Audit
from edge_agent.contract.errors import Reason, UnavailableError

log = logging.getLogger(__name__)

REFUSED, DENIED, QUARANTINED = "block_refused", "denied_by_broker", "rows_quarantined"
KINDS_MAX = 10_000
ALARM_S = 10.0


class Kind(NamedTuple):
    """Refusals that are written down together. `by` says by whom: REFUSED by the gate, DENIED by the broker; QUARANTINED: rows only."""

    by: str
    device: str
    lane: str
    stream: str
    reason: Reason


class Entry(NamedTuple):
    """An entry to write: so many refusals of a kind, and what was wrong with the last one."""

    kind: Kind
    times: int
    detail: str


@dataclass
class _Count:
    """Refusals not yet written down; they are when `due`."""

    due: float
    count: int = 0
    detail: str = ""


class Refusals:
    """Counts refusals and writes them down. `raised` is told of each entry that stands in the trail."""

    def __init__(self, audit: Audit, region: str, raised: Callable[[Entry], None]) -> None:
        self.available = True
        self._audit, self._region, self._raised = audit, region, raised
        self._counts: dict[Kind, _Count] = {}
        self._writer = ThreadPoolExecutor(1, "audit")
        self._writing: Future[list[Entry]] | None = None

    @property
    def written(self) -> bool:
        """Whether all that was added stands in the trail."""
        return self._writing is None and not any(waiting.count for waiting in self._counts.values())

    def add(self, kind: Kind, detail: str, now: float) -> None:
        """Count one refusal."""
        self._add(Entry(kind, 1, detail), now)

    def write(self, now: float) -> None:
        """Begin to write down what is due, and take up what could not be written; waits for nothing."""
        if self._writing is not None and self._writing.done():
            unwritten, self._writing = self._writing.result(), None
            self.available = not unwritten
            for entry in unwritten:
                self._add(entry, now)
        if self._writing is None:
            due = self._due(now)
            if due:
                self._writing = self._writer.submit(self._write, due)

    def close(self) -> None:
        """Write down all that is left, if the database answers."""
        self._writer.shutdown()
        if self._writing is not None:
            for entry in self._writing.result():
                self._add(entry, 0.0)
        for entry in self._write(self._due(float("inf"))):
            log.warning("refusals not written down kind=%s count=%d detail=%s", entry.kind, entry.times, entry.detail)

    def _add(self, entry: Entry, now: float) -> None:
        kind = entry.kind
        if kind not in self._counts and len(self._counts) >= KINDS_MAX:
            kind = Kind(kind.by, "", "", "", kind.reason)
        waiting = self._counts.setdefault(kind, _Count(now))
        waiting.count, waiting.detail = waiting.count + entry.times, entry.detail

    def _due(self, now: float) -> list[Entry]:
        due = []
        for kind, waiting in [(k, w) for k, w in self._counts.items() if w.due <= now]:
            if not waiting.count:
                del self._counts[kind]
                continue
            due.append(Entry(kind, waiting.count, waiting.detail))
            waiting.due, waiting.count = now + ALARM_S, 0
        return due

    def _write(self, entries: list[Entry]) -> list[Entry]:
        """Write entries; those that the database did not take."""
        for i, (kind, times, detail) in enumerate(entries):
            try:
                self._audit.add(kind.by, region=self._region, subject=kind.device, reason=kind.reason, detail=detail, count=times)
            except UnavailableError as e:
                log.warning("audit unavailable region=%s waiting=%d reason=%s", self._region, len(entries) - i, e)
                return entries[i:]
            self._raised(entries[i])
        return []
