"""What a stream promises to its readers: the service levels of an ODCS document. The cloud watches them (`cloud.watch`).

| in `slaProperties` | promise |
| --- | --- |
| `freshness` | the newest reading of each device in the lake is not older than this |
| `latency` | a reading is in the lake this long after its event time at the latest |
| `frequency` | each entity has a reading at least this often |
| `completeness`, in `percent` | of what devices captured, at least this share is in the lake |

Times have a `unit`: ms, s, min, h, d, or these words written out. Other properties (retention, support, …) are for people and stay unread.

Of `quality`, a property may have the metrics `nullValues` and `missingValues` (the same here), `mustBe: 0`, `mustBeLessThan` or
`mustBeLessOrEqualTo`, in rows or `unit: percent`. Other metrics are refused, so that no rule stands there unchecked; `type: text`, `sql`
and `custom` are for others and stay unread.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from edge_agent.contract.errors import ContractError
from edge_agent.contract.odcs_tree import items, number

_SECONDS = {
    **dict.fromkeys(("ms", "millisecond", "milliseconds"), 1e-3),
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3_600.0),
    **dict.fromkeys(("d", "day", "days"), 86_400.0),
}
_TIMES = ("freshness", "latency", "frequency")
_NULLS = ("nullValues", "missingValues")
_LIMITS = ("mustBe", "mustBeLessThan", "mustBeLessOrEqualTo")


@dataclass(frozen=True)
class NullLimit:
    """At most this many (or with `percent` this share of the) values of a field may be missing; `below`: less than that."""

    field: str
    limit: float
    percent: bool
    below: bool

    def broken(self, missing: int, rows: int) -> bool:
        """Whether so many missing values are too many."""
        found = 100 * missing / rows if self.percent and rows else float(missing)
        return found >= self.limit if self.below else found > self.limit

    def __str__(self) -> str:
        return f"{'less than' if self.below else 'at most'} {self.limit:g} {'percent' if self.percent else 'rows'}"


@dataclass(frozen=True)
class ServiceLevels:
    """The promises of one stream; None: not promised. `completeness` is a share, 0 to 1."""

    freshness_s: float | None = None
    latency_s: float | None = None
    frequency_s: float | None = None
    completeness: float | None = None
    nulls: tuple[NullLimit, ...] = ()


NO_LEVELS = ServiceLevels()


def parse_levels(document: dict[str, Any], properties: list[Any]) -> ServiceLevels:
    """The service levels of an ODCS document and its one schema's properties.

    Raises:
        ContractError: a promise that Fenceline watches cannot be read.
    """
    said: dict[str, Any] = {}
    for entry in items(document, "slaProperties"):
        if not isinstance(entry, dict) or "property" not in entry:
            raise ContractError(f"slaProperties: {entry!r} has no property")
        name = str(entry["property"])
        if name not in (*_TIMES, "completeness"):
            continue
        if name in said:
            raise ContractError(f"slaProperties: {name} stands there twice")
        said[name] = entry
    times = {f"{name}_s": _time(said[name]) for name in _TIMES if name in said}
    nulls = tuple(limit for p in properties for limit in _null_limits(p))
    return ServiceLevels(**times, completeness=_share(said["completeness"]) if "completeness" in said else None, nulls=nulls)


def _time(entry: dict[str, Any]) -> float:
    name, unit = entry["property"], str(entry.get("unit", ""))
    value = number(entry, "value", math.nan)
    if unit not in _SECONDS:
        raise ContractError(f"slaProperties: {name} has the unit {unit!r}; one of ms, s, min, h, d is needed")
    if not 0 < value < math.inf:
        raise ContractError(f"slaProperties: {name} {entry.get('value')!r} must be above 0")
    return value * _SECONDS[unit]


def _share(entry: dict[str, Any]) -> float:
    value = number(entry, "value", math.nan)
    if entry.get("unit") != "percent" or not 0 < value <= 100:
        raise ContractError(f"slaProperties: completeness {entry.get('value')!r} must be above 0, at most 100, with unit: percent")
    return value / 100


def _null_limits(field: dict[str, Any]) -> list[NullLimit]:
    limits = []
    for rule in items(field, "quality"):
        if not isinstance(rule, dict) or rule.get("type", "library") != "library":
            continue
        where = f"field {str(field.get('name'))!r}: quality"
        metric = rule.get("metric", rule.get("rule"))
        if metric not in _NULLS:
            raise ContractError(f"{where}: {metric!r} is not checked here; take {' or '.join(_NULLS)}, or type: text for people")
        found = [name for name in _LIMITS if name in rule]
        value = number(rule, found[0], math.nan) if len(found) == 1 else math.nan
        if not 0 <= value < math.inf or (found == ["mustBe"] and value):
            raise ContractError(f"{where}: {metric} needs mustBe: 0, mustBeLessThan or mustBeLessOrEqualTo")
        limits.append(NullLimit(str(field["name"]), value, rule.get("unit") == "percent", found == ["mustBeLessThan"]))
    return limits
