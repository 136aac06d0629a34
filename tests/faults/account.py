"""The account of a whole agent: every reading that its sensors' broker took is in the cloud exactly once, or named in the loss ledger."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from edge_agent.contract.stream import LOSSES
from edge_agent.core.ledger import Loss, read_losses
from tests.edge_agent.gateway import Bench

QUIET_S = 2.0  # the sensors' broker delivers again what was not acknowledged
PATIENCE_S = 90.0


@dataclass(frozen=True)
class Account:
    """How it came out."""

    arrived: int
    named: int
    blocks: int


def losses(bench: Bench) -> list[Loss]:
    """The ledger as the cloud has it."""
    return [loss for _, table in bench.cloud.arrived(LOSSES.stream) for loss in read_losses(table)]


def settle_accounts(bench: Bench, published: int) -> Account:
    """Wait until readings 1 to `published` have arrived or are named, and assert that none has arrived twice."""
    deadline = time.monotonic() + PATIENCE_S
    while len(set(bench.cloud.readings())) < published and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(QUIET_S)
    counts = Counter(cycle for _, cycle in bench.cloud.readings())
    doubled = sorted(cycle for cycle, count in counts.items() if count > 1)
    assert not doubled, f"{len(doubled)} readings arrived twice: {doubled[:20]}\n{bench.log()[-3000:]}"
    missing = sorted(set(range(1, published + 1)) - counts.keys())
    named = sum(loss.readings for loss in losses(bench) if loss.of_stream == "turbofan")
    assert len(missing) == named, f"{len(missing)} of {published} readings missing, {named} named: {missing[:20]}\n{bench.log()[-3000:]}"
    return Account(len(counts), len(missing), len(bench.cloud.tables))
