"""How fast sensor messages become checked columns: our batch decoder, and two usual ways, message by message.

All three check the same types and give the same columns (compared bit for bit). One thread.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, create_model

from bench.block_bytes import check_equal
from bench.report import Report, best_of, main
from bench.streams import Stream, engines
from edge_agent.contract.columns import Strings, Table
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import FieldType, StreamContract
from edge_agent.core.decode import Decoder
from edge_agent.core.validate import validate

CONTRACT = Path(__file__).parents[1] / "contracts" / "turbofan.odcs.yaml"
TYPES: dict[FieldType, Any] = {FieldType.STRING: str, FieldType.INTEGER: int, FieldType.NUMBER: float, FieldType.TIMESTAMP: float}
ENGINES = 50
ROUNDS = 5


def measure(arguments: argparse.Namespace) -> Report:
    """Messages a second and microseconds each, for the turbofan stream."""
    contract = parse_contract(CONTRACT.read_text())
    stream = engines(2 if arguments.quick else ENGINES)
    ways: dict[str, Decoder | Checked | Modelled] = {
        "Decoder, one batch": Decoder(contract),
        "json.loads and checks, each": Checked(contract),
        "pydantic, each": Modelled(contract),
    }
    count = len(stream.messages)
    rows: list[list[str | float]] = []
    numbers: dict[str, float] = {}
    for (title, way), key in zip(ways.items(), ("decoder", "json_loads", "pydantic"), strict=True):
        check_equal(table_of(way, stream), stream.table)
        us = best_of(ROUNDS, partial(table_of, way, stream)) * 1e6 / count
        rows.append([title, 1e6 / us, us])
        numbers |= {f"{key}_us_per_message": us}
    decoded = Decoder(contract).decode(stream.messages)
    us = best_of(ROUNDS, lambda: validate(contract, decoded.table)) * 1e6 / count
    rows.append(["(then ranges by contract, NumPy)", 1e6 / us, us])
    numbers |= {"validate_us_per_message": us}
    size = sum(map(len, stream.messages)) // count
    return Report(
        f"Decoding {count:,} JSON messages of {size} bytes, {len(contract.fields)} fields", ["way", "messages/s", "µs each"], rows, numbers
    )


def table_of(way: Decoder | Checked | Modelled, stream: Stream) -> Table:
    return way.decode(stream.messages).table if isinstance(way, Decoder) else way.decode(stream.messages)


class Checked:
    """`json.loads` and a type check per field."""

    def __init__(self, contract: StreamContract) -> None:
        self._contract = contract
        self._types = {f.name: (int, float) if TYPES[f.type] is float else TYPES[f.type] for f in contract.fields}

    def decode(self, messages: list[bytes]) -> Table:
        return columns([self._one(message) for message in messages], self._contract)

    def _one(self, message: bytes) -> dict[str, Any]:
        reading: dict[str, Any] = json.loads(message)
        for name, kind in self._types.items():
            if not isinstance(reading[name], kind):
                raise TypeError(f"{name} is {reading[name]!r}")
        return reading


class Modelled:
    """A pydantic model per message."""

    def __init__(self, contract: StreamContract) -> None:
        self._contract = contract
        fields: dict[str, Any] = {f.name: (TYPES[f.type], ...) for f in contract.fields}
        self._model: type[BaseModel] = create_model("Reading", **fields)

    def decode(self, messages: list[bytes]) -> Table:
        validate_json = self._model.model_validate_json
        return columns([validate_json(message).__dict__ for message in messages], self._contract)


def columns(readings: list[dict[str, Any]], contract: StreamContract) -> Table:
    """Dicts to columns, as any of these ways ends."""
    table: Table = {}
    for field in contract.fields:
        values = [reading[field.name] for reading in readings]
        if field.type is FieldType.STRING:
            table[field.name] = Strings.of(values)
        elif field.type is FieldType.INTEGER:
            table[field.name] = np.array(values, np.int64)
        elif field.type is FieldType.TIMESTAMP:
            table[field.name] = np.round(np.array(values, np.float64) * 1e6).astype(np.int64)
        else:
            table[field.name] = np.array(values, np.float64)
    return table


if __name__ == "__main__":
    main(__doc__, measure)
