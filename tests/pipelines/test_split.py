from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.errors import ConfigError
from pipelines.split import holdout_of
from pipelines.train import folds

names = st.sets(st.text(min_size=1, max_size=8), min_size=4, max_size=60)


@given(names, st.floats(0.05, 0.6))
def test_both_sides_have_engines(engines: set[str], share: float) -> None:
    held = holdout_of(engines, share)
    assert held
    assert held < engines
    assert len(engines - held) >= 2


def test_engine_stays_on_its_side_when_engines_are_added() -> None:
    many = [f"engine-{i}" for i in range(400)]
    before, after = holdout_of(many[:300], 0.2), holdout_of(many, 0.2)
    assert before <= after
    assert 0.15 < len(after) / 400 < 0.25


def test_too_few_engines_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"3 engines with labels; at least 4 .* Add readings and labels"):
        holdout_of(["a", "b", "c"], 0.2)


def test_no_engine_is_on_both_sides_of_a_fold(seed: int) -> None:
    random = np.random.default_rng(seed)
    engines = np.array([f"e{i}" for i in random.integers(0, 17, 500)])
    cuts = folds(engines, 4, seed % 1000)
    assert sorted(np.concatenate([outside for _, outside in cuts]).tolist()) == list(range(500))
    for inside, outside in cuts:
        assert not set(engines[inside]) & set(engines[outside])
