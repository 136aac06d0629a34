"""`fenceline quarantine|completeness`: is the data good, and is it whole."""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, positive, print_json, print_table, say, seconds, short, show
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from cloud.config import Settings
    from cloud.quarantined import Selection

SHOWN_MAX = 20
SPAN_CHARACTERS_MAX = 12


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    quarantine = add_group(commands, "quarantine", "readings that broke their contract: on the device, or in the cloud")
    add_command(quarantine, "list", _list, "how many lie there, by stream, device and reason")
    show = add_command(quarantine, "show", _show, "the rows themselves: payloads, values, and what was allowed")
    _selection_arguments(show)
    show.add_argument("--limit", type=positive, default=SHOWN_MAX, metavar="ROWS", help=f"default: {SHOWN_MAX}")
    release = add_command(quarantine, "release", _release, "put those that keep the present contract into their stream")
    _selection_arguments(release)
    release.add_argument("--as-is", action="store_true", help="whatever the contract says; needs --by")
    release.add_argument("--by", metavar="NAME", help="who answers for it (default: the user of this shell)")
    whole = add_command(commands, "completeness", _completeness, "which share of what was captured is in the lake, and every gap")
    whole.add_argument("of", nargs="?", metavar="DEVICE|STREAM", help="default: everything")
    whole.add_argument("--since", type=_since, metavar="TIME", help="only what came since then: ISO time, or 30min, 12h, 7d ago")
    whole.add_argument("--grace", type=seconds, metavar="S", help="how late a block may be (default: [quality] grace_s)")


def _selection_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("row", nargs="?", metavar="ROW", help="DEVICE/EPOCH/LANE/SEQUENCE/ROW, as show prints it")
    command.add_argument("--stream")
    command.add_argument("--device")
    command.add_argument("--reason")


def _selected(args: argparse.Namespace, settings: Settings) -> Selection:
    """What is meant, of what the user may see."""
    from cloud.quarantined import Selection, parse_name
    from cloud.viewers import rights

    if not (args.row or args.stream or args.device or args.reason):
        raise ConfigError("say which rows: ROW, --stream, --device or --reason; fenceline quarantine list shows what there is")
    return Selection(args.stream, args.device, args.reason, parse_name(args.row) if args.row else None, rights(settings))


def _list(args: argparse.Namespace) -> int:
    from cloud.quarantined import listing
    from cloud.viewers import rights
    from cloud.watch import open_lake

    settings = config.load(args.project, args.state)
    zones = rights(settings)
    found = listing(open_lake(settings), zones)
    if args.json:
        print_json(found)
    elif not found:
        print("nothing lies in quarantine")
    else:
        names = ("origin", "stream", "device", "lane", "reason", "rows", "released", "last_at", "detail")
        print_table(tuple(name.replace("_at", "") for name in names), [tuple(short(group[name]) for name in names) for group in found])
    return 0


def _show(args: argparse.Namespace) -> int:
    from cloud.quarantined import describe, shelves
    from cloud.watch import open_lake

    settings = config.load(args.project, args.state)
    wanted = _selected(args, settings)
    lake = open_lake(settings)
    rows = [row for shelf in shelves(lake, wanted) for row in describe(lake, shelf, args.limit)][: args.limit]
    if not rows:
        raise ConfigError("no such row lies in quarantine; fenceline quarantine list shows what does")
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        show(f"{row['name']}  {row['origin']}  {row['stream'] or '(no stream)'}  {row['reason']}: {row['detail']}")
        for name in ("topic", "payload"):
            if name in row:
                show(f"    {name}: {short(row[name])}")
        for name, value in row.get("values", {}).items():
            show(f"    {name} = {value}{'   <- ' + row['broken'][name] if name in row['broken'] else ''}")
        if row["released_at"]:
            show(f"    released {row['released_at']}")
    return 0


def _release(args: argparse.Namespace) -> int:
    from cloud.audit import Audit
    from cloud.readmission import Readmission
    from cloud.viewers import user_name
    from cloud.watch import open_lake

    if args.as_is and not args.by:
        raise ConfigError("--as-is needs --by NAME: somebody answers for rows that break their contract")
    settings = config.load(args.project, args.state)
    wanted, by = _selected(args, settings), args.by or user_name()
    done = Readmission(open_lake(settings), Audit(settings.audit_db)).release(wanted, by, as_is=args.as_is)
    if args.json:
        print_json({"released": done.released, "already": done.already, "kept": dict(done.kept), "by": by, "as_is": args.as_is})
    else:
        show(f"{done.released} rows released by {by}, {done.already} were there already")
        for why, rows in done.kept.most_common():
            show(f"{rows} rows stay: {why}")
    return 0 if done.complete else 1


def _completeness(args: argparse.Namespace) -> int:
    from cloud.block_index import BlockIndex
    from cloud.completeness import examine
    from cloud.fleet import Fleet
    from cloud.watch import open_lake, removed, waiting

    settings = config.load(args.project, args.state)
    lake, fleet = open_lake(settings), Fleet(settings.fleet_db)
    scope = _scope(
        args.of, sorted({*fleet.devices(), *fleet.removals()}), [*lake.lake.streams(), *(c.stream for c in lake.lake.contracts.listed)]
    )
    grace_s = settings.quality.grace_s if args.grace is None else args.grace
    now_us = time.time_ns() // 1_000
    held, gone = waiting(fleet), removed(fleet, now_us)
    found = examine(lake, BlockIndex(), now_us, **scope, since_us=args.since, grace_s=grace_s, waiting=held, removed=gone)
    blocks = {"captured": found.captured, "stored": found.stored, **{state.value: count for state, count in found.blocks.items()}}
    readings = {"stored": found.readings, "quarantined": found.quarantined_readings, "lost": found.lost_readings}
    if args.json:
        print_json({**scope, "share": found.share, "blocks": blocks, "readings": readings, "gaps": found.gaps, "alarm": found.alarm})
        return 1 if found.alarm else 0
    counts = ", ".join(f"{name} {count}" for name, count in blocks.items())
    print(f"{100 * found.share:.4f} percent of {found.captured} blocks are in the lake: {counts}")
    print(f"readings: {readings['stored']} in streams, {readings['quarantined']} in quarantine, {readings['lost']:.0f} lost at least")
    if found.gaps:
        names = ("device", "epoch", "lane", "first", "last", "state", "stream", "reason", "readings")
        print_table(names, [tuple(getattr(gap, name) for name in names) for gap in found.gaps])
    if found.alarm:
        say("blocks are missing that nobody accounted for")
    return 1 if found.alarm else 0


def _scope(name: str | None, devices: list[str], streams: list[str]) -> dict[str, str]:
    from edge_agent.core.settings import nearest

    if name is None:
        return {}
    if name in devices and name in streams:
        raise ConfigError(f"{name!r} is a device and a stream; rename one of them")
    if name not in devices and name not in streams:
        raise ConfigError(f"there is no device or stream {name!r}{nearest(name, [*devices, *streams])}")
    return {"device": name} if name in devices else {"stream": name}


def _since(text: str) -> int:
    """Microseconds since 1970 of an ISO time, or of so long ago."""
    for unit, length_s in (("min", 60), ("h", 3_600), ("d", 86_400), ("s", 1)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdecimal() and len(number) <= SPAN_CHARACTERS_MAX:
            return time.time_ns() // 1_000 - int(float(number) * length_s * 1e6)
    try:
        found = datetime.fromisoformat(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an ISO time nor a span like 30min, 12h or 7d") from e
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1e6)
