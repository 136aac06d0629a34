"""What every benchmark shares: a table on the screen, the same numbers as JSON, and how to time a thing.

- A benchmark is a module with `measure(arguments) -> Report`, ended by `main(__doc__, measure)`.
- A claim that the numbers rest on (lossless, equal results) is checked inside `measure` and raises when it does not hold.
- Times are the best of several rounds: on a shared machine the least disturbed one is nearest to the truth.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Cell = str | int | float
Options = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Report:
    """A table (`columns`, `rows`), its caption, and `numbers` for machines."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: dict[str, Any]
    notes: Sequence[str] = field(default=())

    def text(self) -> str:
        """The table as aligned text: first column left, the others right.

        >>> print(Report("Speed", ["what", "s"], [["ours", 0.5], ["theirs", 12.25]], {}).text())
        Speed
        <BLANKLINE>
        what        s
        ------  -----
        ours     0.50
        theirs  12.25
        """
        table = [list(self.columns), *([shown(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        table.insert(1, ["-" * width for width in widths])
        lines = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in table]
        return "\n".join([self.title, "", *lines, *(("", *self.notes) if self.notes else ())])


def shown(cell: Cell) -> str:
    """A number with as many digits as one can use."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1_000 else f"{cell:.2f}" if abs(cell) >= 0.01 or cell == 0 else f"{cell:.2g}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def _no_options(_: argparse.ArgumentParser) -> None:
    """A benchmark without options of its own."""


def best_of(rounds: int, work: Callable[[], Any]) -> float:
    """Seconds of the fastest of `rounds` runs."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main(doc: str | None, measure: Callable[[argparse.Namespace], Report], options: Options = _no_options) -> None:
    """Run one benchmark from the command line."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--quick", action="store_true", help="a small run that shows that it works; its times mean little")
    options(parser)
    arguments = parser.parse_args()
    report = measure(arguments)
    print(report.text())
    if arguments.json:
        machine = {"python": platform.python_version(), "system": platform.platform(), "cpus": len(os.sched_getaffinity(0))}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"title": report.title, "machine": machine, **report.numbers}, indent=2) + "\n")
