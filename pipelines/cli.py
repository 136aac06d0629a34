"""The pipeline's voice: the only module in this room that prints.

Stages mark progress with a bullet, so that `pipelines.run` can tell it from what libraries write.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

BULLET = "  - "

Say = Callable[[str], None]
"""What takes a line of progress."""


def out(line: str) -> None:
    """A line of the answer, for people or machines."""
    print(line, flush=True)


def err(line: str) -> None:
    """A line beside the answer: progress, or what went wrong."""
    print(line, file=sys.stderr, flush=True)


def progress(message: str, done: int | None = None, total: int | None = None) -> None:
    """How far a stage is."""
    count = "" if done is None else f"[{done}/{total}] "
    print(f"{BULLET}{count}{message}", flush=True)
