"""Routing: which endpoint each lane uses now, and which links to open, to close and to keep warm.

A state machine without clock or network: times are arguments (seconds, monotonic), effects and timers are results.

- A lane goes only to endpoints that it allows: by rank, and among equal ranks by round trip. Without a connected one it is held.
- An endpoint is closed, connecting or up; an up one may be suspected: silent while another one answers.
- A lane stays where it is while that endpoint is up and not suspected. It leaves a suspect for one that answers, and goes back to a
  better rank once that has proved itself: it never failed, or it has answered without a gap for `failback_s` since. Each
  failure soon after a proof doubles that time, up to 32 times. A suspect that answers after all, on the same connection, was slow
  and not dead: its proof takes WOBBLE times as long, or lanes would go to and fro on a lossy link. A suspect stays in use where
  there is nothing else.
- Links are opened for the first two endpoints of every lane in use: the one it wants and a warm standby. Those that
  fail or are suspected do not count, so a long list is walked to its end.
- A link that no lane wants is closed after `linger_s`. A link that carries a lane is never closed to try another.
- Reconnects wait with decorrelated jitter (Brooker, 2015). The wait is at most HURRY of the time that the endpoint has been away
  (EASE if its lanes have another one), at least a second, at most `backoff_max_s`: a short outage ends soon after its end, and a
  broker that was away for long is not stormed. It starts small again only after a connection has held for `stable_s`, so a
  broker that accepts and kicks is not hammered.
- An attempt has `connect_timeout_s`, or eight round trips; every fourth one has four times that, for links slower than we know.

>>> router = Router(RoutingConfig(endpoints=("eu", "us")), uniform=lambda low, high: low)
>>> router.use({"canada": ("us", "eu")})
>>> router.step(0.0).open
['us', 'eu']
>>> router.connected("us", 0.1)
>>> router.step(0.1).routes["canada"].endpoint
'us'
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

WARM_LINKS = 2
ENDPOINTS_MAX = 64
HURRY, EASE = 1 / 20, 1 / 4
FIRST_S, FIRST_EASED_S = 0.5, 3.0  # first waits are drawn up to this: a fleet that is kicked at once comes back over this time
CAP_S = 1.0  # the longest wait is never below this
STRIKES_MAX = 5
WOBBLE = 12
PATIENT_EVERY, PATIENT_TIMES = 4, 4
INFINITY = float("inf")


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
    connect_timeout_s: float = 2.0
    stable_s: float = 5.0
    linger_s: float = 30.0
    backoff_min_s: float = 0.1
    backoff_max_s: float = 30.0


@dataclass(frozen=True)
class Route:
    """Where a lane goes now. `standby` is the next endpoint that it allows and that answers; `held` says why there is none."""

    endpoint: str | None
    standby: str | None = None
    held: Held | None = None


@dataclass(frozen=True)
class Move:
    """A lane changed its endpoint; `reason` is that of the endpoint that `failed`, or "connected", "preferred" or "policy"."""

    lane: str
    source: str | None
    target: str | None
    reason: str
    failed: bool = field(default=False, compare=False)


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
    """Health of one endpoint. `since`: of `state`; `answers_since`: without a gap; `away_since`: no stable connection.
    It `wobbled` if it was suspected and then answered on the same connection."""

    state: _State = _State.CLOSED
    since: float = 0.0
    suspected: bool = False
    answers_since: float = 0.0
    failed: bool = False
    wobbled: bool = False
    strikes: int = 0
    reason: str = ""
    away_since: float | None = None
    attempts: int = 0
    wait_s: float = 0.0
    retry_at: float = -INFINITY
    wanted_at: float = -INFINITY
    round_trip_s: float | None = None


Ranks = dict[str, int]


class Router:
    """The state machine. Tell it what happened, then ask `step` what to do; `uniform` draws a number between two."""

    def __init__(self, config: RoutingConfig, uniform: Callable[[float, float], float]) -> None:
        if not 1 <= len(config.endpoints) <= ENDPOINTS_MAX or len(set(config.endpoints)) != len(config.endpoints):
            raise ValueError(f"{len(config.endpoints)} endpoints; 1 to {ENDPOINTS_MAX} different ones are allowed")
        self._config, self._uniform = config, uniform
        self._endpoints = {name: _Endpoint() for name in config.endpoints}
        self._lanes: dict[str, Ranks] = {}
        self._current: dict[str, str | None] = {}

    def use(self, lanes: Mapping[str, Sequence[str | Sequence[str]]]) -> None:
        """Set the lanes in use, each with the endpoints it allows in order of preference; a sequence within is one rank.
        Unknown endpoints do not count."""
        self._lanes = {lane: self._ranks(allowed) for lane, allowed in lanes.items()}
        self._current = {lane: self._current.get(lane) for lane in self._lanes}

    def connected(self, endpoint: str, now: float) -> None:
        """The link to `endpoint` is up and authenticated."""
        health = self._endpoints[endpoint]
        health.state, health.since, health.answers_since, health.suspected, health.wobbled = _State.UP, now, now, False, False

    def answered(self, endpoint: str, now: float, round_trip_s: float | None = None) -> None:
        """`endpoint` acknowledged a message."""
        health = self._endpoints[endpoint]
        health.round_trip_s = round_trip_s
        if health.suspected:
            health.suspected, health.wobbled, health.answers_since = False, True, now

    def suspect(self, endpoint: str, now: float, reason: str) -> None:
        """`endpoint` is silent though it is connected; it is trusted again when it answers."""
        health = self._endpoints[endpoint]
        if health.state is _State.UP and not health.suspected:
            self._fail(health, now, reason)
            health.suspected = True

    def lost(self, endpoint: str, now: float, reason: str) -> None:
        """The link failed: it broke, or an attempt did not succeed."""
        health, config = self._endpoints[endpoint], self._config
        began = health.since if health.state is _State.CONNECTING else now
        if health.state is _State.UP and not health.suspected:
            self._fail(health, now, reason)
        if health.state is _State.UP and now - health.since >= config.stable_s:
            health.away_since, health.attempts, health.wait_s = None, 0, 0.0
        if health.away_since is None:
            health.away_since = now
        eased = self._has_another(endpoint)
        first_s, share = (FIRST_EASED_S, EASE) if eased else (FIRST_S, HURRY)
        cap_s = min(config.backoff_max_s, max(first_s, CAP_S, share * (now - health.away_since)))
        health.wait_s = self._uniform(config.backoff_min_s, min(cap_s, max(first_s, 3 * health.wait_s)))
        health.retry_at = max(now + config.backoff_min_s, began + health.wait_s)  # an attempt that took its time has waited
        health.state, health.since, health.suspected = _State.CLOSED, now, False
        health.failed, health.reason = True, reason

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
            health = self._endpoints[name]
            health.state, health.since, health.attempts = _State.CONNECTING, now, health.attempts + 1
        return Plan(routes, opening, closing, moves, self._wake_at(wanted, now))

    def reason(self, endpoint: str) -> str:
        """Why `endpoint` failed last; empty if it never did."""
        return self._endpoints[endpoint].reason

    def suspected(self, endpoint: str) -> bool:
        return self._endpoints[endpoint].suspected

    def _ranks(self, allowed: Sequence[str | Sequence[str]]) -> Ranks:
        ranks: Ranks = {}
        for rank, entry in enumerate(allowed):
            for name in (entry,) if isinstance(entry, str) else entry:
                if name in self._endpoints:
                    ranks.setdefault(name, rank)
        return ranks

    def _fail(self, health: _Endpoint, now: float, reason: str) -> None:
        again = health.failed and now - health.answers_since < 2 * self._config.failback_s * 2**health.strikes
        health.strikes = min(STRIKES_MAX, health.strikes + 1) if again else 0
        health.failed, health.reason = True, reason

    def _has_another(self, endpoint: str) -> bool:
        """Do all lanes that allow `endpoint` have another one that answers?"""
        return all(any(e != endpoint and self._good(e) for e in ranks) for ranks in self._lanes.values() if endpoint in ranks)

    def _move(self, now: float) -> list[Move]:
        moves = []
        for lane in self._lanes:
            old, new = self._current[lane], self._choice(lane, now)
            if old != new:
                reason, failed = self._move_reason(lane, old)
                moves.append(Move(lane, old, new, reason, failed))
                self._current[lane] = new
        return moves

    def _move_reason(self, lane: str, old: str | None) -> tuple[str, bool]:
        if old is None:
            return "connected", False
        if old not in self._lanes[lane]:
            return "policy", False
        return ("preferred", False) if self._good(old) else (self._endpoints[old].reason, True)

    def _choice(self, lane: str, now: float) -> str | None:
        ranks, current = self._lanes[lane], self._current[lane]
        proved = [name for name in ranks if self._proved(name, now)]
        if current in ranks and self._good(current):
            return self._best(ranks, [name for name in proved if ranks[name] < ranks[current]]) or current
        good = [name for name in ranks if self._good(name)]
        if (best := self._best(ranks, proved or good)) is not None:
            return best
        if current in ranks and self._up(current):
            return current
        return self._best(ranks, [name for name in ranks if self._up(name)])

    def _best(self, ranks: Ranks, names: Iterable[str]) -> str | None:
        """The first by rank, then by round trip, then in the order given."""
        return min(names, key=lambda name: (ranks[name], self._round_trip_s(name)), default=None)

    def _round_trip_s(self, name: str) -> float:
        known = self._endpoints[name].round_trip_s
        return INFINITY if known is None else known

    def _route(self, lane: str) -> Route:
        endpoint, ranks = self._current[lane], self._lanes[lane]
        if endpoint is None:
            return Route(None, held=Held.NOT_CONNECTED if ranks else Held.NOT_ALLOWED)
        return Route(endpoint, self._best(ranks, [name for name in ranks if name != endpoint and self._good(name)]))

    def _wanted(self, now: float) -> list[str]:
        """Endpoints that should have a link, the most wanted first."""
        wanted: dict[str, None] = {}
        for ranks in self._lanes.values():
            wanted.update(dict.fromkeys(self._warm(ranks, WARM_LINKS, now)))
        wanted.update(dict.fromkeys(name for name in self._current.values() if name is not None))
        if not wanted:
            control = self._config.endpoints if self._config.control is None else self._config.control
            wanted.update(dict.fromkeys(self._warm([name for name in control if name in self._endpoints], 1, now)))
        return list(wanted)

    def _warm(self, allowed: Iterable[str], count: int, now: float) -> list[str]:
        """The head of `allowed` that holds `count` endpoints in good health: proved, or not tried yet."""
        head, good = [], 0
        for name in allowed:
            if good == count:
                break
            head.append(name)
            good += self._proved(name, now) or not self._endpoints[name].failed
        return head

    def _must_close(self, name: str, now: float) -> bool:
        health = self._endpoints[name]
        if health.state is _State.CONNECTING and now >= health.since + self._timeout_s(health):
            return True
        return health.state is not _State.CLOSED and now >= health.wanted_at + self._config.linger_s

    def _close(self, name: str, now: float) -> None:
        health = self._endpoints[name]
        if health.state is _State.CONNECTING:
            self.lost(name, now, f"no connection within {self._timeout_s(health):g} s")
            return
        health.state, health.since, health.suspected = _State.CLOSED, now, False
        health.retry_at = max(health.retry_at, now + self._config.backoff_min_s)

    def _timeout_s(self, health: _Endpoint) -> float:
        timeout_s = max(self._config.connect_timeout_s, 8 * (health.round_trip_s or 0.0))
        return timeout_s * (PATIENT_TIMES if health.attempts % PATIENT_EVERY == 0 else 1)

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
                times.append(health.since + self._timeout_s(health))
            if self._good(name) and not self._proved(name, now):
                times.append(health.answers_since + self._proof_s(health))
            if health.state is not _State.CLOSED and name not in wanted:
                times.append(health.wanted_at + self._config.linger_s)
        return min(times, default=None)

    def _up(self, name: str) -> bool:
        return self._endpoints[name].state is _State.UP

    def _good(self, name: str) -> bool:
        return self._up(name) and not self._endpoints[name].suspected

    def _proved(self, name: str, now: float) -> bool:
        health = self._endpoints[name]
        return self._good(name) and (not health.failed or now >= health.answers_since + self._proof_s(health))

    def _proof_s(self, health: _Endpoint) -> float:
        return float(self._config.failback_s * max(2**health.strikes, WOBBLE if health.wobbled else 1))
