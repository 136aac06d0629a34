"""How commands are declared, and how they print: tables for people, one JSON document for machines, the rest on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import msgspec

Command = Callable[[argparse.Namespace], int]

PIPE_WIDTH = 140  # of tables that no terminal shows


def add_command(commands: Any, name: str, function: Command, text: str) -> argparse.ArgumentParser:
    """A command that `function` runs; it takes `--json`."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=function)
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def add_group(commands: Any, name: str, text: str) -> Any:
    """A word that only groups commands: what `add_command` may add to."""
    return commands.add_parser(name, help=text, description=text).add_subparsers(required=True, metavar="COMMAND")


def say(text: str) -> None:
    """Progress and hints: on stderr, so that stdout stays one document."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    print(msgspec.json.format(msgspec.json.encode(document, enc_hook=str)).decode(), flush=True)


def print_table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A table on stdout, as wide as the terminal; None is shown as a dash."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*heads, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def print_devices(found: list[dict[str, Any]]) -> None:
    """The devices of `cloud.status.devices` as a table."""
    names = ("device", "desired", "active", "phase", "reason", "zone", "blocks_waiting", "seen_s_ago")
    heads = ("device", "wanted", "runs", "phase", "reason", "zone", "waiting", "seen s ago")
    print_table(heads, [tuple(d[name] for name in names) for d in found])


def pair(text: str) -> tuple[str, str]:
    """An argument NAME=VALUE."""
    name, mark, value = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
