"""The fence of one agent: the policy in force, the track of the device, and what an operator should know of both.

- A newer policy comes from the updater's thread (`offer`) and is taken by the data path between two batches (`swap`), so every batch is
  stamped, sealed and named after one policy. What was sealed before keeps the policy it was sealed under; where it may go is decided
  by the new one.
- Lanes that wait and that the new policy allows nowhere (a zone that is gone, say) are held, and the operator is told.
- Positions that are refused are counted, and told once in TELL_S per reason.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from edge_agent.anchor import Anchor
from edge_agent.contract.block import NOWHERE
from edge_agent.contract.errors import Reason
from edge_agent.core.fix import Fix, Position, Precision, stored
from edge_agent.core.track import Track
from edge_agent.core.zones import Zones
from edge_agent.metrics import Metrics

log = logging.getLogger(__name__)

TELL_S = 60.0


@dataclass
class Fence:
    """See the module's rules. `streams`: how exactly each stream may know its place; `tell` tells the operator of an event."""

    track: Track
    streams: Mapping[str, Precision]
    metrics: Metrics
    tell: Callable[..., None]
    anchor: Anchor | None = None
    _offers: queue.SimpleQueue[Zones] = field(default_factory=queue.SimpleQueue)
    _told: dict[Reason, float] = field(default_factory=dict)

    @property
    def policy(self) -> str:
        """The digest of the zones document in force."""
        return self.track.zones.digest

    @property
    def precision(self) -> Precision:
        """The finest place that any stream may store."""
        levels = list(Precision)
        return max(self.streams.values(), key=levels.index, default=Precision.ZONE_ONLY)

    def endpoints(self, lane: str) -> tuple[str, ...]:
        """The endpoints that `lane` may go to now; called by the uplink in its own thread."""
        return self.track.zones.endpoints(lane)

    def offer(self, zones: Zones) -> None:
        """Take these zones before the next batch; called by the updater in its own thread."""
        self._offers.put(zones)

    def swap(self, waiting: Callable[[], Iterable[str]]) -> None:
        """Take the policy offered last, if there is a new one; `waiting` gives the lanes that have blocks."""
        zones = None
        while not self._offers.empty():
            zones = self._offers.get()
        if zones is None or zones == self.track.zones:  # not by digest alone: that of a damaged policy's place-holder is the same
            return
        before, lanes = self.policy, sorted(waiting())
        self.track.adopt(zones)
        held = [lane for lane in lanes if lane != NOWHERE and not zones.endpoints(lane)]
        log.info("policy adopted digest=%s before=%s held=%s", self.policy, before, ",".join(held) or "none")
        self.tell("policy_adopted", digest=self.policy, before=before)
        for lane in held:
            self.tell("lane_held", lane=lane, policy=self.policy, detail=f"the new policy allows no endpoint for {lane!r}; its blocks wait")

    def take(self, position: Position, now_us: int | None) -> tuple[Fix | None, tuple[Reason, str] | None]:
        """Take a position: the fix to store, no more exact than it may be, and why the position was refused, if it was."""
        taken = self.track.take(position, now_us)
        fix = None if taken.fix is None else stored(taken.fix, self.precision)
        if taken.reason is None:
            return fix, None
        self.metrics.positions_refused.labels(taken.reason.value).inc()
        self._tell_refused(taken.reason, taken.detail)
        return fix, (taken.reason, taken.detail)

    def remember(self) -> None:
        """The fixes taken so far are stored: keep the last position for the next start, in memory only."""
        if self.anchor is not None:
            self.anchor.write(self.track.anchor)

    def _tell_refused(self, reason: Reason, detail: str) -> None:
        now = time.monotonic()
        if now - self._told.get(reason, float("-inf")) >= TELL_S:
            self._told[reason] = now
            log.warning("position refused reason=%s detail=%s", reason, detail)
            self.tell("position_refused", reason=reason.value, detail=detail)
