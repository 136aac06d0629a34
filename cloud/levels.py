"""Do streams keep the service levels that their contracts promise? What a level means stands in `contract.service`.

- `freshness` is looked at per device, `frequency` per entity; what was silent for RETIRED_S is taken for gone, and so is what was heard
  last from a device before it was removed from the fleet.
- `latency` and missing values are those of blocks that arrived in the last WINDOW_S; a block counts with its earliest reading.
- `completeness` is the share of blocks that are in the lake or in its quarantine (`cloud.completeness`), of all the lake knows of and
  that are due: those that may still come are left out.
- All versions of a stream's contract have one table; the newest version's levels count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cloud.block_index import BlockIndex
from cloud.completeness import GRACE_S, Completeness, Epoch, examine
from cloud.quarantine import CheckedLake
from cloud.quarantined import newest
from edge_agent.contract.service import NO_LEVELS
from edge_agent.contract.stream import StreamContract

WINDOW_S = 86_400.0
RETIRED_S = 7 * 86_400.0


@dataclass(frozen=True)
class Breach:
    """A promise that is not kept now. `subject`: the device or entity; empty: the stream as a whole."""

    stream: str
    subject: str
    level: str
    promised: str
    found: str

    def __str__(self) -> str:
        who = f" of {self.subject}" if self.subject else ""
        return f"stream {self.stream}: {self.level}{who} is {self.found}; promised is {self.promised}"


def breaches(
    lake: CheckedLake,
    index: BlockIndex,
    now_us: int,
    *,
    grace_s: float = GRACE_S,
    waiting: Mapping[Epoch, int] | None = None,
    removed: Mapping[str, int] | None = None,
) -> list[Breach]:
    """Every promise that is not kept at `now_us`; `grace_s`, `waiting` and `removed` are those of `completeness.examine`.

    Raises:
        UnavailableError: the lake does not read.
    """
    found: list[Breach] = []
    for stream in sorted({c.stream for c in lake.lake.contracts.listed}):
        contract = newest(lake.lake.contracts, stream)
        if contract is not None and contract.levels != NO_LEVELS:
            if lake.lake.lanes(stream):
                found += _of_blocks(lake, index, contract, now_us, removed or {})
                found += _of_entities(lake, index, contract, now_us, removed or {})
            if contract.levels.completeness is not None:
                whole = examine(lake, index, now_us, stream=stream, grace_s=grace_s, waiting=waiting, removed=removed)
                found += _completeness(stream, contract.levels.completeness, whole)
    return found


def _of_blocks(lake: CheckedLake, index: BlockIndex, contract: StreamContract, now_us: int, removed: Mapping[str, int]) -> Iterator[Breach]:
    levels = contract.levels
    fields = tuple(limit.field for limit in levels.nulls)
    parts = [index.blocks(lake.lake.table(contract.stream, lane), contract.event_time, fields) for lane in lake.lake.lanes(contract.stream)]
    blocks = pa.concat_tables(parts)
    if levels.freshness_s is not None:
        newest_us = blocks.group_by("device").aggregate([("last_us", "max")])
        for device, last_us in zip(newest_us["device"].to_pylist(), newest_us["last_us_max"].to_pylist(), strict=True):
            if levels.freshness_s < (age_s := (now_us - last_us) / 1e6) <= RETIRED_S and last_us > removed.get(device, -1):
                yield Breach(contract.stream, device, "freshness", _time(levels.freshness_s), _time(age_s))
    recent = blocks.filter(pc.greater_equal(blocks["arrived_us"], now_us - int(WINDOW_S * 1e6)))
    if levels.latency_s is not None and recent.num_rows:
        late_s = (recent["arrived_us"].to_numpy() - recent["first_us"].to_numpy()) / 1e6
        devices = np.array(recent["device"].to_pylist())
        for device in sorted(set(devices[late_s > levels.latency_s].tolist())):
            yield Breach(contract.stream, device, "latency", _time(levels.latency_s), _time(float(late_s[devices == device].max())))
    for limit in levels.nulls:
        missing, rows = (int(pc.sum(recent[name]).as_py() or 0) for name in (f"missing_{limit.field}", "rows"))
        if limit.broken(missing, rows):
            yield Breach(contract.stream, "", f"missing values of {limit.field}", str(limit), f"{missing} of {rows} rows")


def _of_entities(
    lake: CheckedLake, index: BlockIndex, contract: StreamContract, now_us: int, removed: Mapping[str, int]
) -> Iterator[Breach]:
    if contract.levels.frequency_s is None:
        return
    tables = [lake.lake.table(contract.stream, lane) for lane in lake.lake.lanes(contract.stream)]
    parts = pa.concat_tables([index.newest(table, contract.event_time, contract.entity) for table in tables])
    rising = parts.sort_by("last_us")
    last = {e: (us, dev) for e, us, dev in zip(*(rising[name].to_pylist() for name in ("entity", "last_us", "device")), strict=True)}
    for entity, (last_us, device) in sorted(last.items()):
        if contract.levels.frequency_s < (age_s := (now_us - last_us) / 1e6) <= RETIRED_S and last_us > removed.get(device, -1):
            yield Breach(contract.stream, entity, "frequency", f"every {_time(contract.levels.frequency_s)}", f"silent for {_time(age_s)}")


def _completeness(stream: str, promised: float, found: Completeness) -> Iterator[Breach]:
    if found.share_due < promised:
        blocks = f"{100 * found.share_due:.3f} percent of {found.due} blocks"
        yield Breach(stream, "", "completeness", f"{100 * promised:g} percent", blocks)


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
