"""The lake: one Delta table per stream and lane, one row per reading, exactly once.

- Rows lie in `<lake>/<stream>/<lane>/`: zones are apart on disk. Labels lie in `<lake>/_labels/<stream>/`.
- A block is stored once, by its identity (device, epoch, lane, sequence), however often and wherever it arrives. Each commit
  carries a Delta application transaction per (device, epoch, lane) that it adds to, and names its blocks in its metadata.
  A writer that has not seen another's commit for the same lane is refused by Delta; it reads what the other stored, drops
  that, and tries again. A commit that Delta rebased over others is followed by reading those, before the next one.
- What is settled is rebuilt from the rows themselves when a lane is first touched; compaction does not change rows.
- What the loss ledger names is settled too, but not stored: see `cloud.settled`.

    lake = Lake(settings.lake_dir)
    table = lake.read("turbofan", lanes=["europe"], versions={"europe": 12}, columns=["engine", "score"])
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from cloud.clocks import Boot, Clocks, Place, correct
from cloud.rows import ORDER, TEXT_BYTES_MAX, Contracts, Shifted, schema, stamped, text_bytes, to_rows
from cloud.settled import LEDGER_COLUMNS, Identity, SettledIndex
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ContractError, UnavailableError
from edge_agent.contract.receipt import Receipt
from edge_agent.contract.stream import AGENT_STREAMS, LOSSES, StreamContract

log = logging.getLogger(__name__)

ATTEMPTS_MAX = 20
BLOCKS_KEY = "fenceline.blocks"
LABELS = "_labels"
REFRESH_S = 5.0
"""How often a lane is read again for what others committed to it, while its receipts are cut off."""


@dataclass(frozen=True)
class Settled:
    """What an append did: the blocks it added, those that were there already, and the receipts to send."""

    committed: list[Identity]
    duplicates: list[Identity]
    receipts: list[Receipt]


@dataclass
class _Handle:
    """An open table. Blocks of all commits up to `seen` are in the settled index."""

    stream: str
    lane: str
    table: DeltaTable
    seen: int
    commits: int = 0  # since the last compaction here


@dataclass
class Lake:
    """The lake in `directory`. `contracts` are needed only to append. One object belongs to one thread."""

    directory: Path
    contracts: Contracts = field(default_factory=Contracts)

    def __post_init__(self) -> None:
        self._handles: dict[tuple[str, str], _Handle] = {}
        self._settled = SettledIndex()
        self._lanes_seen: set[str] = set()
        self._refresh_due: dict[str, float] = {}
        self._clocks = Clocks()

    # Writing

    def append(self, region: str, blocks: Sequence[tuple[BlockHeader, Table]]) -> Settled:
        """Store checked blocks that `region` received; blocks that are settled already are left out.

        Raises:
            UnavailableError: the lake could not commit. What was committed before that is settled; append again.
        """
        received_us = time.time_ns() // 1_000
        unique = {header.identity: (header, table) for header, table in blocks}
        groups: defaultdict[tuple[str, str], list[tuple[BlockHeader, Table]]] = defaultdict(list)
        for header, table in unique.values():
            groups[header.stream, header.lane].append((header, table))
        committed: list[Identity] = []
        self._clocks.learn(header for header, _ in unique.values())
        for (stream, lane), group in groups.items():
            self._open_lane(lane)
            for part in _portions(group):
                committed += self._append_group(region, stream, lane, part, received_us)
        added = set(committed)
        for lane in self._settled.cut(unique):
            self._refresh(lane)
        return Settled(committed, [i for i in unique if i not in added], self._settled.receipts(unique))

    def _append_group(
        self, region: str, stream: str, lane: str, group: list[tuple[BlockHeader, Table]], received_us: int
    ) -> list[Identity]:
        for attempt in range(ATTEMPTS_MAX):
            try:
                handle = self._handle(stream, lane, group[0][0])
                if attempt:
                    self._sync(handle)
                fresh = [(h, t) for h, t in group if h.identity not in self._settled]
                if fresh:
                    self._commit(handle, self._rows(region, fresh, received_us), [h for h, _ in fresh])
                return [h.identity for h, _ in fresh]
            except CommitFailedError as e:
                log.info("commit repeated stream=%s lane=%s attempt=%d reason=%s", stream, lane, attempt + 1, e)
            except (DeltaError, OSError) as e:
                self._handles.pop((stream, lane), None)  # whether it landed is read from the table, next time
                self._lanes_seen.discard(lane)
                raise UnavailableError(f"lake {stream}/{lane} did not commit {len(group)} blocks: {e}") from e
        raise UnavailableError(f"lake {stream}/{lane}: {ATTEMPTS_MAX} commits in a row met others; too many writers for one lane")

    def _rows(self, region: str, blocks: Sequence[tuple[BlockHeader, Table]], received_us: int) -> pa.Table:
        """The rows of blocks of one stream; those of one contract version are built together."""
        versions: defaultdict[str, list[Shifted]] = defaultdict(list)
        for header, table in blocks:
            versions[header.contract_version].append((header, table, self._clocks.shift(header)))
        parts = [to_rows(self._contract(group[0][0]), region, group, received_us) for group in versions.values()]
        return pa.concat_tables(parts, promote_options="default")

    def _contract(self, header: BlockHeader) -> StreamContract:
        contract = self.contracts.get(header)
        if contract is None:
            raise ContractError(f"block {header.identity}: no contract for {header.stream!r} version {header.contract_version!r}")
        return contract

    def _commit(self, handle: _Handle, rows: pa.Table, headers: list[BlockHeader]) -> None:
        highest: dict[str, int] = {}
        for header in headers:
            app = "/".join(header.identity[:3])
            highest[app] = max(highest.get(app, 0), header.sequence)
        write_deltalake(
            handle.table,
            rows,
            mode="append",
            schema_mode="merge",
            commit_properties=CommitProperties(
                custom_metadata={BLOCKS_KEY: json.dumps([list(h.identity) for h in headers])},
                app_transactions=[Transaction(app, version) for app, version in highest.items()],
            ),
        )
        for header in headers:
            self._settled.add(header.identity)
            self._clocks.stored((header.stream, header.lane), header)
        if handle.stream == LOSSES.stream:
            self._settled.give_up(rows)
        handle.commits += 1
        if handle.table.version() == handle.seen + 1:
            handle.seen += 1
        else:
            self._absorb(handle)

    def _handle(self, stream: str, lane: str, header: BlockHeader) -> _Handle:
        if (stream, lane) in self._handles:
            return self._handles[stream, lane]
        path, columns = self._path(stream, lane), schema(self._contract(header))
        path.mkdir(parents=True, exist_ok=True)
        table = DeltaTable.create(str(path), schema=columns, mode="ignore", name=f"{stream}-{lane}")
        self._handles[stream, lane] = handle = _Handle(stream, lane, table, -1)
        self._sync(handle)  # another process may have created it, and more, a moment ago
        return handle

    # The settled index

    def _open_lane(self, lane: str) -> None:
        """Index every stream's table of `lane`: the streams of a lane share one count of sequences."""
        if lane in self._lanes_seen:
            return
        for stream in self.streams():
            if (stream, lane) not in self._handles and lane in self.lanes(stream):
                try:
                    table = DeltaTable(str(self._path(stream, lane)))
                    self._index(stream, lane, table)
                    self._clocks.index((stream, lane), table)
                except (DeltaError, OSError) as e:
                    raise UnavailableError(f"lake {stream}/{lane} does not open: {e}") from e
                self._handles[stream, lane] = _Handle(stream, lane, table, table.version())
        self._lanes_seen.add(lane)

    def _refresh(self, lane: str) -> None:
        """See what others committed to any table of a lane: with it, receipts may reach further."""
        if self._refresh_due.get(lane, 0.0) > time.monotonic():
            return
        self._refresh_due[lane] = time.monotonic() + REFRESH_S
        self._lanes_seen.discard(lane)  # others may have made tables
        self._open_lane(lane)
        for place, handle in [(p, h) for p, h in self._handles.items() if h.lane == lane]:
            try:
                self._sync(handle)
            except (DeltaError, OSError) as e:
                del self._handles[place]  # it is read from its rows, next time
                self._lanes_seen.discard(lane)
                raise UnavailableError(f"lake {'/'.join(place)} does not read: {e}") from e

    def _index(self, stream: str, lane: str, table: DeltaTable) -> None:
        if stream == LOSSES.stream:
            self._settled.give_up(table.to_pyarrow_dataset().to_table(columns=list(LEDGER_COLUMNS)))
        scanner = table.to_pyarrow_dataset().scanner(columns=["device", "epoch", "sequence"])
        for batch in scanner.to_batches():
            found = pa.table(batch).group_by(["device", "epoch", "sequence"]).aggregate([])
            for device, epoch, sequence in sorted(zip(*(c.to_pylist() for c in found.columns), strict=True)):
                self._settled.add((device, epoch, lane, sequence))

    def _sync(self, handle: _Handle) -> None:
        """See the commits of others."""
        handle.table.update_incremental()
        self._absorb(handle)

    def _absorb(self, handle: _Handle) -> None:
        """Take the blocks of the commits after `seen` into the index."""
        newest = handle.table.version()
        limit = newest - handle.seen
        if limit == 0:
            return
        commits = handle.table.history(limit)
        while len(commits) == limit and min(c["version"] for c in commits) > handle.seen + 1:
            limit *= 2  # history starts from the newest commit, and others commit while we read
            commits = handle.table.history(limit)
        if min((c["version"] for c in commits), default=newest) > handle.seen + 1:  # Delta has cleaned up its log since
            self._index(handle.stream, handle.lane, handle.table)
        found = {(d, e, lane, n) for commit in commits for d, e, lane, n in json.loads(commit.get(BLOCKS_KEY, "[]"))}
        for identity in sorted(found):
            self._settled.add(identity)
        if found and handle.stream == LOSSES.stream:
            theirs = pc.field("sequence").isin(sorted({identity[3] for identity in found}))
            self._settled.give_up(handle.table.to_pyarrow_dataset().to_table(columns=list(LEDGER_COLUMNS), filter=theirs))
        handle.seen = newest

    # Upkeep

    def compact(self, files_max: int) -> dict[str, int]:
        """Merge the small files of every table that this object made more than `files_max` commits to; files removed by table."""
        removed: dict[str, int] = {}
        for (stream, lane), handle in self._handles.items():
            if handle.commits > files_max:
                handle.commits = 0
                removed[f"{stream}/{lane}"] = self._compact(handle)
        return removed

    def _compact(self, handle: _Handle) -> int:
        try:
            metrics: dict[str, Any] = handle.table.optimize.compact()
            handle.table.create_checkpoint()
        except DeltaError as e:  # another process compacts the same table; nothing is lost, next time
            log.info("compaction skipped table=%s reason=%s", handle.table.table_uri, e)
            metrics = {}
        self._sync(handle)
        return int(metrics.get("numFilesRemoved", 0))

    def correct_clocks(self, everywhere: bool = False) -> dict[str, int]:
        """Give the rows of boots whose clock was set later their true times; corrected rows by table.

        Those that this object has seen; `everywhere`: of all tables, whoever wrote them.

        Raises:
            UnavailableError: a table does not open.
        """
        for lane in {lane for stream in self.streams() for lane in self.lanes(stream)} if everywhere else ():
            self._open_lane(lane)
        corrected: dict[str, int] = {}
        for boot, offset_us, places in self._clocks.due():
            for place in places:
                corrected["/".join(place)] = corrected.get("/".join(place), 0) + self._correct(place, boot, offset_us)
        return corrected

    def _correct(self, place: Place, boot: Boot, offset_us: int) -> int:
        handle = self._handles.get(place)
        if handle is None:
            return 0  # it failed to open a moment ago
        contract = next((c for c in AGENT_STREAMS if c.stream == place[0]), None)
        try:
            rows = correct(handle.table, boot, offset_us, stamped(contract) if contract else ())
        except DeltaError as e:  # another process changes the same files; the rows wait, next time
            log.info("clock correction skipped table=%s boot=%s reason=%s", handle.table.table_uri, boot, e)
            rows = 0
        else:
            self._clocks.corrected(boot, place)
            log.info("clock corrected device=%s boot=%s table=%s rows=%d", *boot, handle.table.table_uri, rows)
        self._sync(handle)
        return rows

    # Reading

    def streams(self) -> list[str]:
        """The names of the streams that hold rows."""
        return sorted(p.name for p in _directories(self.directory) if p.name != LABELS and self.lanes(p.name))

    def lanes(self, stream: str) -> list[str]:
        """The lanes of a stream."""
        return sorted(p.name for p in _directories(self.directory / stream) if DeltaTable.is_deltatable(str(p)))

    def versions(self, stream: str) -> dict[str, int]:
        """The newest version of each lane's table: with `read`, a name for exactly the rows that are there now."""
        return {lane: DeltaTable(str(self._path(stream, lane))).version() for lane in self.lanes(stream)}

    def table(self, stream: str, lane: str, version: int | None = None) -> DeltaTable:
        """A lane's table, as it is now or at a version.

        Raises:
            UnavailableError: it does not open.
        """
        try:
            return DeltaTable(str(self._path(stream, lane)), version=version)
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"lake {stream}/{lane} does not open: {e}") from e

    def read(
        self,
        stream: str,
        lanes: Sequence[str] | None = None,
        versions: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows in the order in which each device saw them: sorted by device, epoch, ordinal, row.

        Args:
            lanes: None for all of them (of `versions`, if given).
            versions: table version by lane; lanes without one are read as they are now.
            columns: None for all; see `cloud.rows` for their names.

        Returns:
            The rows; without columns if there is no such lane.
        """
        pinned = dict(versions or {})
        chosen = list(lanes) if lanes is not None else sorted(pinned) or self.lanes(stream)
        wanted = None if columns is None else list(dict.fromkeys([*columns, *ORDER]))
        parts = [self._read_lane(stream, lane, pinned.get(lane), wanted) for lane in chosen]
        if not parts:
            return pa.table({})
        whole = pa.concat_tables(parts, promote_options="default").sort_by([(name, "ascending") for name in ORDER])
        return whole if columns is None else whole.select(list(columns))

    def _read_lane(self, stream: str, lane: str, version: int | None, columns: list[str] | None) -> pa.Table:
        try:
            return DeltaTable(str(self._path(stream, lane)), version=version).to_pyarrow_table(columns=columns)
        except (TableNotFoundError, DeltaError) as e:
            raise UnavailableError(f"lake {stream}/{lane} version {'newest' if version is None else version} does not read: {e}") from e

    # Labels

    def write_labels(self, stream: str, table: pa.Table) -> int:
        """Replace the labels of a stream, in one commit; the new version of the labels."""
        path = self.directory / LABELS / stream
        path.mkdir(parents=True, exist_ok=True)
        write_deltalake(str(path), table, mode="overwrite", schema_mode="overwrite")
        return DeltaTable(str(path)).version()

    def labels(self, stream: str, version: int | None = None) -> pa.Table | None:
        """The labels of a stream; None if it has none."""
        path = self.directory / LABELS / stream
        return DeltaTable(str(path), version=version).to_pyarrow_table() if DeltaTable.is_deltatable(str(path)) else None

    def labels_version(self, stream: str) -> int | None:
        """The newest version of the labels; None if there are none."""
        path = self.directory / LABELS / stream
        return DeltaTable(str(path)).version() if DeltaTable.is_deltatable(str(path)) else None

    def _path(self, stream: str, lane: str) -> Path:
        return self.directory / stream / lane


def _directories(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def _portions(group: list[tuple[BlockHeader, Table]]) -> Iterator[list[tuple[BlockHeader, Table]]]:
    """Blocks whose rows fit one commit."""
    portion: list[tuple[BlockHeader, Table]] = []
    size = 0
    for header, table in group:
        more = text_bytes(header, table)
        if portion and size + more > TEXT_BYTES_MAX:
            yield portion
            portion, size = [], 0
        portion.append((header, table))
        size += more
    yield portion
