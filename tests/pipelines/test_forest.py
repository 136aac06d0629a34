from __future__ import annotations

import numpy as np
import onnx
import pytest
from sklearn.ensemble import HistGradientBoostingRegressor

from edge_agent.contract.errors import ConfigError
from pipelines.export import disagreement, hard_rows
from pipelines.forest import IR_VERSION, OPSET, floor32, freeze, to_onnx
from pipelines.scoring import score


def trained(seed: int, missing: bool = True) -> tuple[HistGradientBoostingRegressor, np.ndarray]:
    random = np.random.default_rng(seed)
    x = random.normal(500, 3, (1_500, 6)).astype(np.float32)
    if missing:
        x[random.random(x.shape) < 0.1] = np.nan
    y = np.nan_to_num(x[:, 0] - 500) * 20 + np.nan_to_num(x[:, 1] - 500) ** 2
    model = HistGradientBoostingRegressor(max_iter=60, max_leaf_nodes=12, random_state=0).fit(x, y)
    return model, x


def test_frozen_model_and_onnx_agree_in_every_bit_also_on_thresholds_and_missing_values(seed: int) -> None:
    model, x = trained(seed % 2**31)
    freeze(model)
    onnx_model = to_onnx(model, x.shape[1])
    rows = np.concatenate([x, hard_rows(model, x, seed % 2**31)])
    assert np.array_equal(model.predict(rows), score(onnx_model, rows))
    assert disagreement(model, onnx_model, x, 3)["max_abs_diff"] == 0.0


def test_freezing_changes_no_decision_and_hardly_a_score() -> None:
    model, x = trained(5)
    before = model.predict(x)
    step = freeze(model)
    assert np.abs(model.predict(x) - before).max() <= 61 * step / 2
    assert step < 1e-3


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_freezing_keeps_scores_of_every_unit(unit: float) -> None:
    _, x = trained(5)
    y = np.nan_to_num(x[:, 0]) * unit
    model = HistGradientBoostingRegressor(max_iter=60, random_state=0).fit(x, y)
    before = model.predict(x)
    freeze(model)
    assert np.abs(model.predict(x) - before).max() < 1e-5 * np.abs(y).max()


def test_batches_of_any_size_give_the_same_bits() -> None:
    model, x = trained(6)
    freeze(model)
    onnx_model = to_onnx(model, x.shape[1])
    whole = score(onnx_model, x[:300])
    for size in (1, 7, 64):
        parts = [score(onnx_model, x[i : min(i + size, 300)]) for i in range(0, 300, size)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_rounded_threshold_would_send_a_value_the_other_way_without_freezing() -> None:
    threshold = np.array([0.1])  # its nearest float32 lies above it
    value = np.float32(0.1)
    assert not value <= threshold[0]
    assert value <= np.float32(threshold[0])
    assert not value <= floor32(threshold)[0]


def test_model_is_pinned_to_what_old_device_runtimes_read() -> None:
    model, x = trained(7, missing=False)
    freeze(model)
    proto = onnx.load_from_string(to_onnx(model, x.shape[1]))
    assert proto.ir_version == IR_VERSION == 8
    assert {o.domain: o.version for o in proto.opset_import} == {"": OPSET, "ai.onnx.ml": 3}
    assert proto.graph.input[0].name == "features"


def test_model_with_another_link_is_refused() -> None:
    x = np.random.default_rng(0).random((200, 2))
    model = HistGradientBoostingRegressor(loss="poisson", max_iter=3).fit(x, x[:, 0])
    with pytest.raises(ConfigError, match="poisson"):
        to_onnx(model, 2)
