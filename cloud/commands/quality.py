"""`fenceline quarantine|completeness|query`: is the data whole, is it good, and a look at it."""

from __future__ import annotations

import argparse
import getpass
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, print_json, print_table, say
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from cloud.quarantined import Selection

SHOWN_MAX = 20
LIMIT_MAX = 1_000_000
CELL_CHARACTERS_MAX = 60
GRACE_S_MAX = 100 * 365 * 86_400.0


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    quarantine = add_group(commands, "quarantine", "readings that broke their contract: on the device, or in the cloud")
    add_command(quarantine, "list", _list, "how many lie there, by stream, device and reason")
    show = add_command(quarantine, "show", _show, "the rows themselves: payloads, values, and what was allowed")
    _selection_arguments(show)
    show.add_argument("--limit", type=_limit, default=SHOWN_MAX, metavar="ROWS", help=f"default: {SHOWN_MAX}")
    release = add_command(quarantine, "release", _release, "put those that keep the present contract into their stream")
    _selection_arguments(release)
    release.add_argument("--as-is", action="store_true", help="whatever the contract says; needs --by")
    release.add_argument("--by", metavar="NAME", help="who answers for it (default: the user of this shell)")
    whole = add_command(commands, "completeness", _completeness, "which share of what was captured is in the lake, and every gap")
    whole.add_argument("of", nargs="?", metavar="DEVICE|STREAM", help="default: everything")
    whole.add_argument("--since", type=_since, metavar="TIME", help="only what came since then: ISO time, or 30min, 12h, 7d ago")
    whole.add_argument("--grace", type=_grace, metavar="S", help="how late a block may be (default: [quality] grace_s)")
    query = add_command(commands, "query", _query, "SQL over the lake: one SELECT, a view per stream")
    query.add_argument("sql", metavar="SELECT")
    query.add_argument(
        "--zones", type=lambda text: text.split(","), default=[], metavar="A,B", help="only these zones (default: all you may see)"
    )
    form = query.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="print CSV")
    form.add_argument("--parquet", type=Path, metavar="FILE", help="write Parquet")


def _selection_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("row", nargs="?", metavar="ROW", help="DEVICE/EPOCH/LANE/SEQUENCE/ROW, as show prints it")
    command.add_argument("--stream")
    command.add_argument("--device")
    command.add_argument("--reason")


def _selected(args: argparse.Namespace) -> Selection:
    from cloud.quarantined import Selection, parse_name

    if not (args.row or args.stream or args.device or args.reason):
        raise ConfigError("say which rows: ROW, --stream, --device or --reason; fenceline quarantine list shows what there is")
    return Selection(args.stream, args.device, args.reason, parse_name(args.row) if args.row else None)


def _list(args: argparse.Namespace) -> int:
    from cloud.quarantined import listing
    from cloud.watch import open_lake

    found = listing(open_lake(config.load(args.project, args.state)))
    if args.json:
        print_json(found)
    elif not found:
        print("nothing lies in quarantine")
    else:
        names = ("origin", "stream", "device", "lane", "reason", "rows", "released", "last_at", "detail")
        print_table(tuple(name.replace("_at", "") for name in names), [tuple(_cell(group[name]) for name in names) for group in found])
    return 0


def _show(args: argparse.Namespace) -> int:
    from cloud.quarantined import describe, shelves
    from cloud.watch import open_lake

    lake = open_lake(config.load(args.project, args.state))
    rows = [row for shelf in shelves(lake, _selected(args)) for row in describe(lake, shelf, args.limit)][: args.limit]
    if not rows:
        raise ConfigError("no such row lies in quarantine; fenceline quarantine list shows what does")
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        print(f"{row['name']}  {row['origin']}  {row['stream'] or '(no stream)'}  {row['reason']}: {row['detail']}")
        for name in ("topic", "payload"):
            if name in row:
                print(f"    {name}: {_cell(row[name])}")
        for name, value in row.get("values", {}).items():
            print(f"    {name} = {value}{'   <- ' + row['broken'][name] if name in row['broken'] else ''}")
        if row["released_at"]:
            print(f"    released {row['released_at']}")
    return 0


def _release(args: argparse.Namespace) -> int:
    from cloud.audit import Audit
    from cloud.readmission import Readmission
    from cloud.watch import open_lake

    if args.as_is and not args.by:
        raise ConfigError("--as-is needs --by NAME: somebody answers for rows that break their contract")
    settings = config.load(args.project, args.state)
    by = args.by or getpass.getuser()
    done = Readmission(open_lake(settings), Audit(settings.audit_db)).release(_selected(args), by, as_is=args.as_is)
    if args.json:
        print_json({"released": done.released, "already": done.already, "kept": dict(done.kept), "by": by, "as_is": args.as_is})
    else:
        print(f"{done.released} rows released by {by}, {done.already} were there already")
        for why, rows in done.kept.most_common():
            print(f"{rows} rows stay: {why}")
    return 0 if done.complete else 1


def _completeness(args: argparse.Namespace) -> int:
    from cloud.block_index import BlockIndex
    from cloud.completeness import examine
    from cloud.fleet import Fleet
    from cloud.watch import open_lake, waiting

    settings = config.load(args.project, args.state)
    lake, fleet = open_lake(settings), Fleet(settings.fleet_db)
    scope = _scope(args.of, fleet.devices(), [*lake.lake.streams(), *(c.stream for c in lake.lake.contracts.listed)])
    grace_s = settings.quality.grace_s if args.grace is None else args.grace
    now_us = time.time_ns() // 1_000
    found = examine(lake, BlockIndex(), now_us, **scope, since_us=args.since, grace_s=grace_s, waiting=waiting(fleet))
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


def _query(args: argparse.Namespace) -> int:
    from cloud.query import Query, rights
    from cloud.watch import open_lake

    settings = config.load(args.project, args.state)
    zones = rights(settings, args.zones)
    with Query(open_lake(settings), zones, settings.query) as query:
        found = query.run(args.sql)
    if args.parquet is not None:
        import pyarrow.parquet

        pyarrow.parquet.write_table(found, args.parquet)
        say(f"{found.num_rows} rows in {args.parquet}")
    elif args.csv:
        import sys

        import pyarrow.csv

        pyarrow.csv.write_csv(found, sys.stdout.buffer)
    elif args.json:
        print_json(found.to_pylist())
    else:
        print_table(tuple(found.column_names), [tuple(map(_cell, row.values())) for row in found.slice(0, 1_000).to_pylist()])
        say(f"{found.num_rows} rows{' (the first 1000 are shown; --csv prints all)' if found.num_rows > 1_000 else ''}")
    return 0


def _cell(value: Any) -> Any:
    """A value as a cell of a table: times without noise, long texts cut."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    text = value if isinstance(value, str) else None
    return f"{text[:CELL_CHARACTERS_MAX]}… ({len(text)} characters)" if text is not None and len(text) > CELL_CHARACTERS_MAX else value


def _grace(text: str) -> float:
    """Seconds, at least 0 and at most a hundred years."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= GRACE_S_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and {GRACE_S_MAX:.0f} seconds")
    return found


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= LIMIT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 and {LIMIT_MAX}")
    return int(text)


def _since(text: str) -> int:
    """Microseconds since 1970 of an ISO time, or of so long ago."""
    for unit, seconds in (("min", 60), ("h", 3_600), ("d", 86_400), ("s", 1)):
        if text.endswith(unit) and text.removesuffix(unit).replace(".", "", 1).isdigit():
            return time.time_ns() // 1_000 - int(float(text.removesuffix(unit)) * seconds * 1e6)
    try:
        found = datetime.fromisoformat(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an ISO time nor a span like 30min, 12h or 7d") from e
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1e6)
