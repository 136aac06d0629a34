"""`fenceline up|status|ui`: the development stack."""

from __future__ import annotations

import argparse
import signal
import time
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, pair, positive, print_devices, print_json, print_table, say, show
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from cloud.watch import Quality


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    up = add_command(commands, "up", _up, "run the development stack until Ctrl-C")
    up.add_argument("--ports", type=_ports, default={}, metavar="NAME=PORT,…", help="other ports, for example sensors=2883,eu=28831")
    up.add_argument("--free-ports", action="store_true", help="take ports that are free")
    add_command(commands, "status", _status, "what the stack, the fleet and the lake look like")
    ui = add_command(commands, "ui", _ui, "open the MLflow UI")
    ui.add_argument("--no-open", action="store_true", help="only print the address")


def _up(args: argparse.Namespace) -> int:
    from cloud.parts import free_ports
    from cloud.stack import Stack, addresses

    settings = config.load(args.project, args.state)
    settings = free_ports(settings).with_ports(args.ports) if args.free_ports else settings.with_ports(args.ports)
    stack = Stack(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stack.request_stop())
    say(f"starting the stack in {settings.state_dir}")
    try:
        stack.start()
        stack.wait_ready()
        if args.json:
            print_json(stack.description())
        else:
            print_table(("part", "address"), list(addresses(settings).items()))
            print(f"API token: {settings.token_path}\nCtrl-C stops all of it.", flush=True)
        stack.wait()
    finally:
        stack.stop()
    say("stopped")
    return 0


def _status(args: argparse.Namespace) -> int:
    from cloud.status import collect

    found = collect(config.load(args.project, args.state))
    if args.json:
        print_json(found)
        return 0 if found["audit_broken_at"] is None else 1
    stack = found["stack"]
    running = "does not run (fenceline up)" if stack is None else f"runs, pid {stack['pid']}"
    print(f"the stack {running}; state in {found['state_dir']}")
    if stack is not None:
        print_table(("part", "address"), list(stack["addresses"].items()))
    print_devices(found["devices"])
    rows = [(n, r.rows, r.quarantined_rows, r.blocks, r.duplicates, sum(r.refused.values())) for n, r in found["ingest"].items()]
    print_table(("ingest", "rows", "in quarantine", "blocks", "duplicates", "refused"), rows)
    print_table(("lake stream", "lane", "version"), [(s, lane, v) for s, lanes in found["lake"].items() for lane, v in lanes.items()])
    if found["refused"]:
        print_table(("refused because", "times, ever"), list(found["refused"].items()))
    _print_quality(found["quality"])
    if found["rollout"]:
        last = found["rollout"]
        show(f"rollout  {last['id']}: {last['target']} {last['status']} {last['moved']}/{last['devices']} {last['reason']}")
    if found["audit_broken_at"] is not None:
        say(f"the audit trail was changed: entry {found['audit_broken_at']} does not fit")
        return 1
    return 0


def _print_quality(quality: Quality | None) -> None:
    if quality is None:
        return
    if quality.failure:
        print(f"ALARM    the last look at the lake failed: {quality.failure}")
    if not quality.at_us:
        return
    lost = f"{quality.lost_blocks} blocks lost, {quality.unaccounted_blocks} unaccounted"
    ago_s = round(time.time() - quality.at_us / 1e6)
    held = f"{quality.quarantined_readings} readings in quarantine"
    print(f"lake     {100 * quality.share:.4f} percent complete {ago_s} s ago: {held}, {lost}")
    for line in (*quality.levels, *(f"unaccounted: {gap}" for gap in quality.gaps)):
        show(f"ALARM    {line}")


def _ui(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    running = config.running_stack(settings) is not None
    if args.json:
        print_json({"url": settings.mlflow_url, "running": running})
        return 0
    print(settings.mlflow_url)
    if not running:
        raise ConfigError("the stack does not run; start it with: fenceline up")
    if not args.no_open:
        import webbrowser

        webbrowser.open(settings.mlflow_url)
    return 0


def _ports(text: str) -> dict[str, int]:
    pairs = [pair(part) for part in text.split(",")]
    return {name: positive(port) for name, port in pairs}
