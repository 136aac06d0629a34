"""NASA's C-MAPSS FD001 in place of the simulator.

`train_FD001` are engines run to failure, `test_FD001` engines cut short, `RUL_FD001` the cycles that those had left.
Files may be `.txt` or `.txt.gz`. The engine numbers of both files are the same, so each gets a prefix of its own.
The gateways stand still, one in each zone and one more.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cloud.demo.journey import CYCLE_S, START_S, Message, reading_message, true_zone
from cloud.demo.simulator import FIELDS, Engine, Floats
from cloud.demo.track import CHICAGO, FRANKFURT, MADRID, MONTREAL, ZURICH, Place
from edge_agent.contract.errors import ConfigError
from edge_agent.core.zones import Zones

OCEAN_STATION = Place(47.0, -35.0)
STATIONS = (FRANKFURT, CHICAGO, MONTREAL, OCEAN_STATION, ZURICH, MADRID)
TRAIN, TEST, TRUTH = "train_FD001", "test_FD001", "RUL_FD001"
_COLUMNS = 2 + len(FIELDS)


@dataclass(frozen=True)
class Flights:
    """Both parts of FD001: engines run to failure, and engines still flying."""

    train: list[Engine]
    test: list[Engine]


def load(directory: Path) -> Flights:
    """Read FD001.

    Raises:
        ConfigError: a file is missing, or is not what NASA published.
    """
    train = _engines(_table(directory, TRAIN, _COLUMNS), "train", None)
    remaining = _table(directory, TRUTH, 1)[:, 0]
    test = _engines(_table(directory, TEST, _COLUMNS), "test", remaining)
    return Flights(train, test)


def station_messages(device: str, place: Place, engines: list[Engine], zones: Zones) -> list[Message]:
    """The readings of the engines at a gateway that stands still, one engine after the other, an hour per cycle."""
    zone = true_zone(zones, place.lat, place.lon)
    return [
        reading_message(device, engine.name, START_S + (row + 1) * CYCLE_S, row + 1, values, zone)
        for engine in engines
        for row, values in enumerate(engine.values)
    ]


def _engines(table: Floats, part: str, remaining: Floats | None) -> list[Engine]:
    units = np.unique(table[:, 0]).astype(int)
    if remaining is not None and len(remaining) != len(units):
        raise ConfigError(f"{TRUTH} names {len(remaining)} engines, {TEST} has {len(units)}; both must be of FD001")
    engines = []
    for i, unit in enumerate(units):
        rows = table[table[:, 0] == unit]
        if not np.array_equal(rows[:, 1], np.arange(1, len(rows) + 1)):
            raise ConfigError(f"engine {unit} of the {part} file: cycles must count 1, 2, 3, … without a gap")
        left = 0 if remaining is None else int(remaining[i])
        engines.append(Engine(f"fd001-{part}-{unit:03d}", len(rows) + left, rows[:, 2:] + 0.0))
    return engines


def find(directory: Path, name: str) -> Path:
    """The file called `name`, plain or packed, or ConfigError."""
    for path in (directory / f"{name}.txt", directory / f"{name}.txt.gz"):
        if path.is_file():
            return path
    raise ConfigError(f"{directory} holds neither {name}.txt nor {name}.txt.gz; name the directory of NASA's C-MAPSS files")


def _table(directory: Path, name: str, columns: int) -> Floats:
    path = find(directory, name)
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            table = np.loadtxt(file, ndmin=2)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} does not read: {e}") from e
    if table.shape[1] != columns or not len(table):
        raise ConfigError(f"{path} has {table.shape[0]} rows of {table.shape[1]} columns; {columns} columns are wanted")
    return table
