"""The report: every promise that the figures break is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cloud.demo.crossing import Crossing
from cloud.demo.report import Report, as_table, promises, rmse, write_report

ASKED = {
    "readings_published", "readings_in_lake", "lost", "duplicates", "out_of_zone", "mlflow_run_id", "model_version",
    "devices_running_model", "edge_cloud_parity_max_abs_diff", "uplink_bytes_per_reading", "seconds_by_phase",
}  # fmt: skip


def good(dataset: str = "simulator") -> Report:
    return Report(
        dataset=dataset, seed=1, devices=2, engines_trained=4, engines_scored=2, mlflow_run_id="run", model_version="1",
        devices_running_model=2, edge_cloud_parity_max_abs_diff=0.0, rmse_edge_clipped=14.0, border_crossings=[crossing(3)],
    )  # fmt: skip


def crossing(delivered: int) -> Crossing:
    counts = {"waiting": {"europe": 3}, "flowed": {"canada": 2}, "delivered": {"europe": delivered}}
    return Crossing(device="plane-01", lost_region="eu", **counts)


def test_a_good_report_keeps_all_promises_and_holds_the_fields_asked_for(tmp_path: Path) -> None:
    report = good()
    assert promises(report) == []
    write_report(report, tmp_path / "build" / "demo-report.json")
    assert set(json.loads((tmp_path / "build" / "demo-report.json").read_text())) >= ASKED


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("devices_running_model", 1, "1 of 2 devices run the released model"),
        ("edge_cloud_parity_max_abs_diff", 2e-6, "differ by up to 2e-06"),
        ("edge_cloud_parity_max_abs_diff", float("nan"), "differ by up to nan"),
        ("edge_cloud_parity_max_abs_diff", None, "were not compared"),
        ("mlflow_run_id", "", "no MLflow run"),
        ("quarantined", 3, "3 good readings were quarantined"),
        ("border_crossings", [], "no aircraft crossed a border during the outage"),
        ("border_crossings", [crossing(2)], "plane-01: {'europe': 3} waited for 'eu', {'europe': 2} reached it"),
    ],
)
def test_a_figure_that_breaks_a_promise_is_named(field: str, value: object, says: str) -> None:
    report = good()
    setattr(report, field, value)
    assert [says in p for p in promises(report)] == [True]


def test_the_error_limit_holds_for_nasas_engines_only() -> None:
    for dataset, broken in (("simulator", 0), ("cmapss", 1)):
        report = good(dataset)
        report.rmse_edge_clipped = 16.1
        assert len(promises(report)) == broken


def test_truth_is_clipped_like_the_training_target() -> None:
    assert rmse([125.0, 10.0], [300.0, 10.0]) == 0.0
    assert rmse([0.0], [5.0]) == 5.0


def test_the_table_reads_well_without_a_terminal() -> None:
    out = io.StringIO()
    Console(file=out, width=140).print(as_table(good()))
    assert "all kept" in out.getvalue() and "not known" in out.getvalue()
