"""An open Delta table, and how far its commits are known."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from deltalake import DeltaTable

BLOCKS_KEY = "fenceline.blocks"
REOPEN_COMMITS = 100
"""A table is to be opened anew when its version has passed a multiple of this: delta-rs keeps another batch of file names for each commit,
and goes through all of them in the next one. As often as it writes a checkpoint, so that there is little to read."""


@dataclass
class Handle:
    """An open table of a stream and lane. Blocks of all commits up to version `seen` are in the settled index of who holds it."""

    stream: str
    lane: str
    table: DeltaTable
    seen: int
    opened: int = 0  # the version at which it was
    small: int = 0  # files since the last look at its partitions
    columns: frozenset[str] = frozenset()
    verdicts: dict[str, str | None] = field(default_factory=dict)  # why a contract version does not fit, by version

    @classmethod
    def of(cls, stream: str, lane: str, table: DeltaTable, *, seen: bool) -> Handle:
        """A handle of a table just opened, `seen` up to its newest commit, or not at all."""
        version, columns = table.version(), frozenset(f.name for f in table.schema().fields)
        return cls(stream, lane, table, version if seen else -1, version, len(table.file_uris()) if seen else 0, columns)

    @property
    def worn(self) -> bool:
        """Whether the table had so many commits since it was opened that it should be opened anew."""
        return self.table.version() // REOPEN_COMMITS > self.opened // REOPEN_COMMITS

    def reopen(self, table: DeltaTable) -> None:
        """Go on with the same table, opened anew; what others committed is not seen yet."""
        self.table, self.opened = table, table.version()

    def news(self) -> list[dict[str, Any]] | None:
        """The commits after `seen`, in no order; None if Delta has cleaned up some of them."""
        newest = self.table.version()
        limit = newest - self.seen
        if limit == 0:
            return []
        commits = self.table.history(limit)
        while len(commits) == limit and min(c["version"] for c in commits) > self.seen + 1:
            limit *= 2  # history starts from the newest commit, and others commit while we read
            commits = self.table.history(limit)
        return commits if min((c["version"] for c in commits), default=newest) <= self.seen + 1 else None


def blocks_of(commit: dict[str, Any]) -> list[tuple[str, str, str, int]]:
    """The identities of the blocks that a commit brought."""
    return [(device, epoch, lane, sequence) for device, epoch, lane, sequence in json.loads(commit.get(BLOCKS_KEY, "[]"))]
