"""What must be true of the lake, said by someone who saw every reading being taken.

- *lost*: acknowledged by the sensor broker, not in the lake. *duplicate*: a row more than the reading's first.
- *out of zone*: the row lies in the lane (the path on disk) of another zone than the one it was captured in, or in a
  region whose endpoint that zone does not allow.
- *altered*: the row's numbers are not, bit for bit, those that were measured. *foreign*: nobody measured it.

The oracle takes the true position, not the fix that the device had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from cloud.demo.journey import Key, Reading
from edge_agent.core.zones import Zones

EXAMPLES_MAX = 5


@dataclass(frozen=True)
class LakeRow:
    """A row of the lake: the reading's name, where it lies, its values in the order of FIELDS, its score and the model that gave it."""

    key: Key
    cycle: int
    lane: str
    region: str
    values: tuple[float, ...]
    score: float | None = None
    model: str | None = None


@dataclass
class Verdict:
    """How many readings were published and stored, and the names of those with which something is wrong."""

    published: int = 0
    rows: int = 0
    lost: list[Key] = field(default_factory=list)
    duplicates: list[Key] = field(default_factory=list)
    out_of_zone: list[Key] = field(default_factory=list)
    altered: list[Key] = field(default_factory=list)
    foreign: list[Key] = field(default_factory=list)

    @property
    def broken(self) -> list[str]:
        """One sentence per promise that does not hold."""
        kinds = {
            "acknowledged readings are not in the lake": self.lost,
            "rows repeat a reading": self.duplicates,
            "rows lie where their zone does not allow": self.out_of_zone,
            "rows differ from what was measured": self.altered,
            "rows were never measured": self.foreign,
        }
        return [f"{len(keys)} {what}, e.g. {examples(keys)}" for what, keys in kinds.items() if keys]


def examples(keys: list[Key]) -> str:
    """The first few names, for a message."""
    shown = ", ".join("/".join(map(str, key)) for key in sorted(keys)[:EXAMPLES_MAX])
    return shown + (", …" if len(keys) > EXAMPLES_MAX else "")


def judge(published: Iterable[Reading], rows: Iterable[LakeRow], zones: Zones) -> Verdict:
    """Compare the lake with what was published and acknowledged."""
    truth = {reading.key: reading for reading in published}
    verdict = Verdict(published=len(truth))
    seen: Counter[Key] = Counter()
    for row in rows:
        verdict.rows += 1
        seen[row.key] += 1
        reading = truth.get(row.key)
        if reading is None:
            verdict.foreign.append(row.key)
            continue
        if seen[row.key] > 1:
            verdict.duplicates.append(row.key)
        if reading.zone not in row.lane.split("_") or row.region not in zones.endpoints(reading.zone):
            verdict.out_of_zone.append(row.key)
        if (row.cycle, row.values) != (reading.cycle, reading.values):
            verdict.altered.append(row.key)
    verdict.lost = [key for key in truth if key not in seen]
    return verdict
