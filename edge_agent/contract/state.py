"""Desired and reported state: two retained, versioned JSON documents per device.

The cloud raises `version` with every desired document; a device refuses one that is lower than the last it saw.
The device answers with what it really runs.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TypeVar

import msgspec

from edge_agent.contract.errors import UNREADABLE, ContractError, Reason

T = TypeVar("T")


class BundleRef(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle by name: TUF target path, model name and version in the registry, SHA-256 of the file."""

    target: str
    model: str
    model_version: str
    sha256: str


class ZonesRef(msgspec.Struct, frozen=True, kw_only=True):
    """A zone policy by name: TUF target path, the version that the release keys signed with it, SHA-256 of the document."""

    target: str
    version: int
    sha256: str


class Desired(msgspec.Struct, frozen=True, kw_only=True):
    """What the cloud wants a device to run; `bundle` None means: no model. `zones` None means: no other policy than it has."""

    version: int
    bundle: BundleRef | None = None
    zones: ZonesRef | None = None


class Phase(StrEnum):
    """Where a device is with the desired bundle."""

    IDLE = "idle"  # no bundle wanted, none active
    FETCHING = "fetching"
    PROBATION = "probation"  # active, first windows under watch
    ACTIVE = "active"
    REJECTED = "rejected"  # refused before activation; `active` is unchanged
    ROLLED_BACK = "rolled_back"  # was active, failed; `active` is the previous one
    RETRYING = "retrying"  # the release server does not answer


class Reported(msgspec.Struct, frozen=True, kw_only=True):
    """What a device runs. `desired_version` is the document it answers to, `at_us` wall time, `policy` the digest of its zones."""

    device: str
    agent_version: str
    desired_version: int
    phase: Phase
    active: BundleRef | None = None
    reason: Reason | None = None
    detail: str = ""
    at_us: int = 0
    epoch: str = ""
    zone: str = ""
    blocks_waiting: int = 0
    readings_stored: int = 0
    policy: str = ""


def encode_state(document: Desired | Reported) -> bytes:
    return msgspec.json.encode(document)


def decode_desired(data: bytes) -> Desired:
    """Parse a desired document, or raise ContractError."""
    return _decode(data, Desired)


def decode_reported(data: bytes) -> Reported:
    """Parse a reported document, or raise ContractError."""
    return _decode(data, Reported)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except UNREADABLE as e:
        raise ContractError(f"{kind.__name__.lower()} state: {e}") from e
