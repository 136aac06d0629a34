"""The lake: one Delta table per lane and stream, one row per reading, exactly once.

- Rows lie in `<root>/<lane>/<stream>/`, by event date: zones are apart on disk, and may have roots of their own (`cloud.roots`).
- A block is stored once, by its identity (device, epoch, lane, sequence), however often and wherever it arrives. Each commit
  carries a Delta application transaction per (device, epoch, lane) that it adds to, and names its blocks in its metadata.
  A writer that has not seen another's commit for the same lane is refused by Delta; it reads what the other stored, drops
  that, and tries again. A commit that Delta rebased over others is followed by reading those, before the next one.
- What is settled is rebuilt from the rows themselves when a lane is first touched; compaction does not change rows.
- What the loss ledger names is settled too, but not stored; and it may not be ranges without end: see `cloud.settled`.
- A block that has no place here, or whose contract breaks with the rows of its table, is refused by itself: the others are stored.

    lake = Lake(settings.lake, contracts)
    table = lake.read("turbofan", lanes=["europe"], versions={"europe": 12}, columns=["engine", "score"])
"""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud import upkeep
from cloud.clocks import Boot, Clocks, Place, correct
from cloud.evolution import disagreement
from cloud.gate import Refusal
from cloud.handle import BLOCKS_KEY, Handle, blocks_of
from cloud.portions import portions
from cloud.reading import read_rows
from cloud.roots import Roots
from cloud.rows import EVENT_DATE, Contracts, stamped, to_rows
from cloud.settled import LEDGER_COLUMNS, Identity, SettledIndex
from cloud.stacks import Block, Stack, stacked
from cloud.tables import LABELS, Tables, contract_of, is_table, open_table, read_table
from edge_agent.contract.block import BlockHeader
from edge_agent.contract.errors import ConfigError, ContractError, Reason, UnavailableError
from edge_agent.contract.receipt import Receipt
from edge_agent.contract.stream import AGENT_STREAMS, LOSSES, StreamContract

log = logging.getLogger(__name__)

ATTEMPTS_MAX = 20
PARQUET = WriterProperties(compression="ZSTD")
NO_CLEANUP = PostCommitHookProperties(cleanup_expired_logs=False)
"""Looking for expired commits lists the whole log, with each commit; compaction does it."""
REFRESH_S = 5.0
"""How often a lane is read again for what others committed to it, while its receipts are cut off."""


@dataclass(frozen=True)
class Settled:
    """What an append did: the blocks it added, those that were there already, those that may not be stored, and the receipts to send."""

    committed: list[Identity]
    duplicates: list[Identity]
    receipts: list[Receipt]
    refused: list[Refusal] = field(default_factory=list)


@dataclass
class Lake:
    """The lake in a directory, or in `Roots`. `contracts` are needed only to append. One object belongs to one thread."""

    where: Path | str | Roots
    contracts: Contracts = field(default_factory=Contracts)

    def __post_init__(self) -> None:
        self.roots = Roots.at(self.where)
        self._tables = Tables(self.roots)
        self._handles: dict[tuple[str, str], Handle] = {}
        self._settled = SettledIndex()
        self._lanes_seen: set[str] = set()
        self._refresh_due: dict[str, float] = {}
        self._clocks = Clocks()
        self._vacuum_due: dict[Place, float] = {}

    def beside(self, where: Roots, contracts: Contracts) -> Lake:
        """A lake of the same devices: what one learns of their clocks the other knows too."""
        other = Lake(where, contracts)
        other._clocks = self._clocks.beside()
        return other

    # Writing

    def append(self, region: str, found: Iterable[Block | Stack], elsewhere: Sequence[Identity] = ()) -> Settled:
        """Store checked blocks that `region` received; blocks that are settled already are left out.

        `elsewhere` names blocks that came too and are stored in another place: they are settled as well, and the receipts say so.

        Raises:
            UnavailableError: the lake could not commit. What was committed before that is settled; append again.
            ConfigError: tables lie elsewhere than the settings say.
        """
        arrived_us = time.time_ns() // 1_000
        stacks = stacked(found)
        groups: defaultdict[tuple[str, str], list[Stack]] = defaultdict(list)
        for stack in stacks:
            groups[stack.headers[0].stream, stack.headers[0].lane].append(stack)
        came = [header for stack in stacks for header in stack.headers]
        committed: list[Identity] = []
        refused: dict[Identity, Refusal] = {}
        self._clocks.learn(came)
        for (stream, lane), group in groups.items():
            fit = self._admit(stream, lane, group, refused)
            for part in portions(fit, self._contract):
                committed += self._append_group(region, stream, lane, part, arrived_us)
        self.settle(elsewhere)
        added = set(committed)
        known = [header.identity for header in came if header.identity not in refused]
        named = [*known, *elsewhere]
        for lane in self._settled.cut(named):
            self._refresh(lane)
        return Settled(committed, [i for i in known if i not in added], self._settled.receipts(named), list(refused.values()))

    def settle(self, identities: Iterable[Identity]) -> None:
        """Note that blocks are stored in another place: receipts tell of them, and this lake does not hold them."""
        for identity in identities:
            self._settled.name(identity)

    def holds(self, identity: Identity) -> bool:
        """Whether rows of a block lie here, as far as this object has seen; false for a lane that has no root."""
        if identity[2] not in self._lanes_seen:
            try:
                self.roots.of(identity[2])
            except ConfigError:
                return False
            self._open_lane(identity[2])
        return identity in self._settled

    def _admit(self, stream: str, lane: str, group: list[Stack], refused: dict[Identity, Refusal]) -> list[Stack]:
        """The stacks of a group that may be stored; the blocks of the others go to `refused`, with the reason."""
        problem: tuple[Reason, str] | None
        fit = []
        for stack in group:
            try:
                self.roots.of(lane)
            except ConfigError as e:
                problem = Reason.NO_ROOT, str(e)
            else:
                self._open_lane(lane)
                why = self._verdict(self._handle(stream, lane, stack.headers[0]), stack.headers[0])
                problem = None if why is None else (Reason.CONTRACT_BROKEN, why)
            if problem is None:
                fit.append(stack)
            else:
                refused |= {h.identity: Refusal(h.device, lane, stream, *problem, h.identity) for h in stack.headers}
        return self._bounded(lane, fit, refused) if stream == LOSSES.stream else fit

    def _bounded(self, lane: str, ledger: list[Stack], refused: dict[Identity, Refusal]) -> list[Stack]:
        """The stacks of a lane's ledger without blocks that name too many ranges."""
        many = self._settled.too_many(b for stack in ledger for b in stack.blocks() if b[0].identity not in self._settled)
        refused |= {i: Refusal(i[0], lane, LOSSES.stream, Reason.OVERSIZE, why, i) for i, why in many.items()}
        return [left for stack in ledger if (left := stack.only(lambda header: header.identity not in many)) is not None]

    def _verdict(self, handle: Handle, header: BlockHeader) -> str | None:
        """Why a block's contract does not fit its table; None if it does."""
        version = header.contract_version
        if version not in handle.verdicts:
            handle.verdicts[version] = disagreement(contract_of(handle.table), self._contract(header))
        return handle.verdicts[version]

    def _append_group(self, region: str, stream: str, lane: str, group: list[Stack], arrived_us: int) -> list[Identity]:
        for attempt in range(ATTEMPTS_MAX):
            try:
                handle = self._handle(stream, lane, group[0].headers[0])
                if attempt:
                    self._sync(handle)
                elif handle.worn:
                    handle.reopen(self._tables.open(stream, lane))
                    self._absorb(handle)  # at once: what it brings of others is no conflict for Delta any more
                fresh = [new for stack in group if (new := stack.only(lambda header: header.identity not in self._settled)) is not None]
                headers = [header for stack in fresh for header in stack.headers]
                if fresh:
                    self._commit(handle, self._rows(region, fresh, arrived_us), headers)
                return [header.identity for header in headers]
            except CommitFailedError as e:
                log.info("commit repeated stream=%s lane=%s attempt=%d reason=%s", stream, lane, attempt + 1, e)
            except (DeltaError, OSError) as e:
                self._forget(stream, lane)  # whether it landed is read from the table, next time
                blocks = sum(len(stack.headers) for stack in group)
                raise UnavailableError(f"lake {lane}/{stream} did not commit {blocks} blocks: {e}") from e
        raise UnavailableError(f"lake {lane}/{stream}: {ATTEMPTS_MAX} commits in a row met others; too many writers for one lane")

    def _rows(self, region: str, stacks: list[Stack], arrived_us: int) -> pa.Table:
        """The rows of stacks of one stream."""
        contracts = [self._contract(stack.headers[0]) for stack in stacks]
        parts = [
            to_rows(contract, region, stack, [self._clocks.shift(header) for header in stack.headers], arrived_us)
            for contract, stack in zip(contracts, stacks, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        whole = pa.concat_tables(parts, promote_options="default")
        return whole.sort_by([(EVENT_DATE, "ascending"), (contracts[0].entity, "ascending"), (contracts[0].event_time, "ascending")])

    def _contract(self, header: BlockHeader) -> StreamContract:
        contract = self.contracts.get(header)
        if contract is None:
            raise ContractError(f"block {header.identity}: no contract for {header.stream!r} version {header.contract_version!r}")
        return contract

    def _commit(self, handle: Handle, rows: pa.Table, headers: list[BlockHeader]) -> None:
        highest: dict[str, int] = {}
        for header in headers:
            app = "/".join(header.identity[:3])
            highest[app] = max(highest.get(app, 0), header.sequence)
        write_deltalake(
            handle.table,
            rows,
            mode="append",
            schema_mode=None if handle.columns == set(rows.column_names) else "merge",
            writer_properties=PARQUET,
            commit_properties=CommitProperties(
                custom_metadata={BLOCKS_KEY: json.dumps([list(h.identity) for h in headers])},
                app_transactions=[Transaction(app, version) for app, version in highest.items()],
            ),
            post_commithook_properties=NO_CLEANUP,
        )
        for header in headers:
            self._settled.add(header.identity)
            self._clocks.stored((header.stream, header.lane), header)
        if handle.stream == LOSSES.stream:
            self._settled.give_up(rows)
        handle.small += len(rows[EVENT_DATE].unique())
        handle.columns |= set(rows.column_names)
        if handle.table.version() == handle.seen + 1:
            handle.seen += 1
        else:
            self._absorb(handle)

    def _handle(self, stream: str, lane: str, header: BlockHeader) -> Handle:
        if (stream, lane) in self._handles:
            return self._handles[stream, lane]
        contract = self._contract(header)
        try:
            try:
                table = self._tables.create(lane, contract)
            except CommitFailedError:
                table = self._tables.open(stream, lane)  # another process was faster
            handle = Handle.of(stream, lane, table, seen=False)
            self._sync(handle)  # another process may have created it, and more, a moment ago
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"lake {lane}/{stream} cannot be made: {e}") from e
        self._handles[stream, lane] = handle
        return handle

    def _forget(self, stream: str, lane: str) -> None:
        """Read a table again from its rows, next time."""
        self._handles.pop((stream, lane), None)
        self._lanes_seen.discard(lane)

    # The settled index

    def _open_lane(self, lane: str) -> None:
        """Index every stream's table of `lane`: the streams of a lane share one count of sequences."""
        if lane in self._lanes_seen:
            return
        for stream in self._tables.streams(lane):
            if (stream, lane) not in self._handles:
                table = self._tables.open(stream, lane)
                try:
                    self._index(stream, lane, table)
                    self._clocks.index((stream, lane), table)
                except (DeltaError, OSError) as e:
                    raise UnavailableError(f"lake {lane}/{stream} does not read: {e}") from e
                self._handles[stream, lane] = Handle.of(stream, lane, table, seen=True)
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
                self._forget(*place)
                raise UnavailableError(f"lake {lane}/{place[0]} does not read: {e}") from e

    def _index(self, stream: str, lane: str, table: DeltaTable) -> None:
        if stream == LOSSES.stream:
            self._give_up(table)
        scanner = table.to_pyarrow_dataset().scanner(columns=["device", "epoch", "sequence"])
        for batch in scanner.to_batches():
            found = pa.table(batch).group_by(["device", "epoch", "sequence"]).aggregate([])
            for device, epoch, sequence in sorted(zip(*(c.to_pylist() for c in found.columns), strict=True)):
                self._settled.add((device, epoch, lane, sequence))

    def _sync(self, handle: Handle) -> None:
        """See the commits of others."""
        handle.table.update_incremental()
        self._absorb(handle)

    def _absorb(self, handle: Handle) -> None:
        """Take the blocks of the commits after `seen` into the index."""
        commits = handle.news()
        if commits is None:
            self._index(handle.stream, handle.lane, handle.table)
        found = {identity for commit in commits or () for identity in blocks_of(commit)}
        for identity in sorted(found):
            self._settled.add(identity)
        if found and handle.stream == LOSSES.stream:
            self._give_up(handle.table, pc.field("sequence").isin(sorted({identity[3] for identity in found})))
        handle.seen = handle.table.version()

    def _give_up(self, table: DeltaTable, which: pc.Expression | None = None) -> None:
        """Take rows of the ledger into the index, a few at a time: its texts are a device's, and may be as long as it likes."""
        dataset, names = table.to_pyarrow_dataset(), list(LEDGER_COLUMNS)
        scanner = dataset.scanner(columns=names, filter=which, batch_size=upkeep.SCAN_ROWS, batch_readahead=0, fragment_readahead=1)
        for batch in scanner.to_batches():
            self._settled.give_up(pa.Table.from_batches([batch]))

    # Upkeep

    def compact(self, files_max: int) -> dict[str, int]:
        """Merge small files of tables that got more than `files_max` of them; files removed by table.

        One call looks at one table at most, and works on few of its dates: ingest calls it when idle, and once a minute when it is not. It
        can always wait: a table that does not answer is logged, and looked at again after its next commit.
        """
        crowded = next((handle for handle in self._handles.values() if handle.small > files_max), None)
        if crowded is None:
            return {}
        place = crowded.stream, crowded.lane
        self._handles[place] = self._handles.pop(place)  # last: the next call looks at another one first
        try:
            done = upkeep.compact(crowded.table, files_max, dates_max=upkeep.DATES_PER_CALL)
            crowded.small = done.small_left
            self._sync_or_forget(crowded)
        except UnavailableError as e:
            log.warning("compaction put off table=%s reason=%s", crowded.table.table_uri, e)
            self._forget(crowded.stream, crowded.lane)
            return {}
        except Exception:  # what delta-rs's engine refuses comes as a bare one; the table can be read and added to all the same
            log.exception("compaction given up table=%s", crowded.table.table_uri)
            crowded.small = 0
            return {}
        return {f"{crowded.lane}/{crowded.stream}": done.removed}

    def vacuum(self, hours: int) -> dict[str, int]:
        """Remove files that no version of the last `hours` needs; how many, by table.

        One call looks at one table, and at each that this object has seen once in VACUUM_EVERY_S. It can always wait: a table that does not
        answer is logged, and its turn comes again after that time.
        """
        now = time.monotonic()
        place = min(self._handles, key=lambda place: self._vacuum_due.get(place, 0.0), default=None)
        if place is None or self._vacuum_due.get(place, 0.0) > now:
            return {}
        handle, self._vacuum_due[place] = self._handles[place], now + upkeep.VACUUM_EVERY_S
        try:
            gone = upkeep.vacuum(handle.table, hours, dry_run=False)
            self._sync_or_forget(handle)
        except UnavailableError as e:
            log.warning("vacuum put off table=%s reason=%s", handle.table.table_uri, e)
            self._forget(*place)
            return {}
        except Exception:  # as in `compact`
            log.exception("vacuum given up table=%s", handle.table.table_uri)
            return {}
        return {f"{handle.lane}/{handle.stream}": len(gone)}

    def correct_clocks(self, everywhere: bool = False) -> dict[str, int]:
        """Give the rows of boots whose clock was set later their true times; corrected rows by table.

        Those that this object has seen; `everywhere`: of all tables, whoever wrote them.

        Raises:
            UnavailableError: a table does not open.
        """
        if everywhere:
            self.open_everything()
        corrected: dict[str, int] = {}
        for boot, offset_us, places in self._clocks.due():
            for stream, lane in places:
                name = f"{lane}/{stream}"
                corrected[name] = corrected.get(name, 0) + self._correct((stream, lane), boot, offset_us)
        return corrected

    def open_everything(self) -> None:
        """See all tables, whoever wrote them.

        Raises:
            UnavailableError: one does not open.
        """
        for lane in {lane for stream in self.streams() for lane in self.lanes(stream)}:
            self._open_lane(lane)

    def _correct(self, place: Place, boot: Boot, offset_us: int) -> int:
        handle = self._handles.get(place)
        if handle is None:
            return 0  # it failed to open a moment ago
        contract = next((c for c in AGENT_STREAMS if c.stream == place[0]), None)
        try:
            rows = correct(handle.table, boot, offset_us, stamped(contract) if contract else ())
        except (DeltaError, OSError) as e:  # another process changes the same files, or they are away; the rows wait, next time
            log.info("clock correction skipped table=%s boot=%s reason=%s", handle.table.table_uri, boot, e)
            rows = 0
        except Exception:  # what delta-rs's engine refuses comes as a bare one; it would refuse it again
            log.exception("clock correction given up device=%s boot=%s table=%s", *boot, handle.table.table_uri)
            self._clocks.corrected(boot, place)
            rows = 0
        else:
            self._clocks.corrected(boot, place)
            log.info("clock corrected device=%s boot=%s table=%s rows=%d", *boot, handle.table.table_uri, rows)
        self._sync_or_forget(handle)
        return rows

    def _sync_or_forget(self, handle: Handle) -> None:
        try:
            self._sync(handle)
        except (DeltaError, OSError) as e:
            self._forget(handle.stream, handle.lane)
            raise UnavailableError(f"lake {handle.lane}/{handle.stream} does not read: {e}") from e

    # Reading

    def streams(self, lane: str | None = None) -> list[str]:
        """The names of the streams that have tables, in `lane` or anywhere."""
        return self._tables.streams(lane)

    def within(self, zones: Collection[str]) -> list[tuple[str, str]]:
        """Stream and lane of each table of a lane of nothing but `zones`; the roots of other zones are not asked."""
        return self._tables.within(zones)

    def lanes(self, stream: str) -> list[str]:
        """The lanes of a stream."""
        return self._tables.lanes(stream)

    def table(self, stream: str, lane: str, version: int | None = None) -> DeltaTable:
        """The open table of a stream and lane, with what it needs to reach its storage.

        Raises:
            UnavailableError: there is no such table or version, or the storage does not answer.
        """
        return self._tables.open(stream, lane, version)

    def versions(self, stream: str) -> dict[str, int]:
        """The newest version of each lane's table: with `read`, a name for exactly the rows that are there now."""
        return {lane: self.table(stream, lane).version() for lane in self.lanes(stream)}

    def read(
        self,
        stream: str,
        lanes: Sequence[str] | None = None,
        versions: Mapping[str, int] | None = None,
        columns: Sequence[str] | None = None,
        during_us: tuple[int, int] | None = None,
    ) -> pa.Table:
        """Rows in the order in which each device saw them: sorted by device, epoch, ordinal, row.

        Args:
            lanes: None for all of them (of `versions`, if given).
            versions: table version by lane; lanes without one are read as they are now.
            columns: None for all; see `cloud.rows` for their names.
            during_us: only event times from the first up to, not including, the second; microseconds since 1970 UTC. Files of other
                dates are not opened.

        Returns:
            The rows; without columns if there is no such lane.
        """
        pinned = dict(versions or {})
        chosen = list(lanes) if lanes is not None else sorted(pinned) or self.lanes(stream)
        return read_rows([self.table(stream, lane, pinned.get(lane)) for lane in chosen], columns, during_us)

    # Labels: `cloud.labels` adds them

    def labels(self, stream: str, version: int | None = None) -> pa.Table | None:
        """The labels of a stream; None if it has none."""
        root = self.roots.default
        return read_table(open_table(root.path(LABELS, stream), root, version)) if is_table(root, LABELS, stream) else None

    def labels_version(self, stream: str) -> int | None:
        """The newest version of the labels; None if there are none."""
        root = self.roots.default
        return open_table(root.path(LABELS, stream), root).version() if is_table(root, LABELS, stream) else None
