"""Windows and their features in plain Python, straight from the words of FeatureSpec: one reading, one window, one addition at a time.

`membership` says which readings a window holds, `value` gives a feature of them in Python floats (equal in every bit), `exact` in rational
numbers, rounded once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from fractions import Fraction

from edge_agent.contract.feature_spec import FeatureSpec, WindowKind, quantile_of

HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Reading:
    """`place` in the order seen; `x` may be NaN."""

    place: int
    entity: str
    us: int
    x: float


@dataclass(frozen=True)
class Window:
    """`done` is the place of the reading that the window is done with."""

    done: int
    start_us: int
    entity: str
    readings: list[Reading]


@dataclass
class Membership:
    windows: list[Window] = field(default_factory=list)
    late: list[int] = field(default_factory=list)
    overfull: list[int] = field(default_factory=list)


def membership(spec: FeatureSpec, readings: list[Reading]) -> Membership:
    return trailing(spec, readings) if spec.kind is WindowKind.TRAILING else closing(spec, readings)


def trailing(spec: FeatureSpec, readings: list[Reading]) -> Membership:
    found = Membership()
    for r in readings:
        seen = [s for s in readings[: r.place + 1] if s.entity == r.entity][-spec.window_rows :]
        inside = [s for s in seen if r.us - spec.window_s * 1e6 < s.us <= r.us]
        found.windows.append(Window(r.place, r.us - spec.window_us, r.entity, inside))
    return found


def closing(spec: FeatureSpec, readings: list[Reading]) -> Membership:
    found = Membership()
    newest: dict[str, int] = {}
    hop_rows: defaultdict[tuple[str, int], int] = defaultdict(int)
    held: defaultdict[tuple[str, int], list[Reading]] = defaultdict(list)
    for r in readings:
        watermark = newest[r.entity] - spec.lateness_us if r.entity in newest else None
        hop = r.us // spec.every_us
        mine = range(hop - spec.overlap + 1, hop + 1)
        open_ones = [k for k in mine if watermark is None or k * spec.every_us + spec.window_us > watermark]
        if len(open_ones) < len(mine):
            found.late.append(r.place)
        if open_ones and hop_rows[r.entity, hop] == spec.window_rows // spec.overlap:
            found.overfull.append(r.place)
        elif open_ones:
            hop_rows[r.entity, hop] += 1
            for k in open_ones:
                held[r.entity, k].append(r)
        newest[r.entity] = max(r.us, newest.get(r.entity, r.us))
        watermark = newest[r.entity] - spec.lateness_us
        due = sorted(k for e, k in held if e == r.entity and k * spec.every_us + spec.window_us <= watermark)
        for k in due:
            inside = sorted(held.pop((r.entity, k)), key=lambda s: (s.us, s.place))
            found.windows.append(Window(r.place, k * spec.every_us, r.entity, inside))
    return found


def value(aggregate: str, readings: list[Reading]) -> float:
    """A feature of a window, in floats, sums from the oldest reading on. `last` is the newest reading's."""
    kept = [r for r in readings if not math.isnan(r.x)]
    x = [r.x for r in kept]
    match aggregate:
        case "last":
            return readings[-1].x if readings else math.nan
        case "count":
            return float(len(x))
        case _ if not x:
            return math.nan
        case "mean":
            return added(x) / len(x)
        case "std":
            mean = added(x) / len(x)
            return math.sqrt(added([(v - mean) * (v - mean) for v in x]) / len(x))
        case "min":
            return min(x) + 0.0
        case "max":
            return max(x) + 0.0
        case "rms":
            return math.sqrt(added([v * v for v in x]) / len(x))
        case "delta":
            return x[-1] - x[0] + 0.0
        case "slope":
            hours = [(r.us - readings[-1].us) / HOUR_US for r in kept]
            mean, middle = added(x) / len(x), added(hours) / len(x)
            spread = added([(h - middle) * (h - middle) for h in hours])
            together = added([(v - mean) * (h - middle) for v, h in zip(x, hours, strict=True)])
            return together / spread if spread else 0.0
    q = quantile_of(aggregate)
    assert q is not None
    ordered = sorted(x)
    position = (len(x) - 1.0) * q
    below, share = int(position), position - int(position)
    low, high = ordered[below], ordered[math.ceil(position)]
    return (low + share * (high - low) if share else low) + 0.0


def exact(aggregate: str, readings: list[Reading]) -> float:
    """The same in rational numbers, rounded once (roots: twice)."""
    kept = [r for r in readings if not math.isnan(r.x)]
    if not kept or aggregate in ("last", "count"):
        return value(aggregate, readings)
    x = [Fraction(r.x) for r in kept]
    mean = sum(x, Fraction()) / len(x)
    match aggregate:
        case "mean":
            return float(mean)
        case "std":
            return math.sqrt(sum((v - mean) ** 2 for v in x) / len(x))
        case "min":
            return float(min(x))
        case "max":
            return float(max(x))
        case "rms":
            return math.sqrt(sum(v * v for v in x) / len(x))
        case "delta":
            return float(x[-1] - x[0])
        case "slope":
            hours = [Fraction(r.us - readings[-1].us, HOUR_US) for r in kept]
            middle = sum(hours, Fraction()) / len(hours)
            spread = sum((h - middle) ** 2 for h in hours)
            return float(sum((v - mean) * (h - middle) for v, h in zip(x, hours, strict=True)) / spread) if spread else 0.0
    q = quantile_of(aggregate)
    assert q is not None
    position = (len(x) - 1) * Fraction(q)
    ordered, below = sorted(x), math.floor(position)
    return float(ordered[below] + (position - below) * (ordered[math.ceil(position)] - ordered[below]))


def added(numbers: list[float]) -> float:
    total = 0.0
    for number in numbers:
        total += number
    return total
