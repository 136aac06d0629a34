"""The simulator: seeded, within the contract, worn at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cloud.demo.simulator import CYCLES_MAX, CYCLES_MIN, FIELDS, build_engine, cut_short
from edge_agent.contract.odcs import parse_contract
from edge_agent.contract.stream import StreamContract

CONTRACTS = Path(__file__).parents[3] / "contracts"


@pytest.fixture(scope="module")
def contract() -> StreamContract:
    return parse_contract((CONTRACTS / "turbofan.odcs.yaml").read_bytes(), "turbofan.odcs.yaml")


def test_equal_seeds_give_equal_engines_and_other_seeds_others() -> None:
    assert np.array_equal(build_engine("sim-1", 7).values, build_engine("sim-1", 7).values)
    assert not np.array_equal(build_engine("sim-1", 7).values[:100], build_engine("sim-1", 8).values[:100])
    assert not np.array_equal(build_engine("sim-1", 7).values[:100], build_engine("sim-2", 7).values[:100])


@pytest.mark.parametrize("seed", range(20))
def test_every_value_is_within_the_contract(contract: StreamContract, seed: int) -> None:
    engine = build_engine(f"sim-{seed}", seed)
    assert CYCLES_MIN <= engine.life <= CYCLES_MAX
    for i, name in enumerate(FIELDS):
        field = contract.field(name)
        column = engine.values[:, i]
        assert field.minimum <= column.min() <= column.max() <= field.maximum, name
        assert not np.signbit(column[column == 0]).any(), f"{name} holds -0.0"


def test_the_contract_has_exactly_the_simulated_fields(contract: StreamContract) -> None:
    assert {f.name for f in contract.fields} == {"ts", "engine", "cycle", *FIELDS}


def test_a_worn_engine_shows_it_and_truth_counts_down_to_zero() -> None:
    engine = build_engine("sim-1", 7)
    temperature = engine.values[:, FIELDS.index("sensor_4")]
    assert temperature[-5:].mean() - temperature[:20].mean() > 15
    assert engine.truth()[0] == engine.life - 1
    assert engine.truth()[-1] == 0


@pytest.mark.parametrize("seed", range(20))
def test_an_engine_cut_short_still_has_cycles_to_go(seed: int) -> None:
    whole = build_engine("sim-1", seed)
    flying = cut_short(whole, seed)
    assert 10 <= flying.truth()[-1] <= 100
    assert np.array_equal(flying.values, whole.values[: len(flying.values)])
