"""The rules of a rollout: which devices are asked next, wave after wave, and when it is over or undone.

- The devices of a wave are moved together; the next wave is moved when each device of this one is ACTIVE on the bundle,
  its probation passed.
- A device that answers REJECTED or ROLLED_BACK has failed. More failures than `failures_allowed` undo the rollout: every
  device moved so far gets the bundle back that it had at the start. A tolerated failure counts as done.
- A wave that takes longer than `wave_timeout_s` pauses the rollout, with the late devices in the reason. It goes on by
  itself when they arrive, and can be undone meanwhile.
- A device that leaves the fleet leaves the rollout: nothing is asked of it and nobody waits for it. What it answered before counts, also
  when a device of its name is added again. A wave that all devices left has proved nothing: the next one in line takes their place.

States: running or paused → complete; running, paused or complete → undoing → undone (an operator asked) or failed (the devices did).

All of it is pure, and time is an argument: `step` says what is intended, `cloud.rollout` stores and does it, and tells `done`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

import msgspec

from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import BundleRef, Phase, Reported

NAMED_MAX = 5
ROUNDING = 1e-9


class Status(StrEnum):
    """Where a rollout is."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETE = "complete"
    UNDOING = "undoing"
    UNDONE = "undone"
    FAILED = "failed"


OPEN = (Status.RUNNING, Status.PAUSED, Status.UNDOING)


class Place(StrEnum):
    """What has been asked of a device. MOVING and RESTORING: intended, not yet known to be done. LEFT: the fleet, so nothing is asked."""

    WAITING = "waiting"
    MOVING = "moving"
    MOVED = "moved"
    RESTORING = "restoring"
    RESTORED = "restored"
    LEFT = "left"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A device in a rollout. `version` is the desired document that carries the bundle, `failure` why it was refused."""

    wave: int
    previous: BundleRef | None
    place: Place = Place.WAITING
    version: int = 0
    failure: str = ""


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout and how far it has come. Times are seconds since 1970 UTC; `wave` counts from 0."""

    id: int
    ref: BundleRef
    members: dict[str, Member]
    waves: int
    failures_allowed: int
    wave_timeout_s: float
    created_s: float
    wave_started_s: float
    wave: int = 0
    status: Status = Status.RUNNING
    reason: str = ""
    by_operator: bool = False

    @property
    def failed(self) -> list[str]:
        """The devices that refused the bundle."""
        return [d for d, m in self.members.items() if m.failure]

    @property
    def present(self) -> set[str]:
        """The devices that did not leave the fleet."""
        return {d for d, m in self.members.items() if m.place is not Place.LEFT}


class Action(msgspec.Struct, frozen=True):
    """Ask `device` for `ref` (None: no model)."""

    device: str
    ref: BundleRef | None


def plan(devices: Sequence[str], canary: float = 1) -> list[list[str]]:
    """Waves: `canary` devices (a count, or a fraction below 1, rounded up), then the rest. 0 means: all at once.

    Raises:
        ConfigError: `canary` is negative, or above 1 and not whole.
    """
    if not (0 <= canary < 1 or (canary >= 1 and float(canary).is_integer())):
        raise ConfigError(f"canary {canary} is neither a whole number of devices nor a fraction below 1")
    count = math.ceil(canary * len(devices) - ROUNDING) if canary < 1 else int(canary)
    return [list(wave) for wave in (devices[:count], devices[count:]) if wave]


def step(rollout: Rollout, reported: Mapping[str, Reported], now: float) -> tuple[Rollout, list[Action]]:
    """The next state of a rollout, and what to ask of devices for it.

    Store the state before the actions are done; tell `done` of each that was.
    """
    if rollout.status in (Status.RUNNING, Status.PAUSED):
        rollout = _advance(_note_failures(rollout, reported), reported, now)
    if rollout.status is Status.UNDOING and not _actions(rollout):
        return _with(rollout, status=Status.UNDONE if rollout.by_operator else Status.FAILED), []
    return rollout, _actions(rollout)


def undone(rollout: Rollout, reason: str, by_operator: bool) -> Rollout:
    """The rollout on its way back: whatever was moved will be restored."""
    members = {d: _with(m, place=Place.RESTORING) if m.place in (Place.MOVING, Place.MOVED) else m for d, m in rollout.members.items()}
    return _with(rollout, members=members, status=Status.UNDOING, reason=reason, by_operator=by_operator)


def done(rollout: Rollout, action: Action, version: int) -> Rollout:
    """Note that `action`, which is still intended, is done in the desired document `version`."""
    member = rollout.members[action.device]
    place = Place.MOVED if member.place is Place.MOVING else Place.RESTORED
    return _with(rollout, members={**rollout.members, action.device: _with(member, place=place, version=version)})


def intended(rollout: Rollout, action: Action) -> bool:
    """Whether `action` is still to be done: another may have done it meanwhile, or undone the rollout."""
    member = rollout.members.get(action.device)
    return member is not None and _action(rollout, action.device, member) == action


def without_strangers(rollout: Rollout, fleet: Collection[str]) -> Rollout:
    """The rollout after devices left the fleet: no action is possible for them any more."""
    members = {d: m if d in fleet else _with(m, place=Place.LEFT) for d, m in rollout.members.items()}
    return _with(rollout, members=members)


def _note_failures(rollout: Rollout, reported: Mapping[str, Reported]) -> Rollout:
    """A failure is kept, even if the device reports something else later."""
    members = {}
    for device, member in rollout.members.items():
        answer = _answer(member, reported.get(device))
        if answer is not None and answer.phase in (Phase.REJECTED, Phase.ROLLED_BACK) and not member.failure:
            reason = answer.reason or "no reason given"
            member = _with(member, failure=f"{answer.phase}: {reason}{': ' if answer.detail else ''}{answer.detail}")
        members[device] = member
    return _with(rollout, members=members)


def _advance(rollout: Rollout, reported: Mapping[str, Reported], now: float) -> Rollout:
    failed, rollout = rollout.failed, _filled(rollout)
    if len(failed) > rollout.failures_allowed:
        first = f"{failed[0]} {rollout.members[failed[0]].failure}"
        return undone(rollout, f"{len(failed)} failed, {rollout.failures_allowed} allowed; {first}", by_operator=False)
    if any(m.place is Place.WAITING for m in rollout.members.values() if m.wave == rollout.wave):
        return _move(rollout, rollout.wave, now)
    late = [d for d, m in rollout.members.items() if m.wave == rollout.wave and not _settled(rollout, m, reported.get(d))]
    if not late and rollout.wave + 1 < rollout.waves:
        return _move(rollout, rollout.wave + 1, now)
    if not late:
        return _with(rollout, status=Status.COMPLETE, reason="")
    if now - rollout.wave_started_s >= rollout.wave_timeout_s:
        names = ", ".join(late[:NAMED_MAX]) + (f" and {len(late) - NAMED_MAX} more" if len(late) > NAMED_MAX else "")
        return _with(rollout, status=Status.PAUSED, reason=f"wave {rollout.wave + 1} of {rollout.waves} waits for {names}")
    return rollout


def _filled(rollout: Rollout) -> Rollout:
    """The wave, if nobody is left in it and none had failed, with the first device of those to come."""
    waiting = next((d for d, m in rollout.members.items() if m.place is Place.WAITING), None)
    if waiting is None or any(m.wave == rollout.wave and (m.place is not Place.LEFT or m.failure) for m in rollout.members.values()):
        return rollout
    return _with(rollout, members={**rollout.members, waiting: _with(rollout.members[waiting], wave=rollout.wave)})


def _move(rollout: Rollout, wave: int, now: float) -> Rollout:
    here = {d: _with(m, place=Place.MOVING) for d, m in rollout.members.items() if m.wave == wave and m.place is Place.WAITING}
    members = {**rollout.members, **here}
    return _with(rollout, members=members, wave=wave, wave_started_s=now, status=Status.RUNNING, reason="")


def _answer(member: Member, reported: Reported | None) -> Reported | None:
    """The report, if it answers to the document that moved this device."""
    if member.place is not Place.MOVED or reported is None or reported.desired_version < member.version:
        return None
    return reported


def _settled(rollout: Rollout, member: Member, reported: Reported | None) -> bool:
    answer = _answer(member, reported)
    arrived = answer is not None and answer.phase is Phase.ACTIVE and answer.active == rollout.ref
    return arrived or bool(member.failure) or member.place is Place.LEFT


def _actions(rollout: Rollout) -> list[Action]:
    return [action for d, m in rollout.members.items() if (action := _action(rollout, d, m))]


def _action(rollout: Rollout, device: str, member: Member) -> Action | None:
    if member.place is Place.MOVING:
        return Action(device, rollout.ref)
    return Action(device, member.previous) if member.place is Place.RESTORING else None


_with = msgspec.structs.replace
