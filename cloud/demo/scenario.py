"""Who carries which engine, and what is sent in which phase.

- Simulated: each aircraft flies its engines to failure one after the other, then one new engine for a while.
- C-MAPSS: the engines are dealt to stations that stand still.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloud.demo import cmapss
from cloud.demo.journey import Aircraft, Message
from cloud.demo.simulator import Engine, build_engine, cut_short
from cloud.demo.track import TOURS, Place, Track
from edge_agent.core.zones import Zones

SIMULATED, CMAPSS = "simulator", "cmapss"


@dataclass(frozen=True)
class Gateway:
    """A device with what its sensors will send: run-to-failure data (`collect`), then new engines (`score`).

    `place` is where it stands; None if it flies and sends its positions.
    """

    device: str
    place: Place | None
    collect: list[Message]
    score: list[Message]


@dataclass(frozen=True)
class Scenario:
    """A whole demonstration's input. `files` is the directory of recorded data; None if it is simulated."""

    dataset: str
    seed: int
    gateways: list[Gateway]
    train: list[Engine]
    test: list[Engine]
    files: Path | None = None

    def readings(self, phase: str) -> int:
        """How many readings the phase `collect` or `score` has."""
        return sum(message.reading is not None for gateway in self.gateways for message in getattr(gateway, phase))


def simulated(seed: int, devices: int, engines: int, zones: Zones) -> Scenario:
    """A fleet of `devices` aircraft that wears out `engines` engines, then scores one new engine on each aircraft."""
    train = [build_engine(f"sim-train-{i + 1:02d}", seed) for i in range(engines)]
    test = [cut_short(build_engine(f"sim-test-{i + 1:02d}", seed), seed) for i in range(devices)]
    gateways = []
    for i in range(devices):
        aircraft = Aircraft(f"plane-{i + 1:02d}", Track(_tour(i)), zones)
        collect = [message for engine in train[i::devices] for message in aircraft.fly(engine)]
        gateways.append(Gateway(aircraft.device, None, collect, aircraft.fly(test[i])))
    return Scenario(SIMULATED, seed, gateways, train, test)


def recorded(directory: Path, seed: int, zones: Zones) -> Scenario:
    """NASA's FD001, dealt to the stations.

    Raises:
        ConfigError: `directory` does not hold it.
    """
    flights = cmapss.load(directory)
    gateways = []
    for i, place in enumerate(cmapss.STATIONS):
        device = f"station-{i + 1:02d}"
        collect, score = (
            cmapss.station_messages(device, place, part[i :: len(cmapss.STATIONS)], zones) for part in (flights.train, flights.test)
        )
        gateways.append(Gateway(device, place, collect, score))
    return Scenario(CMAPSS, seed, gateways, flights.train, flights.test, directory)


def _tour(i: int) -> tuple[Place, ...]:
    """Aircraft on the same tour start at different airports."""
    tour = TOURS[i % len(TOURS)]
    start = (i // len(TOURS)) % len(tour)
    return tour[start:] + tour[:start]
