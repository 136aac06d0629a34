"""Which engines a model never learns from.

- Whole engines, never rows: neighbouring rows of one engine are nearly copies.
- An engine's place follows from its name alone, so it stays where it is when data is added, and models of different runs can be
  compared on the same hold-out.
- With few engines the rule would leave the hold-out empty; then the next engines in the same order are taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from edge_agent.contract.errors import ConfigError

ENGINES_MIN = 4


def holdout_of(entities: Iterable[str], share: float) -> set[str]:
    """The entities to hold out: those whose hash falls below `share`, and at least three quarters of what `share` promises.

    Raises:
        ConfigError: there are fewer than ENGINES_MIN entities.
    """
    places = sorted((_place(e), e) for e in set(entities))
    if len(places) < ENGINES_MIN:
        raise ConfigError(
            f"{len(places)} engines with labels; at least {ENGINES_MIN} are needed to train on some and test on others. "
            "Add readings and labels of more engines"
        )
    below = sum(place < share for place, _ in places)
    least = max(1, round(len(places) * share * 0.75))
    most = len(places) - 2
    return {e for _, e in places[: min(max(below, least), most)]}


def _place(entity: str) -> float:
    return int.from_bytes(hashlib.sha256(entity.encode()).digest()[:8], "big") / 2**64
