"""What an operator should know of the uplink: lanes that moved or are held, and hedges beyond their allowance.

- `failover` and `failback`: a lane's endpoint failed; the lane is back at a better one. Both are counted, by endpoint and by lane.
- `lane_held`: a lane with blocks has had no endpoint for HELD_S; `lane_released` follows when it has one.
- `hedge_storm`: hedges were denied, told at most once in STORM_S.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping

from edge_agent.core.allowance import HedgeAllowance
from edge_agent.core.routing import Move

log = logging.getLogger(__name__)

HELD_S = 5.0
STORM_S = 60.0
TOLD = float("-inf")  # instead of the time since when a lane is held

Tell = Callable[[str, Mapping[str, str]], None]


class UplinkEvents:
    """See the module's rules. `tell` takes the name of an event, and its fields.

    Attributes:
        failovers: how often an endpoint was left because it failed; `lane_failovers`: how often a lane left one.
        lane_reasons: why each lane moved last.
    """

    def __init__(self, tell: Tell | None) -> None:
        self._tell: Tell = tell or (lambda event, fields: None)
        self._held_since: dict[str, float] = {}
        self._storm_at, self._storm_denied = float("-inf"), 0
        self.failovers: Counter[str] = Counter()
        self.lane_failovers: Counter[str] = Counter()
        self.lane_reasons: dict[str, str] = {}

    def moved(self, move: Move) -> None:
        """A lane changed its endpoint."""
        log.info("lane moved lane=%s from=%s to=%s reason=%s", move.lane, move.source, move.target, move.reason)
        self.lane_reasons[move.lane] = move.reason
        if move.source is None:
            return
        if move.failed:
            self.failovers[move.source] += 1
            self.lane_failovers[move.lane] += 1
        if move.failed or move.reason == "preferred":
            fields = {"lane": move.lane, "source": move.source, "target": move.target or "", "reason": move.reason}
            self._tell("failover" if move.failed else "failback", fields)

    def hold(self, held: Mapping[str, str], now: float) -> None:
        """The lanes that are held now, each with the reason; to be told now and then."""
        for lane in [lane for lane in self._held_since if lane not in held]:
            if self._held_since.pop(lane) == TOLD:
                self._tell("lane_released", {"lane": lane})
        for lane, why in held.items():
            since = self._held_since.setdefault(lane, now)
            if since != TOLD and now - since >= HELD_S:
                self._held_since[lane] = TOLD
                log.warning("lane held lane=%s reason=%s", lane, why)
                self._tell("lane_held", {"lane": lane, "reason": why})

    def hedge(self, hedging: HedgeAllowance, duplicate_bytes: int, now: float) -> None:
        """What hedges there were; to be told now and then."""
        if hedging.denied > self._storm_denied and now - self._storm_at >= STORM_S:
            self._storm_at, self._storm_denied = now, hedging.denied
            fields = {"hedges": str(hedging.hedges), "denied": str(hedging.denied), "bytes": str(duplicate_bytes)}
            self._tell("hedge_storm", fields)
