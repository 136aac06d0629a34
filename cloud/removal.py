"""Removal: a lost or stolen device may not connect, send or receive any more. What it sent stays, and its name may be added again.

- Its password goes from the fleet's database and from the embedded brokers, which end the connections that it holds. Rollouts go on
  without it; the control loop clears its desired document in every region.
- What is missing of it is known as `removed`, and its silence breaks no service level: `cloud.completeness`, `cloud.levels`.
- The audit trail has the removal before it is done: twice perhaps if that is cut off, never not at all. What was cut off is finished by
  removing the device again.
- A broker of your own has to be told (deploy/README.md): `fenceline broker acl` denies removed devices everything, and a list of revoked
  certificates keeps them from connecting.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from cloud import rollout
from cloud.audit import Audit
from cloud.config import Settings
from cloud.enrol import agent_path, password_path, reload_brokers
from cloud.fleet import Fleet

log = logging.getLogger(__name__)

REMOVED = "device_removed"


def remove(settings: Settings, fleet: Fleet, device: str, by: str) -> bool:
    """Take `device` out of the fleet; `by` answers for it.

    Returns:
        False if it was removed before: then the brokers are told once more.

    Raises:
        ConfigError: there never was such a device.
        UnavailableError: a database does not answer; do it again.
    """

    def record() -> None:
        Audit(settings.audit_db).add(REMOVED, region="", subject=device, reason="", detail=f"by {by}; {_last_words(fleet, device)}")

    removed = fleet.remove(device, record)
    reload_brokers(settings, fleet)
    rollout.leave(settings, device)
    for path in (password_path(settings, device), agent_path(settings, device)):  # the cloud's copies; without them the name is free
        path.unlink(missing_ok=True)
    log.info("device removed device=%s by=%s before=%s", device, by, not removed)
    return removed


def _last_words(fleet: Fleet, device: str) -> str:
    """What the device said last, for whoever asks later what was lost with it."""
    if device not in (reported := fleet.all_reported()):
        return "it never reported"
    said, at_us = reported[device]
    at = datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(timespec="seconds")
    return f"it reported last at {at}, with {said.blocks_waiting} blocks waiting on it, epoch {said.epoch or 'unknown'}"
