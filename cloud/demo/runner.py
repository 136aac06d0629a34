"""`fenceline demo`: the whole journey in a temporary directory, and a report of what it came to.

    from cloud.demo import runner
    runner.add_arguments(parser)        # an argparse parser
    code = runner.run(parser.parse_args())

`run` shows progress on stdout (with `--json` on stderr, and the report on stdout), writes the report file, and returns 0 if every
promise was kept, 1 if one was broken or a part failed, 2 for a wrong argument, 130 after Ctrl-C. It leaves no process behind. After a
failure the directory with all logs stays, and is named.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import msgspec
from rich.console import Console

from cloud import config, keys
from cloud.config import Settings
from cloud.demo import phases, scenario
from cloud.demo.display import Display
from cloud.demo.house import House
from cloud.demo.outcome import stored_by
from cloud.demo.report import Report, as_table, write_report
from cloud.demo.scenario import Scenario
from cloud.demo.verify import verify
from cloud.demo.workspace import make_project
from cloud.gate import load_zones
from cloud.parts import free_ports
from cloud.stack import Stack
from edge_agent.contract.errors import ConfigError, FencelineError

log = logging.getLogger(__name__)

REPORT = Path("build/demo-report.json")
MODEL = "turbofan-rul"
SEED, DEVICES, ENGINES = 7, 5, 15
DEVICES_MAX, ENGINES_MAX = 50, 500


@dataclass(frozen=True)
class Options:
    """What the user asked for. `overrides` are `section.key=value` for the pipeline's parameters."""

    source: Path
    files: Path | None = None
    seed: int = SEED
    devices: int = DEVICES
    engines: int = ENGINES
    overrides: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's arguments, for the command line of `fenceline`; `project` (the one to copy) is its global one."""
    parser.add_argument(
        "--cmapss", type=Path, metavar="DIR", help="use NASA's train_FD001, test_FD001 and RUL_FD001 (.txt or .txt.gz) in DIR"
    )
    parser.add_argument("--report", type=Path, default=REPORT, metavar="PATH", help=f"where the report goes (default: {REPORT})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"names the simulated fleet (default: {SEED})")
    parser.add_argument("--devices", type=int, default=DEVICES, help=f"simulated aircraft (default: {DEVICES})")
    parser.add_argument("--engines", type=int, default=ENGINES, help=f"simulated engines that are run to failure (default: {ENGINES})")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="change the pipeline's parameters, such as train.folds=2"
    )
    parser.add_argument("--keep", action="store_true", help="keep the directory with the stack's state and all logs")
    parser.add_argument("--json", action="store_true", help="print the report as JSON; progress goes to stderr")


def run(args: argparse.Namespace) -> int:
    """Run the demonstration; the exit code."""
    console = Console(stderr=args.json, width=None if sys.stdout.isatty() else 140)
    display = Display(console)
    directory = Path(tempfile.mkdtemp(prefix="fenceline-demo-"))
    keep = args.keep
    try:
        with _terminated_like_interrupted():
            report = demonstrate(_options(args), directory, display)
        keep = keep or bool(report.broken)
        write_report(report, args.report)
    except ConfigError as e:
        keep = keep or (directory / "state/logs").exists()  # it had started
        console.print(f"demo: {e}", style="bold red", markup=False, highlight=False)
        return 2
    except FencelineError as e:
        keep = True
        console.print(f"demo failed: {e}", style="bold red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        console.print("demo: stopped")
        return 130
    except BaseException:
        keep = True
        raise
    finally:
        if keep:
            console.print(
                f"state and logs are kept in {directory} (logs: {directory}/logs and {directory}/state/logs)", markup=False, soft_wrap=True
            )
        else:
            shutil.rmtree(directory, ignore_errors=True)
    console.print(as_table(report))
    console.print(f"report: {args.report}", markup=False, highlight=False)
    if args.json:
        Console(soft_wrap=True).print_json(msgspec.json.encode(report).decode())
    return 1 if report.broken else 0


def demonstrate(options: Options, directory: Path, display: Display) -> Report:
    """The whole journey in `directory`; its report.

    Raises:
        FencelineError: a part failed, so that there is nothing to report; logs are in `directory`.
    """
    started = time.monotonic()
    logs = directory / "logs"
    logs.mkdir(parents=True)
    with _logging_to(logs / "demo.log"):
        with display.phase("start", "a project, brokers in two regions, ingest, release server, MLflow, API, and the fleet"):
            project = make_project(options.source, directory / "project")
            settings = free_ports(config.load(project, directory / "state"))
            plan = _plan(options, settings)
            keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
            house = House(settings, Stack(settings), display, logs)
        try:
            report = _run_phases(house, plan, options, display)
        finally:
            with display.phase("stop", "agents and stack end in order"):
                house.close()
    report.seconds_by_phase = dict(display.seconds)
    report.seconds_total = round(time.monotonic() - started, 2)
    return report


def _run_phases(house: House, plan: Scenario, options: Options, display: Display) -> Report:
    readings = f"{plan.readings('collect'):,} readings of {len(plan.train)} engines run to failure, on {len(plan.gateways)} gateways"
    with display.phase("fleet", f"stack on free ports, {len(plan.gateways)} agents"):
        _start(house, plan)
    with display.phase("collect", readings):
        outage = phases.collect(house, plan)
    with display.phase("train", "snapshot, features, dataset, train, evaluate, export, register"):
        trained = phases.train(house, list(options.overrides))
    with display.phase("release", "a signed bundle, on its way to every device"):
        ref = phases.release_and_roll_out(house, MODEL)
    with display.phase("score", f"{plan.readings('score'):,} readings of {len(plan.test)} new engines, scored on the devices"):
        phases.score(house, plan, ref)
    with display.phase("verify", "lake against oracle, devices against cloud, predictions against truth"):
        return verify(house, plan, trained, ref, outage.finish(stored_by(house.lake)))


def _start(house: House, plan: Scenario) -> None:
    """Register the devices, start stack and agents, and wait until sensors may send."""
    for gateway in plan.gateways:
        house.add_device(gateway.device, gateway.place)
    house.stack.start()
    house.stack.wait_ready()
    for agent in house.agents:
        agent.start()
    house.wait_for_sensors()


def _plan(options: Options, settings: Settings) -> Scenario:
    zones = load_zones(settings)
    if options.files is not None:
        return scenario.recorded(options.files, options.seed, zones)
    return scenario.simulated(options.seed, options.devices, options.engines, zones)


def _options(args: argparse.Namespace) -> Options:
    if not 1 <= args.devices <= DEVICES_MAX or not args.devices <= args.engines <= ENGINES_MAX:
        raise ConfigError(
            f"--devices {args.devices} must be 1 to {DEVICES_MAX}, --engines {args.engines} at least that and at most {ENGINES_MAX}"
        )
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed} must not be negative")
    source = config.find_project(getattr(args, "project", None))
    return Options(source, args.cmapss, args.seed, args.devices, args.engines, tuple(args.set))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Everything that the demonstration's own process logs, in a file instead of between the lines of progress."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    root = logging.getLogger()
    others, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.handlers[:] = others
        root.setLevel(level)
        handler.close()


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM ends the demonstration as Ctrl-C does: in order."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
