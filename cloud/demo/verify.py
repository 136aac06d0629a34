"""What all of it came to: the lake against the oracle, devices against the cloud, predictions against the truth."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath
from typing import Any

from cloud.demo import pipeline
from cloud.demo.crossing import Crossing
from cloud.demo.house import House
from cloud.demo.oracle import LakeRow, judge
from cloud.demo.outcome import count_quarantined, read_rows
from cloud.demo.phases import running
from cloud.demo.report import Report, promises, rmse
from cloud.demo.scenario import Scenario
from cloud.gate import load_zones
from edge_agent.contract.state import BundleRef


def verify(house: House, scenario: Scenario, trained: dict[str, Any], ref: BundleRef, crossings: list[Crossing]) -> Report:
    """The report, but for its times: every figure is read from the lake, the fleet's database or an agent's own status."""
    report = Report(
        dataset=scenario.dataset,
        seed=scenario.seed,
        devices=len(scenario.gateways),
        engines_trained=len(scenario.train),
        engines_scored=len(scenario.test),
        mlflow_run_id=trained["run_id"],
        model_version=ref.model_version,
        bundle_sha256=ref.sha256,
        devices_running_model=len(running(house, ref)),
        border_crossings=crossings,
    )
    rows = read_rows(house.lake)
    _count(report, house, scenario, rows)
    _judge_scores(report, scenario, [r for r in rows if r.model == ref.sha256 and r.score is not None])
    _compare(report, house, ref)
    report.broken += promises(report)
    return report


def _count(report: Report, house: House, scenario: Scenario, rows: list[LakeRow]) -> None:
    messages = [m for g in scenario.gateways for m in (*g.collect, *g.score) if m.reading is not None]
    verdict = judge([m.reading for m in messages if m.reading is not None], rows, load_zones(house.settings))
    report.readings_published, report.readings_in_lake = verdict.published, verdict.rows
    report.lost, report.duplicates, report.out_of_zone = len(verdict.lost), len(verdict.duplicates), len(verdict.out_of_zone)
    report.altered, report.foreign = len(verdict.altered), len(verdict.foreign)
    report.quarantined = count_quarantined(house.lake)
    report.rows_by_lane = dict(Counter(r.lane for r in rows))
    report.rows_by_region = dict(Counter(r.region for r in rows))
    report.broken += verdict.broken
    for agent in house.agents:
        house.note_uplink(agent)
    report.uplink_bytes_per_reading = round(house.uplinked.bytes / max(1, verdict.rows), 2)
    report.sensor_bytes_per_reading = round(sum(len(m.payload) for m in messages) / max(1, len(messages)), 2)
    report.failovers = house.uplinked.failovers
    report.broker_kills, report.agent_kills = house.broker_kills, sum(a.kills for a in house.agents)


def _judge_scores(report: Report, scenario: Scenario, scored: list[LakeRow]) -> None:
    """Predictions made on the devices, against the cycles that the engines really had left."""
    lives = {engine.name: engine.life for engine in scenario.test}
    ours = sorted((r for r in scored if r.key[1] in lives), key=lambda r: r.cycle)
    report.readings_scored_on_device = len(ours)
    expected = scenario.readings("score")
    if len(ours) != expected:
        report.broken.append(f"{len(ours)} of {expected} readings of new engines were scored on the device by the released model")
    if not ours:
        return
    last = {r.key[1]: r for r in ours}  # the highest cycle wins
    report.rmse_edge_clipped = round(rmse([r.score or 0.0 for r in last.values()], [lives[n] - r.cycle for n, r in last.items()]), 4)
    report.rmse_edge_all_readings = round(rmse([r.score or 0.0 for r in ours], [lives[r.key[1]] - r.cycle for r in ours]), 4)


def _compare(report: Report, house: House, ref: BundleRef) -> None:
    """The cloud scores every reading of the lake again with the very file that the devices run."""
    target = PurePosixPath(ref.target)
    bundle = house.settings.releases_dir / "targets" / target.parent / f"{ref.sha256}.{target.name}"
    result = pipeline.recompute(house.settings, bundle, house.logs / "score.log", house.display.say)
    report.edge_cloud_parity_max_abs_diff = result["max_abs_diff"]
    if result["rows_compared"] != report.readings_scored_on_device:
        report.broken.append(f"the cloud compared {result['rows_compared']} scores; devices made {report.readings_scored_on_device}")
