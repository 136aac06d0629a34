from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from edge_agent.contract.bundle import pack_bundle
from edge_agent.contract.errors import ConfigError
from pipelines.score import compare, missing, recompute
from tests.edge_agent.models import bundle


def scored(rows: list[tuple[str | None, float | None, float]]) -> pa.Table:
    models, device, ours = zip(*rows, strict=True)
    return pa.table(
        {"model": pa.array(models, pa.string()), "device_score": pa.array(device, pa.float64()), "score": pa.array(ours, pa.float64())}
    )


def test_only_rows_scored_with_this_bundle_are_compared() -> None:
    report = compare(scored([("mine", 1.0, 1.0), ("mine", None, 5.0), ("other", 1.0, 9.0), (None, None, 9.0), ("mine", 2.0, 2.5)]), "mine")
    assert report == {
        "bundle_sha256": "mine",
        "rows_scored": 5,
        "rows_with_model": 3,
        "rows_compared": 2,
        "max_abs_diff": 0.5,
        "rows_not_equal": 1,
        "rows_scored_by_one": 1,
    }


def test_wrong_path_is_a_mistake_that_is_said_before_the_work(tmp_path: Path) -> None:
    file = tmp_path / "model.bundle"
    nothing: Any = SimpleNamespace()
    with pytest.raises(ConfigError, match="does not read: No such file"):
        recompute(nothing, file)
    file.write_bytes(pack_bundle(bundle()))
    with pytest.raises(ConfigError, match="there is no directory"):
        recompute(nothing, file, tmp_path / "nowhere/scores.parquet")


def test_nothing_to_compare_is_not_agreement() -> None:
    assert compare(scored([("other", 1.0, 1.0)]), "mine")["max_abs_diff"] is None


@pytest.mark.parametrize(("ordinals", "expected"), [([0, 1, 2], 0), ([1, 2], 1), ([0, 3, 4], 2)])
def test_holes_in_a_devices_numbering_are_counted(ordinals: list[int], expected: int) -> None:
    rows = pa.table({"device": ["d"] * len(ordinals), "epoch": ["e"] * len(ordinals), "ordinal": ordinals})
    assert missing(rows) == expected


def test_each_epoch_has_a_numbering_of_its_own() -> None:
    rows = pa.table({"device": ["d"] * 4, "epoch": ["e", "e", "f", "f"], "ordinal": [0, 1, 0, 2]})
    assert missing(rows) == 1
