"""Stacks: blocks of one stream, lane and contract version whose rows lie one after the other in one table.

What ingest does for a block it does for a whole stack, in a few calls of NumPy; a block by itself is looked at only where something is
wrong with it. Texts of a stack have one dictionary.

    for stack in stacked(blocks):        # of blocks, of stacks, of both
        stack.headers[2], stack.block(2)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Column, Ints, Strings, Table, take

Block = tuple[BlockHeader, Table]


@dataclass(frozen=True)
class Stack:
    """Blocks and their rows: `headers[i].rows` of them, from `starts[i]` on, are those of block i."""

    headers: Sequence[BlockHeader]
    table: Table

    @cached_property
    def counts(self) -> Ints:
        """How many rows each block has."""
        return np.array([header.rows for header in self.headers], np.int64)

    @cached_property
    def starts(self) -> Ints:
        """The row that each block begins with."""
        return np.cumsum(self.counts) - self.counts

    def each(self, values: Sequence[object] | Ints) -> Ints:
        """One number per block as one per row."""
        return np.repeat(np.asarray(values, np.int64), self.counts)

    def block(self, place: int) -> Block:
        """One block, its texts with a dictionary of their own."""
        header, start = self.headers[place], int(self.starts[place])
        table = take(self.table, slice(start, start + header.rows))
        return header, {name: _own(column) if isinstance(column, Strings) else column for name, column in table.items()}

    def blocks(self) -> list[Block]:
        """All blocks, one by one."""
        return [self.block(place) for place in range(len(self.headers))]

    def only(self, wanted: Callable[[BlockHeader], bool]) -> Stack | None:
        """The stack of some of its blocks; None if there are none."""
        chosen = np.array([wanted(header) for header in self.headers], np.bool_)
        if chosen.all():
            return self
        headers = [header for header, yes in zip(self.headers, chosen.tolist(), strict=True) if yes]
        return Stack(headers, take(self.table, np.repeat(chosen, self.counts))) if headers else None


def stacked(found: Iterable[Block | Stack]) -> list[Stack]:
    """Checked blocks in as few stacks as can be, each block once; the first of several that have one name."""
    groups: dict[tuple[object, ...], list[Stack]] = {}
    seen: set[tuple[str, str, str, int]] = set()
    for stack in _fresh(found, seen):
        header = stack.headers[0]
        groups.setdefault((header.stream, header.lane, header.contract_version, frozenset(stack.table)), []).append(stack)
    return [_joined(group) for group in groups.values()]


def join(parts: Sequence[Column]) -> Column:
    """Columns one after the other; texts keep one dictionary, so that it costs nothing per row."""
    if len(parts) == 1:
        return parts[0]
    texts = [part for part in parts if isinstance(part, Strings)]
    if not texts:
        return np.concatenate(parts)  # type: ignore[arg-type]
    index: dict[str, int] = {}
    codes = [np.array([index.setdefault(text, len(index)) for text in part.values], np.int32)[part.codes] for part in texts]
    return Strings(np.concatenate(codes), tuple(index))


def _fresh(found: Iterable[Block | Stack], seen: set[tuple[str, str, str, int]]) -> Iterator[Stack]:
    """As stacks, without blocks that have been `seen`."""

    def first(header: BlockHeader) -> bool:
        known = len(seen)
        seen.add(header.identity)
        return len(seen) > known

    for item in found:
        stack = item if isinstance(item, Stack) else Stack([item[0]], item[1])
        fresh = stack.only(first)
        if fresh is not None:
            yield fresh


def _joined(stacks: Sequence[Stack]) -> Stack:
    if len(stacks) == 1:
        return stacks[0]
    table = {name: join([stack.table[name] for stack in stacks]) for name in stacks[0].table}
    return Stack([header for stack in stacks for header in stack.headers], table)


def _own(texts: Strings) -> Strings:
    used, codes = np.unique(texts.codes, return_inverse=True)
    return Strings(codes.astype(np.int32), tuple(texts.values[code] for code in used.tolist()))
