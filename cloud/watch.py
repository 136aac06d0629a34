"""The watch over the lake: now and then, what is missing and which service levels are not kept. Runs beside the control loop.

- `tick` never waits: a look takes place in a thread of its own, and only one at a time. Only files that are new are read.
- An alarm is told once, in the log and in the audit trail, when it begins: blocks that nobody accounted for (`unaccounted`), a level
  that is not kept (`level_broken`). What stands now is in `<state>/run/quality.json`, for `fenceline status` and Prometheus.
- Told is told: after a restart an alarm that still stands is not new.
- If a look fails, whatever the reason, what was known stays, with its time and with the reason; the next look is as due as ever.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import msgspec

from cloud.audit import Audit
from cloud.block_index import BlockIndex
from cloud.completeness import Gap, State, examine
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.gate import load_contracts
from cloud.lake import Lake
from cloud.levels import breaches
from cloud.quarantine import CheckedLake
from edge_agent.contract.errors import UNREADABLE, FencelineError

log = logging.getLogger(__name__)

UNACCOUNTED, LEVEL = "unaccounted", "level_broken"
GAPS_TOLD_MAX = 100


class Quality(msgspec.Struct, frozen=True):
    """What the last look found that did not fail, at `at_us`; 0: none yet.

    `gaps`: those that nobody accounted for, `levels`: promises that are not kept; in words. `alarms`: those that were told.
    `failure`: why a look failed since then; empty: none did.
    """

    at_us: int = 0
    share: float = 0.0
    stored_blocks: int = 0
    lost_blocks: int = 0
    quarantined_readings: int = 0
    unaccounted_blocks: int = 0
    gaps: list[str] = []
    levels: list[str] = []
    alarms: list[str] = []
    failure: str = ""


def quality_path(settings: Settings) -> Path:
    """Where the last look is written down."""
    return settings.run_dir / "quality.json"


def read_quality(settings: Settings) -> Quality | None:
    """What the last look found; None before the first, and if it cannot be read any more: then alarms that stand are told again."""
    try:
        return msgspec.json.decode(quality_path(settings).read_bytes(), type=Quality)
    except (FileNotFoundError, *UNREADABLE):
        return None


def open_lake(settings: Settings) -> CheckedLake:
    """The lake of the settings, with its contracts and its quarantine."""
    return CheckedLake(Lake(settings.lake, load_contracts(settings)))


def waiting(fleet: Fleet) -> dict[tuple[str, str], int]:
    """How many blocks each device said last that it still holds, by device and epoch."""
    return {(name, told.epoch): told.blocks_waiting for name, (told, _) in fleet.all_reported().items()}


def removed(fleet: Fleet, now_us: int) -> dict[str, int]:
    """Until when each device that was removed is none of the fleet's (us): until now, or until it was removed last, if it is back."""
    return {name: removal.at_us if removal.back else now_us for name, removal in fleet.removals().items()}


class Watch:
    """Looks every `[quality] check_s`."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._fleet, self._audit = settings, Fleet(settings.fleet_db), Audit(settings.audit_db)
        self._index = BlockIndex()
        self._due = 0.0
        self._thread: threading.Thread | None = None
        known = read_quality(settings)
        self._told = set(known.alarms) if known else set()

    def tick(self, now: float) -> None:
        """Begin a look, if one is due and none is under way; `now`: monotonic seconds."""
        if now < self._due or (self._thread is not None and self._thread.is_alive()):
            return
        self._due = now + self._settings.quality.check_s
        self._thread = threading.Thread(target=self._look_quietly, name="watch", daemon=True)
        self._thread.start()

    def look(self, now_us: int) -> Quality:
        """Look now; alarms that are new are told.

        Raises:
            FencelineError: the lake does not read, or a contract cannot be used.
        """
        lake, held, gone = open_lake(self._settings), waiting(self._fleet), removed(self._fleet, now_us)
        grace_s = self._settings.quality.grace_s
        found = examine(lake, self._index, now_us, grace_s=grace_s, waiting=held, removed=gone)
        gaps = [gap for gap in found.gaps if gap.state is State.UNACCOUNTED]
        levels = breaches(lake, self._index, now_us, grace_s=grace_s, waiting=held, removed=gone)
        alarms = {f"{UNACCOUNTED} {words(g)}": (UNACCOUNTED, g.device, words(g), g.blocks) for g in gaps[:GAPS_TOLD_MAX]}
        alarms |= {f"{LEVEL} {b.stream} {b.level} {b.subject}": (LEVEL, b.subject, str(b), 1) for b in levels}
        quality = Quality(
            at_us=now_us,
            share=found.share,
            stored_blocks=found.stored,
            lost_blocks=found.blocks[State.LOST],
            quarantined_readings=found.quarantined_readings,
            unaccounted_blocks=found.blocks[State.UNACCOUNTED],
            gaps=[words(gap) for gap in gaps[:GAPS_TOLD_MAX]],
            levels=[str(breach) for breach in levels],
            alarms=list(alarms),
        )
        for key, (kind, subject, detail, count) in alarms.items():
            if key not in self._told:
                log.warning("%s %s", kind.replace("_", " "), detail)
                self._audit.add(kind, region="", subject=subject, reason=kind, detail=detail, count=count)
                self._told.add(key)  # the next alarm may not get into the trail
        self._told = set(alarms)
        self._write(quality)
        return quality

    def _look_quietly(self) -> None:
        try:
            self.look(time.time_ns() // 1_000)
        except Exception as e:  # a fault of ours, too, must not end the watch without a word
            log.warning("quality not looked at reason=%s", e, exc_info=not isinstance(e, FencelineError | OSError))
            known = read_quality(self._settings) or Quality()
            self._write(msgspec.structs.replace(known, failure=str(e) or type(e).__name__))

    def _write(self, quality: Quality) -> None:
        path = quality_path(self._settings)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(msgspec.json.encode(quality))
        temporary.replace(path)


def words(gap: Gap) -> str:
    """A gap in a line."""
    return f"device {gap.device} epoch {gap.epoch} lane {gap.lane}: sequences {gap.first} to {gap.last}, {gap.blocks} blocks"
