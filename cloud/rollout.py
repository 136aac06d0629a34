"""Rollouts: a release on its way through the fleet, wave after wave.

Rules of the core (`step`: pure, time is an argument):

- The devices of a wave are moved together; the next wave is moved when each device of this one is ACTIVE on the bundle,
  its probation passed.
- A device that answers REJECTED or ROLLED_BACK has failed. More failures than `failures_allowed` undo the rollout: every
  device moved so far gets the bundle back that it had at the start. A tolerated failure counts as done.
- A wave that takes longer than `wave_timeout_s` pauses the rollout, with the late devices in the reason. It goes on by
  itself when they arrive, and can be undone meanwhile.
- A device that leaves the fleet leaves the rollout: nothing is asked of it and nobody waits for it. What it answered before counts, also
  when a device of its name is added again. A wave that all devices left has proved nothing: the next one in line takes their place.
- What is intended is stored before it is done, and done again until it is known to be done. Asking a device for the
  bundle that it already has changes nothing, so a crash in between costs nothing.

States: running or paused → complete; running, paused or complete → undoing → undone (an operator asked) or failed (the devices did).
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

import msgspec
from sqlalchemy import Column, Connection, Integer, LargeBinary, MetaData, Table, delete, func, insert, select

from cloud.metadata import Database, Store
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import BundleRef, Desired, Phase, Reported

log = logging.getLogger(__name__)

WAVE_TIMEOUT_S = 600.0
DEVICES_MAX = 100_000
LATE_NAMED_MAX = 5
ROUNDING = 1e-9
HOLD_S = 0.5


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


class FleetState(Protocol):
    """What a rollout needs of `cloud.fleet.Fleet`."""

    def devices(self) -> list[str]: ...
    def desired(self, device: str) -> Desired: ...
    def set_desired(self, device: str, bundle: BundleRef | None) -> Desired: ...
    def all_reported(self) -> dict[str, tuple[Reported, int]]: ...


class Databases(Protocol):
    """What a rollout needs of `cloud.config.Settings`. A SQLite file must be another one than the fleet's, which is written meanwhile."""

    @property
    def rollouts_db(self) -> Database: ...


# --- the core ---


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
        names = ", ".join(late[:LATE_NAMED_MAX]) + (f" and {len(late) - LATE_NAMED_MAX} more" if len(late) > LATE_NAMED_MAX else "")
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


# --- the shell ---


def start(
    settings: Databases,
    fleet: FleetState,
    ref: BundleRef,
    *,
    now: float,
    devices: Collection[str] | None = None,
    canary: float = 1,
    failures_allowed: int = 0,
    wave_timeout_s: float = WAVE_TIMEOUT_S,
) -> Rollout:
    """Begin to move `devices` (None: the whole fleet) to `ref`; the canary is asked at once.

    Devices that already want `ref` are left out.

    Raises:
        ConfigError: an unknown device, none at all, a device in an open rollout, or limits that make no sense.
    """
    chosen = _chosen(fleet, devices)
    if failures_allowed < 0 or not 0 < wave_timeout_s < math.inf:
        raise ConfigError(
            f"failures allowed {failures_allowed} must not be negative, wave timeout {wave_timeout_s} s must be positive and finite"
        )
    with _transaction(settings) as store:  # no other rollout moves devices while it is looked what they want now
        previous = {d: fleet.desired(d).bundle for d in chosen}
        waves = plan([d for d in chosen if previous[d] != ref], canary)
        members = {d: Member(wave=i, previous=previous[d]) for i, wave in enumerate(waves) for d in wave}
        _refuse_overlap(store.all(only_open=True), members)
        rollout = Rollout(
            id=store.next_id(),
            ref=ref,
            members=members,
            waves=len(waves),
            failures_allowed=failures_allowed,
            wave_timeout_s=wave_timeout_s,
            created_s=now,
            wave_started_s=now,
            status=Status.RUNNING if members else Status.COMPLETE,
            reason="" if members else "every device already wants this release",
        )
        store.save(rollout)
    log.info("rollout started id=%d target=%s devices=%d waves=%d", rollout.id, ref.target, len(members), len(waves))
    return Controller(settings, fleet).advance(rollout.id, now)


def status(settings: Databases, rollout_id: int | None = None) -> Rollout:
    """One rollout, or the last one.

    Raises:
        ConfigError: there is none.
    """
    with _transaction(settings) as store:
        return store.load(rollout_id)


def history(settings: Databases) -> list[Rollout]:
    """Every rollout, the oldest first."""
    with _transaction(settings) as store:
        return store.all()


def undo(settings: Databases, fleet: FleetState, rollout_id: int | None = None, *, now: float) -> Rollout:
    """Give every moved device of a rollout (None: the last one) its previous bundle back, at once.

    Raises:
        ConfigError: there is none, it is already undone, or a later rollout has moved the same devices.
    """
    with _transaction(settings) as store:
        rollout = store.load(rollout_id)
        if rollout.status in (Status.UNDONE, Status.FAILED):
            raise ConfigError(f"rollout {rollout.id} is already {rollout.status}: {rollout.reason}")
        for later in store.all():
            if later.id > rollout.id and later.status not in (Status.UNDONE, Status.FAILED) and later.present & rollout.present:
                raise ConfigError(f"rollout {later.id} has moved the same devices since; undo it first: fenceline rollout undo {later.id}")
        store.save(undone(rollout, "an operator asked", by_operator=True))
    log.info("rollout undo asked id=%d", rollout.id)
    return Controller(settings, fleet).advance(rollout.id, now)


def leave(settings: Databases, device: str) -> None:
    """Take a device that left the fleet out of every rollout that may still ask it for something: one of its name may be added now."""
    with _transaction(settings) as store:
        for rollout in store.all():
            if device in rollout.present and rollout.status not in (Status.UNDONE, Status.FAILED):
                store.save(without_strangers(rollout, rollout.present - {device}))


class Controller:
    """Moves open rollouts on. Several may run (a service and a command): a device is asked while the rollout is held, for what is intended
    then, so nobody asks for what another has undone."""

    def __init__(self, settings: Databases, fleet: FleetState) -> None:
        self._settings = settings
        self._fleet = fleet

    def tick(self, now: float, patience_s: float = math.inf) -> list[Rollout]:
        """Take one step with every open rollout; returns those that were open. Who is not asked within `patience_s` is next time."""
        with _transaction(self._settings) as store:
            ids = [r.id for r in store.all(only_open=True)]
        until = time.monotonic() + patience_s
        return [self.advance(rollout_id, now, until) for rollout_id in ids]

    def advance(self, rollout_id: int, now: float, until: float = math.inf) -> Rollout:
        """Step until nothing more is to be asked of a device now, or it is later than `until` (monotonic seconds)."""
        while True:
            rollout, actions = self._step(rollout_id, now)
            if not actions:
                return rollout
            while actions:
                actions = self._perform(rollout_id, actions)
                if time.monotonic() >= until:
                    return rollout

    def _step(self, rollout_id: int, now: float) -> tuple[Rollout, list[Action]]:
        with _transaction(self._settings) as store:
            before = store.load(rollout_id)
            if before.status not in OPEN:
                return before, []
            present = without_strangers(before, set(self._fleet.devices()))
            reports = {d: r for d, (r, _) in self._fleet.all_reported().items()}
            after, actions = step(present, reports, now)
            if after != before:
                store.save(after)
        if after.status is not before.status:
            log.info("rollout changed id=%d status=%s reason=%s", after.id, after.status, after.reason or "-")
        return after, actions

    def _perform(self, rollout_id: int, actions: list[Action]) -> list[Action]:
        """Ask devices, for HOLD_S or a little longer; then it is somebody else's turn, who may want to undo all of it. What is left."""
        started, asked = time.monotonic(), 0
        with _transaction(self._settings) as store:
            rollout = store.load(rollout_id)
            for action in actions:
                asked += 1
                if intended(rollout, action) and (version := self._ask(action)):
                    rollout = done(rollout, action, version)
                if time.monotonic() - started >= HOLD_S:
                    break
            store.save(rollout)
        return actions[asked:]

    def _ask(self, action: Action) -> int | None:
        """The version of the document that asks for `action`; None if the device has just left the fleet: the next step knows it."""
        try:
            current = self._fleet.desired(action.device)
            desired = current if current.bundle == action.ref else self._fleet.set_desired(action.device, action.ref)
        except ConfigError:
            return None
        return desired.version


def _chosen(fleet: FleetState, devices: Collection[str] | None) -> list[str]:
    known = sorted(fleet.devices())
    if not known:
        raise ConfigError("the fleet has no devices; add one with: fenceline device add NAME")
    chosen = known if devices is None else list(dict.fromkeys(devices))
    unknown = sorted(set(chosen) - set(known))
    if unknown or not chosen or len(chosen) > DEVICES_MAX:
        raise ConfigError(f"{len(chosen)} devices chosen, unknown: {', '.join(unknown) or 'none'}; known: {', '.join(known)}")
    return chosen


def _refuse_overlap(rollouts: Sequence[Rollout], members: Collection[str]) -> None:
    for other in rollouts:
        shared = sorted(other.present & set(members))
        if shared:
            raise ConfigError(
                f"rollout {other.id} is {other.status} and holds {', '.join(shared[:LATE_NAMED_MAX])}; "
                f"wait for it, or undo it: fenceline rollout undo {other.id}"
            )


_TABLES = MetaData()
_ROLLOUTS = Table(
    "rollouts",
    _TABLES,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("open", Integer, nullable=False),
    Column("document", LargeBinary, nullable=False),
)


class _Rollouts:
    """The table of rollouts, inside one transaction."""

    def __init__(self, db: Connection) -> None:
        self._db = db

    def all(self, only_open: bool = False) -> list[Rollout]:
        rows = self._db.execute(select(_ROLLOUTS.c.document).where(_ROLLOUTS.c.open >= int(only_open)).order_by(_ROLLOUTS.c.id))
        return [_decode(row.document) for row in rows]

    def next_id(self) -> int:
        return int(self._db.execute(select(func.coalesce(func.max(_ROLLOUTS.c.id), 0))).scalar_one()) + 1

    def load(self, rollout_id: int | None) -> Rollout:
        newest = select(_ROLLOUTS.c.document).order_by(_ROLLOUTS.c.id.desc()).limit(1)
        row = self._db.execute(newest if rollout_id is None else newest.where(_ROLLOUTS.c.id == rollout_id)).first()
        if row is None:
            known = ", ".join(str(r.id) for r in self.all()) or "none yet"
            raise ConfigError(f"there is no rollout{'' if rollout_id is None else f' {rollout_id}'}; rollouts: {known}")
        return _decode(row.document)

    def save(self, rollout: Rollout) -> None:
        self._db.execute(delete(_ROLLOUTS).where(_ROLLOUTS.c.id == rollout.id))
        document = msgspec.json.encode(rollout)
        self._db.execute(insert(_ROLLOUTS).values(id=rollout.id, open=int(rollout.status in OPEN), document=document))


_decode = msgspec.json.Decoder(Rollout).decode


@contextmanager
def _transaction(settings: Databases) -> Iterator[_Rollouts]:
    """The rollouts, held by this process alone; changes are kept only if the block ends well."""
    with _store(settings.rollouts_db).writing() as db:
        yield _Rollouts(db)


@functools.cache
def _store(database: Database) -> Store:
    return Store(database, _TABLES)
