"""Receipts on their way to devices: the newest of what the lake holds, for each device at most once in an interval.

- The first goes at once. What comes within the interval after it waits, and is overtaken by what comes later: a receipt of a lane says all
  that the one before it said.
- What does not fit into one message goes in several: a broker ends the connection of whoever sends it too much.
- A receipt that is lost, with its ingest or on its way, costs a device one more sending of a block: it is a copy then, and has a receipt.

>>> sent = []
>>> receipts = Receipts(lambda receipt: sent.append(receipt.lanes[0].cumulative), interval_s=1.0)
>>> for now, cumulative in ((0.0, 1), (0.1, 2), (0.2, 3)):
...     receipts.add([Receipt(device="d", epoch="e", lanes=[LaneReceipt(lane="a", cumulative=cumulative)])], now)
>>> receipts.send(1.0); sent
[1, 3]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from edge_agent.contract.receipt import LaneReceipt, Receipt, messages

Lanes = dict[tuple[str, str], LaneReceipt]
"""By epoch and lane."""


class Receipts:
    """Receipts not yet published."""

    def __init__(self, publish: Callable[[Receipt], object], interval_s: float) -> None:
        self._publish, self._interval_s = publish, interval_s
        self._waiting: dict[str, Lanes] = {}
        self._quiet: set[str] = set()  # devices that had a receipt less than the interval ago
        self._ends: deque[tuple[float, str]] = deque()  # when their quiet ends: the interval is the same for all, so in order

    def add(self, receipts: Sequence[Receipt], now: float) -> None:
        """Take what a commit settled; what may be sent now is."""
        self.send(now)
        fresh = {receipt.device for receipt in receipts} - self._quiet
        for receipt in receipts:
            lanes = self._waiting.setdefault(receipt.device, {})
            lanes.update({(receipt.epoch, lane.lane): lane for lane in receipt.lanes})
        for device in sorted(fresh):
            self._send(device, now)

    def send(self, now: float) -> None:
        """Send what has waited long enough."""
        while self._ends and self._ends[0][0] <= now:
            device = self._ends.popleft()[1]
            self._quiet.discard(device)
            if device in self._waiting:
                self._send(device, now)

    def due_s(self, now: float) -> float | None:
        """Seconds until `send` has something to do; None if nothing waits."""
        return max(0.0, self._ends[0][0] - now) if self._waiting else None

    def _send(self, device: str, now: float) -> None:
        epochs: dict[str, list[LaneReceipt]] = {}
        for (epoch, _), lane in self._waiting.pop(device).items():
            epochs.setdefault(epoch, []).append(lane)
        for epoch, lanes in epochs.items():
            for message in messages(Receipt(device=device, epoch=epoch, lanes=lanes)):
                self._publish(message)
        if self._interval_s:
            self._quiet.add(device)
            self._ends.append((now + self._interval_s, device))
