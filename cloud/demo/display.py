"""What the demonstration shows while it works: phases, bars and lines; without a terminal only lines.

It also keeps the time of each phase for the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 5.0


@dataclass
class Display:
    """Output of one demonstration; `quiet` shows nothing."""

    console: Console
    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """One line of news."""
        if not self.quiet:
            self.console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, what: str) -> Iterator[None]:
        """Announce a phase and take its time, also when it fails."""
        if not self.quiet:
            self.console.print(f"[bold]{name}[/bold]: {what}", highlight=False)
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(time.monotonic() - started, 2)
        self.say(f"{name} took {self.seconds[name]:.1f} s")

    @contextmanager
    def counting(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar; the yielded function is told how many more are done."""
        if self.quiet or not self.console.is_terminal:
            yield self._counting_lines(what, total)
            return
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda more: progress.advance(task, more)
        self.say(f"{what}: {total:,}")

    def _counting_lines(self, what: str, total: int) -> Callable[[int], None]:
        done, next_line = 0, time.monotonic() + LINE_EVERY_S

        def advance(more: int) -> None:
            nonlocal done, next_line
            done += more
            if done >= total or time.monotonic() >= next_line:
                self.say(f"{what}: {done:,} of {total:,}")
                next_line = time.monotonic() + LINE_EVERY_S

        return advance
