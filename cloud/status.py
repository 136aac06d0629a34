"""What the stack, the fleet and the lake look like now: for `fenceline status`, the API and Prometheus.

Reads what the parts leave on disk, so it works while the stack is down.
"""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from cloud import config, rollout, watch
from cloud.audit import Audit
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.ingest_status import read_status
from cloud.lake import Lake
from cloud.refusals import DENIED, REFUSED
from cloud.waves import Place
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import BundleRef


def collect(settings: Settings) -> dict[str, Any]:
    """Everything worth telling, as plain values.

    Keys: state_dir, stack (None if it does not run), devices, ingest (by region), lake (rows' tables by stream and lane:
    version), quality (what the last look found, or None), refused (how often by the gate or a broker, by reason), audit_broken_at,
    rollout (the last one, or None).
    """
    fleet, audit, lake = Fleet(settings.fleet_db), Audit(settings.audit_db), Lake(settings.lake)
    reports = {r.name: read_status(settings, r.name) for r in settings.regions}
    return {
        "state_dir": str(settings.state_dir),
        "stack": config.running_stack(settings),
        "devices": devices(fleet),
        "ingest": {name: report for name, report in reports.items() if report is not None},
        "lake": {stream: lake.versions(stream) for stream in lake.streams()},
        "quality": watch.read_quality(settings),
        "refused": audit.counts((REFUSED, DENIED)),
        "audit_broken_at": audit.verify(),
        "rollout": _last_rollout(settings),
    }


def devices(fleet: Fleet) -> list[dict[str, Any]]:
    """Each device: what it should run, what it says it runs, and how long ago it said so."""
    now_us = time.time_ns() // 1_000
    reported = fleet.all_reported()
    return [
        {
            "device": name,
            "desired_version": desired.version,
            "desired": _name(desired.bundle),
            "active": _name(reported[name][0].active) if name in reported else None,
            "phase": reported[name][0].phase if name in reported else "unknown",
            "reason": reported[name][0].reason if name in reported else None,
            "zone": reported[name][0].zone if name in reported else "",
            "blocks_waiting": reported[name][0].blocks_waiting if name in reported else None,
            "readings_stored": reported[name][0].readings_stored if name in reported else None,
            "agent_version": reported[name][0].agent_version if name in reported else None,
            "seen_s_ago": round((now_us - reported[name][1]) / 1e6, 1) if name in reported else None,
        }
        for name, desired in fleet.all_desired().items()
    ]


def exposition(settings: Settings) -> bytes:
    """The same for Prometheus."""
    registry = CollectorRegistry()
    counters = {
        "blocks": Counter("fenceline_ingest_blocks", "Blocks committed to the lake.", ["region"], registry=registry),
        "rows": Counter("fenceline_ingest_rows", "Readings committed to the lake.", ["region"], registry=registry),
        "quarantined_rows": Counter("fenceline_ingest_quarantined_readings", "Readings put apart.", ["region"], registry=registry),
        "duplicates": Counter("fenceline_ingest_duplicate_blocks", "Blocks that came again.", ["region"], registry=registry),
        "bytes": Counter("fenceline_ingest_bytes", "Bytes of block messages.", ["region"], registry=registry),
        "commits": Counter("fenceline_ingest_commits", "Batches committed.", ["region"], registry=registry),
    }
    refused = Counter("fenceline_ingest_refused_blocks", "Blocks refused.", ["region", "reason"], registry=registry)
    connected = Gauge("fenceline_ingest_connected", "1 if the region's broker is connected.", ["region"], registry=registry)
    for region in settings.regions:
        report = read_status(settings, region.name)
        if report is None:
            continue
        for name, counter in counters.items():
            counter.labels(region.name).inc(getattr(report, name))
        for reason, count in report.refused.items():
            refused.labels(region.name, reason).inc(count)
        connected.labels(region.name).set(report.connected)
    if (quality := watch.read_quality(settings)) is not None:
        failed = Gauge("fenceline_quality_look_failed", "1 if the last look at the lake failed.", registry=registry)
        failed.set(bool(quality.failure))
    if quality is not None and quality.at_us:
        for name, text, value in (
            ("fenceline_unaccounted_blocks", "Blocks that are missing and that nobody accounted for.", quality.unaccounted_blocks),
            ("fenceline_lost_blocks", "Blocks that devices said they gave up.", quality.lost_blocks),
            ("fenceline_quarantined_readings", "Readings that ingest took out of blocks.", quality.quarantined_readings),
            ("fenceline_service_levels_broken", "Service levels that are not kept.", len(quality.levels)),
            ("fenceline_complete_share", "The share of captured blocks that is in the lake.", quality.share),
        ):
            Gauge(name, text, registry=registry).set(value)
    known = Gauge("fenceline_devices", "Devices by phase of their model.", ["phase"], registry=registry)
    for device in devices(Fleet(settings.fleet_db)):
        known.labels(device["phase"]).inc()
    return generate_latest(registry)


def _last_rollout(settings: Settings) -> dict[str, Any] | None:
    try:
        last = rollout.status(settings)
    except ConfigError:
        return None
    moved = sum(m.place == Place.MOVED for m in last.members.values())
    counts = {"devices": len(last.present), "moved": moved}
    return {"id": last.id, "target": last.ref.target, "status": last.status, "reason": last.reason, **counts}


def _name(bundle: BundleRef | None) -> str | None:
    return None if bundle is None else f"{bundle.model} {bundle.model_version}"
