"""Which receipts count: those for this device's buffer, from an endpoint that the lane allows.

A region cannot make the device forget what it may not hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container

import msgspec

from edge_agent.contract.errors import ContractError
from edge_agent.contract.receipt import Receipt, decode_receipt

log = logging.getLogger(__name__)


class Receipts:
    """Reads receipts for `device` and the `epoch` of its buffer; `allowed` gives the endpoints of a lane. `refused` counts."""

    def __init__(self, device: str, epoch: Callable[[], str], allowed: Callable[[str], Container[str]]) -> None:
        self._device, self._epoch, self._allowed = device, epoch, allowed
        self.refused = 0

    def read(self, endpoint: str, payload: bytes) -> Receipt | None:
        """What counts of a receipt that came from `endpoint`; None if it is about another buffer, or none at all."""
        try:
            receipt = decode_receipt(payload)
        except ContractError as e:
            self._refuse(endpoint, str(e))
            return None
        if receipt.device != self._device or receipt.epoch != self._epoch():
            return None
        mine = [lane for lane in receipt.lanes if self._may_settle(endpoint, lane.lane)]
        if len(mine) < len(receipt.lanes):
            self._refuse(endpoint, "it names lanes that may not go there")
        return msgspec.structs.replace(receipt, lanes=mine)

    def _may_settle(self, endpoint: str, lane: str) -> bool:
        try:
            return endpoint in self._allowed(lane)
        except ContractError:  # no lane at all
            return False

    def _refuse(self, endpoint: str, why: str) -> None:
        self.refused += 1
        log.warning("receipt refused endpoint=%s error=%s", endpoint, why)
