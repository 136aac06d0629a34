"""The gate of a region: which blocks may be stored here.

- The device is not trusted. Its header must say what the topic says; the broker lets a device publish under its own name only.
- The contract must be known, and the columns be the contract's. Headers are looked at one by one; the columns of many blocks are decoded at
  once.
- This region must be one that every zone of the block's lane allows by the policy in force here, whatever policy the device sealed it
  under.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import zstandard

from cloud.config import Settings
from cloud.rows import Contracts, check_columns
from cloud.settled import Identity
from cloud.stacks import Block, Stack
from edge_agent.contract.block import RAW_BYTES_MAX, BlockHeader, open_block, unpack
from edge_agent.contract.columns import Table, decode_columns
from edge_agent.contract.errors import ConfigError, ContractError, Reason
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stacked import Layout, decode_stacked, read_layout
from edge_agent.contract.stream import StreamContract
from edge_agent.contract.topics import Kind, Topic, parse
from edge_agent.core.zones import LANE_CHARACTERS_MAX, Zones, parse_zones

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


@dataclass(frozen=True, slots=True)
class Sealed:
    """A block that may be stored here by its topic and header; `packed` are its columns."""

    where: Topic
    header: BlockHeader
    packed: bytes


_Unpacked = tuple[Sealed, bytes, Layout | None]
"""A block, its columns unpacked, and how they lie, if that is of the usual form."""


@dataclass(frozen=True)
class Gate:
    """Decides what this region may store."""

    region: str
    contracts: Contracts
    zones: Zones

    def admit(self, topic: str, payload: bytes) -> Sealed | Refusal:
        """The block in a message, its columns unread, or why it is refused."""
        try:
            where = parse(topic)
        except ContractError as e:
            return Refusal("", "", "", Reason.UNKNOWN_TOPIC, str(e))
        return _attempt(where, partial(self._opened, where, payload))

    def unseal(self, sealed: Iterable[Sealed]) -> tuple[list[Stack], list[Refusal]]:
        """The columns of admitted blocks, stacked, and the blocks whose columns are not what their contract says.

        At most RAW_BYTES_MAX are unpacked beyond what is decoded.
        """
        stacks: list[Stack] = []
        refused: list[Refusal] = []
        alike: defaultdict[tuple[object, ...], list[_Unpacked]] = defaultdict(list)
        waiting = 0
        decompressor = zstandard.ZstdDecompressor()
        for one in sealed:
            header, layout = one.header, None
            raw = _attempt(one.where, partial(unpack, header, one.packed, decompressor))
            if isinstance(raw, Refusal):
                refused.append(raw)
                continue
            with contextlib.suppress(ContractError):  # of another form, or damaged: it is decoded by itself
                layout = read_layout(raw, header.rows)
            key = header.stream, header.lane, header.contract_version, layout.shape if layout else header.identity
            alike[key].append((one, raw, layout))
            waiting += len(raw)
            if waiting > RAW_BYTES_MAX:
                self._decode_all(alike, stacks, refused)
                waiting = 0
        self._decode_all(alike, stacks, refused)
        return stacks, refused

    def inspect(self, topic: str, payload: bytes) -> Block | Refusal:
        """The block in a message, or why it is refused."""
        sealed = self.admit(topic, payload)
        if isinstance(sealed, Refusal):
            return sealed
        stacks, refused = self.unseal([sealed])
        return refused[0] if refused else stacks[0].block(0)

    def _decode_all(self, alike: defaultdict[tuple[object, ...], list[_Unpacked]], stacks: list[Stack], refused: list[Refusal]) -> None:
        for group in alike.values():
            self._decode(group, stacks, refused)
        alike.clear()

    def _decode(self, group: Sequence[_Unpacked], stacks: list[Stack], refused: list[Refusal]) -> None:
        """Decode blocks that are alike; where that fails they are parted until those to blame are found."""
        found = _attempt(group[0][0].where, partial(self._decoded, group))
        if isinstance(found, Stack):
            stacks.append(found)
        elif len(group) == 1:
            refused.append(found)
        else:
            half = len(group) // 2
            self._decode(group[:half], stacks, refused)
            self._decode(group[half:], stacks, refused)

    def _decoded(self, group: Sequence[_Unpacked]) -> Stack:
        stack = Stack([one.header for one, _, _ in group], _columns(group))
        check_columns(self._contract(stack.headers[0]), stack)
        return stack

    def _opened(self, where: Topic, payload: bytes) -> Sealed | Refusal:
        header, packed = open_block(payload)
        problem = self._problem(where, header)
        return Sealed(where, header, packed) if problem is None else _refusal(where, *problem)

    def _contract(self, header: BlockHeader) -> StreamContract:
        contract = self.contracts.get(header)
        if contract is None:
            raise ContractError(f"no contract for stream {header.stream!r} version {header.contract_version!r}")
        return contract

    def _problem(self, where: Topic, header: BlockHeader) -> tuple[Reason, str] | None:
        told = (header.device, header.lane, header.stream)
        if where.kind is not Kind.UP or told != (where.device, where.lane, where.stream):
            return Reason.WRONG_DEVICE, f"header says {'/'.join(told)}, topic says {where.device}/{where.lane}/{where.stream}"
        numbers = {"sequence": header.sequence, "sealed_us": header.sealed_us, "monotonic_us": header.monotonic_us}
        if huge := {name: number for name, number in numbers.items() if number not in INT64}:
            return Reason.CORRUPT, f"header numbers that do not fit 64 bits: {huge}"
        if len(header.lane) > LANE_CHARACTERS_MAX:  # the lake could not make its folder, and ingest would try for ever
            return Reason.UNKNOWN_TOPIC, f"lane of {len(header.lane)} characters; at most {LANE_CHARACTERS_MAX}"
        if self.contracts.get(header) is None:
            return Reason.UNKNOWN_STREAM, f"no contract for stream {header.stream!r} version {header.contract_version!r}"
        allowed = self.zones.endpoints(header.lane)
        if self.region not in allowed:
            return Reason.WRONG_REGION, f"region {self.region!r} may not hold {header.lane!r}, which allows {', '.join(allowed) or 'none'}"
        return None


def _columns(group: Sequence[_Unpacked]) -> Table:
    """The columns of blocks that are alike, one block's rows after the other's."""
    layouts = [layout for _, _, layout in group if layout is not None]
    if len(group) == 1:  # the decoder of single blocks knows every form, and says what is wrong
        one, raw, _ = group[0]
        return decode_columns(raw, one.header.rows)
    return decode_stacked(layouts)


def _attempt(where: Topic, work: Callable[[], T]) -> T | Refusal:
    """What `work` on bytes from outside gives, or the refusal: whatever they do to a decoder, ingest goes on."""
    try:
        return work()
    except ContractError as e:
        return _refusal(where, Reason.CORRUPT, str(e))
    except Exception as e:
        log.exception("block decode failed device=%s lane=%s stream=%s", where.device, where.lane, where.stream)
        return _refusal(where, Reason.CORRUPT, f"{type(e).__name__}: {e}")


def _refusal(where: Topic, reason: Reason, detail: str) -> Refusal:
    return Refusal(where.device, where.lane, where.stream, reason, detail)


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
