"""Rows against their contract, in the cloud: the device is not trusted to have checked them. Pure.

- Ranges are as on the device: inclusive, NaN means missing and is in range; a required field may not be missing; numbers are finite; times
  lie in 1970 to 2200; texts have at most STRING_CHARACTERS_MAX characters.
- A personal field must look treated (`contract.privacy`): hashed text like a hash, a rounded number on its step, a dropped value absent.
- A block that names other units than its contract has breaks it in every row: nobody can tell which value is meant how.
- A row that breaks several rules is given the first, in the contract's order of fields, units before all.

Clean blocks are the rule: those of one contract are looked at together, one pass for the lowest and highest value of each field; only where
that fails is it asked which rows are to blame, and only their blocks are looked at by themselves.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cloud.stacks import Stack
from edge_agent.contract.columns import Column, Ints, Strings, Table
from edge_agent.contract.errors import Reason
from edge_agent.contract.privacy import PiiKind, is_hashed, off_step
from edge_agent.contract.stream import AGENT_STREAMS, Field, FieldType, StreamContract
from edge_agent.core.decode import EVENT_S_END
from edge_agent.core.topic_levels import STRING_CHARACTERS_MAX

US_PER_S = 1e6
FLOAT_MAX = sys.float_info.max
SAID_CHARACTERS_MAX = 100
"""Of what a block's header says, in the detail of a rule: each of its rows gets that text."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rule:
    """What a row broke: why it is refused, which field, and what is allowed there."""

    reason: Reason
    field: str
    detail: str


@dataclass(frozen=True)
class Violations:
    """Rows of one block that break its contract: `rows[i]`, rising, broke `rules[broken[i]]`."""

    rows: Ints
    broken: Ints
    rules: tuple[Rule, ...]

    def texts(self, name: str) -> Strings:
        """`reason`, `field` or `detail` of each row."""
        return Strings(self.broken.astype(np.int32), tuple(str(getattr(rule, name)) for rule in self.rules))


def violations(contract: StreamContract, stack: Stack) -> dict[int, Violations]:
    """Which of these blocks, all of `contract`, hold rows that break it, by their place in the stack."""
    if contract in AGENT_STREAMS:
        return {}
    found = {place: check(contract, stack.block(place)[1]) for place in _suspects(contract, stack)}
    for place, header in enumerate(stack.headers):
        if header.units and header.units != contract.units:
            detail = f"the block's units are {header.units[:SAID_CHARACTERS_MAX]!r}, those of version {contract.version} {contract.units!r}"
            rule = Rule(Reason.WRONG_UNIT, "", detail)
            found[place] = Violations(np.arange(header.rows), np.zeros(header.rows, np.int64), (rule,))
    return {place: hit for place, hit in found.items() if len(hit.rows)}


def check(contract: StreamContract, table: Table, only: Reason | None = None) -> Violations:
    """The rows of one table that break the contract; `only`: that break it for this reason, whatever else they break."""
    count = len(table[contract.event_time])
    first = np.full(count, -1, np.int64)
    rules: list[Rule] = []
    for field in contract.fields:
        for rule, bad in _broken(field, table[field.name]):
            if only in (None, rule.reason) and bad.any():
                first[bad & (first < 0)] = len(rules)
                rules.append(rule)
    rows = np.flatnonzero(first >= 0)
    return Violations(rows.astype(np.int64), first[rows], tuple(rules))


def broken_fields(contract: StreamContract, table: Table) -> dict[str, str]:
    """What is allowed in each field that any row of a table breaks."""
    return {f.name: rule.detail for f in contract.fields for rule, bad in _broken(f, table[f.name]) if bad.any()}


def allowed(field: Field) -> str:
    """The range of a field in words."""
    unit = f" {field.unit}" if field.unit else ""
    return f"{field.minimum:g} to {field.maximum:g}{unit} allowed"


def _suspects(contract: StreamContract, stack: Stack) -> list[int]:
    """The places of blocks that hold a row to blame."""
    odd = np.zeros(int(stack.counts.sum()), np.bool_)
    for field in contract.fields:
        if not _clean(field, stack.table[field.name]):
            for _, bad in _broken(field, stack.table[field.name]):
                odd |= bad
    return np.unique(np.searchsorted(stack.starts, np.flatnonzero(odd), "right") - 1).tolist()


def _clean(field: Field, column: Column) -> bool:
    """Whether nothing in a field can be wrong; False: look closer."""
    tag = field.pii.kind if field.pii else None
    if isinstance(column, Strings):
        return all(_text_fits(text, tag) for text in column.values)
    if field.pii and (off_step(column.astype(np.float64, copy=False), field.pii.step) if field.pii.step else ~np.isnan(column)).any():
        return False
    low, high = _limits(field)
    if field.required:  # NaN is the lowest and the highest there, and not in range
        return bool(column.min() >= low and column.max() <= high)
    return bool(np.fmin.reduce(column, initial=np.inf) >= low and np.fmax.reduce(column, initial=-np.inf) <= high)


def _limits(field: Field) -> tuple[float, float]:
    """The lowest and highest value of a column; times are in microseconds there."""
    if field.type is FieldType.TIMESTAMP:
        return max(0.0, field.minimum * US_PER_S), min(EVENT_S_END * US_PER_S - 1, field.maximum * US_PER_S)
    return max(-FLOAT_MAX, field.minimum), min(FLOAT_MAX, field.maximum)


def _text_fits(text: str, tag: PiiKind | None) -> bool:
    if tag is PiiKind.HASH:
        return is_hashed(text)
    return not text if tag is PiiKind.DROP else len(text) <= STRING_CHARACTERS_MAX


def _broken(field: Field, column: Column) -> list[tuple[Rule, Mask]]:
    """The rules of one field, each with the rows that break it."""
    tag = field.pii.kind if field.pii else None
    if isinstance(column, Strings):
        odd = np.array([not _text_fits(text, tag) for text in column.values], np.bool_)
        rule = Rule(Reason.NOT_PRIVATE, field.name, f"pii: {tag} is not done") if tag else _too_long(field)
        return [(rule, odd[column.codes] if len(odd) else np.zeros(len(column), np.bool_))]
    low, high = _limits(field)
    values = column.astype(np.float64, copy=False)
    ranges = (Rule(Reason.OUT_OF_RANGE, field.name, allowed(field)), (values < low) | (values > high))
    found = [ranges]
    if field.required:
        found.insert(0, (Rule(Reason.MISSING_FIELD, field.name, "required"), np.isnan(values)))
    if field.pii:
        bad = off_step(values, field.pii.step) if field.pii.step else ~np.isnan(values)
        step = f", step {field.pii.step:g}" if field.pii.step else ""
        found.append((Rule(Reason.NOT_PRIVATE, field.name, f"pii: {tag}{step} is not done"), bad))
    return found


def _too_long(field: Field) -> Rule:
    return Rule(Reason.OVERSIZE, field.name, f"at most {STRING_CHARACTERS_MAX} characters")
