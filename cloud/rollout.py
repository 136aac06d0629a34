"""Rollouts: a release on its way through the fleet. `cloud.waves` has the rules; here they are stored, and done.

- What is intended is stored before it is done, and done again until it is known to be done. Asking a device for the
  bundle that it already has changes nothing, so a crash in between costs nothing.
- Each step holds the table of rollouts, so that commands and the control loop may run in different processes.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import msgspec
from sqlalchemy import Column, Connection, Integer, LargeBinary, MetaData, Table, delete, func, insert, select

from cloud.metadata import Database, Store
from cloud.waves import NAMED_MAX, OPEN, Action, Member, Rollout, Status, done, intended, plan, step, undone, without_strangers
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import BundleRef, Desired, Reported

log = logging.getLogger(__name__)

WAVE_TIMEOUT_S = 600.0
DEVICES_MAX = 100_000
HOLD_S = 0.5


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
    """One rollout, or the last one that had devices to move.

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
    """Give every moved device of a rollout (None: the last one that had any to move) its previous bundle back, at once.

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
                f"rollout {other.id} is {other.status} and holds {', '.join(shared[:NAMED_MAX])}; "
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
        """The rollout of that id; None: the last one that had devices to move, as one that had none hides nothing that can be undone."""
        ids = self._db.execute(select(_ROLLOUTS.c.id).order_by(_ROLLOUTS.c.id.desc())).scalars().all()
        if not ids or rollout_id not in (None, *ids):
            known = ", ".join(map(str, reversed(ids))) or "none yet"
            raise ConfigError(f"there is no rollout{'' if rollout_id is None else f' {rollout_id}'}; rollouts: {known}")
        if rollout_id is not None:
            return self._one(rollout_id)
        return next((found for found in map(self._one, ids) if found.members), None) or self._one(ids[0])

    def _one(self, rollout_id: int) -> Rollout:
        return _decode(self._db.execute(select(_ROLLOUTS.c.document).where(_ROLLOUTS.c.id == rollout_id)).scalar_one())

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
