"""How fast do readings find another way when an endpoint fails, beside a Mosquitto bridge with two addresses?

A device and three regional brokers stand on a network of namespaces (bench/failover_site.py); two endpoints may hold the device's
zone, one may not. Faults are made on that network (bench/failover_faults.py); what a run measures is said in
bench/failover_runs.py. Needs root, iproute2, nftables and Mosquitto (`make system-deps`).

Zero readings may be lost, stored twice, or reach the foreign endpoint: otherwise the benchmark fails. The bridge runs on the same
site under the same faults; a reading has no name there, so copies stay.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.failover_delta import DeltaLake
from bench.failover_device import BACKOFF_S_MAX, RECEIPT_TIMEOUT_S, Agent, Bridge, Sensors
from bench.failover_faults import FAULTS
from bench.failover_runs import LOSSY_S, RATE, SLOW_LOSS, SLOW_MS, Series, Trial
from bench.failover_site import ALLOWED, BRIDGE, DEVICE, Site
from bench.report import Cell, Report, main

RUNS, RUNS_QUICK = 20, 1
SLOW_RUNS_MAX = 30
BRIDGE_RUNS = 3
DELTA_RUNS = 2
ALL = (*FAULTS, "lossy", "foreign_only")
QUICK = ("kill", "lossy", "foreign_only")  # all of them: tests/faults/test_failover.py
COLUMNS = (
    "fault",
    "runs",
    "p50 ms",
    "p99 ms",
    "max ms",
    "gap p50 ms",
    "gap max ms",
    "lost",
    "duplicates",
    "copies",
    "foreign bytes",
    "changes/min",
)


def options(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--runs", type=int, help=f"runs of each fault under load (default {RUNS}; --quick {RUNS_QUICK})")
    parser.add_argument("--slow-runs", type=int, help=f"runs of lossy and foreign_only (default: as --runs, at most {SLOW_RUNS_MAX})")
    parser.add_argument("--idle-runs", type=int, help="runs of each fault when idle (default: a quarter of --runs, at least 1)")
    parser.add_argument(
        "--bridge-runs", type=int, help=f"runs of each fault with the Mosquitto bridge (default {BRIDGE_RUNS}; --quick: one of one fault)"
    )
    parser.add_argument("--delta-runs", type=int, help=f"runs of each fault with a Delta lake behind (default {DELTA_RUNS}; --quick: none)")
    parser.add_argument("--faults", metavar="NAME,…", help=f"of {', '.join(ALL)} (default: all; --quick: {', '.join(QUICK)})")
    parser.add_argument(
        "--broker", choices=["mosquitto", "nats"], default="mosquitto", help="the regions' brokers (nats: the embedded one)"
    )
    parser.add_argument("--seed", type=int, default=None, help="repeat a run's random choices")
    parser.add_argument("--verbose", action="store_true", help="say on stderr what is being done")


@dataclass(frozen=True)
class Plan:
    """How many runs of each fault: of the agent under load, idle, and with a Delta lake behind, and of the bridge."""

    loaded: dict[str, int]
    idle: dict[str, int]
    delta: dict[str, int]
    bridge: dict[str, int]


def plan(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for; `--quick` is one run of some."""
    quick = arguments.quick
    faults = [name for name in arguments.faults.split(",") if name] if arguments.faults else [*(QUICK if quick else ALL)]
    unknown = [name for name in faults if name not in ALL]
    if unknown:
        raise SystemExit(f"no such fault: {', '.join(unknown)}; there are {', '.join(ALL)}")
    runs = _default(arguments.runs, RUNS_QUICK if quick else RUNS)
    slow = _default(arguments.slow_runs, min(runs, SLOW_RUNS_MAX))
    single = [f for f in faults if f in FAULTS]
    return Plan(
        loaded={f: runs if f in FAULTS else slow for f in faults},
        idle=dict.fromkeys(single, _default(arguments.idle_runs, max(1, runs // 4))),
        delta=dict.fromkeys(single, _default(arguments.delta_runs, 0 if quick else DELTA_RUNS)),
        bridge=dict.fromkeys(single if quick else faults, _default(arguments.bridge_runs, 1 if quick else BRIDGE_RUNS)),
    )


def measure(arguments: argparse.Namespace) -> Report:
    """Run everything and check what may never happen."""
    if os.geteuid() != 0:
        raise SystemExit("failover needs root: it makes network namespaces")
    wanted, kind = plan(arguments), arguments.broker
    seed = _default(arguments.seed, random.SystemRandom().randrange(2**32))
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="fenceline-failover-") as folder:
        with Site(Path(folder) / "site", kind) as site:
            offsets = site.puback_offset_ms(ALLOWED[1])
            for name in ALLOWED:
                site.network.join_slow(site.device, site.brokers[name].place, delay_ms=SLOW_MS, loss=SLOW_LOSS, seed=seed)
            loaded, idle = with_agent(site, wanted.loaded, wanted.idle, seed)
            bridged = with_bridge(site, wanted.bridge, seed)
        delta = with_delta_lake(Path(folder) / "delta", kind, wanted.delta, seed)
    return _report(kind, seed, offsets, loaded, idle, delta, bridged)


def _default(asked: int | None, otherwise: int) -> int:
    return otherwise if asked is None else asked


def with_agent(site: Site, loaded: Mapping[str, int], idle: Mapping[str, int], seed: int) -> tuple[dict[str, Series], dict[str, Series]]:
    """The agent's runs, under load and idle."""
    agent, sensors = Agent(site), Sensors(site, DEVICE)
    try:
        trial = Trial(site, agent, sensors, seed)
        found = {fault: trial.series(fault, runs) for fault, runs in loaded.items() if runs and fault in FAULTS}
        found_idle = {fault: trial.series(fault, runs, idle=True) for fault, runs in idle.items() if runs}
        # Last: after a slow link deadlines are longer for a while, as they should be.
        found |= {fault: trial.series(fault, runs) for fault, runs in loaded.items() if runs and fault not in FAULTS}
    except Exception:
        logging.getLogger(__name__).error("agent's log ends: %s", agent.log()[-5_000:])
        raise
    finally:
        sensors.close()
        agent.close()
    _check({**found, **{f"idle {name}": series for name, series in found_idle.items()}}, seed)
    return found, found_idle


def with_delta_lake(folder: Path, kind: str, runs: Mapping[str, int], seed: int) -> dict[str, Series]:
    """The agent's runs under load with the real lake, which two ingests write to."""
    if not any(runs.values()):
        return {}
    lake = DeltaLake(folder / "lake")
    with Site(folder / "site", kind, lake.writer) as site:
        found, _ = with_agent(site, runs, {}, seed)
        readings = len(site.lake.committed)
    if lake.rows() != (readings, readings):
        raise RuntimeError(f"the Delta lake has {lake.rows()} rows and different readings, {readings} were stored; seed {seed}")
    return found


def with_bridge(site: Site, runs: Mapping[str, int], seed: int) -> dict[str, Series]:
    """The same faults with a Mosquitto bridge."""
    if not any(runs.values()):
        return {}
    bridge, sensors = Bridge(site), Sensors(site, BRIDGE)
    try:
        site.lake.forget()
        trial = Trial(site, bridge, sensors, seed)
        return {fault: trial.series(fault, count) for fault, count in runs.items() if count}
    finally:
        sensors.close()
        bridge.close()


def _check(found: dict[str, Series], seed: int) -> None:
    for name, series in found.items():
        if series.lost or series.duplicates or series.foreign_bytes:
            raise RuntimeError(f"a promise is broken, fault {name}, seed {seed}: {series.numbers()}")


def _report(
    kind: str,
    seed: int,
    offsets: Sequence[float],
    loaded: dict[str, Series],
    idle: dict[str, Series],
    delta: dict[str, Series],
    bridged: dict[str, Series],
) -> Report:
    groups = (("", loaded), ("idle: ", idle), ("delta: ", delta), ("bridge: ", bridged))
    rows = [_row(f"{group}{name}", series.numbers()) for group, all_ in groups for name, series in all_.items()]
    middle = offsets[len(offsets) // 2]
    notes = [
        f"p50, p99, max: from the fault to the first PUBACK on the standby, at {RATE:,.0f} readings/s; idle: from the capture of the first",
        "reading after the fault. lossy: a reading's age at its commit. foreign_only: from the return of an allowed endpoint.",
        "gap: longest time without a commit at the lake, which is in memory; delta: two ingests on one Delta table, counted afterwards.",
        "copies: blocks that came more than once (bridge: readings, and they are stored again).",
        f"lossy: {2 * SLOW_MS:g} ms round trip and {100 * SLOW_LOSS:g} % loss each way, a run is {LOSSY_S:g} s.",
        f"Times are a subscriber's at the standby: {middle:+.2f} ms (median; {offsets[0]:+.2f} to {offsets[-1]:+.2f}) after the PUBACK.",
        f"Agent: backoff at most {BACKOFF_S_MAX:g} s, receipts awaited {RECEIPT_TIMEOUT_S:g} s. Bridge: keepalive 5 s, restart after 1 s.",
        f"Brokers {kind}, mTLS. Seed {seed}.",
    ]
    numbers: dict[str, Any] = {
        "seed": seed,
        "broker": kind,
        "readings_per_s": RATE,
        "subscriber_after_puback_ms": {"min": round(offsets[0], 3), "p50": round(middle, 3), "max": round(offsets[-1], 3)},
        "faults": {name: series.numbers() for name, series in loaded.items()},
        "idle": {name: series.numbers() for name, series in idle.items()},
        "delta_lake": {name: series.numbers() for name, series in delta.items()},
        "mosquitto_bridge": {name: series.numbers() for name, series in bridged.items()},
    }
    return Report("Failover: from a fault to the first PUBACK on the standby", COLUMNS, rows, numbers, notes)


def _row(name: str, n: dict[str, Any]) -> list[Cell]:
    times = [n[key] if n[key] is not None else "-" for key in ("p50_ms", "p99_ms", "max_ms", "gap_p50_ms", "gap_max_ms")]
    counts = [n[key] for key in ("lost", "duplicates", "copies_received", "foreign_bytes")]
    return [name, n["runs"], *times, *counts, float(n["endpoint_changes_per_min"])]


if __name__ == "__main__":
    main(__doc__, measure, options)
