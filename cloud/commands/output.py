"""How commands are declared, and how they print: tables for people, one JSON document for machines, the rest on stderr.

Much of what is printed was written by devices and sensors. For people its control characters are escaped, as a terminal would obey them,
and nothing in it is markup; in JSON and CSV it is as it came.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec

Command = Callable[[argparse.Namespace], int]

SECONDS_MAX = 100 * 365 * 86_400.0
PIPE_WIDTH = 140  # of tables that no terminal shows
CELL_CHARACTERS_MAX = 60
COLUMN_CHARACTERS_MIN = 8
NUMBER_MAX = 2**31 - 1  # what a database takes
_JSON = msgspec.json.Encoder(enc_hook=str, decimal_format="number")  # the sum of whole numbers is a decimal in Arrow


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
    """Progress, hints and errors: on stderr, so that stdout stays one document."""
    print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line for people, on stdout."""
    print(printable(text))


def printable(text: str) -> str:
    """Text with what a terminal could obey, or nobody could see, escaped: `\\x1b` for ESC."""
    return text if text.isprintable() else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(document: object) -> None:
    """One JSON document on stdout."""
    print(msgspec.json.format(_JSON.encode(document)).decode(), flush=True)


def print_table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """A table on stdout, as wide as the terminal; None is shown as a dash."""
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table(*(Column(Text(printable(head))) for head in heads), box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None else printable(str(cell))) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    with console.capture() as captured:  # it would end the process itself when nobody reads the table
        console.print(table)
    print(captured.get(), end="")


def print_records(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    """As `print_table`; rows with more columns than a line can show go one under the other, a line for each value."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPE_WIDTH
    if len(heads) * COLUMN_CHARACTERS_MIN <= width:
        print_table(heads, rows)
        return
    name_width = max(map(len, heads))
    for number, row in enumerate(rows, 1):
        print(f"row {number}")
        for head, cell in zip(heads, row, strict=True):
            print(f"  {printable(head):<{name_width}}  {'-' if cell is None else printable(str(cell))}")


def short(value: Any) -> Any:
    """A value as a cell of a table: times without noise, long texts cut."""
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).strftime("%Y-%m-%d %H:%M:%S")
    if isinstance(value, str) and len(value) > CELL_CHARACTERS_MAX:
        return f"{value[:CELL_CHARACTERS_MAX]}… ({len(value)} characters)"
    return value


def print_devices(found: list[dict[str, Any]]) -> None:
    """The devices of `cloud.status.devices` as a table."""
    names = ("device", "desired", "active", "phase", "reason", "zone", "blocks_waiting", "seen_s_ago")
    heads = ("device", "wanted", "runs", "phase", "reason", "zone", "waiting", "seen s ago")
    print_table(heads, [tuple(d[name] for name in names) for d in found])


def positive(text: str) -> int:
    """An argument that is a whole number from 1 to NUMBER_MAX."""
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(NUMBER_MAX))  # Python reads no number of thousands of digits
    if not digits or not 1 <= int(text) <= NUMBER_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {NUMBER_MAX}")
    return int(text)


def seconds(text: str) -> float:
    """An argument that is a time in seconds, from 0."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= SECONDS_MAX:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {SECONDS_MAX:g}")
    return found


def iso_time(text: str) -> datetime:
    """An argument that is an ISO time; UTC if it names no zone."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"{text!r} is not an ISO time such as 2026-11-30 or 2026-11-30T12:00:00Z") from e
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def pair(text: str) -> tuple[str, str]:
    """An argument NAME=VALUE."""
    name, mark, value = text.partition("=")
    if not mark:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value
