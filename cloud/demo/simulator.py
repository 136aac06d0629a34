"""Engines that wear until they fail.

Modelled on NASA's C-MAPSS FD001: each sensor has a healthy value, a shift that it reaches at failure, noise and
a fixed number of decimals (measured on `train_FD001`). There, the mean shift of the sensors with r cycles to go is
within 5 % of exp(-r / 50) times the shift at failure; so is it here.

- Equal seeds give equal engines, whatever else is drawn.
- Values are rounded as an instrument would, and lie within the ranges of the turbofan contract.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

CYCLES_MIN, CYCLES_MAX = 130, 230
WEAR_CYCLES = 50.0  # the wear grows e-fold in so many cycles
WEAR_MAX = 1.35  # of the shift at failure, for the weakest engine


@dataclass(frozen=True)
class Sensor:
    """Healthy value, shift at failure, noise (standard deviation) and decimals of one channel."""

    healthy: float
    shift: float
    noise: float
    decimals: int


SETTINGS = (Sensor(0.0, 0.0, 0.0022, 4), Sensor(0.0, 0.0, 0.0003, 4), Sensor(100.0, 0.0, 0.0, 1))
SENSORS = (
    Sensor(518.67, 0.0, 0.0, 2),
    Sensor(642.37, 1.30, 0.37, 2),
    Sensor(1586.92, 15.37, 4.65, 2),
    Sensor(1402.68, 26.25, 5.86, 2),
    Sensor(14.62, 0.0, 0.0, 2),
    Sensor(21.61, 0.0, 0.001, 2),
    Sensor(553.96, -2.47, 0.62, 2),
    Sensor(2388.06, 0.18, 0.05, 2),
    Sensor(9057.01, 40.98, 8.22, 2),
    Sensor(1.30, 0.0, 0.0, 2),
    Sensor(47.35, 0.79, 0.17, 2),
    Sensor(521.92, -2.11, 0.50, 2),
    Sensor(2388.05, 0.18, 0.05, 2),
    Sensor(8138.29, 28.58, 7.78, 2),
    Sensor(8.4179, 0.1025, 0.0263, 4),
    Sensor(0.03, 0.0, 0.0, 2),
    Sensor(392.26, 3.98, 1.14, 0),
    Sensor(2388.0, 0.0, 0.0, 0),
    Sensor(100.0, 0.0, 0.0, 2),
    Sensor(38.93, -0.49, 0.13, 2),
    Sensor(23.36, -0.29, 0.078, 4),
)
CHANNELS = (*SETTINGS, *SENSORS)
FIELDS = (*(f"setting_{i}" for i in range(1, len(SETTINGS) + 1)), *(f"sensor_{i}" for i in range(1, len(SENSORS) + 1)))


@dataclass(frozen=True)
class Engine:
    """The readings of one engine: row i is cycle i + 1, columns are FIELDS. `life` is the cycle of failure."""

    name: str
    life: int
    values: Floats

    def truth(self) -> Floats:
        """Remaining cycles at each reading: 0 at the last cycle before failure."""
        return self.life - np.arange(1, len(self.values) + 1, dtype=np.float64)

    def until(self, cycle: int) -> Engine:
        """The engine as it was seen up to `cycle`."""
        return Engine(self.name, self.life, self.values[:cycle])


def build_engine(name: str, seed: int) -> Engine:
    """An engine run to failure. It depends on `name` and `seed` alone."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    life = int(rng.integers(CYCLES_MIN, CYCLES_MAX + 1))
    weakness = rng.uniform(0.85, WEAR_MAX)
    to_go = life - np.arange(1, life + 1, dtype=np.float64)
    wear = weakness * np.exp(-to_go / WEAR_CYCLES)
    values = np.empty((life, len(CHANNELS)))
    for i, channel in enumerate(CHANNELS):
        # Engines differ a little from the first day, and their instruments scatter.
        offset = rng.normal(0.0, 0.3 * channel.noise)
        scatter = np.clip(rng.normal(0.0, channel.noise, life), -4 * channel.noise, 4 * channel.noise)
        values[:, i] = np.round(channel.healthy + offset + channel.shift * wear + scatter, channel.decimals)
    return Engine(name, life, values + 0.0)  # + 0.0 turns -0.0 into 0.0


def cut_short(engine: Engine, seed: int) -> Engine:
    """An engine that is still flying: cut at a random cycle, 10 to 100 cycles before failure."""
    rng = np.random.default_rng([seed, zlib.crc32(engine.name.encode()), 1])
    return engine.until(engine.life - int(rng.integers(10, 101)))
