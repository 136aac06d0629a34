"""What the uplink does now, for `edge-agent status` and metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EndpointStatus:
    """One endpoint.

    `suspected`: connected, but silent while another one answers. `failovers`: how often lanes left it because it failed; `reason`: why it
    failed last. Round trip (smoothed) and deadline are None before its first answer.
    """

    connected: bool
    suspected: bool
    failovers: int
    in_flight_blocks: int
    in_flight_bytes: int
    round_trip_ms: float | None
    deadline_ms: float | None
    reason: str


@dataclass(frozen=True)
class LaneStatus:
    """One lane.

    `waiting`: blocks in the buffer; `unreceipted`: those of them that were sent; `held`: why it has no endpoint, or "". Round trip and
    deadline are its endpoint's. `failovers`: how often its endpoint failed; `reason`: of its last move.
    """

    endpoint: str | None
    standby: str | None
    waiting: int
    unreceipted: int
    held: str
    round_trip_ms: float | None = None
    deadline_ms: float | None = None
    failovers: int = 0
    reason: str = ""


@dataclass(frozen=True)
class UplinkStatus:
    """What the uplink does now, and its counters since the start.

    `hedges`: blocks that also went to a standby because their PUBACK was late; `hedges_denied`: those that did not, because of
    `hedge_share_max`; `duplicate_bytes`: bytes that went twice, by hedges or because an endpoint failed.
    """

    endpoints: dict[str, EndpointStatus]
    lanes: dict[str, LaneStatus]
    blocks_sent: int
    bytes_sent: int
    blocks_sent_again: int
    blocks_settled: int
    receipts_refused: int
    events_dropped: int
    hedges: int
    hedges_denied: int
    duplicate_bytes: int
