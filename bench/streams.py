"""The two streams that the benchmarks share: aircraft engines, and a pump."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from cloud.demo import cmapss
from cloud.demo.simulator import FIELDS, build_engine
from edge_agent.contract.columns import Column, Strings, Table

START_S = 1_700_000_000.0
CYCLE_S = 3_600.0
SEED = 1


@dataclass(frozen=True)
class Stream:
    """Readings in the order published: as columns, and as the JSON messages of the sensors. `key` is the entity field."""

    name: str
    key: str
    table: Table
    messages: list[bytes]

    @property
    def event_us(self) -> Any:
        return self.table["ts"]


def engines(count: int, directory: Path | None = None) -> Stream:
    """Engines run to failure, 24 channels each cycle: simulated, or NASA's own from `directory`."""
    found = cmapss.load(directory).train[:count] if directory else [build_engine(f"engine-{i:03d}", SEED) for i in range(count)]
    cycles = np.concatenate([np.arange(1, len(e.values) + 1) for e in found])
    values = np.concatenate([e.values for e in found])
    names = [e.name for e in found for _ in range(len(e.values))]
    columns: dict[str, Column] = {"engine": Strings.of(names), "cycle": cycles.astype(np.int64)}
    columns |= {field: values[:, i] for i, field in enumerate(FIELDS)}
    title = "turbofan (NASA FD001)" if directory else "turbofan"
    return _stream(title, "engine", START_S + cycles * CYCLE_S, columns)


def pump(rows: int) -> Stream:
    """A pump, eight channels once a second, as a data logger rounds them."""
    rng = np.random.default_rng(SEED)
    t = np.arange(rows)
    load = 0.6 + 0.3 * np.sin(2 * np.pi * t / 900) + np.cumsum(rng.normal(0, 0.002, rows))
    channels = {
        "flow_m3h": (42 * load, 0.15, 2),
        "pressure_in_bar": (1.8 + 0.1 * load, 0.01, 3),
        "pressure_out_bar": (6.2 + 1.5 * load, 0.02, 3),
        "speed_rpm": (1_450 + 20 * load, 1.5, 0),
        "current_a": (18 * load, 0.1, 2),
        "temperature_c": (41 + np.cumsum(rng.normal(0, 0.004, rows)), 0.03, 1),
        "vibration_mms": (2.1 + 0.4 * load, 0.12, 2),
        "level_m": (3.4 + 0.2 * np.sin(2 * np.pi * t / 3_600), 0.002, 3),
    }
    columns: dict[str, Column] = {"pump": Strings.of(["p-1"] * rows)}
    columns |= {name: np.round(level + rng.normal(0, noise, rows), digits) + 0.0 for name, (level, noise, digits) in channels.items()}
    return _stream("pump", "pump", START_S + t.astype(np.float64), columns)


def _stream(name: str, key: str, times_s: Any, columns: Table) -> Stream:
    lists = {"ts": times_s.tolist(), **{field: column.tolist() for field, column in columns.items()}}
    rows = zip(*lists.values(), strict=True)
    messages = [msgspec.json.encode(dict(zip(lists, row, strict=True))) for row in rows]
    return Stream(name, key, {"ts": np.round(times_s * 1e6).astype(np.int64), **columns}, messages)
