"""Routing: which endpoint each lane uses now, and which links to open, close and keep warm.

A state machine without clock or network: times are arguments (seconds, monotonic), effects are results.

- A lane goes only to endpoints that it allows, in its order of preference. Without a connected one it is held.
- A lane stays where it is while that link lives. It goes back to a more preferred endpoint once that one is proved:
  it never failed, or it has been connected for `failback_s` since.
- Links are opened for the first two endpoints of every lane in use: the one it wants and a warm standby. Those that
  fail do not count, so a long list is walked to its end.
- A link that no lane wants is closed after `linger_s`. A link that carries a lane is never closed to try another.
- Reconnects wait with decorrelated jitter (Brooker, 2015), at most `backoff_max_s`. The wait starts small again only
  after a connection has held for `stable_s`, so a broker that accepts and kicks is not hammered.

>>> router = Router(RoutingConfig(endpoints=("eu", "us")), uniform=lambda low, high: low)
>>> router.use({"canada": ("us", "eu")})
>>> router.step(0.0).open
['us', 'eu']
>>> router.connected("us", 0.1)
>>> router.step(0.1).routes["canada"].endpoint
'us'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

WARM_LINKS = 2
ENDPOINTS_MAX = 64


class Held(StrEnum):
    """Why a lane waits."""

    NOT_ALLOWED = "not_allowed"  # no configured endpoint may hold this lane
    NOT_CONNECTED = "not_connected"  # allowed endpoints exist, none is connected


@dataclass(frozen=True)
class RoutingConfig:
    """Endpoints this device knows, and the times of the state machine.

    `control` names the endpoints that may be connected while no lane wants any, so that control documents (no
    readings) still reach a device that does not know where it is. None allows all endpoints.
    """

    endpoints: tuple[str, ...]
    control: tuple[str, ...] | None = None
    failback_s: float = 10.0
    connect_timeout_s: float = 10.0
    stable_s: float = 5.0
    linger_s: float = 30.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 30.0


@dataclass(frozen=True)
class Route:
    """Where a lane goes now. `standby` is the next connected endpoint that it allows; `held` says why there is none."""

    endpoint: str | None
    standby: str | None = None
    held: Held | None = None


@dataclass(frozen=True)
class Move:
    """A lane changed its endpoint; `reason` is that of the lost link, or "connected", "preferred" or "policy"."""

    lane: str
    source: str | None
    target: str | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """What to do now: routes by lane, links to open and to close, and when to ask again at the latest."""

    routes: dict[str, Route]
    open: list[str] = field(default_factory=list)
    close: list[str] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    wake_at: float | None = None


class _State(StrEnum):
    CLOSED = "closed"
    CONNECTING = "connecting"
    UP = "up"


@dataclass
class _Endpoint:
    """Health of one endpoint. `since` is the time of the last change of `state`, `retry_at` the earliest next attempt."""

    state: _State = _State.CLOSED
    since: float = 0.0
    failed: bool = False
    reason: str = ""
    wait_s: float = 0.0
    retry_at: float = float("-inf")
    wanted_at: float = float("-inf")


class Router:
    """The state machine. Tell it what happened, then ask `step` what to do; `uniform` draws a number between two."""

    def __init__(self, config: RoutingConfig, uniform: Callable[[float, float], float]) -> None:
        if not 1 <= len(config.endpoints) <= ENDPOINTS_MAX or len(set(config.endpoints)) != len(config.endpoints):
            raise ValueError(f"{len(config.endpoints)} endpoints; 1 to {ENDPOINTS_MAX} different ones are allowed")
        self._config, self._uniform = config, uniform
        self._endpoints = {name: _Endpoint() for name in config.endpoints}
        self._lanes: dict[str, tuple[str, ...]] = {}
        self._current: dict[str, str | None] = {}

    def use(self, lanes: Mapping[str, Sequence[str]]) -> None:
        """Set the lanes in use, each with the endpoints it allows in order of preference; unknown endpoints do not count."""
        self._lanes = {lane: tuple(e for e in dict.fromkeys(allowed) if e in self._endpoints) for lane, allowed in lanes.items()}
        self._current = {lane: self._current.get(lane) for lane in self._lanes}

    def connected(self, endpoint: str, now: float) -> None:
        """The link to `endpoint` is up and authenticated."""
        health = self._endpoints[endpoint]
        health.state, health.since = _State.UP, now

    def lost(self, endpoint: str, now: float, reason: str) -> None:
        """The link failed: it broke, or an attempt did not succeed."""
        health = self._endpoints[endpoint]
        held_s = now - health.since if health.state is _State.UP else 0.0
        low, cap = self._config.backoff_min_s, self._config.backoff_max_s
        previous_s = low if held_s >= self._config.stable_s else max(low, health.wait_s)
        health.wait_s = min(cap, self._uniform(low, 3 * previous_s))
        health.retry_at = now + health.wait_s
        health.state, health.since, health.failed, health.reason = _State.CLOSED, now, True, reason

    def step(self, now: float) -> Plan:
        """Decide. Endpoints in `open` count as connecting from now on, those in `close` as closed."""
        moves = self._move(now)
        routes = {lane: self._route(lane) for lane in self._lanes}
        wanted = self._wanted(now)
        for name in wanted:
            self._endpoints[name].wanted_at = now
        closing = [name for name in self._endpoints if self._must_close(name, now)]
        for name in closing:
            self._close(name, now)
        opening = [name for name in wanted if self._may_open(name, now)]
        for name in opening:
            self._endpoints[name].state, self._endpoints[name].since = _State.CONNECTING, now
        return Plan(routes, opening, closing, moves, self._wake_at(wanted, now))

    def reason(self, endpoint: str) -> str:
        """Why the last link to `endpoint` was lost; empty if none was."""
        return self._endpoints[endpoint].reason

    def _move(self, now: float) -> list[Move]:
        moves = []
        for lane in self._lanes:
            old, new = self._current[lane], self._choice(lane, now)
            if old != new:
                moves.append(Move(lane, old, new, self._move_reason(lane, old)))
                self._current[lane] = new
        return moves

    def _move_reason(self, lane: str, old: str | None) -> str:
        if old is None:
            return "connected"
        if not self._up(old):
            return self._endpoints[old].reason
        return "preferred" if old in self._lanes[lane] else "policy"

    def _choice(self, lane: str, now: float) -> str | None:
        allowed, current = self._lanes[lane], self._current[lane]
        proved = [name for name in allowed if self._proved(name, now)]
        if current in allowed and self._up(current):
            better = [name for name in proved if allowed.index(name) < allowed.index(current)]
            return better[0] if better else current
        up = [name for name in allowed if self._up(name)]
        return next(iter(proved or up), None)

    def _route(self, lane: str) -> Route:
        endpoint, allowed = self._current[lane], self._lanes[lane]
        if endpoint is None:
            return Route(None, held=Held.NOT_CONNECTED if allowed else Held.NOT_ALLOWED)
        return Route(endpoint, next((name for name in allowed if name != endpoint and self._up(name)), None))

    def _wanted(self, now: float) -> list[str]:
        """Endpoints that should have a link, the most wanted first."""
        wanted: dict[str, None] = {}
        for allowed in self._lanes.values():
            wanted.update(dict.fromkeys(self._warm(allowed, WARM_LINKS, now)))
        wanted.update(dict.fromkeys(name for name in self._current.values() if name is not None))
        if not wanted:
            control = self._config.endpoints if self._config.control is None else self._config.control
            wanted.update(dict.fromkeys(self._warm([name for name in control if name in self._endpoints], 1, now)))
        return list(wanted)

    def _warm(self, allowed: Sequence[str], count: int, now: float) -> list[str]:
        """The head of `allowed` that holds `count` endpoints in good health: proved, or not tried yet."""
        head, good = [], 0
        for name in allowed:
            if good == count:
                break
            head.append(name)
            good += self._proved(name, now) or not self._endpoints[name].failed
        return head

    def _must_close(self, name: str, now: float) -> bool:
        health, config = self._endpoints[name], self._config
        if health.state is _State.CONNECTING and now - health.since >= config.connect_timeout_s:
            return True
        return health.state is not _State.CLOSED and now - health.wanted_at >= config.linger_s

    def _close(self, name: str, now: float) -> None:
        health = self._endpoints[name]
        if health.state is _State.CONNECTING:
            self.lost(name, now, f"no connection within {self._config.connect_timeout_s:g} s")
            return
        health.state, health.since = _State.CLOSED, now
        health.retry_at = max(health.retry_at, now + self._config.backoff_min_s)

    def _may_open(self, name: str, now: float) -> bool:
        health = self._endpoints[name]
        return health.state is _State.CLOSED and now >= health.retry_at

    def _wake_at(self, wanted: Sequence[str], now: float) -> float | None:
        """The earliest time at which a decision may change by itself."""
        times = []
        for name, health in self._endpoints.items():
            if health.state is _State.CLOSED and name in wanted:
                times.append(health.retry_at)
            if health.state is _State.CONNECTING:
                times.append(health.since + self._config.connect_timeout_s)
            if health.state is _State.UP and health.failed and not self._proved(name, now):
                times.append(health.since + self._config.failback_s)
            if health.state is not _State.CLOSED and name not in wanted:
                times.append(health.wanted_at + self._config.linger_s)
        return min(times, default=None)

    def _up(self, name: str) -> bool:
        return self._endpoints[name].state is _State.UP

    def _proved(self, name: str, now: float) -> bool:
        health = self._endpoints[name]
        return health.state is _State.UP and (not health.failed or now - health.since >= self._config.failback_s)
