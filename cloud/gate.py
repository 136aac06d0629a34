"""The gate of a region: which blocks may be stored here.

- The device is not trusted. Its header must say what the topic says; the broker lets a device publish under its own name only.
- The contract must be known, and the columns be the contract's.
- This region must be one that every zone of the block's lane allows by the policy in force here, whatever policy the device sealed it
  under.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cloud.config import Settings
from cloud.rows import Contracts, check_columns
from cloud.settled import Identity
from edge_agent.contract.block import BlockHeader, decode_block
from edge_agent.contract.columns import Table
from edge_agent.contract.errors import ConfigError, ContractError, Reason
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract
from edge_agent.contract.topics import Kind, Topic, parse
from edge_agent.core.zones import Zones, parse_zones

log = logging.getLogger(__name__)

T = TypeVar("T")

INT64 = range(-(2**63), 2**63)
"""What a column of the lake can hold; a header may say more."""


@dataclass(frozen=True)
class Refusal:
    """A block that may not be stored. `device`, `lane` and `stream` are the topic's; `block` is its name, if it came as far as the lake."""

    device: str
    lane: str
    stream: str
    reason: Reason
    detail: str
    block: Identity | None = None


@dataclass(frozen=True)
class Gate:
    """Decides what this region may store."""

    region: str
    contracts: Contracts
    zones: Zones

    def inspect(self, topic: str, payload: bytes) -> tuple[BlockHeader, Table] | Refusal:
        """The block in a message, or why it is refused."""
        try:
            where = parse(topic)
        except ContractError as e:
            return Refusal("", "", "", Reason.UNKNOWN_TOPIC, str(e))
        try:
            header, table = decode_block(payload)
            contract = self.contracts.get(header)
            problem = self._problem(where, header, contract)
            if contract is not None and problem is None:
                check_columns(contract, header, table)
                return header, table
        except ContractError as e:
            problem = Reason.CORRUPT, str(e)
        except Exception as e:  # bytes from outside: whatever they do to the decoder, ingest goes on
            log.exception("block decode failed topic=%s bytes=%d", topic, len(payload))
            problem = Reason.CORRUPT, f"{type(e).__name__}: {e}"
        reason, detail = problem or (Reason.UNKNOWN_STREAM, "no contract")
        return Refusal(where.device, where.lane, where.stream, reason, detail)

    def _problem(self, where: Topic, header: BlockHeader, contract: StreamContract | None) -> tuple[Reason, str] | None:
        told = (header.device, header.lane, header.stream)
        if where.kind is not Kind.UP or told != (where.device, where.lane, where.stream):
            return Reason.WRONG_DEVICE, f"header says {'/'.join(told)}, topic says {where.device}/{where.lane}/{where.stream}"
        numbers = {"sequence": header.sequence, "sealed_us": header.sealed_us, "monotonic_us": header.monotonic_us}
        if huge := {name: number for name, number in numbers.items() if number not in INT64}:
            return Reason.CORRUPT, f"header numbers that do not fit 64 bits: {huge}"
        if contract is None:
            return Reason.UNKNOWN_STREAM, f"no contract for stream {header.stream!r} version {header.contract_version!r}"
        allowed = self.zones.endpoints(header.lane)
        if self.region not in allowed:
            return Reason.WRONG_REGION, f"region {self.region!r} may not hold {header.lane!r}, which allows {', '.join(allowed) or 'none'}"
        return None


def load_contracts(settings: Settings) -> Contracts:
    """The contracts of the project.

    Raises:
        ConfigError: a file cannot be read, or is not a contract.
    """
    return Contracts([_read(path, parse_contract) for path in settings.contracts])


def policy_path(settings: Settings) -> Path:
    """Where the published policy lies; until one is published, the project's file is in force."""
    return settings.state_dir / "policy" / "zones.geojson"


def load_zones(settings: Settings) -> Zones:
    """The zone policy in force: the one that was published last, or the project's.

    Raises:
        ConfigError: the file cannot be read, or is not a policy.
    """
    published = policy_path(settings)
    return _read(published if published.exists() else settings.zones_path, parse_zones)


class PolicyWatch:
    """Notices a published policy."""

    def __init__(self, settings: Settings, known: Zones) -> None:
        self._settings, self._digest = settings, known.digest
        self._seen: tuple[int, int] | None = None

    def changed(self) -> Zones | None:
        """The policy in force, if it is another one than at the last call.

        Raises:
            ConfigError: the published file is not a policy.
        """
        try:
            status = policy_path(self._settings).stat()
        except FileNotFoundError:
            return None
        seen = (status.st_ino, status.st_mtime_ns)
        if seen == self._seen:
            return None
        zones = load_zones(self._settings)
        self._seen, before, self._digest = seen, self._digest, zones.digest
        return None if zones.digest == before else zones


def _read(path: Path, parse_document: Callable[[bytes, str], T]) -> T:
    try:
        return parse_document(path.read_bytes(), str(path))
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}; fenceline.toml names it") from e
    except ContractError as e:
        raise ConfigError(str(e)) from e
