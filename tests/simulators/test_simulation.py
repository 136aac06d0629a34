"""Seeded worlds full of accidents: whatever happens, what was acknowledged is not lost, and goes nowhere it may not go.

A failure names its seed: FENCELINE_WORLD=seed repeats that one.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.simulators.world import World, world

WORLDS, WORLDS_LONG = 50, int(os.environ.get("FENCELINE_RUNS", "1000"))
TIGHT_WORLDS = 15
STEPS = 30


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Worlds log much, and have a trace of their own."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def live(seed: int, *, tight: bool = False) -> World:
    with tempfile.TemporaryDirectory(prefix="world-") as folder, world(seed, Path(folder), tight=tight) as made:
        made.live(STEPS)
        made.settle_down()
    return made


def worlds(seed: int, count: int) -> None:
    given = os.environ.get("FENCELINE_WORLD")
    crashes = acknowledged = blocks = copies = 0
    for number in [int(given)] if given else range(seed, seed + count):
        print(f"world {number}")
        made = live(number)
        crashes, acknowledged = crashes + made.device.crashes, acknowledged + len(made.acknowledged)
        blocks, copies = blocks + len(made.cloud.lake.blocks), copies + made.cloud.lake.copies
    print(f"{count} worlds: {crashes} crashes, {acknowledged} messages acknowledged, {blocks} blocks in the lakes, {copies} copies refused")


@pytest.mark.timeout(600)  # a minute on two free cores
def test_promises_hold_in_every_world(seed: int) -> None:
    worlds(seed, WORLDS)


@pytest.mark.timeout(300)
def test_history_that_gives_way_leaves_no_reading_to_be_doubled(seed: int) -> None:
    live(20_604)  # the world in which readings were doubled
    for number in range(seed, seed + TIGHT_WORLDS):
        print(f"tight world {number}")
        live(number, tight=True)


@pytest.mark.long
@pytest.mark.timeout(14_400)
def test_promises_hold_in_a_thousand_worlds(seed: int) -> None:
    worlds(seed, WORLDS_LONG)


def test_a_world_repeats_from_its_seed(seed: int) -> None:
    first, again = live(seed), live(seed)
    assert first.trace == again.trace
    assert first.acknowledged == again.acknowledged and first.now == again.now
