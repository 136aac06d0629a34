"""`fenceline`: the commands of operators and of the cloud.

Exit codes: 0 done, 1 it failed or a promise is broken, 2 a setting or the command line has to change. What reports something takes
`--json`: one document on stdout, everything else on stderr. Heavy modules are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cloud import config
from edge_agent.contract.errors import ConfigError, FencelineError

if TYPE_CHECKING:
    from cloud.config import Settings
    from cloud.enrol import Position
    from cloud.rollout import Rollout
    from edge_agent.contract.stream import StreamContract

Command = Callable[[argparse.Namespace], int]

ROLLOUT_POLL_S = 0.5
PIPE_WIDTH = 140  # of tables that no terminal shows


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    args = _parser("demo" in words).parse_args(words)
    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return int(args.command(args))
    except ConfigError as e:
        print(f"fenceline: {e}", file=sys.stderr)
        return 2
    except FencelineError as e:
        print(f"fenceline: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fenceline: stopped", file=sys.stderr)
        return 130


# --- the command line ---


def _parser(with_demo: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fenceline", description="Train in the cloud, run at the edge, keep data inside the fence.")
    parser.add_argument("--project", type=Path, help="directory with pipelines/dvc.yaml or fenceline.toml (default: here and upward)")
    parser.add_argument("--state", type=Path, help="state directory (default: FENCELINE_STATE, then fenceline.toml)")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_stack_commands(commands)
    _add_data_commands(commands)
    _add_model_commands(commands)
    _add_fleet_commands(commands)
    _add_policy_commands(commands)
    _add_demo(commands, with_demo)
    return parser


def _add(commands: Any, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=function)
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _group(commands: Any, name: str, text: str) -> Any:
    return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")


def _add_stack_commands(commands: Any) -> None:
    up = _add(commands, "up", _up, "run the development stack until Ctrl-C")
    up.add_argument("--ports", type=_ports, default={}, metavar="NAME=PORT,…", help="other ports, for example sensors=2883,eu=28831")
    up.add_argument("--free-ports", action="store_true", help="take ports that are free")
    _add(commands, "status", _status, "what the stack, the fleet and the lake look like")
    ui = _add(commands, "ui", _ui, "open the MLflow UI")
    ui.add_argument("--no-open", action="store_true", help="only print the address")


def _add_data_commands(commands: Any) -> None:
    replay = _add(commands, "replay", _replay, "publish recorded rows as sensor messages")
    replay.add_argument("file", type=Path, help="CSV, text or Parquet; .gz too")
    _mapping_arguments(replay)
    replay.add_argument("--device", action="append", default=[], help="the gateway; repeat it to share the entities out (default: all)")
    replay.add_argument("--rate", type=float, default=0.0, metavar="ROWS_PER_S", help="default: as fast as the broker takes them")
    replay.add_argument("--limit", type=int, metavar="ROWS", help="stop after that many rows")
    bring = _add(commands, "import-buffer", _import_buffer, "bring the buffer of a dead device into the lake, as its uplink would have")
    bring.add_argument("file", type=Path, metavar="FILE", help="its buffer.db, with buffer.db-wal beside it")
    bring.add_argument("--key-file", type=Path, metavar="FILE", help="the device's keys, if its blocks are encrypted")
    bring.add_argument("--region", action="append", default=[], help="only this region may store; may be repeated (default: all)")
    labels = _group(commands, "labels", "what models learn to say")
    add = _add(labels, "add", _labels_add, "add or replace labels")
    add.add_argument("file", type=Path)
    _mapping_arguments(add)
    what = add.add_mutually_exclusive_group(required=True)
    what.add_argument("--run-to-failure", action="store_true", help="the file ends with each entity's failure: label = cycles left")
    what.add_argument("--column", metavar="NAME", help="the label is this column")
    clock = _group(commands, "clock", "the devices' clocks")
    _add(clock, "fix", _clock_fix, "give rows that were stored before a device's clock was set their true times")


def _mapping_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--stream", help="the stream (default: the only one)")
    command.add_argument(
        "--mapping", metavar="NAME", help="a mapping of contracts/mappings, or a path (default: columns named like fields)"
    )
    command.add_argument("--set", type=_pair, action="append", default=[], metavar="FIELD=COLUMN", help="change the mapping; repeatable")
    command.add_argument("--entity-prefix", metavar="TEXT", help="put this before the entity's name")
    command.add_argument("--start", type=_time, metavar="ISO_TIME", help="the time of cycle 0, for mappings that count")


def _add_model_commands(commands: Any) -> None:
    train = _add(commands, "train", _train, "run the training pipeline on Ray")
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change params.yaml first; may be repeated")
    train.add_argument("--ray-address", metavar="URL", help="a Ray cluster (default: a local one)")
    release = _add(commands, "release", _release, "sign a registered model as a bundle that devices may fetch")
    release.add_argument("model", metavar="MODEL@ALIAS", help="for example turbofan-rul@champion, or @3 for version 3")
    rollout = _group(commands, "rollout", "bring a release to the fleet")
    start = _add(rollout, "start", _rollout_start, "move devices to a release, wave after wave")
    start.add_argument("model", metavar="MODEL[@VERSION]", help="a released model (default: its newest release)")
    start.add_argument("--device", action="append", help="only these; may be repeated")
    start.add_argument("--canary", type=float, default=1.0, help="devices in the first wave: a number, or a share below 1; 0: all")
    start.add_argument("--failures-allowed", type=int, default=0, metavar="N")
    start.add_argument("--wave-timeout", type=float, default=600.0, metavar="S")
    start.add_argument("--wait", action="store_true", help="return when it is complete (0) or has failed or paused (1)")
    status = _add(rollout, "status", _rollout_status, "how far a rollout is")
    status.add_argument("id", type=int, nargs="?", help="default: the last one")
    undo = _add(rollout, "undo", _rollout_undo, "give every device its previous bundle back")
    undo.add_argument("id", type=int, nargs="?", help="default: the last one")
    keys = _group(commands, "keys", "signing keys")
    _add(keys, "init", _keys_init, "make the signing keys and an empty release repository")


def _add_fleet_commands(commands: Any) -> None:
    device = _group(commands, "device", "the fleet")
    add = _add(device, "add", _device_add, "register a device and write its agent.toml")
    add.add_argument("name")
    add.add_argument("--out", type=Path, metavar="FILE", help="agent.toml (default: STATE/devices/NAME/agent.toml)")
    add.add_argument("--home", type=_position, metavar="LAT,LON", help="where the gateway stands (default: it moves)")
    _add(device, "list", _device_list, "all devices and what they run")
    broker = _group(commands, "broker", "brokers of your own")
    acl = _add(broker, "acl", _broker_acl, "print the ACL file of a region's Mosquitto: who may publish and subscribe what")
    acl.add_argument("--region", required=True, help="an endpoint name of zones.geojson")
    acl.add_argument(
        "--cloud",
        action="append",
        default=[],
        metavar="CN",
        help="a certificate of the cloud; may be repeated (default: ingest-1, control-1)",
    )


def _add_policy_commands(commands: Any) -> None:
    policy = _group(commands, "policy", "the zone policy: where records may go")
    publish = _add(policy, "publish", _policy_publish, "sign a zones document, put it into force, and ask every device for it")
    publish.add_argument("file", type=Path)
    _add(policy, "show", _policy_show, "the policy in force, and the devices that do not work under it yet")


def _add_demo(commands: Any, wanted: bool) -> None:
    """The demo knows its own arguments; its modules are heavy, so only who calls it imports them."""
    text = "the whole journey on this machine, in a temporary directory"
    demo = commands.add_parser("demo", help=text, description=text)
    if wanted:
        from cloud.demo.runner import add_arguments, run

        add_arguments(demo)
        demo.set_defaults(command=run)


# --- commands ---


def _up(args: argparse.Namespace) -> int:
    from cloud.parts import free_ports
    from cloud.stack import Stack, addresses

    settings = config.load(args.project, args.state)
    settings = free_ports(settings).with_ports(args.ports) if args.free_ports else settings.with_ports(args.ports)
    stack = Stack(settings)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stack.request_stop())
    _say(f"starting the stack in {settings.state_dir}")
    try:
        stack.start()
        stack.wait_ready()
        if args.json:
            _print_json(stack.description())
        else:
            _print_table(("part", "address"), list(addresses(settings).items()))
            print(f"API token: {settings.token_path}\nCtrl-C stops all of it.", flush=True)
        stack.wait()
    finally:
        stack.stop()
    _say("stopped")
    return 0


def _status(args: argparse.Namespace) -> int:
    from cloud.status import collect

    found = collect(config.load(args.project, args.state))
    if args.json:
        _print_json(found)
        return 0 if found["audit_broken_at"] is None else 1
    stack = found["stack"]
    running = "does not run (fenceline up)" if stack is None else f"runs, pid {stack['pid']}"
    print(f"the stack {running}; state in {found['state_dir']}")
    if stack is not None:
        _print_table(("part", "address"), list(stack["addresses"].items()))
    _print_devices(found["devices"])
    rows = [(name, r.rows, r.blocks, r.duplicates, sum(r.refused.values())) for name, r in found["ingest"].items()]
    _print_table(("ingest", "rows", "blocks", "duplicates", "refused"), rows)
    _print_table(("lake stream", "lane", "version"), [(s, lane, v) for s, lanes in found["lake"].items() for lane, v in lanes.items()])
    if found["refused"]:
        _print_table(("refused because", "blocks, ever"), list(found["refused"].items()))
    if found["rollout"]:
        last = found["rollout"]
        print(f"rollout  {last['id']}: {last['target']} {last['status']} {last['moved']}/{last['devices']} {last['reason']}")
    if found["audit_broken_at"] is not None:
        print(f"the audit trail was changed: entry {found['audit_broken_at']} does not fit", file=sys.stderr)
        return 1
    return 0


def _ui(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    running = config.running_stack(settings) is not None
    if args.json:
        _print_json({"url": settings.mlflow_url, "running": running})
        return 0
    print(settings.mlflow_url)
    if not running:
        raise ConfigError("the stack does not run; start it with: fenceline up")
    if not args.no_open:
        import webbrowser

        webbrowser.open(settings.mlflow_url)
    return 0


def _replay(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from cloud import brokers
    from cloud.fleet import Fleet
    from cloud.replay import SensorBroker, replay

    settings = config.load(args.project, args.state)
    contract = _contract(settings, args.stream)
    fleet = Fleet(settings.fleet_path).devices()
    devices = args.device or fleet
    for stranger in sorted(set(devices) - set(fleet)):
        _say(f"there is no device {stranger!r} in this fleet: without a gateway that listens, the broker drops its messages")
    if not devices:
        raise ConfigError("the fleet has no device to play the sensors of; add one with: fenceline device add NAME")
    broker = SensorBroker(
        settings.sensors.host, settings.sensors.port, brokers.SENSOR_USER, brokers.password(settings, brokers.SENSOR_USER)
    )
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("rows acknowledged", total=None)
        done = replay(
            args.file,
            _mapping(args, settings, contract),
            contract,
            broker,
            devices,
            rows_per_s=args.rate,
            rows_max=args.limit,
            progress=lambda acknowledged, total: bar.update(task, completed=acknowledged, total=total),
        )
    if args.json:
        _print_json(done)
    else:
        print(f"{done.acknowledged} of {done.rows} rows acknowledged in {done.seconds:.1f} s")
    return 0 if done.acknowledged == done.rows else 1


def _import_buffer(args: argparse.Namespace) -> int:
    from cloud.buffer_import import BufferImport, document

    done = BufferImport(config.load(args.project, args.state), args.region).run(args.file, args.key_file)
    if args.json:
        _print_json(document(done))
    else:
        print(f"{done.stored_blocks} of {done.blocks} blocks stored ({done.stored_rows} rows), {done.duplicates} were in the lake already")
        for reason, blocks in done.refused.items():
            print(f"{blocks} blocks refused: {reason}; fenceline status and the audit trail say more")
        if done.damaged:
            print(f"{done.damaged} blocks are damaged; copy the file again if you can")
    return 0 if done.complete else 1


def _labels_add(args: argparse.Namespace) -> int:
    from cloud import labels
    from cloud.lake import Lake

    settings = config.load(args.project, args.state)
    contract = _contract(settings, args.stream)
    with_fields = args.mapping or args.run_to_failure
    mapping = _mapping(args, settings, contract) if with_fields else labels.plain(contract.entity, contract.event_time)
    table = labels.run_to_failure(args.file, mapping) if args.run_to_failure else labels.from_column(args.file, mapping, args.column)
    total = labels.add(Lake(settings.lake_dir), contract.stream, table)
    if args.json:
        _print_json({"stream": contract.stream, "added": table.num_rows, "labels": total})
    else:
        print(f"{table.num_rows} labels read; stream {contract.stream} has {total} now")
    return 0


def _clock_fix(args: argparse.Namespace) -> int:
    from cloud.lake import Lake

    corrected = Lake(config.load(args.project, args.state).lake_dir).correct_clocks(everywhere=True)
    if args.json:
        _print_json(corrected)
    else:
        print("".join(f"{table}: {rows} rows corrected\n" for table, rows in corrected.items()) or "no rows to correct")
    return 0


def _train(args: argparse.Namespace) -> int:
    settings = config.load(args.project, args.state)
    running = config.running_stack(settings) is not None
    command = [sys.executable, "-m", "pipelines.run", "--project", str(settings.project), "--state", str(settings.state_dir)]
    command += ["--mlflow", settings.mlflow_url] if running else []
    command += [word for assignment in args.set for word in ("--set", assignment)]
    command += ["--ray-address", args.ray_address] if args.ray_address else []
    command += ["--json"] if args.json else []
    path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it got the same Ctrl-C, and ends its stages
            continue


def _release(args: argparse.Namespace) -> int:
    from cloud.release import release

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
        progress=_say,
    )
    if args.json:
        _print_json(ref)
    else:
        print(f"released {ref.model} version {ref.model_version} as {ref.target}\nsha256 {ref.sha256}")
    return 0


def _rollout_start(args: argparse.Namespace) -> int:
    from cloud import release, rollout
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    model, version = _model(args.model, "")
    ref = release.find(settings.releases_dir, model, version or None)
    started = rollout.start(
        settings,
        Fleet(settings.fleet_path),
        ref,
        now=time.time(),
        devices=args.device,
        canary=args.canary,
        failures_allowed=args.failures_allowed,
        wave_timeout_s=args.wave_timeout,
    )
    if config.running_stack(settings) is None:
        _say("the stack does not run, so devices hear of it later: fenceline up")
    while args.wait and started.status in (rollout.Status.RUNNING, rollout.Status.UNDOING):
        time.sleep(ROLLOUT_POLL_S)
        started = rollout.status(settings, started.id)
    _print_rollout(started, args.json)
    return 1 if args.wait and started.status is not rollout.Status.COMPLETE else 0


def _rollout_status(args: argparse.Namespace) -> int:
    from cloud import rollout

    _print_rollout(rollout.status(config.load(args.project, args.state), args.id), args.json)
    return 0


def _rollout_undo(args: argparse.Namespace) -> int:
    from cloud import rollout
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    _print_rollout(rollout.undo(settings, Fleet(settings.fleet_path), args.id, now=time.time()), args.json)
    return 0


def _keys_init(args: argparse.Namespace) -> int:
    from cloud import keys

    settings = config.load(args.project, args.state)
    root = keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    if args.json:
        _print_json({"keys_dir": settings.keys_dir, "root": root})
    else:
        print(f"keys in {settings.keys_dir}: whoever has them can run code on every gateway; keep root.pem offline")
        print(f"root for devices: {root}")
    return 0


def _device_add(args: argparse.Namespace) -> int:
    from cloud.enrol import enrol
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    path = enrol(settings, Fleet(settings.fleet_path), args.name, args.out, args.home)
    if args.json:
        _print_json({"device": args.name, "config": path})
    else:
        print(f"device {args.name} added\nedge-agent run --config {path}")
    return 0


def _broker_acl(args: argparse.Namespace) -> int:
    from cloud.gate import load_zones
    from cloud.rights import CLOUD, mosquitto_acl

    acl = mosquitto_acl(load_zones(config.load(args.project, args.state)), args.region, args.cloud or CLOUD)
    if args.json:
        _print_json({"region": args.region, "acl": acl})
    else:
        print(acl, end="")
    return 0


def _device_list(args: argparse.Namespace) -> int:
    from cloud.fleet import Fleet
    from cloud.status import devices

    found = devices(Fleet(config.load(args.project, args.state).fleet_path))
    if args.json:
        _print_json(found)
    else:
        _print_devices(found)
    return 0


def _policy_publish(args: argparse.Namespace) -> int:
    from cloud import policy
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    ref = policy.publish(settings, Fleet(settings.fleet_path), args.file, now=datetime.now(UTC))
    if args.json:
        _print_json(ref)
    else:
        print(f"policy version {ref.version} is in force here, and every device is asked for it\nsha256 {ref.sha256}")
    return 0


def _policy_show(args: argparse.Namespace) -> int:
    from cloud import policy
    from cloud.fleet import Fleet

    settings = config.load(args.project, args.state)
    found = policy.show(settings, Fleet(settings.fleet_path))
    zones = {z.name: z.endpoints for z in found.zones.zones}
    if args.json:
        version = found.ref.version if found.ref else None
        _print_json(
            {
                "version": version,
                "sha256": found.zones.digest,
                "file": found.path,
                "zones": zones,
                "devices": found.devices,
                "behind": found.behind,
            }
        )
        return 0
    print(f"policy {f'version {found.ref.version}' if found.ref else 'of the project, never published'} sha256 {found.zones.digest}")
    _print_table(("zone", "endpoints, the preferred first"), [(name, ", ".join(ends) or "none: held") for name, ends in zones.items()])
    print(f"devices that work under another policy: {', '.join(found.behind) or 'none'}")
    return 0


# --- arguments ---


def _ports(text: str) -> dict[str, int]:
    pairs = [_pair(part) for part in text.split(",")]
    return {name: int(port) for name, port in pairs}


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def _time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _position(text: str) -> Position:
    from cloud.enrol import Position

    lat, _, lon = text.partition(",")
    return Position(float(lat), float(lon))


def _model(text: str, default: str) -> tuple[str, str]:
    model, _, version = text.partition("@")
    return model, version or default


def _contract(settings: Settings, stream: str | None) -> StreamContract:
    from cloud.gate import load_contracts
    from edge_agent.core.settings import nearest

    found = {c.stream: c for c in load_contracts(settings).listed}
    if stream is None and len(found) != 1:
        raise ConfigError(f"give --stream; the project has {', '.join(sorted(found)) or 'none'}")
    name = stream or next(iter(found))
    if name not in found:
        raise ConfigError(f"there is no stream {name!r}{nearest(name, found)}")
    return found[name]


def _mapping(args: argparse.Namespace, settings: Settings, contract: StreamContract) -> Any:
    from cloud.mapping import adjust, load_mapping, same_names

    base = load_mapping(args.mapping, settings.project) if args.mapping else same_names(contract)
    return adjust(base, contract, dict(args.set), args.entity_prefix, args.start)


# --- output ---


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_json(document: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(document, enc_hook=str)).decode(), flush=True)


def _print_table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _print_devices(found: list[dict[str, Any]]) -> None:
    names = ("device", "desired", "active", "phase", "reason", "zone", "blocks_waiting", "seen_s_ago")
    heads = ("device", "wanted", "runs", "phase", "reason", "zone", "waiting", "seen s ago")
    _print_table(heads, [tuple(d[name] for name in names) for d in found])


def _print_rollout(found: Rollout, as_json: bool) -> None:
    if as_json:
        _print_json(found)
        return
    print(f"rollout {found.id}: {found.ref.target} is {found.status}, wave {found.wave + 1} of {found.waves}. {found.reason}")
    rows = [(name, m.wave + 1, m.place, m.failure or None) for name, m in found.members.items()]
    _print_table(("device", "wave", "place", "failure"), rows)


if __name__ == "__main__":
    sys.exit(main())
