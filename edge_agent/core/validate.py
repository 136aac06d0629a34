"""Readings against the ranges of their contract.

- `minimum` and `maximum` are inclusive; those of a timestamp are epoch seconds.
- NaN means missing and is in range; whether a field may be missing is the decoder's business.
- A reading with several values out of range is refused for the first of them, in the contract's order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.errors import ContractError, Reason
from edge_agent.contract.stream import Field, FieldType, StreamContract
from edge_agent.core.rejects import Reject

US_PER_S = 1_000_000

Mask = npt.NDArray[np.bool_]


def validate(contract: StreamContract, table: Table) -> tuple[Mask, list[Reject]]:
    """Which rows are in range (rows,), and why the others are not.

    Raises:
        ContractError: the table lacks a field of the contract, or text stands where a number belongs.
    """
    ok = np.ones(len(next(iter(table.values()), ())), np.bool_)
    rejects: dict[int, Reject] = {}
    for field in contract.fields:
        if field.type is FieldType.STRING or (np.isneginf(field.minimum) and np.isposinf(field.maximum)):
            continue
        values = _numbers(field, table)
        low, high = np.fmin.reduce(values, initial=np.inf), np.fmax.reduce(values, initial=-np.inf)
        if low >= field.minimum and high <= field.maximum:  # the usual case
            continue
        for row in np.flatnonzero((values < field.minimum) | (values > field.maximum)).tolist():
            ok[row] = False
            rejects.setdefault(row, Reject(row, Reason.OUT_OF_RANGE, _detail(field, float(values[row])), field.name))
    return ok, [rejects[row] for row in sorted(rejects)]


def _numbers(field: Field, table: Table) -> npt.NDArray[np.float64]:
    column = table.get(field.name)
    if column is None or isinstance(column, Strings):
        raise ContractError(f"table has no column of numbers for field {field.name!r}")
    values = column.astype(np.float64, copy=False)
    return values / US_PER_S if field.type is FieldType.TIMESTAMP else values


def _detail(field: Field, value: float) -> str:
    unit = f" {field.unit}" if field.unit else ""
    return f"field {field.name!r} is {value:.17g}{unit}; {field.minimum:g} to {field.maximum:g} allowed"
