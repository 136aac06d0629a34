"""NASA's files: both forms are read, truth fits, and what is not FD001 is refused with its place."""

from __future__ import annotations

import gzip
from pathlib import Path

import msgspec
import numpy as np
import pytest

from cloud.demo.cmapss import STATIONS, TEST, TRAIN, TRUTH, load, station_messages
from cloud.demo.journey import true_zone
from cloud.demo.simulator import FIELDS, build_engine
from edge_agent.contract.errors import ConfigError
from edge_agent.core.zones import Zones, parse_zones

ZONES = Path(__file__).parents[3] / "contracts" / "zones.geojson"


@pytest.fixture(scope="module")
def zones() -> Zones:
    return parse_zones(ZONES.read_bytes())


def lines(units: dict[int, int]) -> str:
    """NASA's layout, with two blanks at the end of a line: that many cycles of each unit."""
    text = ""
    for unit, cycles in units.items():
        for cycle, values in enumerate(build_engine(f"unit-{unit}", 1).values[:cycles]):
            text += f"{unit} {cycle + 1} " + " ".join(f"{v:g}" for v in values) + "  \n"
    return text


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / f"{TRAIN}.txt").write_text(lines({1: 6, 2: 4}))
    with gzip.open(tmp_path / f"{TEST}.txt.gz", "wt") as file:
        file.write(lines({1: 3, 2: 2}))
    (tmp_path / f"{TRUTH}.txt").write_text("112 \n98 \n")
    return tmp_path


def test_plain_and_packed_files_are_read_and_no_engine_of_test_has_a_name_of_train(files: Path) -> None:
    flights = load(files)
    assert [(e.name, len(e.values), e.life) for e in flights.train] == [("fd001-train-001", 6, 6), ("fd001-train-002", 4, 4)]
    assert [(e.name, len(e.values), e.truth()[-1]) for e in flights.test] == [("fd001-test-001", 3, 112), ("fd001-test-002", 2, 98)]
    assert flights.train[0].truth()[-1] == 0


def test_stations_stand_in_every_zone(zones: Zones) -> None:
    assert {true_zone(zones, p.lat, p.lon) for p in STATIONS} == {z.name for z in zones.zones}


def test_a_reading_keeps_its_numbers_and_its_hour(files: Path, zones: Zones) -> None:
    flights = load(files)
    messages = station_messages("station-1", STATIONS[0], flights.train, zones)
    assert len(messages) == 10
    last = msgspec.json.decode(messages[-1].payload)
    assert (last["engine"], last["cycle"], last["ts"]) == ("fd001-train-002", 4, 1_700_000_000 + 4 * 3_600)
    assert [last[name] for name in FIELDS] == flights.train[1].values[-1].tolist()
    assert len({m.reading.key for m in messages if m.reading is not None}) == 10


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (TRAIN, "1 1 0 0\n", "1 rows of 4 columns; 26"),
        (TRAIN, "1 one\n", "does not read"),
        (TRUTH, "1\n2\n3\n", "names 3 engines, test_FD001 has 2"),
    ],
)
def test_a_file_that_is_not_nasas_is_refused(files: Path, name: str, text: str, says: str) -> None:
    (files / f"{name}.txt").write_text(text)
    with pytest.raises(ConfigError, match=says):
        load(files)


def test_a_gap_in_the_cycles_is_refused(files: Path) -> None:
    table = np.loadtxt(files / f"{TRAIN}.txt")
    np.savetxt(files / f"{TRAIN}.txt", np.delete(table, 2, axis=0))
    with pytest.raises(ConfigError, match="engine 1 of the train file"):
        load(files)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither train_FD001.txt nor train_FD001.txt.gz"):
        load(tmp_path)
