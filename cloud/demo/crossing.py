"""An aircraft that crosses a border while its region is out of reach: what waits on board, and what flows meanwhile.

- A look at the lake at the end of the outage, before the region is back: of each aircraft, readings that only the lost region may hold and
  that are not there (*waiting*), and readings taken after the oldest of those that another region has stored (*flowed*). An aircraft
  with both has crossed.
- At the end of the demonstration every one of the waiting must lie where it belongs: in its own region (*delivered*).
- Zones are those of the true position, which no device knows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from cloud.demo.journey import Key, Reading
from edge_agent.core.zones import Zones


class Crossing(msgspec.Struct, kw_only=True):
    """One aircraft's crossing. Counts are of readings by true zone; `lost_region` is the region that was out of reach.

    `waiting` and `flowed` are as at the end of the outage, `delivered` counts the waiting that are in the lake by their own region now.
    """

    device: str
    lost_region: str
    waiting: dict[str, int]
    flowed: dict[str, int]
    delivered: dict[str, int] = {}

    @property
    def complete(self) -> bool:
        """Whether all that waited has reached its own region."""
        return self.delivered == self.waiting

    def sentence(self) -> str:
        """The crossing in words."""
        return (
            f"{self.device} crossed a border while {self.lost_region!r} was down: {_listed(self.waiting)} wait on board for it; "
            f"{_listed(self.flowed)}, taken later, are in the lake"
        )


class Outage:
    """Looks at the aircraft of a fleet during one outage, and again at the end."""

    def __init__(self, lost_region: str, readings: Iterable[Reading], zones: Zones) -> None:
        self._region, self._zones = lost_region, zones
        self._readings: dict[str, list[Reading]] = {}
        for reading in readings:
            self._readings.setdefault(reading.key[0], []).append(reading)
        self._waiting: dict[str, list[Reading]] = {}
        self.crossings: list[Crossing] = []

    def look(self, stored: Mapping[Key, str]) -> list[Crossing]:
        """The crossings at the end of the outage. `stored`: the region that stored each reading of the lake."""
        for device, readings in self._readings.items():
            newest = max((r.key[2] for r in readings if r.key in stored), default=0)
            waiting = [r for r in readings if r.key[2] < newest and r.key not in stored and self._only_here(r)]
            oldest = min((r.key[2] for r in waiting), default=newest)
            flowed = [r for r in readings if r.key[2] > oldest and stored.get(r.key, self._region) != self._region]
            if waiting and flowed:
                self._waiting[device] = waiting
                self.crossings.append(Crossing(device=device, lost_region=self._region, waiting=_by_zone(waiting), flowed=_by_zone(flowed)))
        return self.crossings

    def finish(self, stored: Mapping[Key, str]) -> list[Crossing]:
        """The crossings, with what of the waiting has been delivered to its own region."""
        for crossing in self.crossings:
            crossing.delivered = _by_zone([r for r in self._waiting[crossing.device] if stored.get(r.key) == self._region])
        return self.crossings

    def _only_here(self, reading: Reading) -> bool:
        return self._zones.endpoints(reading.zone) == (self._region,)


def _by_zone(readings: list[Reading]) -> dict[str, int]:
    return dict(sorted(Counter(r.zone for r in readings).items()))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of {zone}" for zone, count in counts.items())
