"""The zone policy: which zones there are, which lane a circle on Earth has, and which endpoints a lane may reach.

- `zones.geojson` (RFC 7946) is the policy: each feature names a `zone` and its `endpoints` in order of preference.
- A position lies in every zone that its accuracy circle touches. Several zones make one lane, `a_b`, and only the
  endpoints that *all* of them allow may take it. A circle that also leaves every zone belongs to no zone: `nowhere`.
- A larger circle never has a lane that allows more.
- A circle that touches so many zones that their names fill more than LANE_CHARACTERS_MAX belongs to none, too: a lane is a folder's name.
- A gap between zones that is narrower than 0.1 m, where borders were drawn twice, is no gap.

What follows from many positions over time is in `core.track`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import shapely
from shapely import affinity
from shapely.geometry import Point, box, shape
from shapely.geometry.base import BaseGeometry

from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import UNREADABLE, ContractError
from edge_agent.contract.topics import check_lane, check_name

ZONES_MAX = 1_000
ACCURACY_M_MAX = 5_000_000.0
LANE_CHARACTERS_MAX = 255
_METRES_PER_DEGREE = 110_574.0  # of latitude at the equator, where it is shortest: no circle is drawn too small
_POINT_M = 0.01  # a circle this small is its own centre
_GAP_DEGREES = 1e-6  # one in the sixth decimal, with which borders are drawn
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
        allowed = [self._endpoints.get(name, ()) for name in check_lane(lane).split("_")]
        return tuple(e for e in allowed[0] if all(e in others for others in allowed[1:]))

    def without_endpoints(self) -> Zones:
        """The same zones, of which none allows any endpoint: everything waits."""
        return Zones(tuple(Zone(z.name, (), z.area) for z in self.zones), self.digest)

    def same_areas(self, other: Zones) -> bool:
        """Whether every position has the same lane under both policies."""
        mine, others = ({z.name: z.area for z in policy.zones} for policy in (self, other))
        return mine.keys() == others.keys() and all(area.equals(others[name]) for name, area in mine.items())

    def locate(self, lat: float, lon: float, accuracy_m: float = 0.0) -> str:
        """The lane of a position, given in degrees (WGS 84) with the radius of its accuracy circle.

        Raises:
            ContractError: the position is not on Earth, or the accuracy not between 0 and ACCURACY_M_MAX.
        """
        if not (-90 <= lat <= 90 and -180 <= lon <= 180 and 0 <= accuracy_m <= ACCURACY_M_MAX):
            raise ContractError(f"position lat {lat}, lon {lon}, accuracy {accuracy_m} m is out of bounds")
        circles = _circles(lat, lon, accuracy_m)
        touched = [z for z in self.zones if any(z.area.intersects(c) for c in circles)]
        if not touched or not all(self._covers(c) for c in circles):
            return NOWHERE
        return join([z.name for z in touched])

    def _covers(self, circle: BaseGeometry) -> bool:
        """Whether nothing of the circle lies outside all zones; narrow gaps do not count."""
        if self._union.covers(circle):
            return True
        rest, reach = circle.difference(self._union), _GAP_DEGREES / 2
        # What is nowhere wider than two reaches is smaller than its outline times one: this is asked first, as it costs nothing.
        return bool(rest.area <= reach * rest.length) and rest.buffer(-reach).is_empty

    @cached_property
    def _union(self) -> BaseGeometry:
        union = shapely.union_all([z.area for z in self.zones])
        shapely.prepare(union)
        return union

    @cached_property
    def _endpoints(self) -> dict[str, tuple[str, ...]]:
        return {z.name: z.endpoints for z in self.zones}


def join(lanes: Iterable[str]) -> str:
    """The lane of what may lie in any of `lanes`: all their zones; `nowhere` if one of them is, or if they are too many to name."""
    names = {name for lane in lanes for name in lane.split("_")}
    lane = "_".join(sorted(names))
    return NOWHERE if NOWHERE in names or len(lane) > LANE_CHARACTERS_MAX else lane


def _circles(lat: float, lon: float, accuracy_m: float) -> list[BaseGeometry]:
    """The accuracy circle in degrees, cut at the antimeridian; where it holds a pole, or almost, the whole band around the Earth."""
    high = max(accuracy_m, _POINT_M) / _METRES_PER_DEGREE
    # The widest parallel inside the circle is the one nearer to the pole.
    polar = abs(lat) + high >= 90.0
    wide = math.inf if polar else high / math.cos(math.radians(abs(lat) + high))
    if wide >= 180.0:
        return [box(-180, max(-90.0, lat - high), 180, min(90.0, lat + high))]
    if accuracy_m <= _POINT_M:
        twin = [Point(-lon, lat)] if abs(lon) == 180.0 else []
        return [Point(lon, lat), *twin]
    circle = affinity.affine_transform(_CIRCLE, [wide, 0, 0, high, lon, lat])
    world = box(-180, -90, 180, 90)
    turns = [affinity.translate(circle, turn) for turn in (-360.0, 0.0, 360.0)]
    return [part for part in (world.intersection(t) for t in turns) if not part.is_empty]


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
        if not isinstance(endpoint, str):
            raise ContractError(f"{where}: endpoint {endpoint!r} is no name")
        check_name(endpoint, f"{where}: endpoint")
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
    flat = [[[p[:2] for p in ring] for ring in polygon] for polygon in polygons]  # without altitudes
    area = shape({"type": kind, "coordinates": flat[0] if kind == "Polygon" else flat})
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
