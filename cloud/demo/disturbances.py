"""What goes wrong during the demonstration, and when: a script driven by how much has been published.

- A disturbance begins when its share of the messages is published, and ends `lasts_s` later.
- The script does nothing by itself: whoever publishes calls `advance`, and `finish` when all is published.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

STEP_S = 0.05


@dataclass(frozen=True)
class Disturbance:
    """One fault. `at` is the share of all messages, from 0 to 1."""

    name: str
    at: float
    lasts_s: float
    begin: Callable[[], None]
    end: Callable[[], None]


class Script:
    """The disturbances of a phase; `say` is told what happens."""

    def __init__(self, disturbances: list[Disturbance], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._planned = sorted(disturbances, key=lambda d: d.at)
        self._going: list[tuple[float, Disturbance]] = []

    def advance(self, share: float) -> None:
        """This share of the messages is published."""
        while self._planned and share >= self._planned[0].at:
            disturbance = self._planned.pop(0)
            self._say(f"{disturbance.name}, with {share:.0%} published")
            disturbance.begin()
            self._going.append((self._clock() + disturbance.lasts_s, disturbance))
        self._end_due()

    def finish(self) -> None:
        """Everything is published: begin what has not, and wait until all has ended."""
        self.advance(1.0)
        while self._going:
            self._end_due()
            time.sleep(STEP_S)

    def _end_due(self) -> None:
        now = self._clock()
        for entry in [e for e in self._going if e[0] <= now]:
            self._going.remove(entry)
            entry[1].end()
            self._say(f"{entry[1].name}: over after {entry[1].lasts_s:.0f} s")
