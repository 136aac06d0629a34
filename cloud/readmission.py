"""Out of quarantine: rows that keep the contract by now, or that a named person answers for, go into their stream's table once.

- A row is checked against the newest contract of its stream. A refused payload is decoded first, as the device would have.
- `as_is` skips the check. What it cannot skip: a payload that does not decode, and a personal field that was not treated, whatever
  else is wrong with the row.
- Rows stay if the newest contract breaks with the table that they would go into, or with the one that they lie in: as at ingest, what
  was measured in one unit is not taken for another.
- It stands in the audit trail first: a release that was cut off may stand there twice, never not at all.
- A released row keeps its name; `arrived_at` is now, so nobody can have known it before. Of a refused payload the device made no window:
  its `ordinal` lies behind all that the device counted.
- Once: rows that are in the stream's table are left out, in the commit's own version of it; releases exclude each other by a Delta
  application transaction. Then they are marked. Who stops between the two finds them there and only marks.
- A refused payload whose key the stream has already (the sensor sent it again) is marked and not added.
- A row whose block is not yet settled stays: its first row in the stream would make the lake believe that it holds the block.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from cloud.audit import Audit
from cloud.enforcement import check
from cloud.evolution import disagreement
from cloud.lake import ATTEMPTS_MAX, PARQUET
from cloud.quarantine import CheckedLake, quarantine_contract, rows_of, whole_blocks
from cloud.quarantined import NAME, RELEASED, Origin, Selection, Shelf, newest, shelves, topic_of
from cloud.rows import EVENT_DATE, NO_DAY, TIME, Days, event_days, schema
from cloud.tables import Tables, contract_of, read_table, text_field
from edge_agent.contract.block import ORDINAL
from edge_agent.contract.columns import Strings, Table, concat, take
from edge_agent.contract.errors import ConfigError, Reason, UnavailableError
from edge_agent.contract.stream import Compression, Encoding, FieldType, StreamContract
from edge_agent.core.decode import Decoder
from edge_agent.core.rejects import REDACTED, from_text
from edge_agent.core.single_values import ValueDecoder

APP = "fenceline/quarantine/release"
KIND = "quarantine_released"
BEHIND = 2**62
"""Added to the ordinal of a refused payload."""


@dataclass
class Released:
    """What a release did, in rows. `kept`: those that stay, by why."""

    released: int = 0
    already: int = 0
    kept: Counter[str] = field(default_factory=Counter)

    @property
    def complete(self) -> bool:
        """Whether everything that was meant is in its stream now."""
        return not self.kept


@dataclass(frozen=True)
class _Candidates:
    """Rows of one stream and lane that may go: their fields as `values`, the rest in `table`, row by row."""

    table: pa.Table
    values: Table


class Readmission:
    """Releases rows of one lake."""

    def __init__(self, lake: CheckedLake, audit: Audit) -> None:
        self._lake, self._audit = lake, audit

    def release(self, wanted: Selection, by: str, *, as_is: bool = False) -> Released:
        """Release what is meant; again does no harm.

        Args:
            by: who does it, for the audit trail; `as_is`: who answers for it, whatever the contract says.

        Raises:
            ConfigError: nothing like that lies in quarantine.
            UnavailableError: the lake does not commit; run it again.
        """
        done, found = Released(), False
        for shelf in list(shelves(self._lake, wanted)):
            found = True
            self._release(shelf, by, as_is, done)
        if not found:
            raise ConfigError("no such row lies in quarantine; fenceline quarantine list shows what does")
        return done

    def _release(self, shelf: Shelf, by: str, as_is: bool, done: Released) -> None:
        waiting = replace(shelf, table=shelf.table.filter(pc.is_null(shelf.table["released"])))
        done.already += shelf.table.num_rows - waiting.table.num_rows
        if not waiting.table.num_rows:
            return
        contract = newest(self._lake.lake.contracts, shelf.stream)
        if contract is None:
            done.kept["no contract has this topic or stream"] += waiting.table.num_rows
            return
        if problem := self._disagreement(contract, shelf):
            done.kept[problem] += waiting.table.num_rows
            return
        rows = self._decoded(contract, waiting, done) if shelf.origin is Origin.DEVICE else self._settled(contract, waiting, done)
        rows = _kept(contract, rows, waiting, as_is, done)
        if not (count := rows.table.num_rows):
            return
        counts = ", ".join(f"{device} {n}" for device, n in Counter(rows.table["device"].to_pylist()).items())
        how = "as they are" if as_is else f"by contract {contract.version}"
        detail = f"{count} rows of {shelf.stream} in {shelf.lane} released {how} by {by}; origin {shelf.origin}; rows by device: {counts}"
        self._audit.add(KIND, region="", subject=by, reason="", detail=detail, count=count)
        added = self._commit(contract, shelf, rows)
        done.released += added
        done.already += count - added
        self._mark(shelf, rows.table, by, as_is)

    def _disagreement(self, contract: StreamContract, shelf: Shelf) -> str | None:
        """Why rows of a shelf may not be taken for rows of the contract, or not lie in its table; None if they may.

        What they were taken by, their own version, need not be in the settings any more: their quarantine's table agrees with it.
        """
        places = [(self._lake.lake, contract)]
        if shelf.origin is Origin.INGEST:
            places.append((self._lake.held, quarantine_contract(contract)))
        for lake, wanted in places:
            if shelf.lane in lake.lanes(shelf.stream) and (
                problem := disagreement(contract_of(lake.table(shelf.stream, shelf.lane)), wanted)
            ):
                return problem
        return None

    def _settled(self, contract: StreamContract, shelf: Shelf, done: Released) -> _Candidates:
        """Rows that ingest took out of blocks which are settled by now."""
        whole = set(whole_blocks(self._lake.held, shelf.lane))
        stored = self._stored(shelf, shelf.table)
        there = (
            {(d, e, shelf.lane, s) for d, e, s in zip(*(stored[name].to_pylist() for name in NAME[:3]), strict=True)}
            if stored is not None
            else set()
        )
        ready = np.array([name[:4] in whole or name[:4] in there for name in shelf.names], np.bool_)
        if unsettled := int(np.count_nonzero(~ready)):
            done.kept["the block is not settled yet; it comes again from its device"] += unsettled
        table = shelf.table.filter(pa.array(ready))
        return _Candidates(table, rows_of(_with_fields(table, contract), contract))

    def _decoded(self, contract: StreamContract, shelf: Shelf, done: Released) -> _Candidates:
        """Refused payloads that decode by the present contract."""
        places: list[int] = []
        tables: list[Table] = []
        captured = shelf.table["captured_at"].cast(pa.int64()).to_pylist()
        facts = zip(*(shelf.table[name].to_pylist() for name in ("device", "topic", "payload")), captured, strict=True)
        for place, (device, topic, text, captured_us) in enumerate(facts):
            decoded = _decode(contract, device, topic, text, captured_us)
            if isinstance(decoded, str):
                done.kept[decoded] += 1
            else:
                places.append(place)
                tables.append(decoded)
        table = shelf.table.take(pa.array(places, pa.int64()))
        behind = pc.add(table[ORDINAL], pa.scalar(BEHIND, pa.int64()))
        table = table.set_column(table.column_names.index(ORDINAL), ORDINAL, behind)
        return _Candidates(table, concat(tables) if tables else {})

    def _commit(self, contract: StreamContract, shelf: Shelf, rows: _Candidates) -> int:
        """Add the rows that the stream's table does not have; how many they were."""
        arrow = to_arrow(contract, rows.table, rows.values)
        tables = Tables(self._lake.lake.roots)
        for _ in range(ATTEMPTS_MAX):
            try:
                table = tables.create(shelf.lane, contract)
                fresh = _absent(table, contract, shelf.origin, arrow)
                if fresh.num_rows:
                    write_deltalake(
                        table,
                        fresh,
                        mode="append",
                        schema_mode="merge",
                        writer_properties=PARQUET,
                        commit_properties=CommitProperties(app_transactions=[Transaction(APP, time.time_ns())]),
                    )
                return int(fresh.num_rows)
            except CommitFailedError:
                continue  # another release was faster: look again what is there
            except (DeltaError, OSError) as e:
                raise UnavailableError(f"lake {shelf.lane}/{shelf.stream} did not commit: {e}; release again") from e
        raise UnavailableError(f"lake {shelf.lane}/{shelf.stream}: {ATTEMPTS_MAX} commits in a row met other releases; release again")

    def _stored(self, shelf: Shelf, table: pa.Table) -> pa.Table | None:
        """The names of rows in the stream's table that are of the same blocks; None if there is no such table."""
        if shelf.lane not in self._lake.lake.lanes(shelf.stream):
            return None
        return _same_blocks(self._lake.lake.table(shelf.stream, shelf.lane), table)

    def _mark(self, shelf: Shelf, table: pa.Table, by: str, as_is: bool) -> None:
        count = table.num_rows
        marked = pa.table(
            {
                **{name: table[name] for name in NAME},
                "stream": pa.array([shelf.stream] * count, pa.string()),
                "released_at": pa.array([time.time_ns() // 1_000] * count, pa.int64()).cast(TIME),
                "released_by": pa.array([by] * count, pa.string()),
                "as_is": pa.array([as_is] * count, pa.bool_()),
            }
        )
        root = self._lake.held.roots.of(shelf.lane)
        try:
            write_deltalake(root.path(shelf.lane, RELEASED), marked, mode="append", storage_options=root.storage_options())
        except (DeltaError, OSError) as e:
            raise UnavailableError(f"the rows are in {shelf.lane}/{shelf.stream}, but not marked: {e}; release again") from e


def to_arrow(contract: StreamContract, table: pa.Table, values: Table) -> pa.Table:
    """Rows of the stream's table: `values` as fields, everything else as it stands in `table`; they arrive now."""
    now = pa.array([time.time_ns() // 1_000] * table.num_rows, pa.int64()).cast(TIME)
    times = values[contract.event_time]
    assert isinstance(times, np.ndarray)
    days = _days(table, times)
    told: dict[str, Any] = {
        **{f.name: _array(values[f.name], f.type) for f in contract.fields},
        "contract_version": pa.array([contract.version] * table.num_rows, pa.string()),
        "arrived_at": now,
        EVENT_DATE: pa.array(days.astype(np.int32), mask=days == NO_DAY).cast(pa.date32()),
    }
    wanted = schema(contract)
    whole = pa.table({name: told[name] if name in told else table[name] for name in wanted.names}, schema=wanted)
    return whole.sort_by([(EVENT_DATE, "ascending"), (contract.entity, "ascending"), (contract.event_time, "ascending")])


def _days(table: pa.Table, times: Any) -> Days:
    """The event dates of rows in any order, by the rule that ingest has for those of one block."""
    keys = np.stack([pc.rank(table[name], tiebreaker="dense").to_numpy() for name in NAME[:3]])
    order = np.lexsort(keys)
    first = np.flatnonzero((np.diff(keys[:, order]) != 0).any(axis=0)) + 1
    days = np.empty(len(order), np.int64)
    days[order] = event_days(times[order], np.diff([0, *first, len(order)]))
    return days


def _array(column: Any, kind: FieldType) -> pa.Array:
    if isinstance(column, Strings):
        return pa.array(column.tolist(), pa.string())
    return pa.array(column).cast(TIME) if kind is FieldType.TIMESTAMP else pa.array(column, from_pandas=True)


def _with_fields(table: pa.Table, contract: StreamContract) -> pa.Table:
    """The table with the optional numbers that a newer contract has and an older row has not."""
    for f in contract.fields:
        if f.name not in table.column_names:
            table = table.append_column(f.name, pa.nulls(table.num_rows, pa.float64()))
    return table


def _kept(contract: StreamContract, rows: _Candidates, shelf: Shelf, as_is: bool, done: Released) -> _Candidates:
    """The rows that may go; the others are counted in `done.kept`."""
    if not rows.table.num_rows:
        return rows
    hit = check(contract, rows.values, only=Reason.NOT_PRIVATE if as_is else None)
    stays = np.zeros(rows.table.num_rows, np.bool_)
    stays[hit.rows] = True
    for place in hit.broken.tolist():
        rule = hit.rules[place]
        done.kept[f"{rule.reason}: field {rule.field!r}: {rule.detail}"] += 1
    if shelf.origin is Origin.INGEST and not as_is:
        units = (rows.table["violation"].to_numpy(zero_copy_only=False) == Reason.WRONG_UNIT.value) & ~stays
        stays |= units
        if units.any():
            done.kept[f"{Reason.WRONG_UNIT}: no contract says what these values mean"] += int(np.count_nonzero(units))
    go = ~stays
    return _Candidates(rows.table.filter(pa.array(go)), take(rows.values, go))


def _decode(contract: StreamContract, device: str, topic: str, text: str, captured_us: int) -> Table | str:
    """The one reading of a refused payload, or why there is none."""
    if contract.encoding is Encoding.SPARKPLUG:
        return "Sparkplug: without the birth of its node a payload cannot be read"
    own = replace(contract, topic=topic_of(contract, device))
    if text.startswith(REDACTED):
        own, payload = replace(own, encoding=Encoding.JSON, compression=Compression.NONE), text[len(REDACTED) :].encode()
    else:
        payload = from_text(text)
    decoder = ValueDecoder(own) if own.encoding is Encoding.VALUE else Decoder(own)
    decoded = decoder.decode([payload], [topic], captured_us)
    if decoded.rejects:
        return f"{decoded.rejects[0].reason}: {decoded.rejects[0].detail}"
    return decoded.table


def _same_blocks(table: DeltaTable, rows: pa.Table) -> pa.Table:
    """The names of rows in a table that are of the same blocks as `rows`, or nearly: of the same devices and sequences."""
    same = text_field("device").isin(pc.unique(rows["device"])) & pc.field("sequence").isin(pc.unique(rows["sequence"]))
    return read_table(table, columns=list(NAME), filter=same)


def _absent(table: DeltaTable, contract: StreamContract, origin: Origin, rows: pa.Table) -> pa.Table:
    """The rows that a table does not have: by name, and those of refused payloads by key as well."""
    place = pa.array(np.arange(rows.num_rows))
    names = rows.select(list(NAME)).append_column("place", place)
    left = names.join(_same_blocks(table, rows), keys=list(NAME), join_type="left anti")["place"]
    rows = rows.take(left.combine_chunks().sort())
    if origin is Origin.INGEST or contract.encoding is Encoding.VALUE or not rows.num_rows:
        return rows
    keys = ["device", *contract.key]
    times = rows[contract.event_time]
    near = text_field("device").isin(pc.unique(rows["device"]))
    near &= (pc.field(contract.event_time) >= pc.min(times)) & (pc.field(contract.event_time) <= pc.max(times))
    known = read_table(table, columns=keys, filter=near)
    named = rows.select(keys).append_column("place", pa.array(np.arange(rows.num_rows)))
    fresh = named.join(known, keys=keys, join_type="left anti").group_by(keys).aggregate([("place", "min")])
    return rows.take(fresh["place_min"].combine_chunks().sort())
