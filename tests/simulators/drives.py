"""Random drives across the borders of a zone policy: the true track, and what the device is told of it.

- The true track is known to the oracle only. It starts near a border, in any direction, at a speed below SPEED_M_S_MAX.
- Fixes are honest: the true position lies within the accuracy that they state. Sometimes there are none (GPS loss), and late ones.
- Liars: null island, NaN, positions from the future, and spoofed positions that cannot have been reached. A spoofed position that the
  device *can* have reached is indistinguishable from a true one, so there is none here, and the first fix is always honest: that is the
  limit of what the fence guarantees.
"""

from __future__ import annotations

import bisect
import math
import random
from dataclasses import dataclass, field

from edge_agent.contract.block import NOWHERE
from edge_agent.core.fix import Position
from edge_agent.core.zones import Zones

START_S = 1_700_000_000
SPEED_M_S_MAX = 300.0
STEPS = 40
_METRES_PER_DEGREE = 111_195.0


@dataclass(frozen=True)
class Sample:
    """A reading: its event time, and where it was truly captured."""

    time_us: int
    lat: float
    lon: float


@dataclass
class Drive:
    """What happens, in the order in which it reaches the device."""

    seed: int
    events: list[Sample | Position] = field(default_factory=list)
    spoofed: int = 0
    lost: int = 0

    @property
    def samples(self) -> list[Sample]:
        return [e for e in self.events if isinstance(e, Sample)]


def allowed(zones: Zones, sample: Sample) -> tuple[str, ...]:
    """The regions that may hold what was captured there."""
    lane = zones.locate(sample.lat, sample.lon)
    return () if lane == NOWHERE else zones.endpoints(lane)


def metres(a: tuple[float, float], b: tuple[float, float]) -> float:
    """The distance of two (lat, lon) on a sphere."""
    lat_a, lat_b = math.radians(a[0]), math.radians(b[0])
    square = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin(math.radians(b[1] - a[1]) / 2) ** 2
    return 2 * 6_371_009.0 * math.asin(math.sqrt(min(1.0, square)))


def drive(zones: Zones, seed: int) -> Drive:
    """A random drive."""
    chance = random.Random(seed)
    times, places = _true_track(zones, chance)
    made = Drive(seed)
    events: list[tuple[float, Sample | Position]] = []
    for _ in range(3 * STEPS):
        time_s = chance.uniform(times[0], times[-1])
        events.append((time_s, Sample(round(time_s * 1e6), *_at(times, places, time_s))))
    lost = [_span(chance, times) for _ in range(chance.randrange(3))]
    spoofs = [(*_span(chance, times), _far_away(chance, places[0])) for _ in range(chance.randrange(3))]
    for time_s, place in zip(times, places, strict=True):
        if any(a <= time_s < b for a, b in lost) and time_s > times[0]:
            made.lost += 1
            continue
        arrives_s = time_s + (chance.uniform(0, 200) if time_s > times[0] and chance.random() < 0.05 else 0.0)
        fix = _honest(chance, time_s, place)
        for a, b, liar in spoofs:
            if (
                a <= time_s < b and metres(place, liar) > SPEED_M_S_MAX * (times[-1] - times[0]) + 50_000
            ):  # out of reach for the whole drive
                fix = Position(fix.time_us, liar[0] + chance.uniform(-0.01, 0.01), liar[1], 5.0)
                made.spoofed += 1
        events.append((arrives_s, fix))
        if chance.random() < 0.05:
            events.append((time_s, _nonsense(chance, fix.time_us)))
    events.sort(key=lambda e: (e[0], isinstance(e[1], Sample)))
    made.events = [event for _, event in events]
    return made


def _true_track(zones: Zones, chance: random.Random) -> tuple[list[float], list[tuple[float, float]]]:
    """Times and places; a walk that keeps its heading more or less, begun a little beside a border."""
    ring = chance.choice(zones.zones).area.exterior
    start = ring.interpolate(chance.random(), normalized=True)
    lat, lon = start.y + chance.gauss(0, 0.1), start.x + chance.gauss(0, 0.1)
    heading, top = chance.uniform(0, 2 * math.pi), chance.choice([15.0, 40.0, 100.0, 0.95 * SPEED_M_S_MAX])
    time_s = START_S + chance.uniform(0, 1e6)
    times, places = [], []
    for _ in range(STEPS):
        lat, lon = max(-80.0, min(80.0, lat)), (lon + 180.0) % 360.0 - 180.0
        times.append(round(time_s, 6))
        places.append((lat, lon))
        step_s, speed = chance.choice([1.0, 10.0, 60.0, 120.0]), top * chance.uniform(0.3, 0.95)
        heading += chance.gauss(0, 0.3)
        lat += step_s * speed * math.cos(heading) / _METRES_PER_DEGREE
        lon += step_s * speed * math.sin(heading) / (_METRES_PER_DEGREE * math.cos(math.radians(lat)))
        time_s += step_s
    return times, places


def _at(times: list[float], places: list[tuple[float, float]], time_s: float) -> tuple[float, float]:
    i = max(1, bisect.bisect_left(times, time_s))
    share = (time_s - times[i - 1]) / (times[i] - times[i - 1])
    (lat_a, lon_a), (lat_b, lon_b) = places[i - 1], places[i]
    if abs(lon_b - lon_a) > 180:  # over the antimeridian
        lon_a += math.copysign(360, lon_b)
    return lat_a + share * (lat_b - lat_a), (lon_a + share * (lon_b - lon_a) + 180.0) % 360.0 - 180.0


def _honest(chance: random.Random, time_s: float, place: tuple[float, float]) -> Position:
    accuracy_m = chance.choice([3.0, 15.0, 15.0, 100.0, 3_000.0, 40_000.0])
    error_m, bearing = 0.97 * accuracy_m * math.sqrt(chance.random()), chance.uniform(0, 2 * math.pi)
    lat = place[0] + error_m * math.cos(bearing) / _METRES_PER_DEGREE
    lon = place[1] + error_m * math.sin(bearing) / (_METRES_PER_DEGREE * math.cos(math.radians(place[0])))
    return Position(round(time_s * 1e6), lat, (lon + 180.0) % 360.0 - 180.0, accuracy_m)


def _span(chance: random.Random, times: list[float]) -> tuple[float, float]:
    start = chance.randrange(1, len(times))
    return times[start], times[min(len(times) - 1, start + chance.randrange(1, 15))] + 0.5


def _far_away(chance: random.Random, place: tuple[float, float]) -> tuple[float, float]:
    """Somewhere in Europe or America, the other side if it can be."""
    sides = [(chance.uniform(44, 52), chance.uniform(0, 20)), (chance.uniform(36, 46), chance.uniform(-115, -80))]
    return max(sides, key=lambda side: metres(side, place))


def _nonsense(chance: random.Random, time_us: int) -> Position:
    kinds = [
        Position(time_us, 0.0, 0.0),
        Position(time_us, math.nan, 5.0),
        Position(time_us, 50.0, 9.0, math.nan),
        Position(time_us, 95.0, 9.0),
        Position((START_S + 10**9) * 1_000_000, 50.0, 9.0),
    ]
    return chance.choice(kinds)
