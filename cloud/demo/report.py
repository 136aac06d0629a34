"""What the demonstration found: `build/demo-report.json` for machines, a table for people.

`uplink_bytes_per_reading` is what the agents say they have sent, whole blocks with headers and CRC, those sent again included, divided by
the readings in the lake; MQTT's, TCP's and TLS's own bytes are not counted (an agent that is killed is asked just before).
`sensor_bytes_per_reading` is the JSON of the readings on the sensor side, counted the same way. Both depend on how many readings share a
block: the simulated gateways seal one every half second. Error figures are in cycles; the truth is clipped like the training target.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from rich.table import Table

from cloud.demo.crossing import Crossing

PARITY_MAX = 1e-6
RUL_CLIP = 125.0
RMSE_CMAPSS_MAX = 16.0


class Report(msgspec.Struct, kw_only=True):
    """The demo report. Counts are of readings unless they say otherwise; `broken` names every promise that does not hold."""

    dataset: str
    seed: int
    devices: int
    engines_trained: int
    engines_scored: int
    readings_published: int = 0
    readings_in_lake: int = 0
    lost: int = 0
    duplicates: int = 0
    out_of_zone: int = 0
    altered: int = 0
    foreign: int = 0
    quarantined: int = 0
    rows_by_lane: dict[str, int] = {}
    rows_by_region: dict[str, int] = {}
    mlflow_run_id: str = ""
    model_version: str = ""
    bundle_sha256: str = ""
    devices_running_model: int = 0
    readings_scored_on_device: int = 0
    edge_cloud_parity_max_abs_diff: float | None = None
    rmse_edge_clipped: float | None = None
    rmse_edge_all_readings: float | None = None
    uplink_bytes_per_reading: float | None = None
    sensor_bytes_per_reading: float | None = None
    broker_kills: int = 0
    agent_kills: int = 0
    failovers: int = 0
    border_crossings: list[Crossing] = []
    seconds_by_phase: dict[str, float] = {}
    seconds_total: float = 0.0
    broken: list[str] = []


def write_report(report: Report, path: Path) -> None:
    """Write the report as JSON, creating the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def rmse(predicted: list[float], truth: list[float]) -> float:
    """Root mean square error against the truth clipped at RUL_CLIP, in cycles."""
    return float(np.sqrt(np.mean((np.array(predicted) - np.minimum(np.array(truth), RUL_CLIP)) ** 2)))


def promises(report: Report) -> list[str]:
    """One sentence per promise that the figures break; the oracle's own findings come with examples and are not repeated here."""
    broken: list[str] = []
    if report.quarantined:
        broken.append(f"{report.quarantined} good readings were quarantined")
    if not report.mlflow_run_id:
        broken.append("training left no MLflow run")
    if report.devices_running_model != report.devices:
        broken.append(f"{report.devices_running_model} of {report.devices} devices run the released model")
    if report.dataset == "simulator" and not report.border_crossings:
        broken.append("no aircraft crossed a border during the outage")
    for crossing in report.border_crossings:
        if not crossing.complete:
            broken.append(f"{crossing.device}: {crossing.waiting} waited for {crossing.lost_region!r}, {crossing.delivered} reached it")
    parity = report.edge_cloud_parity_max_abs_diff
    if parity is None:
        broken.append("edge and cloud scores were not compared")
    elif not parity <= PARITY_MAX:
        broken.append(f"edge and cloud scores differ by up to {parity:g}; at most {PARITY_MAX:g} is promised")
    if report.dataset == "cmapss" and not (report.rmse_edge_clipped or np.inf) <= RMSE_CMAPSS_MAX:
        broken.append(f"rmse_edge_clipped is {report.rmse_edge_clipped}; at most {RMSE_CMAPSS_MAX} is promised")
    return broken


def as_table(report: Report) -> Table:
    """The short table that ends the demonstration."""
    table = Table(title=f"fenceline demo: {report.dataset}, seed {report.seed}", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for what, value in _lines(report):
        table.add_row(what, value)
    return table


def _lines(report: Report) -> list[tuple[str, str]]:
    return [
        ("devices / engines trained / engines scored", f"{report.devices} / {report.engines_trained} / {report.engines_scored}"),
        ("brokers killed / agents killed / failovers", f"{report.broker_kills} / {report.agent_kills} / {report.failovers}"),
        *(
            (
                f"{c.device} crossed a border, {c.lost_region!r} down",
                f"{_sum(c.waiting)} waited, {_sum(c.flowed)} flowed; {_sum(c.delivered)} delivered to {c.lost_region!r}",
            )
            for c in report.border_crossings
        ),
        ("readings published", f"{report.readings_published:,}"),
        ("readings in the lake", f"{report.readings_in_lake:,}"),
        ("lost / duplicates / out of zone", f"{report.lost} / {report.duplicates} / {report.out_of_zone}"),
        ("rows by region", ", ".join(f"{k} {v:,}" for k, v in sorted(report.rows_by_region.items()))),
        (
            "bytes per reading, sensor side / uplink",
            f"{_number(report.sensor_bytes_per_reading)} / {_number(report.uplink_bytes_per_reading)}",
        ),
        ("MLflow run", report.mlflow_run_id or "none"),
        ("model version / devices running it", f"{report.model_version or 'none'} / {report.devices_running_model} of {report.devices}"),
        ("readings scored on devices", f"{report.readings_scored_on_device:,}"),
        ("edge against cloud, largest difference", _number(report.edge_cloud_parity_max_abs_diff, "g")),
        ("RMSE of the last prediction per engine", _number(report.rmse_edge_clipped)),
        ("RMSE of all predictions on devices", _number(report.rmse_edge_all_readings)),
        ("seconds", ", ".join(f"{k} {v:.0f}" for k, v in report.seconds_by_phase.items()) + f", total {report.seconds_total:.0f}"),
        ("promises", "all kept" if not report.broken else "BROKEN: " + "; ".join(report.broken)),
    ]


def _sum(counts: dict[str, int]) -> int:
    return sum(counts.values())


def _number(value: float | None, style: str = ".2f") -> str:
    return "not known" if value is None else format(value, style)
