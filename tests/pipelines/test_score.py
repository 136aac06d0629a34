from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloud.rows import TIME
from edge_agent.contract.bundle import pack_bundle
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from pipelines.score import Compared, compare, recompute, score_devices
from tests.edge_agent.models import bundle, linear
from tests.pipelines.lakes import turbofan

SPEC = FeatureSpec(features=[Feature("sensor_2", "last")], window_rows=5, window_s=100.0)


def scored(rows: list[tuple[str | None, float | None, float]]) -> pa.Table:
    models, device, ours = zip(*rows, strict=True)
    return pa.table(
        {"model": pa.array(models, pa.string()), "device_score": pa.array(device, pa.float64()), "score": pa.array(ours, pa.float64())}
    )


def test_only_rows_scored_with_this_bundle_are_compared() -> None:
    rows: list[tuple[str | None, float | None, float]] = [
        ("mine", 1.0, 1.0), ("mine", None, 5.0), ("other", 1.0, 9.0), (None, None, 9.0), ("mine", 2.0, 2.5)
    ]  # fmt: skip
    wanted = Compared(rows_scored=5, rows_with_model=3, rows_compared=2, max_abs_diff=0.5, rows_not_equal=1, rows_scored_by_one=1)
    assert compare(scored(rows), "mine") == wanted
    assert sum((compare(scored([row]), "mine") for row in rows), Compared()) == wanted, "row by row"


def test_a_difference_that_is_no_number_is_not_forgotten_for_a_smaller_one() -> None:
    one, other = Compared(max_abs_diff=float("nan")), Compared(max_abs_diff=1.0)
    assert math.isnan((one + other).max_abs_diff or 0.0) and math.isnan((other + one + Compared()).max_abs_diff or 0.0)


def test_wrong_path_is_a_mistake_that_is_said_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "model.bundle"
    nothing: Any = SimpleNamespace()
    with pytest.raises(ConfigError, match="does not read: No such file"):
        recompute(nothing, file)
    file.write_bytes(pack_bundle(bundle()))
    with pytest.raises(ConfigError, match="there is no directory"):
        recompute(nothing, file, tmp_path / "nowhere/scores.parquet")


def test_nothing_to_compare_is_not_agreement() -> None:
    assert compare(scored([("other", 1.0, 1.0)]), "mine").max_abs_diff is None


@pytest.mark.parametrize(
    ("epochs", "ordinals", "expected"),
    [
        ("eee", [0, 1, 2], 0),
        ("ee", [1, 2], 1),
        ("eee", [0, 3, 4], 2),
        ("eeff", [0, 1, 0, 2], 1),  # each epoch has a numbering of its own
    ],
)
@pytest.mark.parametrize("batch_rows", [1, 2, 100])
def test_holes_in_a_devices_numbering_are_counted(
    epochs: str, ordinals: list[int], expected: int, batch_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.features.BATCH_ROWS", batch_rows)
    count = len(ordinals)
    rows = {"device": ["d"] * count, "epoch": list(epochs), "lane": ["europe"] * count, "sequence": ordinals, "row": ordinals}
    values = {"engine": ["e"] * count, "ts": pa.array(ordinals).cast(TIME), "sensor_2": [1.0] * count, "ordinal": ordinals}
    scores = {"score": pa.array([2.0] * count), "model": ["mine"] * count}
    pq.write_table(pa.table(rows | values | scores), tmp_path / "readings.parquet")
    model, out = bundle(onnx=linear([2.0]), features=SPEC), tmp_path / "scores.parquet"

    compared, missing = score_devices(tmp_path / "readings.parquet", ["d"], turbofan(), {}, model, "mine", out)

    assert missing == expected
    assert compared == Compared(count, count, count, 0.0)
    assert pq.read_table(out).select(list(rows)).to_pydict() == rows
