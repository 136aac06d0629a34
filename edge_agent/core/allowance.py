"""Bytes that may be spent beside the usual: on hedges, and on what is replayed from the buffer.

- Hedges may take a share of the bytes sent, and a burst at once. Those that make up for an endpoint which is then suspected or lost,
  without another answer, were no waste: they are given back.
- Replay may take so many bytes a second; what is not used within a second lapses. None: no limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

INFINITY = float("inf")
PAUSE_S = 0.001  # at least so much later than the moment at which replay may go on: floats are not exact


@dataclass
class HedgeAllowance:
    """Bytes for hedges, and what became of them: `hedges` in `bytes`, of which `needed_bytes` were no waste, and `denied` ones."""

    share_max: float
    burst_bytes: int
    hedges: int = 0
    denied: int = 0
    bytes: int = 0
    needed_bytes: int = 0
    left: float = field(init=False)
    _spent_for: dict[str, int] = field(default_factory=dict)  # bytes, by the endpoint that was late, since its last answer

    def __post_init__(self) -> None:
        self.left = float(self.burst_bytes)

    def earn(self, size: int) -> None:
        """So many bytes were sent."""
        self._give(self.share_max * size)

    def spend(self, late_endpoint: str, size: int) -> None:
        """So many bytes went twice, because `late_endpoint` was late."""
        self.left -= size
        self.hedges += 1
        self.bytes += size
        self._spent_for[late_endpoint] = self._spent_for.get(late_endpoint, 0) + size

    def answered(self, endpoint: str) -> None:
        """It was slow only."""
        self._spent_for.pop(endpoint, None)

    def failed(self, endpoint: str) -> None:
        """It did not answer any more: what went elsewhere for it had to."""
        needed = self._spent_for.pop(endpoint, 0)
        self.needed_bytes += needed
        self._give(needed)

    def _give(self, size: float) -> None:
        self.left = min(self.burst_bytes, self.left + size)


class ReplayAllowance:
    """Bytes for replay."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._left, self._at = 0.0, 0.0

    def any(self, now: float) -> bool:
        """May a block be replayed now?"""
        if self._rate is None:
            return True
        self._left = min(self._rate, self._left + self._rate * max(0.0, now - self._at))
        self._at = now
        return self._left > 0

    def spend(self, size: int) -> None:
        """So many bytes were replayed; a last block may pass the limit, and is made up for."""
        if self._rate is not None:
            self._left -= size

    def wake_at(self, now: float) -> float:
        """When a block may be replayed again; infinite if one may now, or a time is past: nothing waits for it."""
        if self._rate is None or self._left > 0:
            return INFINITY
        again_at = self._at - self._left / self._rate + PAUSE_S
        return again_at if again_at > now else INFINITY
