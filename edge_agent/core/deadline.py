"""How long an endpoint may take to answer, from the round trips it has shown (RFC 6298).

- Deadline: SRTT + 4 RTTVAR, at least `floor_s`, at most `ceiling_s`; `first_s` before the first answer.
- Karn's rule is met by construction: a block that goes again is a new message with an id of its own, so that every answer
  belongs to one sending. A late answer is therefore a sample too, and the deadline follows a link that becomes slow.
- One sample per round trip (core.pipe sees to it): a hundred answers after one gap are one late answer.
- A sample counts as at most SURPRISE_MAX deadlines. So a stall of seconds, which is no round trip, leaves the next deadline short, and a
  link that has become slow is learned within a few answers.
- Size takes time. Round trips are those of the usual number of bytes under way; more bytes than usual get twice the time that
  they take at the best rate seen of late. So a large block on a slow link is not late, and a small one is not waited for.
- Silence is judged by the worst round trip of late (`peak_s`, halved every minute): TCP sends a lost packet again after 200 ms
  at the earliest, then after twice that, and a link that loses packets is no dead link.
- But a suspect is not waited for beyond `patience_s_max`, or as many round trips: until then every block goes twice.

>>> trips = RoundTrips(DeadlineLimits())
>>> trips.deadline_s(0)
1.0
>>> for _ in range(20): trips.answered(waited_s=0.002, ahead_bytes=600, answered_bytes=600, now=0.0)
>>> trips.deadline_s(600)
0.04
"""

from __future__ import annotations

from dataclasses import dataclass

ALPHA, BETA, K = 1 / 8, 1 / 4, 4  # RFC 6298, 2.3
SURPRISE_MAX = 2
PEAK_HALF_LIFE_S = 60.0
RATE_HALF_LIFE_S = 30.0
RATE_FIRST = 100_000.0  # bytes/s, before any was seen
PATIENCE_MAX = 16.0
MIN_LEAK = 1 / 64  # the least round trip rises by this share of the difference per sample: routes change


@dataclass(frozen=True)
class DeadlineLimits:
    """`floor_s` to `ceiling_s`: the deadline. `suspect_s`, `dead_s`: the least silence of a suspect and of a dead endpoint;
    `unknown_dead_s` that of one which never answered."""

    floor_s: float = 0.04
    ceiling_s: float = 3.0
    first_s: float = 1.0
    suspect_s: float = 0.75
    dead_s: float = 3.0
    unknown_dead_s: float = 10.0
    suspect_peaks: float = 3.0
    patience_s_max: float = 2.0  # one bad moment must not make a minute of copies
    patience_round_trips_max: float = 8.0
    dead_peaks: float = 8.0


class RoundTrips:
    """Round trips of one endpoint. Outlives its connections."""

    def __init__(self, limits: DeadlineLimits) -> None:
        self._limits = limits
        self.srtt_s: float | None = None
        self._rttvar_s = self._min_s = 0.0
        self._usual_bytes = 0.0
        self._peak_s, self._peak_at = 0.0, 0.0
        self._rate, self._rate_at = RATE_FIRST, 0.0
        self._patience = 1.0

    def answered(self, waited_s: float, ahead_bytes: int, answered_bytes: int, now: float) -> None:
        """A message was answered after `waited_s`. When it was sent, `ahead_bytes` were under way, itself among them;
        `answered_bytes` were answered since then, itself among them."""
        if self.srtt_s is None:
            self.srtt_s, self._rttvar_s, self._min_s, self._usual_bytes = waited_s, waited_s / 2, waited_s, float(ahead_bytes)
        else:
            sample_s = min(waited_s, SURPRISE_MAX * self.deadline_s(ahead_bytes))
            self._rttvar_s += BETA * (abs(self.srtt_s - sample_s) - self._rttvar_s)
            self.srtt_s += ALPHA * (sample_s - self.srtt_s)
            self._usual_bytes += ALPHA * (ahead_bytes - self._usual_bytes)
            self._min_s = min(waited_s, self._min_s + MIN_LEAK * (waited_s - self._min_s))
        if waited_s >= self.peak_s(now):
            self._peak_s, self._peak_at = waited_s, now
        rate = answered_bytes / max(waited_s, 1e-6)
        if rate >= self._rate_now(now):
            self._rate, self._rate_at = rate, now

    def given_up(self) -> None:
        """A silent connection was given up. If it was slow and not dead, the next one has twice the time."""
        self._patience = min(PATIENCE_MAX, 2 * self._patience)

    def block_answered(self) -> None:
        """There is progress."""
        self._patience = max(1.0, self._patience / 2)

    def peak_s(self, now: float) -> float:
        """The worst round trip of late."""
        return float(self._peak_s * 0.5 ** (max(0.0, now - self._peak_at) / PEAK_HALF_LIFE_S))

    def deadline_s(self, ahead_bytes: int) -> float:
        """After this time a message sent with `ahead_bytes` under way is late."""
        limits = self._limits
        if self.srtt_s is None:
            return limits.first_s + self._extra_s(ahead_bytes)
        return min(limits.ceiling_s, max(limits.floor_s, self.srtt_s + K * self._rttvar_s)) + self._extra_s(ahead_bytes)

    def suspect_s(self, ahead_bytes: int, now: float) -> float:
        """After this silence, while others answer, the endpoint is suspected."""
        limits = self._limits
        patience_s = max(limits.patience_s_max, limits.patience_round_trips_max * (self.srtt_s or 0.0))
        return max(limits.suspect_s, min(limits.suspect_peaks * self.peak_s(now), patience_s), self.deadline_s(ahead_bytes))

    def dead_s(self, ahead_bytes: int, now: float) -> float:
        """After this silence the connection is given up."""
        limits = self._limits
        least_s = limits.dead_s if self.srtt_s is not None else limits.unknown_dead_s
        return self._patience * (max(least_s, limits.dead_peaks * self.peak_s(now)) + 2 * self._extra_s(ahead_bytes))

    def window_bytes(self, queue_s: float, now: float) -> float:
        """So many bytes under way fill the link and wait no longer than `queue_s` in its queues."""
        return self._rate_now(now) * (self._min_s + queue_s)

    def _extra_s(self, ahead_bytes: int) -> float:
        """The rate counts as it was when last seen: time alone does not make a deadline longer."""
        return 2 * max(0.0, ahead_bytes - self._usual_bytes) / self._rate

    def _rate_now(self, now: float) -> float:
        return float(self._rate * 0.5 ** (max(0.0, now - self._rate_at) / RATE_HALF_LIFE_S))
