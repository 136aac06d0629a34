"""Flight tracks: where an aircraft is at a given time.

An aircraft flies its tour of airports again and again: along the great circle at a steady speed, then it stands for
a while. With a reading per hour, some are taken on the ground and the others wherever the aircraft happens to be.

>>> track = Track((ZURICH, NEW_YORK))
>>> track.position(0.0) == (ZURICH.lat, ZURICH.lon)
True
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

EARTH_M = 6_371_000.0
SPEED_M_S = 235.0
STAND_S = 3 * 3_600.0


@dataclass(frozen=True)
class Place:
    """A point on Earth, in degrees (WGS 84)."""

    lat: float
    lon: float


ZURICH = Place(47.46, 8.55)
GENEVA = Place(46.24, 6.11)
FRANKFURT = Place(50.03, 8.56)
MADRID = Place(40.49, -3.57)
NEW_YORK = Place(40.64, -73.78)
WASHINGTON = Place(38.95, -77.46)
CHICAGO = Place(41.98, -87.90)
TORONTO = Place(43.68, -79.63)
MONTREAL = Place(45.47, -73.74)

TOURS: tuple[tuple[Place, ...], ...] = (
    (ZURICH, NEW_YORK, CHICAGO, TORONTO, FRANKFURT),
    (MADRID, WASHINGTON, MONTREAL, ZURICH),
    (GENEVA, MONTREAL, CHICAGO, NEW_YORK, MADRID),
    (CHICAGO, TORONTO, ZURICH, FRANKFURT, NEW_YORK),
)


@dataclass(frozen=True)
class Track:
    """A tour, flown for ever from its first place at time 0."""

    tour: tuple[Place, ...]
    speed_m_s: float = SPEED_M_S
    stand_s: float = STAND_S

    @cached_property
    def _legs(self) -> list[tuple[Place, Place, float, float]]:
        """From, to, angle (radians) and flight time (s) of each leg; the last one leads home."""
        legs = []
        for start, end in zip(self.tour, (*self.tour[1:], self.tour[0]), strict=True):
            angle = _angle(start, end)
            legs.append((start, end, angle, angle * EARTH_M / self.speed_m_s))
        return legs

    def position(self, seconds: float) -> tuple[float, float]:
        """Latitude and longitude, in degrees, `seconds` after the start of the first tour."""
        left = seconds % sum(self.stand_s + flight_s for *_, flight_s in self._legs)
        for start, end, angle, flight_s in self._legs:
            if left <= self.stand_s:
                return start.lat, start.lon
            left -= self.stand_s
            if left < flight_s:
                return _between(start, end, angle, left / flight_s)
            left -= flight_s
        return self.tour[0].lat, self.tour[0].lon


def _vector(place: Place) -> tuple[float, float, float]:
    lat, lon = math.radians(place.lat), math.radians(place.lon)
    return math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)


def _angle(start: Place, end: Place) -> float:
    return math.acos(max(-1.0, min(1.0, sum(a * b for a, b in zip(_vector(start), _vector(end), strict=True)))))


def _between(start: Place, end: Place, angle: float, part: float) -> tuple[float, float]:
    """The point at `part` (0 to 1) of the great circle."""
    a, b = math.sin((1 - part) * angle) / math.sin(angle), math.sin(part * angle) / math.sin(angle)
    x, y, z = (a * s + b * e for s, e in zip(_vector(start), _vector(end), strict=True))
    return round(math.degrees(math.asin(max(-1.0, min(1.0, z)))), 5), round(math.degrees(math.atan2(y, x)), 5)
