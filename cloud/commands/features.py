"""`fenceline features`: the newest features into the online store."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from cloud import config
from cloud.commands.output import add_command, add_group, iso_time


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    features = add_group(commands, "features", "online features: what a service reads about an entity right now")
    bring = add_command(features, "materialise", _materialise, "bring the newest features of each entity into the online store")
    bring.add_argument("--view", metavar="NAME", help="a feature view (default: all that go online)")
    bring.add_argument("--until", type=iso_time, metavar="ISO_TIME", help="leave later event times for a later run")
    bring.add_argument("--full", action="store_true", help="take all rows, not only those that are new")
    bring.add_argument("--rebuild", action="store_true", help="take all values away first, also those of entities that are gone")
    live = add_command(features, "live", _live, "push the windows of readings that have just reached the lake, until Ctrl-C")
    live.add_argument("--skip-history", action="store_true", help="on the first run, start with what comes from now on")
    live.add_argument("--once", action="store_true", help="push what is there, and end")


def _materialise(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    words = ["--view", args.view] if args.view else []
    words += ["--until", args.until.isoformat()] if args.until else []
    flags = [f"--{name}" for name in ("full", "rebuild", "json") if getattr(args, name)]
    _run(["pipelines.materialise", "--project", str(settings.project), *words, *flags])


def _live(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    flags = [f"--{name}" for name in ("skip-history", "once", "json") if getattr(args, name.replace("-", "_"))]
    _run(["pipelines.live", "--project", str(settings.project), "--state", str(settings.state_dir), *flags])


def _run(command: list[str]) -> NoReturn:
    """Go on as a module of the pipelines, which this room must not import: signals and exit code are its own."""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.execve(sys.executable, [sys.executable, "-m", *command], {**os.environ, "PYTHONPATH": path})
