"""The runs of the failover benchmark: strike, watch the standby and the lake, heal, wait until all is warm, again.

What a run measures, in milliseconds:

- *first*: from the fault to the first PUBACK on the standby, for a block that the endpoint had not delivered before the fault.
- *gap*: the longest time without a commit at the lake, around the fault (only under load).
- Idle, nothing is sent that could be acknowledged, so a reading is published IDLE_S or more after the fault, when the
  heartbeat had its chance, and *first* counts from its capture.
- `foreign_only` takes both endpoints of the zone away for OUTAGE_S, while a foreign one is up; *first* counts from their return.
- `lossy` lets the endpoint's cable have 50 ms round trip and 5 % loss; *first* is a reading's age when the lake commits it.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.failover_device import Agent, Forwarder, Sensors, wait_for
from bench.failover_faults import heal, strike
from bench.failover_site import ALLOWED, Site

log = logging.getLogger(__name__)

RATE = 500.0
HOLD_S_MAX = 60.0
AFTER_S = 0.25
MOVE_S_MAX = 3.0
IDLE_S = (1.5, 2.1)
OUTAGE_S = (1.5, 2.5)
LOSSY_S = 2.0
WARM_S_MAX = 90.0
DRAIN_S_MAX = 120.0
SLOW_MS, SLOW_LOSS = 25.0, 0.05


@dataclass
class Series:
    """All runs of one fault."""

    first_ms: list[float] = field(default_factory=list)
    gap_ms: list[float] = field(default_factory=list)
    lost: int = 0
    duplicates: int = 0
    copies: int = 0
    foreign_bytes: int = 0
    moves: int = 0
    seconds: float = 0.0
    runs: int = 0
    memory_kib: tuple[int, int] = (0, 0)

    def numbers(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "runs": self.runs,
            **{f"{name}_ms": percentile(self.first_ms, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
            **{f"gap_{name}_ms": percentile(self.gap_ms, share) for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))},
            "lost": self.lost,
            "duplicates": self.duplicates,
            "copies_received": self.copies,
            "foreign_bytes": self.foreign_bytes,
            "endpoint_changes": self.moves,
            "endpoint_changes_per_min": round(60 * self.moves / self.seconds, 3) if self.seconds else 0.0,
            "memory_growth_kib": self.memory_kib[1] - self.memory_kib[0],
        }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that a share of all does not exceed; None of none."""
    ranked = sorted(values)
    return round(ranked[max(0, -int(-share * len(ranked) // 1) - 1)], 2) if ranked else None


class Trial:
    """Runs on one site with one forwarder."""

    def __init__(self, site: Site, forwarder: Forwarder, sensors: Sensors, seed: int) -> None:
        self._site, self._forwarder, self._sensors = site, forwarder, sensors
        self._chance = random.Random(seed)

    def series(self, fault: str, runs: int, *, idle: bool = False) -> Series:
        """`runs` runs of one fault, and the account afterwards."""
        lake, found, before = self._site.lake, Series(), len(self._sensors.published)
        duplicates, copies, foreign, moves = lake.duplicates, lake.copies, self._site.foreign_bytes(), self._forwarder.moves()
        memory = self._memory_kib()
        self._sensors.rate = 0.0 if idle else RATE
        started = time.monotonic()
        for run in range(runs):
            self._wait_until_warm()
            if fault == "lossy":
                self._lossy(found, runs)
                break
            (self._both_gone if fault == "foreign_only" else self._one_gone)(fault, run, found, idle)
        found.seconds, found.runs = time.monotonic() - started, runs
        found.moves = self._forwarder.moves() - moves
        found.lost = self._drain(range(before, len(self._sensors.published)))
        found.duplicates, found.copies = lake.duplicates - duplicates, lake.copies - copies
        found.foreign_bytes, found.memory_kib = self._site.foreign_bytes() - foreign, (memory, self._memory_kib())
        log.info("series measured device=%s fault=%s idle=%s %s", self._forwarder.name, fault, idle, found.numbers())
        return found

    def wait_for_endpoint(self, name: str) -> None:
        """Wait until `name` carries the lane."""
        wait_for(lambda: self._forwarder.route()[0] == name, self._forwarder.log, WARM_S_MAX)

    @property
    def readings(self) -> int:
        """How many were published so far."""
        return len(self._sensors.published)

    def _one_gone(self, fault: str, run: int, found: Series, idle: bool) -> None:
        """One run of a fault that takes the endpoint away which carries the lane."""
        target, spare = self._warm_route()
        broker, mark = self._site.brokers[target], len(self._site.lake.arrivals)
        struck = strike(fault, broker, run)
        if idle:
            time.sleep(self._chance.uniform(*IDLE_S))
            struck = time.monotonic()
            self._sensors.publish()
        try:
            found.first_ms.append((self._first_at(spare, target, struck, mark) - struck) * 1e3)
            self._hold(target)
            if not idle:
                found.gap_ms.append(self._gap_ms(struck))
        finally:
            heal(fault, broker)

    def _hold(self, target: str) -> None:
        """Let the fault last until the lane has another endpoint, for MOVE_S_MAX at most."""
        time.sleep(AFTER_S)
        deadline = time.monotonic() + MOVE_S_MAX
        while self._forwarder.route()[0] == target and time.monotonic() < deadline:
            time.sleep(0.05)

    def _both_gone(self, _fault: str, run: int, found: Series, idle: bool) -> None:
        """Both endpoints of the zone go, and come back."""
        fault, brokers = ("kill", "blackhole")[run % 2], [self._site.brokers[e] for e in ALLOWED]
        if not idle:
            time.sleep(AFTER_S)
        struck = min(strike(fault, broker, run) for broker in brokers)
        if idle:
            self._sensors.publish()
        time.sleep(self._chance.uniform(*OUTAGE_S))
        mark, returned = len(self._site.lake.arrivals), time.monotonic()
        for broker in brokers:
            heal(fault, broker)
        found.first_ms.append((self._first_at(None, None, returned, mark) - returned) * 1e3)
        if not idle:
            time.sleep(AFTER_S)
            found.gap_ms.append(self._gap_ms(struck))

    def _lossy(self, found: Series, runs: int) -> None:
        """`runs` times LOSSY_S on a slow, lossy cable."""
        target, _ = self._forwarder.route()
        assert target is not None
        mark = len(self._sensors.published)
        self._site.slow_down(target, slow=True)
        started = time.monotonic()
        try:
            while time.monotonic() - started < runs * LOSSY_S:
                time.sleep(0.2)
                if not self._sensors.rate:
                    self._sensors.publish()
            end = len(self._sensors.published)
            self._drain(range(mark, end), pause=False)
        finally:
            self._site.slow_down(target, slow=False)
        published, committed = self._sensors.published, self._site.lake.committed
        found.first_ms += [(committed[n] - published[n]) * 1e3 for n in range(mark, end) if n in committed]
        found.gap_ms.append(self._gap_ms(started))

    def _first_at(self, spare: str | None, target: str | None, struck: float, mark: int) -> float:
        """When the standby got the first block that the target had not delivered before the fault."""
        arrivals, seen, deadline = self._site.lake.arrivals, mark, time.monotonic() + HOLD_S_MAX
        delivered = {a.name for a in arrivals[max(0, mark - 2_000) : mark]}
        while time.monotonic() < deadline:
            for arrival in arrivals[seen:]:
                seen += 1
                if arrival.endpoint == target and arrival.at < struck:
                    delivered.add(arrival.name)
                elif (spare is None or arrival.endpoint == spare) and arrival.at >= struck and arrival.name not in delivered:
                    return arrival.at
            time.sleep(0.005)
        raise RuntimeError(f"nothing on the standby within {HOLD_S_MAX:g} s: {self._forwarder.log()[-3_000:]}")

    def _gap_ms(self, since: float) -> float:
        """The longest time without a commit from just before `since` until now; all of it if there was no more than one."""
        commits = [c for c in self._site.lake.commits[-50_000:] if c >= since - AFTER_S]
        return max(((b - a) * 1e3 for a, b in itertools.pairwise(commits)), default=(time.monotonic() - since + AFTER_S) * 1e3)

    def _warm_route(self) -> tuple[str, str]:
        """The endpoint and its standby, once all has been warm for AFTER_S and somewhat more."""
        while True:
            self._wait_until_warm()
            time.sleep(self._chance.uniform(AFTER_S, AFTER_S + 0.1))
            target, spare = self._forwarder.route()
            if target is not None and spare is not None:
                return target, spare

    def _wait_until_warm(self) -> None:
        ingests = self._site.ingests.values()
        wait_for(lambda: all(i.ready.is_set() for i in ingests) and self._forwarder.settled(), self._forwarder.log, WARM_S_MAX)

    def _drain(self, numbers: range, *, pause: bool = True) -> int:
        """Wait until all readings are in the lake; returns how many are not in the end."""
        if pause:
            self._sensors.rate = 0.0
            time.sleep(0.1)
        deadline = time.monotonic() + DRAIN_S_MAX
        while (missing := self._site.lake.missing(numbers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        return missing

    def _memory_kib(self) -> int:
        return self._forwarder.memory_kib() if isinstance(self._forwarder, Agent) else 0
