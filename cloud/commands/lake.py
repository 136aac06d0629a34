"""`fenceline lake show|compact|vacuum|probe`: what lies where in the lake and in its quarantine, and their upkeep."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from cloud import config
from cloud.commands.output import add_command, add_group, print_json, print_table
from edge_agent.contract.errors import ConfigError

if TYPE_CHECKING:
    from deltalake import DeltaTable

    from cloud.lake import Lake

HISTORY_HOURS = 30 * 24
"""What vacuum keeps unless told otherwise: as long as Delta's log lets a version be read again."""


def declare(commands: Any) -> None:
    """Declare the commands of this group."""
    lake = add_group(commands, "lake", "what lies where in the lake, and its upkeep")
    _which(add_command(lake, "show", _show, "each table: where it lies, its version, files, bytes, rows and dates"))
    _which(add_command(lake, "compact", _compact, "merge small files, and sort the dates that are quiet"))
    vacuum = add_command(lake, "vacuum", _vacuum, "remove files that no version of the last hours needs")
    _which(vacuum)
    vacuum.add_argument(
        "--hours", type=int, default=HISTORY_HOURS, help=f"versions of these hours can be read afterwards (default {HISTORY_HOURS})"
    )
    vacuum.add_argument("--dry-run", action="store_true", help="only say what would go")
    add_command(lake, "probe", _probe, "see that every root takes commits, and lets one of several racing writers win")


def _which(command: argparse.ArgumentParser) -> None:
    command.add_argument("--stream", help="only this stream (default: all)")
    command.add_argument("--lane", help="only this lane (default: all)")


def _tables(args: argparse.Namespace, *, labels: bool) -> list[tuple[str, str, DeltaTable]]:
    """The tables that are meant, by stream and lane; the lanes of the quarantine's begin with its folder. With `labels` theirs too, whose
    lane is `_labels`.

    Raises:
        ConfigError: there is none by such a name.
    """
    from cloud.quarantine import FOLDER, CheckedLake
    from cloud.tables import LABELS
    from cloud.upkeep import labels_tables
    from edge_agent.core.settings import nearest

    checked = CheckedLake(_lake(args))
    places = [
        (stream, before + lane, partial(lake.table, stream, lane))
        for lake, before in ((checked.lake, ""), (checked.held, f"{FOLDER}/"))
        for stream in lake.streams()
        for lane in lake.lanes(stream)
    ]
    learned = labels_tables(checked.lake.roots) if labels else {}
    places += [(stream, LABELS, partial(learned.__getitem__, stream)) for stream in learned]
    for what, name, known in (("stream", args.stream, {s for s, _, _ in places}), ("lane", args.lane, {lane for _, lane, _ in places})):
        if name is not None and name not in known:
            raise ConfigError(f"the lake has no {what} {name!r}{nearest(name, known) if known else ': it holds nothing yet'}")
    found = [place for place in places if args.stream in (None, place[0]) and args.lane in (None, place[1])]
    if places and not found:
        raise ConfigError(f"stream {args.stream!r} has no rows in lane {args.lane!r}; fenceline lake show says what lies where")
    return [(stream, lane, open_table()) for stream, lane, open_table in found]


def _lake(args: argparse.Namespace) -> Lake:
    from cloud.lake import Lake

    return Lake(config.load(args.project, args.state).lake)


def _show(args: argparse.Namespace) -> int:
    from cloud.upkeep import summary

    found = [{"lane": lane, "stream": stream, **summary(table)} for stream, lane, table in _tables(args, labels=True)]
    if args.json:
        print_json(found)
    else:
        heads = ("lane", "stream", "version", "rows", "files", "small", "bytes", "dates", "first", "last", "root")
        print_table(heads, [tuple(f"{t[h]:,}" if isinstance(t[h], int) else t[h] for h in heads) for t in found])
    return 0


def _compact(args: argparse.Namespace) -> int:
    from cloud.upkeep import compact

    done = [(stream, lane, compact(table, 0, dates_max=None)) for stream, lane, table in _tables(args, labels=False)]
    if args.json:
        print_json([{"lane": lane, "stream": s, "removed": d.removed, "added": d.added, "sorted": d.sorted_dates} for s, lane, d in done])
    else:
        heads = ("lane", "stream", "files replaced", "by", "dates sorted")
        print_table(heads, [(lane, stream, d.removed, d.added, d.sorted_dates) for stream, lane, d in done])
    return 0


def _vacuum(args: argparse.Namespace) -> int:
    from cloud.upkeep import vacuum

    done = [(stream, lane, vacuum(table, args.hours, args.dry_run)) for stream, lane, table in _tables(args, labels=True)]
    if args.json:
        print_json([{"lane": lane, "stream": stream, "files": files, "dry_run": args.dry_run} for stream, lane, files in done])
    else:
        heads = ("lane", "stream", "files that would go" if args.dry_run else "files removed")
        print_table(heads, [(lane, stream, len(files)) for stream, lane, files in done])
    return 0


def _probe(args: argparse.Namespace) -> int:
    from cloud.probe import probe

    found = [probe(root) for root in _lake(args).roots.all]
    if args.json:
        print_json([f.__dict__ for f in found])
    else:
        print_table(("root", "rounds", "one winner", "seconds"), [(f.root, f.rounds, f.single_winners, f"{f.seconds:.1f}") for f in found])
    return 0 if all(f.safe for f in found) else 1
