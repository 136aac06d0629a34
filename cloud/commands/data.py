"""`fenceline replay|import-buffer|labels|clock`: recorded data into the system, and repairs of what is in the lake."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, iso_time, pair, positive, print_json, say
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from cloud.config import Settings
    from edge_agent.contract.stream import StreamContract


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    replay = add_command(commands, "replay", _replay, "publish recorded rows as sensor messages")
    replay.add_argument("file", type=Path, help="CSV, text or Parquet; .gz too")
    _mapping_arguments(replay)
    replay.add_argument("--device", action="append", default=[], help="the gateway; repeat it to share the entities out (default: all)")
    replay.add_argument("--rate", type=float, default=0.0, metavar="ROWS_PER_S", help="default: as fast as the broker takes them")
    replay.add_argument("--limit", type=positive, metavar="ROWS", help="stop after that many rows")
    bring = add_command(
        commands, "import-buffer", _import_buffer, "bring the buffer of a dead device into the lake, as its uplink would have"
    )
    bring.add_argument("file", type=Path, metavar="FILE", help="its buffer.db, with buffer.db-wal beside it")
    bring.add_argument("--key-file", type=Path, metavar="FILE", help="the device's keys, if its blocks are encrypted")
    bring.add_argument("--region", action="append", default=[], help="only this region may store; may be repeated (default: all)")
    labels = add_group(commands, "labels", "what models learn to say")
    add = add_command(labels, "add", _labels_add, "add or replace labels")
    add.add_argument("file", type=Path)
    _mapping_arguments(add)
    what = add.add_mutually_exclusive_group(required=True)
    what.add_argument("--run-to-failure", action="store_true", help="the file ends with each entity's failure: label = cycles left")
    what.add_argument("--column", metavar="NAME", help="the label is this column")
    clock = add_group(commands, "clock", "the devices' clocks")
    add_command(clock, "fix", _clock_fix, "give rows that were stored before a device's clock was set their true times")


def _mapping_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--stream", help="the stream (default: the only one)")
    command.add_argument(
        "--mapping", metavar="NAME", help="a mapping of contracts/mappings, or a path (default: columns named like fields)"
    )
    command.add_argument("--set", type=pair, action="append", default=[], metavar="FIELD=COLUMN", help="change the mapping; repeatable")
    command.add_argument("--entity-prefix", metavar="TEXT", help="put this before the entity's name")
    command.add_argument("--start", type=iso_time, metavar="ISO_TIME", help="the time of cycle 0, for mappings that count")


def _replay(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from cloud import brokers
    from cloud.fleet import Fleet
    from cloud.replay import SensorBroker, replay

    settings = config.load(args.project, args.state)
    contract = _contract(settings, args.stream)
    fleet = Fleet(settings.fleet_db)
    known = fleet.devices()
    devices = args.device or known
    for stranger in sorted(set(devices) - set(known)):
        say(f"there is no device {stranger!r} in this fleet: without a gateway that listens, the broker drops its messages")
    if not devices:
        raise ConfigError("the fleet has no device to play the sensors of; add one with: fenceline device add NAME")
    broker = SensorBroker(
        settings.sensors.host, settings.sensors.port, brokers.SENSOR_USER, brokers.password(settings, brokers.SENSOR_USER)
    )
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True))
    task = bar.add_task("rows acknowledged", total=None)

    def tell(acknowledged: int, total: int) -> None:
        bar.start()  # not before: what cannot begin is one line
        bar.update(task, completed=acknowledged, total=total)

    mapping = _mapping(args, settings, contract)
    try:
        done = replay(args.file, mapping, contract, broker, devices, rows_per_s=args.rate, rows_max=args.limit, progress=tell)
    finally:
        if bar.live.is_started:
            bar.stop()
    for silent in sorted(set(devices).intersection(known) - set(fleet.all_reported())):
        say(f"device {silent!r} has never reported: if no agent listens, the broker drops its messages; start one, and replay again")
    if args.json:
        print_json(done)
    else:
        print(f"{done.acknowledged} of {done.rows} rows acknowledged in {done.seconds:.1f} s")
    return 0 if done.acknowledged == done.rows else 1


def _import_buffer(args: argparse.Namespace) -> int:
    from cloud.buffer_import import BufferImport, document

    done = BufferImport(config.load(args.project, args.state), args.region).run(args.file, args.key_file)
    if args.json:
        print_json(document(done))
    else:
        print(f"{done.stored_blocks} of {done.blocks} blocks stored ({done.stored_rows} rows), {done.duplicates} were in the lake already")
        if done.quarantined_rows:
            print(f"{done.quarantined_rows} of these rows break their contract: fenceline quarantine list")
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
    total = labels.add(Lake(settings.lake), contract.stream, table)
    if args.json:
        print_json({"stream": contract.stream, "added": table.num_rows, "labels": total})
    else:
        print(f"{table.num_rows} labels read; stream {contract.stream} has {total} now")
    return 0


def _clock_fix(args: argparse.Namespace) -> int:
    from cloud.lake import Lake
    from cloud.quarantine import CheckedLake

    corrected = CheckedLake(Lake(config.load(args.project, args.state).lake)).correct_clocks(everywhere=True)
    if args.json:
        print_json(corrected)
    else:
        print("".join(f"{table}: {rows} rows corrected\n" for table, rows in corrected.items()) or "no rows to correct")
    return 0


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
