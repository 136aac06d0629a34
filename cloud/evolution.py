"""How a stream's contract may change while its rows stay in one table.

- A change is additive if every reading of the older version is one of the newer version too, with the new fields missing. Then all
  rows of the table are rows of the newest contract, whoever reads them.
- Additive: a new optional number field; a wider range; a required number that becomes optional. What only says how a reading comes or
  reads (topic, encoding, compression, description) does not change rows.
- All else breaks: a field removed or renamed, another type or unit, a narrower range, an optional field that becomes required, a new field
  that older rows would have to hold, a text that is hashed or dropped from now on, another key, entity or event time. It needs a stream of
  another name.
- The contract that made a table is written in it. A block whose contract breaks with that is refused; other blocks go on.

    broken(contract_1_0_0, contract_2_0_0)      # ["field 'pressure': unit 'bar' became 'kPa'"]
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from itertools import pairwise

import msgspec

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.stream import Field, FieldType, StreamContract


class StoredField(msgspec.Struct, frozen=True):
    """What a table remembers of a field. A range without an end is None there: JSON has no infinity."""

    name: str
    type: FieldType
    required: bool
    minimum: float | None
    maximum: float | None
    unit: str
    pii: str = ""


class StoredContract(msgspec.Struct, frozen=True):
    """What a table remembers of the contract that made it."""

    stream: str
    version: str
    event_time: str
    entity: str
    key: tuple[str, ...]
    fields: tuple[StoredField, ...]


def stored(contract: StreamContract) -> StoredContract:
    """What of a contract its rows depend on."""
    return StoredContract(
        contract.stream, contract.version, contract.event_time, contract.entity, contract.key, tuple(map(_field, contract.fields))
    )


def _field(field: Field) -> StoredField:
    pii = "" if field.pii is None else str(field.pii.kind)
    return StoredField(field.name, field.type, field.required, _finite(field.minimum), _finite(field.maximum), field.unit, pii)


def _finite(limit: float) -> float | None:
    return limit if abs(limit) != float("inf") else None


def broken(older: StoredContract, newer: StoredContract) -> list[str]:
    """What of the change from one version to a later one breaks with older rows; empty if it is additive."""
    found = [
        f"{role} {getattr(older, name)!r} became {getattr(newer, name)!r}"
        for name, role in (("key", "primary key"), ("event_time", "event time"), ("entity", "entity"))
        if getattr(older, name) != getattr(newer, name)
    ]
    before, after = ({f.name: f for f in contract.fields} for contract in (older, newer))
    found += [f"field {name!r} is gone (a new name is another field)" for name in before if name not in after]
    for name, field in after.items():
        if name in before:
            found += [f"field {name!r}: {change}" for change in _broken_field(before[name], field)]
        elif field.required or field.type is not FieldType.NUMBER:
            kind = "required " if field.required else ""
            found.append(f"new field {name!r} is a {kind}{field.type}: older rows have none, so it must be a number with required: false")
    return found


def _broken_field(before: StoredField, after: StoredField) -> list[str]:
    found = []
    if before.type is not after.type:
        found.append(f"type {before.type} became {after.type}")
    if before.unit != after.unit:
        found.append(f"unit {before.unit!r} became {after.unit!r}")
    if after.type is FieldType.STRING and before.pii != after.pii:
        found.append(f"pii {before.pii or 'none'!r} became {after.pii or 'none'!r}: older rows hold other texts for the same")
    if after.required and not before.required:
        found.append("optional became required")
    if after.minimum is not None and (before.minimum is None or after.minimum > before.minimum):
        found.append(f"minimum {_limit(before.minimum)} became {_limit(after.minimum)}, a narrower range")
    if after.maximum is not None and (before.maximum is None or after.maximum < before.maximum):
        found.append(f"maximum {_limit(before.maximum)} became {_limit(after.maximum)}, a narrower range")
    return found


def _limit(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


def check_versions(contracts: Iterable[StreamContract]) -> None:
    """Refuse versions of one stream that cannot share a table.

    Raises:
        ConfigError: a version is there twice, or breaks with the one before; the message is the difference.
    """
    streams: defaultdict[str, list[StreamContract]] = defaultdict(list)
    for contract in contracts:
        streams[contract.stream].append(contract)
    for stream, versions in streams.items():
        versions.sort(key=lambda c: order(c.version))
        for older, newer in pairwise(versions):
            if older.version == newer.version:
                raise ConfigError(f"stream {stream!r} has two contracts of version {older.version!r}; every change needs a new version")
            if problems := broken(stored(older), stored(newer)):
                raise ConfigError(
                    f"contract {stream} {newer.version} breaks with {older.version}: {'; '.join(problems)}. Rows of both cannot share "
                    "a table: give the changed stream another name, or make the change additive"
                )


def disagreement(table: StoredContract, contract: StreamContract) -> str | None:
    """Why rows of `contract` may not lie in a table that another version of it made; None if they may."""
    found = stored(contract)
    older, newer = sorted((table, found), key=lambda c: order(c.version))
    if found == table or not (problems := broken(older, newer)):
        return None
    return (
        f"contract {found.stream} {found.version} does not fit the table, which version {table.version} made "
        f"({older.version} to {newer.version}): {'; '.join(problems)}"
    )


def order(version: str) -> tuple[tuple[int, int | str], ...]:
    """A key that sorts versions by their numbers: 1.10.0 comes after 1.9.0, and a release after its candidates.

    >>> sorted(["1.10.0", "2.0.0-rc1", "2.0.0", "1.9.0"], key=order)
    ['1.9.0', '1.10.0', '2.0.0-rc1', '2.0.0']
    """
    number, _, candidate = version.partition("-")
    parts = [(1, int(p)) if p.isdecimal() else (0, p) for p in re.split(r"[.+_]", number)]
    return (*parts, (0, candidate) if candidate else (1, 0))
