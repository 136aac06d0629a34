"""`fenceline ingest`: the workers that bring a region's blocks into the lake."""

from __future__ import annotations

import argparse
import logging
import signal
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, positive, say
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from cloud.config import Region, Settings


STACKS_OWN = "ingest"


def declare(commands: Any) -> None:
    """Declare the command."""
    ingest = add_command(commands, "ingest", _ingest, "bring the blocks of a region's broker into the lake, until Ctrl-C or SIGTERM")
    ingest.add_argument("--region", required=True, help="a region of fenceline.toml")
    ingest.add_argument("--workers", type=positive, metavar="N", help="processes that share the work (default: ingest.workers)")
    ingest.add_argument(
        "--worker-name",
        default=STACKS_OWN,
        metavar="NAME",
        help="sessions are NAME-1, NAME-2 …; another on each host (default: ingest)",
    )
    ingest.add_argument(
        "--only",
        type=_numbers,
        metavar="I,…",
        help="run only these of the N here: brokers without shared subscriptions, several hosts",
    )


def _ingest(args: argparse.Namespace) -> int:
    from cloud.ingest import serve
    from cloud.workers import Pool, Worker, command

    settings = config.load(args.project, args.state)
    region = settings.region(args.region)
    if args.worker_name == STACKS_OWN and config.running_stack(settings) is not None:
        raise ConfigError(
            f"the stack that runs on {settings.state_dir} ingests region {region.name} already, and sessions of one name cut each other "
            "off; stop it, or give another --worker-name"
        )
    count = args.workers or settings.ingest.workers
    workers = [Worker(number, count, args.worker_name) for number in args.only or range(1, count + 1)]
    logging.getLogger().setLevel(logging.INFO)
    if len(workers) == 1:
        serve(settings, args.region, workers[0])
        return 0
    _check(settings, region, [worker.name for worker in workers])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    say(f"{len(workers)} workers for region {args.region}; Ctrl-C ends them")
    Pool([command(settings, args.region, worker) for worker in workers], stop).run()
    return 0


def _check(settings: Settings, region: Region, names: Sequence[str]) -> None:
    """Raise the ConfigError that each worker would end with, and be started again, for ever."""
    from cloud.gate import load_contracts, load_zones

    load_contracts(settings)
    load_zones(settings)
    if region.tls is not None:
        for name in names:
            region.tls.context(name)


def _numbers(text: str) -> list[int]:
    numbers = [positive(part) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):  # two of one session would cut each other off for ever
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of different workers")
    return numbers
