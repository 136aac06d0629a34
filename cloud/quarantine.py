"""The lake with its quarantine: rows that break their contract lie apart, with the reason, and everything else goes on.

- Quarantined rows lie in `<root of the lane>/_quarantine/<lane>/<stream>/`: in their zone's root, a Delta table per stream like the
  stream's own, with the rule that was broken. Times are integers there: what is out of range has no date.
- A row has the name that it has anywhere: device, epoch, lane, sequence, row. Those in the stream's table and those in quarantine
  together are the block, each row once.
- Quarantine is committed first, exactly once by block, as any table of the lake is. Then the stream's table is, and with it the block is
  settled. Whatever ends between the two, the block comes again. What the first commit took is then final, whatever the contract says by
  now: the stream gets the others.
- A block with no good row is settled by its quarantine: `block_rows` says that it is all there.
- What is released stays here and is marked: see `cloud.readmission`.

    lake = CheckedLake(Lake(settings.lake, contracts))
    settled = lake.append("eu", blocks)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cloud.enforcement import Violations, violations
from cloud.gate import Refusal
from cloud.lake import Lake, Settled
from cloud.roots import Root, Roots
from cloud.rows import ROW, Contracts
from cloud.settled import Identity
from cloud.stacks import Block, Stack, stacked
from cloud.tables import read_table, text_field
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Strings, Table, take
from edge_agent.contract.errors import ConfigError, Reason
from edge_agent.contract.stream import Field, FieldType, StreamContract

FOLDER = "_quarantine"
_IDENTITY = ("device", "epoch", "sequence")


@dataclass(frozen=True)
class Found:
    """Rows of one block that went to quarantine for one reason; `detail` is the first one's."""

    device: str
    lane: str
    stream: str
    reason: Reason
    detail: str
    rows: int


def quarantine_roots(roots: Roots) -> Roots:
    """Where the quarantine of a lake lies: in the same roots."""

    def inner(root: Root) -> Root:
        return replace(root, uri=root.path(FOLDER))

    return Roots(inner(roots.default), {lane: inner(root) for lane, root in roots.zones.items()})


def quarantine_contract(contract: StreamContract) -> StreamContract:
    """What a quarantined row of a stream holds: its fields, without rules, and which rule it broke."""
    times = {f.name: FieldType.INTEGER for f in contract.fields if f.type is FieldType.TIMESTAMP}
    fields = (
        *(Field(f.name, times.get(f.name, f.type), f.required, unit=f.unit) for f in contract.fields),
        Field("violation", FieldType.STRING, description="a contract.errors.Reason"),
        Field("violation_field", FieldType.STRING, description="the field; empty: the whole row"),
        Field("violation_detail", FieldType.STRING, description="what is allowed"),
        Field("block_rows", FieldType.INTEGER, description="how many rows the block had"),
        Field("quarantined_at", FieldType.TIMESTAMP),
    )
    return StreamContract(contract.stream, contract.version, fields, (), "quarantined_at", contract.entity, "")


class CheckedLake:
    """A lake whose contracts are enforced. One object belongs to one thread."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self.held = lake.beside(quarantine_roots(lake.roots), Contracts([quarantine_contract(c) for c in lake.contracts.listed]))
        self._lanes_seen: set[str] = set()
        self._found: list[Found] = []

    def append(self, region: str, found: Iterable[Block | Stack]) -> Settled:
        """Store checked blocks that `region` received: good rows in their streams, the others in quarantine.

        Raises:
            UnavailableError: one of the two could not commit; append again.
        """
        stacks = stacked(found)
        self._open({stack.headers[0].lane for stack in stacks})
        broken = {i: v for i, v in self._violations(stacks).items() if not self.lake.holds(i)}
        before = {h.identity for s in stacks for h in s.headers if self.held.holds(h.identity) and not self.lake.holds(h.identity)}
        if not broken and not before:
            return self.lake.append(region, stacks)
        apart = dict(_blocks(stacks, broken.keys() | before))
        clean = [left for s in stacks if (left := s.only(lambda header: header.identity not in apart)) is not None]
        taken, refused = self._hold(region, apart, broken, before)
        kept = {i: block for i, block in apart.items() if i not in refused}
        good = [part for i, block in kept.items() if (part := _without(block, taken.get(i))) is not None]
        whole = [i for i in taken if i in kept and len(taken[i]) == kept[i][0].rows]
        settled = self.lake.append(region, [*clean, *good], whole)
        new = [i for i in whole if i in broken and i not in before]
        return replace(
            settled,
            committed=[*settled.committed, *new],
            duplicates=[*settled.duplicates, *(i for i in whole if i not in new)],
            refused=[*settled.refused, *refused.values()],
        )

    def take_found(self) -> list[Found]:
        """What went to quarantine since the last call."""
        found, self._found = self._found, []
        return found

    def compact(self, small_files_max: int) -> dict[str, int]:
        """`Lake.compact` of both; names of the quarantine's tables begin with its folder's."""
        return {**self.lake.compact(small_files_max), **{f"{FOLDER}/{t}": n for t, n in self.held.compact(small_files_max).items()}}

    def vacuum(self, hours: int) -> dict[str, int]:
        """`Lake.vacuum` of both."""
        return {**self.lake.vacuum(hours), **{f"{FOLDER}/{t}": n for t, n in self.held.vacuum(hours).items()}}

    def correct_clocks(self, everywhere: bool = False) -> dict[str, int]:
        """`Lake.correct_clocks` of both; each may know the clock that rows of the other wait for."""
        if everywhere:
            self.lake.open_everything()
            self.held.open_everything()
        return {**self.lake.correct_clocks(), **{f"{FOLDER}/{t}": n for t, n in self.held.correct_clocks().items()}}

    def _open(self, lanes: set[str]) -> None:
        """Learn, once, which blocks of these lanes are all in quarantine."""
        for lane in lanes - self._lanes_seen:
            try:
                self.lake.settle(whole_blocks(self.held, lane))
            except ConfigError:  # the lane has no root: the lake refuses its blocks
                continue
            self._lanes_seen.add(lane)

    def _violations(self, stacks: Sequence[Stack]) -> dict[Identity, Violations]:
        found: dict[Identity, Violations] = {}
        for stack in stacks:
            contract = self.lake.contracts.get(stack.headers[0])
            if contract is not None:
                found |= {stack.headers[place].identity: hit for place, hit in violations(contract, stack).items()}
        return found

    def _hold(
        self, region: str, unique: dict[Identity, Block], broken: dict[Identity, Violations], before: set[Identity]
    ) -> tuple[dict[Identity, set[int]], dict[Identity, Refusal]]:
        """Commit bad rows; for each block the rows that are in quarantine now, and the blocks that may not be there."""
        now_us = time.time_ns() // 1_000
        parts = [_quarantined(*unique[i], hit, now_us) for i, hit in broken.items() if i not in before]
        done = self.held.append(region, parts)
        new = set(done.committed)
        refused = {refusal.block: refusal for refusal in done.refused if refusal.block is not None}
        taken = {i: set(broken[i].rows.tolist()) for i in new}
        for i in (set(broken) | before) - new - set(refused):
            taken[i] = self._rows_held(i)
        for i in done.committed:
            self._found += _summary(unique[i][0], broken[i])
        return taken, refused

    def _rows_held(self, identity: Identity) -> set[int]:
        """The rows of a block that are in quarantine, whichever stream it was said to be of when they came."""
        device, epoch, lane, sequence = identity
        same = (text_field("device") == device) & (text_field("epoch") == epoch) & (pc.field("sequence") == sequence)
        tables = [self.held.table(stream, lane) for stream in self.held.streams(lane)]
        return {row for table in tables for row in read_table(table, columns=["row"], filter=same)["row"].to_pylist()}


def whole_blocks(held: Lake, lane: str) -> Iterator[Identity]:
    """The blocks of a lane that have all their rows in quarantine."""
    for stream in held.streams(lane):
        table = read_table(held.table(stream, lane), columns=[*_IDENTITY, "block_rows"])
        found = table.group_by([*_IDENTITY, "block_rows"]).aggregate([([], "count_all")])
        whole = found.filter(pc.equal(found["block_rows"], found["count_all"]))
        for device, epoch, sequence in zip(*(whole[name].to_pylist() for name in _IDENTITY), strict=True):
            yield device, epoch, lane, sequence


def _blocks(stacks: Sequence[Stack], wanted: Set[Identity]) -> Iterator[tuple[Identity, Block]]:
    for stack in stacks:
        for place, header in enumerate(stack.headers):
            if header.identity in wanted:
                yield header.identity, stack.block(place)


def _without(block: Block, rows: set[int] | None) -> Block | None:
    """A block without some of its rows; None if nothing is left."""
    header, table = block
    if not rows:
        return block
    left = np.setdiff1d(np.arange(header.rows), np.fromiter(rows, np.int64, len(rows)))
    if not len(left):
        return None
    return msgspec.structs.replace(header, rows=len(left)), {**take(table, left), ROW: left}


def _quarantined(header: BlockHeader, table: Table, hit: Violations, now_us: int) -> Block:
    """The bad rows of a block, as a block of the quarantine's contract."""
    count = len(hit.rows)
    part: Table = {
        **take(table, hit.rows),
        ROW: hit.rows,
        "violation": hit.texts("reason"),
        "violation_field": hit.texts("field"),
        "violation_detail": hit.texts("detail"),
        "block_rows": np.full(count, header.rows, np.int64),
        "quarantined_at": np.full(count, now_us, np.int64),
    }
    return msgspec.structs.replace(header, rows=count), part


def _summary(header: BlockHeader, hit: Violations) -> list[Found]:
    counts = Counter(hit.broken.tolist())
    found = []
    for place, rows in counts.items():
        rule = hit.rules[place]
        detail = f"{rows} of {header.rows} rows, field {rule.field!r}: {rule.detail}" if rule.field else rule.detail
        found.append(Found(header.device, header.lane, header.stream, rule.reason, detail, rows))
    return found


def rows_of(table: pa.Table, contract: StreamContract) -> Table:
    """The fields of quarantined rows as columns again."""
    columns: Table = {}
    for f in contract.fields:
        column = table[f.name].combine_chunks()
        if f.type is FieldType.STRING:
            columns[f.name] = Strings.of(column.to_pylist())
        elif f.type is FieldType.NUMBER:
            columns[f.name] = column.to_numpy(zero_copy_only=False).astype(np.float64)
        else:
            columns[f.name] = column.to_numpy(zero_copy_only=False).astype(np.int64)
    return columns
