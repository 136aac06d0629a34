"""Rights on a region's broker: a device writes under its own name only, and only in lanes that this region may hold.

- The lanes of a region are its zones and the joins of them: a fix may be uncertain, or doubted, between any of them. A lane with one
  foreign zone in it is not among them. MQTT and NATS have no wildcard for "zones of this region", so the lanes are written out
  one by one: all joins of up to 12 zones, of more zones the joins of few (three of 27), so that they are LANES_MAX at most.
- A publish to another topic is dropped by the broker. On MQTT 3.1.1 it is acknowledged all the same: the device finds out because no
  receipt comes, and the block waits on its disk.
- A device that was removed from the fleet has a certificate still: at Mosquitto it is denied everything by its name.
- Ingest checks every block again (gate.py): rights are the first fence, not the only one.
- They follow from the zone policy and from who was removed: after a change of either print the ACL again (`fenceline broker acl`) and
  reload the broker.

>>> device_writes("plane-01", ["europe"])[0]
'fenceline/v1/plane-01/up/europe/+'
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.topics import ALL_BLOCKS, ALL_EVENTS, ALL_REPORTED, PREFIX, Kind
from edge_agent.core.zones import Zones

LANES_MAX = 4_096
CLOUD = ("ingest-1", "control-1")
"""Certificates of the cloud. One for each process: a client id is one session."""
_MAY_WRITE = (Kind.REPORTED, Kind.EVENTS, Kind.BEAT)
_MAY_READ = (Kind.RECEIPTS, Kind.DESIRED)


def lanes_of(zones: Zones, region: str) -> tuple[str, ...]:
    """The lanes that may be sent to `region`: single zones first, then ever wider joins.

    Raises:
        ConfigError: no zone allows the region.
    """
    own = sorted(z.name for z in zones.zones if region in z.endpoints)
    if not own:
        known = ", ".join(sorted({e for z in zones.zones for e in z.endpoints}))
        raise ConfigError(f"no zone allows the region {region!r}; zones.geojson names {known or 'no region'}")
    lanes: list[str] = []
    for width in range(1, len(own) + 1):
        if len(lanes) + math.comb(len(own), width) > LANES_MAX:
            break
        lanes += map("_".join, itertools.combinations(own, width))
    return tuple(lanes)


def device_writes(device: str, lanes: Iterable[str]) -> list[str]:
    """The filters of what a device may publish; `%u` for `device` makes a Mosquitto pattern."""
    own = f"{PREFIX}/{device}"
    return [*(f"{own}/{Kind.UP}/{lane}/+" for lane in lanes), *(f"{own}/{kind}" for kind in _MAY_WRITE)]


def device_reads(device: str) -> list[str]:
    """The filters of what a device may subscribe to."""
    return [f"{PREFIX}/{device}/{kind}" for kind in _MAY_READ]


def mosquitto_acl(zones: Zones, region: str, cloud: Sequence[str], removed: Iterable[str] = ()) -> str:
    """The ACL file of a region's Mosquitto; `cloud` are the certificate names of ingest and control, `removed` devices have no rights."""
    lines = [
        f"# The rights on the broker of region {region}: `fenceline broker acl --region {region}` printed them",
        f"# from the zone policy {zones.digest[:12]}. %u is the CN of the client's certificate: the device id.",
        *(f"pattern write {f}" for f in device_writes("%u", lanes_of(zones, region))),
        *(f"pattern read {f}" for f in device_reads("%u")),
    ]
    for name in cloud:
        lines += ["", f"user {name}"]
        lines += [f"topic read {f}" for f in (ALL_BLOCKS, ALL_REPORTED, ALL_EVENTS)]
        lines += [f"topic write {PREFIX}/+/{kind}" for kind in (*_MAY_READ, Kind.EVENTS)]
    for name in removed:
        lines += ["", f"user {name}", f"topic deny {PREFIX}/{name}/#"]
    return "\n".join([*lines, ""])
