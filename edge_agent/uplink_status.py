"""What the uplink does now, for `edge-agent status` and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_agent.core.deadline import RoundTrips
from edge_agent.core.routing import Route
from edge_agent.sending import Sending
from edge_agent.uplink_events import UplinkEvents


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


def describe(
    sending: Sending, events: UplinkEvents, waiting: Mapping[str, int], *, blocks_settled: int, receipts_refused: int, events_dropped: int
) -> UplinkStatus:
    """The status of all endpoints and lanes; `waiting`: the buffer's blocks by lane."""
    outbox = sending.outbox
    return UplinkStatus(
        endpoints={name: _endpoint(sending, events, name) for name in sending.endpoints},
        lanes={lane: _lane(sending, events, lane, waiting.get(lane, 0)) for lane in sorted({*waiting, *sending.plan.routes})},
        blocks_sent=sending.blocks_sent,
        bytes_sent=sending.bytes_sent,
        blocks_sent_again=outbox.sent_again,
        blocks_settled=blocks_settled,
        receipts_refused=receipts_refused,
        events_dropped=events_dropped,
        hedges=outbox.hedging.hedges,
        hedges_denied=outbox.hedging.denied,
        duplicate_bytes=outbox.duplicate_bytes,
    )


def _endpoint(sending: Sending, events: UplinkEvents, name: str) -> EndpointStatus:
    return EndpointStatus(
        name in sending.connected,
        sending.router.suspected(name),
        events.failovers[name],
        *sending.outbox.pipes.in_flight(name),
        *_times_ms(sending.outbox.pipes.trips(name)),
        sending.router.reason(name),
    )


def _lane(sending: Sending, events: UplinkEvents, lane: str, waiting: int) -> LaneStatus:
    route = sending.plan.routes.get(lane, Route(None))
    times = (None, None) if route.endpoint is None else _times_ms(sending.outbox.pipes.trips(route.endpoint))
    return LaneStatus(
        route.endpoint,
        route.standby,
        waiting,
        sending.outbox.unreceipted(lane),
        str(route.held or ""),
        *times,
        events.lane_failovers[lane],
        events.lane_reasons.get(lane, ""),
    )


def _times_ms(trips: RoundTrips) -> tuple[float | None, float | None]:
    """Round trip and deadline of an endpoint; None before its first answer."""
    return (None, None) if trips.srtt_s is None else (round(trips.srtt_s * 1e3, 2), round(trips.deadline_s(0) * 1e3, 2))
