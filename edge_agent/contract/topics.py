"""Every MQTT topic of Fenceline, built and parsed in one place.

- `fenceline/v1/{device}/up/{lane}/{stream}`: blocks, device to cloud
- `fenceline/v1/{device}/receipts`: what the lake has settled, cloud to device
- `fenceline/v1/{device}/desired`, `…/reported`: retained state documents
- `fenceline/v1/{device}/events`: what an operator should know
- `fenceline/v1/{device}/beat`: heartbeats, empty; nobody reads them, the broker's PUBACK is the point

>>> DeviceTopics("plane-01").up("europe", "turbofan")
'fenceline/v1/plane-01/up/europe/turbofan'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from edge_agent.contract.errors import ContractError

PREFIX = "fenceline/v1"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Kind(StrEnum):
    """What a topic carries."""

    UP = "up"
    RECEIPTS = "receipts"
    DESIRED = "desired"
    REPORTED = "reported"
    EVENTS = "events"
    BEAT = "beat"


# Filters for the cloud side.
ALL_BLOCKS = f"{PREFIX}/+/{Kind.UP}/+/+"
ALL_REPORTED = f"{PREFIX}/+/{Kind.REPORTED}"
ALL_EVENTS = f"{PREFIX}/+/{Kind.EVENTS}"


def check_name(name: str, what: str) -> str:
    """Return `name` if it can be a device, zone, lane part or stream name.

    Raises:
        ContractError: it does not match ``[a-z0-9][a-z0-9-]{0,62}``.
    """
    if not _NAME.fullmatch(name):
        raise ContractError(f"{what} {name!r} must match {_NAME.pattern} (lower case, digits, dashes, at most 63 characters)")
    return name


def check_lane(lane: str) -> str:
    """Return `lane` if it is a zone name, or several joined by ``_`` in rising order."""
    parts = lane.split("_")
    for part in parts:
        check_name(part, "lane")
    if parts != sorted(set(parts)):
        raise ContractError(f"lane {lane!r} must name its zones once each, in rising order")
    return lane


@dataclass(frozen=True)
class DeviceTopics:
    """The topics of one device."""

    device: str

    def __post_init__(self) -> None:
        check_name(self.device, "device")

    def up(self, lane: str, stream: str) -> str:
        return f"{PREFIX}/{self.device}/{Kind.UP}/{check_lane(lane)}/{check_name(stream, 'stream')}"

    @property
    def receipts(self) -> str:
        return f"{PREFIX}/{self.device}/{Kind.RECEIPTS}"

    @property
    def desired(self) -> str:
        return f"{PREFIX}/{self.device}/{Kind.DESIRED}"

    @property
    def reported(self) -> str:
        return f"{PREFIX}/{self.device}/{Kind.REPORTED}"

    @property
    def events(self) -> str:
        return f"{PREFIX}/{self.device}/{Kind.EVENTS}"

    @property
    def beat(self) -> str:
        return f"{PREFIX}/{self.device}/{Kind.BEAT}"


@dataclass(frozen=True)
class Topic:
    """A parsed topic; `lane` and `stream` are empty unless `kind` is UP."""

    device: str
    kind: Kind
    lane: str = ""
    stream: str = ""


def parse(topic: str) -> Topic:
    """Parse one of our topics.

    Raises:
        ContractError: it is not a Fenceline v1 topic.
    """
    parts = topic.split("/")
    if "/".join(parts[:2]) != PREFIX or len(parts) not in (4, 6):
        raise ContractError(f"topic {topic!r} is not {PREFIX}/DEVICE/…")
    device = check_name(parts[2], "device")
    try:
        kind = Kind(parts[3])
    except ValueError:
        raise ContractError(f"topic {topic!r}: {parts[3]!r} is none of {', '.join(Kind)}") from None
    if (kind is Kind.UP) != (len(parts) == 6):
        raise ContractError(f"topic {topic!r}: only {Kind.UP} topics have a lane and a stream, and they need both")
    if kind is not Kind.UP:
        return Topic(device, kind)
    return Topic(device, kind, check_lane(parts[4]), check_name(parts[5], "stream"))
