"""The devices' clocks: what the wall clock would have said before it was set.

A gateway without a battery clock starts in 1970, or wherever it stopped, until it hears from a time server. Its monotonic clock runs
all the while. So one block that was sealed with a synchronised clock tells how far the two clocks of that boot lie apart, and with it
the true time of every block of the same boot, sealed earlier or later without one.

- A row's `clock_synced` says whether its times can be trusted: the device's clock was synchronised, or the cloud has corrected them.
- `clock_shift_us` is what the cloud added to the times that the device's clock gave: `sealed_at`, and the event time of the agent's
  own streams (quarantine, losses). Null: nothing. The event times of sensors are theirs and are left alone.
- A boot without one synchronised block stays as it is, and says so.
- A device may say any number. What lies outside of TIMES_US tells nothing and is not corrected, nor is what would come to lie there; an
  event time that has no date keeps it, and rows that lie apart (`cloud.rows`) stay there. So no device makes a partition that has no name.
- The limit of the method: the two clocks drift apart, and a device that set its clock twice in one boot has two distances. The
  smallest one that was reported counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable

from cloud.rows import DATED_US, EVENT_DATE
from edge_agent.contract.block import BlockHeader
from edge_agent.core.decode import EVENT_S_END

Boot = tuple[str, str]  # device, boot id
Place = tuple[str, str]  # stream, lane

COLUMNS = ("device", "boot", "monotonic_us", "sealed_at", "clock_synced")
TIME_SQL = "arrow_cast({us}, 'Timestamp(Microsecond, Some(\"UTC\"))')"
TIMES_US = range(int(EVENT_S_END) * 1_000_000)
"""What the clocks of a device may say: since 1970, and since boot; sums and differences of a few of them fit 64 bits."""


class Clocks:
    """What is known of each boot: the distance of its clocks, and the tables that hold rows without a true time."""

    def __init__(self) -> None:
        self._offsets: dict[Boot, int] = {}
        self._waiting: defaultdict[Boot, set[Place]] = defaultdict(set)

    def beside(self) -> Clocks:
        """For another lake of the same devices: it knows the same distances, and waits for rows of its own."""
        other = Clocks()
        other._offsets = self._offsets
        return other

    def learn(self, headers: Iterable[BlockHeader]) -> None:
        """Take the distances that synchronised blocks tell."""
        for header in headers:
            if header.clock_synced and _possible(header):
                self._tell((header.device, header.boot), header.sealed_us - header.monotonic_us)

    def shift(self, header: BlockHeader) -> int | None:
        """What to add to the times of a block; None: nothing, they are true or nobody knows better."""
        offset = self._offsets.get((header.device, header.boot))
        if header.clock_synced or offset is None or not _possible(header) or header.monotonic_us + offset not in TIMES_US:
            return None
        return header.monotonic_us + offset - header.sealed_us

    def stored(self, place: Place, header: BlockHeader) -> None:
        """Note that a block is in a table now."""
        if not header.clock_synced and _possible(header) and self.shift(header) is None:
            self._waiting[header.device, header.boot].add(place)

    def index(self, place: Place, table: DeltaTable) -> None:
        """Learn from the rows that a table holds already."""
        for batch in table.to_pyarrow_dataset().scanner(columns=list(COLUMNS)).to_batches():
            rows = pa.table(batch).filter(_within(pc.field("sealed_at").cast(pa.int64())) & _within(pc.field("monotonic_us")))
            distance = pc.subtract(rows["sealed_at"].cast(pa.int64()), rows["monotonic_us"])
            found = rows.append_column("distance", distance).group_by(["device", "boot", "clock_synced"]).aggregate([("distance", "min")])
            for device, boot, synced, offset in zip(*(c.to_pylist() for c in found.columns), strict=True):
                if boot is None:
                    continue
                if synced:
                    self._tell((device, boot), offset)
                else:
                    self._waiting[device, boot].add(place)

    def due(self) -> list[tuple[Boot, int, list[Place]]]:
        """The boots whose earlier rows can be corrected now, by how much their clocks lie apart, and where the rows are."""
        return [(boot, self._offsets[boot], sorted(places)) for boot, places in self._waiting.items() if boot in self._offsets]

    def corrected(self, boot: Boot, place: Place) -> None:
        """Note that a table's rows of a boot are true now."""
        self._waiting[boot].discard(place)
        if not self._waiting[boot]:
            del self._waiting[boot]

    def _tell(self, boot: Boot, offset: int) -> None:
        self._offsets[boot] = min(offset, self._offsets.get(boot, offset))


def correct(table: DeltaTable, boot: Boot, offset_us: int, stamped: Iterable[str]) -> int:
    """Give the rows of a boot their true times; returns how many. `stamped` are further columns with times of the device's clock."""
    shift = f"(monotonic_us + {offset_us} - arrow_cast(sealed_at, 'Int64'))"
    updates = {"sealed_at": TIME_SQL.format(us=f"monotonic_us + {offset_us}")}
    for event_time in stamped:  # at most one: the row moves to its true date
        told = f"arrow_cast({event_time}, 'Int64')"
        true = f"CASE WHEN {_between(told, DATED_US)} THEN {told} + {shift} ELSE {told} END"
        dated = f"CASE WHEN {EVENT_DATE} IS NOT NULL AND {_between(true, DATED_US)} THEN {true} END"
        updates |= {event_time: TIME_SQL.format(us=true), EVENT_DATE: f"arrow_cast({TIME_SQL.format(us=dated)}, 'Date32')"}
    device, boot_id = (text.replace("'", "''") for text in boot)
    possible = [_between("arrow_cast(sealed_at, 'Int64')", TIMES_US), _between("monotonic_us", TIMES_US)]
    possible.append(_between(f"monotonic_us + {offset_us}", TIMES_US))
    metrics = table.update(
        updates={**updates, "clock_shift_us": shift, "clock_synced": "true"},
        predicate=f"clock_synced = false AND device = '{device}' AND boot = '{boot_id}' AND {' AND '.join(possible)}",
    )
    return int(metrics["num_updated_rows"])


def _possible(header: BlockHeader) -> bool:
    return header.sealed_us in TIMES_US and header.monotonic_us in TIMES_US


def _within(times: pc.Expression) -> pc.Expression:
    return (times >= TIMES_US.start) & (times < TIMES_US.stop)


def _between(sql: str, span: range) -> str:
    return f"({sql}) BETWEEN {span.start} AND {span.stop - 1}"
