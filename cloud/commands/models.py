"""`fenceline train|release|rollout|keys`: from a training run to the model on the devices."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, positive, print_json, print_table, say, show

if TYPE_CHECKING:
    from cloud.waves import Rollout

ROLLOUT_POLL_S = 0.5


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    train = add_command(commands, "train", _train, "run the training pipeline on Ray")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change params.yaml first; may be repeated")
    train.add_argument("--ray-address", metavar="URL", help="a Ray cluster (default: a local one)")
    release = add_command(commands, "release", _release, "sign a registered model as a bundle that devices may fetch")
    release.add_argument("model", metavar="MODEL@ALIAS", help="for example turbofan-rul@champion, or @3 for version 3")
    release.add_argument("--functions", metavar="MODULE", help="the installed module with the functions of its features")
    rollout = add_group(commands, "rollout", "bring a release to the fleet")
    start = add_command(rollout, "start", _rollout_start, "move devices to a release, wave after wave")
    start.add_argument("model", metavar="MODEL[@VERSION]", help="a released model (default: its newest release)")
    start.add_argument("--device", action="append", help="only these; may be repeated")
    start.add_argument("--canary", type=float, default=1.0, help="devices in the first wave: a number, or a share below 1; 0: all")
    start.add_argument("--failures-allowed", type=int, default=0, metavar="N")
    start.add_argument("--wave-timeout", type=float, default=600.0, metavar="S")
    start.add_argument("--wait", action="store_true", help="return when it is complete (0) or has failed or paused (1)")
    status = add_command(rollout, "status", _rollout_status, "how far a rollout is")
    status.add_argument("id", type=positive, nargs="?", help="default: the last one that had devices to move")
    undo = add_command(rollout, "undo", _rollout_undo, "give every device its previous bundle back")
    undo.add_argument("id", type=positive, nargs="?", help="default: the last one that had devices to move")
    keys = add_group(commands, "keys", "signing keys")
    add_command(keys, "init", _keys_init, "make the signing keys and an empty release repository")


def _train(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    running = config.running_stack(settings) is not None
    command = [sys.executable, "-m", "pipelines.run", "--project", str(settings.project), "--state", str(settings.state_dir)]
    command += ["--mlflow", settings.mlflow_url] if running else []
    command += [word for assignment in args.set for word in ("--set", assignment)]
    command += ["--ray-address", args.ray_address] if args.ray_address else []
    command += ["--json"] if args.json else []
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it got the same Ctrl-C, and ends its stages
            continue
        if code < 0:
            say(f"fenceline: the pipeline was ended by signal {-code}")
            return 1
        return code


def _release(args: argparse.Namespace) -> int:
    from cloud.release import release
    from edge_agent.installed_functions import load_functions

    settings = config.load(args.project, args.state)
    model, alias = _model(args.model, "champion")
    url = settings.mlflow_url if config.running_stack(settings) else f"sqlite:///{settings.mlflow_dir}/mlflow.db"
    ref = release(
        model,
        alias,
        mlflow_url=url,
        keys_dir=settings.keys_dir,
        releases_dir=settings.releases_dir,
        now=datetime.now(UTC),
        progress=say,
        functions=load_functions(args.functions),
    )
    if args.json:
        print_json(ref)
    else:
        print(f"released {ref.model} version {ref.model_version} as {ref.target}\nsha256 {ref.sha256}")
    return 0


def _rollout_start(args: argparse.Namespace) -> int:
    from cloud import release, rollout
    from cloud.fleet import Fleet
    from cloud.waves import Status

    settings = config.load(args.project, args.state)
    model, version = _model(args.model, "")
    ref = release.find(settings.releases_dir, model, version or None)
    fleet = Fleet(settings.fleet_db)
    started = rollout.start(
        settings,
        fleet,
        ref,
        now=time.time(),
        devices=args.device,
        canary=args.canary,
        failures_allowed=args.failures_allowed,
        wave_timeout_s=args.wave_timeout,
    )
    if config.running_stack(settings) is None:
        say("the stack does not run, so devices hear of it later: fenceline up")
    while args.wait and started.status in (Status.RUNNING, Status.UNDOING):
        time.sleep(ROLLOUT_POLL_S)
        started = rollout.Controller(settings, fleet).advance(started.id, time.time())  # also without a control loop it pauses in time
    _print_rollout(started, args.json)
    return 1 if args.wait and started.status is not Status.COMPLETE else 0


def _rollout_status(args: argparse.Namespace) -> int:
    from cloud import rollout

    _print_rollout(rollout.status(config.load(args.project, args.state), args.id), args.json)
    return 0


def _rollout_undo(args: argparse.Namespace) -> int:
    from cloud import rollout
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    _print_rollout(rollout.undo(settings, Fleet(settings.fleet_db), args.id, now=time.time()), args.json)
    return 0


def _keys_init(args: argparse.Namespace) -> int:
    from cloud import keys

    settings = config.load(args.project, args.state)
    root = keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    if args.json:
        print_json({"keys_dir": settings.keys_dir, "root": root})
    else:
        print(f"keys in {settings.keys_dir}: whoever has them can run code on every gateway; keep root.pem offline")
        print(f"root for devices: {root}")
    return 0


def _model(text: str, default: str) -> tuple[str, str]:
    model, _, version = text.partition("@")
    return model, version or default


def _print_rollout(found: Rollout, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    where = f", wave {found.wave + 1} of {found.waves}" if found.waves else ""
    show(f"rollout {found.id}: {found.ref.target} is {found.status}{where}{'; ' if found.reason else ''}{found.reason}")
    rows = [(name, m.wave + 1, m.place, m.failure or None) for name, m in found.members.items()]
    print_table(("device", "wave", "place", "failure"), rows)
