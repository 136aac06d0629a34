"""Zones: where a record was captured, and which endpoints it may therefore reach.

- `zones.geojson` (RFC 7946) is the policy: each feature names a `zone` and its `endpoints` in order of preference.
- A position lies in every zone that its accuracy circle touches. Several zones make one lane, `a_b`, and only the
  endpoints that *all* of them allow may take it. A circle that also leaves every zone belongs to no zone: `nowhere`.
- Readings are stamped by event time against the track of fixes, so that what was queued while the agent was
  down is stamped with the place where it was captured, not where it was read.
- Without a fix, or with one older than `max_age_s`, the lane is `home` if the operator named one, else `nowhere`.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import Point, box, shape
from shapely.geometry.base import BaseGeometry

from edge_agent.contract.block import NOWHERE, FixQuality
from edge_agent.contract.columns import Ints, Strings
from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.contract.topics import check_lane, check_name

ZONES_MAX = 1_000
FIXES_MAX = 4_096
ACCURACY_M_MAX = 5_000_000.0
_METRES_PER_DEGREE = 111_195.0  # of latitude, on a sphere of 6,371 km
_POINT_M = 0.01  # a circle this small is its own centre
_CIRCLE = Point(0, 0).buffer(1.0 / math.cos(math.pi / 64), quad_segs=16)  # 64 corners, drawn around the unit circle


@dataclass(frozen=True)
class Zone:
    """One zone: its name, the endpoints allowed there in order of preference, and its area in degrees."""

    name: str
    endpoints: tuple[str, ...]
    area: BaseGeometry


@dataclass(frozen=True)
class Zones:
    """The zone policy; `digest` is the SHA-256 of the document it was read from."""

    zones: tuple[Zone, ...]
    digest: str

    def endpoints(self, lane: str) -> tuple[str, ...]:
        """The endpoints that every zone of `lane` allows, in the first zone's order of preference."""
        if lane == NOWHERE:
            return ()
        known = {z.name: z.endpoints for z in self.zones}
        allowed = [known.get(name, ()) for name in check_lane(lane).split("_")]
        return tuple(e for e in allowed[0] if all(e in others for others in allowed[1:]))

    def locate(self, lat: float, lon: float, accuracy_m: float = 0.0) -> str:
        """The lane of a position, given in degrees (WGS 84) with the radius of its accuracy circle.

        Raises:
            ContractError: the position is not on Earth, or the accuracy not between 0 and ACCURACY_M_MAX.
        """
        if not (-90 <= lat <= 90 and -180 <= lon <= 180 and 0 <= accuracy_m <= ACCURACY_M_MAX):
            raise ContractError(f"position lat {lat}, lon {lon}, accuracy {accuracy_m} m is out of bounds")
        circles = _circles(lat, lon, accuracy_m)
        touched = [z for z in self.zones if any(z.area.intersects(c) for c in circles)]
        if not touched or not _covered(circles, touched):
            return NOWHERE
        return "_".join(sorted(z.name for z in touched))


def _circles(lat: float, lon: float, accuracy_m: float) -> list[BaseGeometry]:
    """The accuracy circle in degrees, cut at the antimeridian, a whole cap where it holds a pole."""
    if accuracy_m <= _POINT_M:
        twin = [Point(-lon, lat)] if abs(lon) == 180.0 else []
        return [Point(lon, lat), *twin]
    high = accuracy_m / _METRES_PER_DEGREE
    if abs(lat) + high >= 90.0:
        return [box(-180, lat - high, 180, 90) if lat > 0 else box(-180, -90, 180, lat + high)]
    # The widest parallel inside the circle is the one nearer to the pole.
    wide = min(180.0, high / math.cos(math.radians(abs(lat) + high)))
    circle = affinity.affine_transform(_CIRCLE, [wide, 0, 0, high, lon, lat])
    world = box(-180, -90, 180, 90)
    turns = [affinity.translate(circle, turn) for turn in (-360.0, 0.0, 360.0)]
    return [part for part in (world.intersection(t) for t in turns) if not part.is_empty]


def _covered(circles: list[BaseGeometry], zones: list[Zone]) -> bool:
    """Whether nothing of the circles lies outside the zones; slivers of rounding do not count."""
    union = shapely.union_all([z.area for z in zones])
    return all(c.difference(union).area <= 1e-9 + 1e-6 * c.area for c in circles)


def parse_zones(document: bytes, origin: str = "zones.geojson") -> Zones:
    """Read a zone policy.

    Raises:
        ContractError: it is not one; the message says which feature and ring, and what to do.
    """
    try:
        tree = msgspec.json.decode(document)
    except UNREADABLE as e:
        raise ContractError(f"{origin}: not JSON: {e}") from e
    features = tree.get("features") if isinstance(tree, dict) and tree.get("type") == "FeatureCollection" else None
    if not isinstance(features, list) or not 1 <= len(features) <= ZONES_MAX:
        raise ContractError(f"{origin}: want a GeoJSON FeatureCollection of 1 to {ZONES_MAX} features")
    zones = tuple(_zone(f, f"{origin}: feature {i}") for i, f in enumerate(features))
    names = [z.name for z in zones]
    repeated = sorted({n for n in names if names.count(n) > 1})
    if repeated:
        raise ContractError(f"{origin}: zones {repeated} appear twice; use one MultiPolygon feature for a zone")
    return Zones(zones, hashlib.sha256(document).hexdigest())


def _zone(feature: Any, where: str) -> Zone:
    properties = feature.get("properties") if isinstance(feature, dict) else None
    geometry = feature.get("geometry") if isinstance(feature, dict) else None
    if not isinstance(properties, dict) or not isinstance(geometry, dict):
        raise ContractError(f"{where}: want a Feature with properties and a geometry")
    name = check_name(str(properties.get("zone", "")), f"{where}: zone")
    where = f"{where} (zone {name!r})"
    endpoints = properties.get("endpoints")
    if name == NOWHERE:
        raise ContractError(f"{where}: the name is kept for readings without a zone")
    if not isinstance(endpoints, list) or len(set(map(str, endpoints))) != len(endpoints):
        raise ContractError(f"{where}: endpoints must be a list of distinct names (it may be empty)")
    for endpoint in endpoints:
        check_name(str(endpoint), f"{where}: endpoint")
    kind, polygons = geometry.get("type"), geometry.get("coordinates")
    if kind == "Polygon":
        polygons = [polygons]
    if kind not in ("Polygon", "MultiPolygon") or not isinstance(polygons, list) or not polygons:
        raise ContractError(f"{where}: geometry must be a Polygon or MultiPolygon, is {kind!r}")
    for p, polygon in enumerate(polygons):
        if not isinstance(polygon, list) or not polygon:
            raise ContractError(f"{where}: polygon {p} has no rings")
        for r, ring in enumerate(polygon):
            _check_ring(ring, f"{where}: ring {r} of polygon {p}")
    area = shape(geometry)
    if not area.is_valid:
        raise ContractError(f"{where}: {shapely.is_valid_reason(area)}; rings may not cross themselves or each other")
    shapely.prepare(area)
    return Zone(name, tuple(endpoints), area)


def _check_ring(ring: Any, where: str) -> None:
    if not isinstance(ring, list) or len(ring) < 4:
        raise ContractError(f"{where} needs at least 4 positions")
    for position in ring:
        numbers = isinstance(position, list) and len(position) >= 2 and all(isinstance(x, int | float) for x in position)
        if not numbers or not (-180 <= position[0] <= 180 and -90 <= position[1] <= 90):
            raise ContractError(f"{where}: {position!r} is not [longitude, latitude] in degrees; cut zones at the antimeridian")
    if ring[0] != ring[-1]:
        raise ContractError(f"{where} is open: it starts at {ring[0]} and ends at {ring[-1]}; repeat the first position at the end")


@dataclass(frozen=True)
class Fix:
    """A position at a time (microseconds since 1970 UTC), already turned into its lane."""

    time_us: int
    lane: str


@dataclass
class Track:
    """The last fixes of a device, by time, and the stamp for its readings.

    With `fixed_lane` the device does not move and every reading gets that lane.
    """

    max_age_s: float
    home: str | None = None
    fixed_lane: str | None = None
    fixes: list[Fix] = field(default_factory=list)

    def add(self, fix: Fix) -> None:
        """Take a fix, in any order; the oldest beyond FIXES_MAX are forgotten. One of the same time is replaced."""
        place = bisect.bisect_left(self.fixes, fix.time_us, key=lambda f: f.time_us)
        if place < len(self.fixes) and self.fixes[place].time_us == fix.time_us:
            self.fixes[place] = fix
        else:
            self.fixes.insert(place, fix)
        del self.fixes[:-FIXES_MAX]

    def stamp(self, event_us: Ints) -> Strings:
        """The lane of each reading."""
        rows = len(event_us)
        if self.fixed_lane is not None:
            return Strings(np.zeros(rows, np.int32), (self.fixed_lane,))
        unknown = self.home or NOWHERE
        if not self.fixes:
            return Strings(np.zeros(rows, np.int32), (unknown,))
        times = np.array([f.time_us for f in self.fixes], np.int64)
        last = np.searchsorted(times, event_us, side="right") - 1
        fresh = (last >= 0) & (event_us - times[last] <= self.max_age_s * 1e6)
        lanes = [unknown, *dict.fromkeys(f.lane for f in self.fixes if f.lane != unknown)]
        lane_of_fix = np.array([lanes.index(f.lane) for f in self.fixes], np.int32)
        return Strings(np.where(fresh, lane_of_fix[last], 0).astype(np.int32), tuple(lanes))

    def quality(self, lane: str) -> FixQuality:
        """How well the readings of `lane` were placed."""
        if self.fixed_lane is not None:
            return FixQuality.STATIC
        if lane == NOWHERE or (lane == self.home and not any(f.lane == lane for f in self.fixes)):
            return FixQuality.NONE
        return FixQuality.UNCERTAIN if "_" in lane else FixQuality.FIX

    def lane_now(self) -> str:
        """The lane of the newest fix: for what has no event time of its own, such as a rejected payload."""
        if self.fixed_lane is not None:
            return self.fixed_lane
        return self.fixes[-1].lane if self.fixes else self.home or NOWHERE
