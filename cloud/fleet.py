"""The fleet: which devices there are, what each should run, and what each says it runs.

- Shared by the services and the commands; where it lies, `cloud.metadata` says. It holds the devices' broker passwords.
- A device's desired version starts at 1 and rises by one with every change, for ever: a device refuses a lower one. That it is removed
  is such a change, so a device of the same name that is added later goes on above it, also on the hardware of before.
- What each change of a desired document was the how manieth of all is kept too: whoever publishes them asks for the changes since the
  last one that it knows, and reads nothing else.
- Reported documents and events are kept as they came; of events EVENTS_MAX in all. The oldest of the device with the most goes for a new
  one: one that says a lot pushes out no events of others.

    fleet = Fleet(settings.fleet_db)
    fleet.add("plane-01")
    fleet.set_desired("plane-01", ref)
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Row,
    Select,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from cloud.metadata import Database, Store
from edge_agent.contract.errors import ConfigError, ContractError
from edge_agent.contract.state import BundleRef, Desired, Reported, ZonesRef, decode_desired, decode_reported, encode_state
from edge_agent.contract.topics import check_name

EVENTS_MAX = 10_000
EVENT_BYTES_MAX = 16 * 1024
PASSWORD_BYTES = 24

_TABLES = MetaData()
_DEVICES = Table(
    "devices",
    _TABLES,
    Column("name", Text, primary_key=True),
    Column("password", Text, nullable=False),
    Column("added_us", BigInteger, nullable=False),
    Column("desired", LargeBinary, nullable=False),
    Column("reported", LargeBinary),
    Column("reported_us", BigInteger),
)
_REMOVED = Table(  # stays when the name is added again
    "removed",
    _TABLES,
    Column("name", Text, primary_key=True),
    Column("version", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)
_POLICY = Table(
    "policy", _TABLES, Column("one", Integer, CheckConstraint("one = 1"), primary_key=True), Column("ref", LargeBinary, nullable=False)
)
_EVENTS = Table(
    "events",
    _TABLES,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("at_us", BigInteger, nullable=False),
    Column("device", Text, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Index("events_by_device", "device", "id"),
    sqlite_autoincrement=True,
)
_CHANGES = Table(
    "desired_changes",
    _TABLES,
    Column("device", Text, primary_key=True),
    Column("number", BigInteger, nullable=False, unique=True),
)
"""The last change of each device's desired document; a device that none has changed since there are numbers has no row."""


class Event(msgspec.Struct, frozen=True):
    """What a device had to say; `body` is its JSON document, or text."""

    at_us: int
    device: str
    body: str


class Removal(msgspec.Struct, frozen=True):
    """When a device of this name was taken out of the fleet last, under which version; `back`: it was added again since."""

    version: int
    at_us: int
    back: bool


class Fleet:
    """The devices registry in `database`. Safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self._store = Store(database, _TABLES)

    # Devices

    def add(self, device: str, deliver: Callable[[str], object] = lambda password: None) -> str:
        """Register a device; its new broker password.

        Args:
            deliver: is told the password before the name is taken; what it raises leaves the name free.

        Raises:
            ConfigError: the name is taken, or cannot be a device's.
        """
        try:
            check_name(device, "device")
        except ContractError as e:
            raise ConfigError(str(e)) from e
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        with self._store.writing() as db:
            if db.execute(select(_DEVICES.c.name).where(_DEVICES.c.name == device)).first():
                raise ConfigError(f"device {device!r} is there already")
            deliver(password)
            desired = encode_state(Desired(version=_removed_version(db, device) + 1, zones=_zones(db)))
            db.execute(insert(_DEVICES).values(name=device, password=password, added_us=_now_us(), desired=desired))
            _count(db, [device])
        return password

    def renew(self, device: str, deliver: Callable[[str], object] = lambda password: None) -> str:
        """Give a device another broker password; the one that it had is none any more.

        Args:
            deliver: is told the new password before it is in force; what it raises leaves the old one in force.

        Raises:
            ConfigError: there is no such device.
        """
        password = secrets.token_urlsafe(PASSWORD_BYTES)
        with self._store.writing() as db:
            _desired(db, device)
            deliver(password)
            db.execute(update(_DEVICES).where(_DEVICES.c.name == device).values(password=password))
        return password

    def remove(self, device: str, record: Callable[[], object] = lambda: None) -> bool:
        """Take a device out: its password, and what it should run and said it runs, go; its events stay. The name may be added again.

        Args:
            record: is called before the device is gone; what it raises leaves it there.

        Returns:
            False if it was removed before.

        Raises:
            ConfigError: there never was such a device.
        """
        with self._store.writing() as db:
            there = db.execute(select(_DEVICES.c.name).where(_DEVICES.c.name == device)).first()
            if there is None and _removed_version(db, device):
                return False
            version = _desired(db, device).version + 1
            record()
            db.execute(delete(_DEVICES).where(_DEVICES.c.name == device))
            db.execute(delete(_REMOVED).where(_REMOVED.c.name == device))
            db.execute(insert(_REMOVED).values(name=device, version=version, at_us=_now_us()))
            _count(db, [device])
        return True

    def removals(self) -> dict[str, Removal]:
        """Every name that was removed, also if it is there again."""
        joined = _REMOVED.outerjoin(_DEVICES, _REMOVED.c.name == _DEVICES.c.name)
        rows = self._rows(select(_REMOVED, _DEVICES.c.name).select_from(joined).order_by(_REMOVED.c.name))
        return {str(name): Removal(int(version), int(at_us), there is not None) for name, version, at_us, there in rows}

    def devices(self) -> list[str]:
        """The names of all devices, sorted."""
        return [name for (name,) in self._rows(select(_DEVICES.c.name).order_by(_DEVICES.c.name))]

    def passwords(self) -> dict[str, str]:
        """The broker password of each device."""
        rows = self._rows(select(_DEVICES.c.name, _DEVICES.c.password).order_by(_DEVICES.c.name))
        return {str(name): str(password) for name, password in rows}

    # State

    def desired(self, device: str) -> Desired:
        """What `device` should run, or ConfigError if there is no such device."""
        with self._store.reading() as db:
            return _desired(db, device)

    def all_desired(self) -> dict[str, Desired]:
        """What each device should run."""
        return {device: desired for device, desired in self.desired_since(None)[0].items() if desired is not None}

    def desired_since(self, change: int | None) -> tuple[dict[str, Desired | None], int]:
        """What changed after the change of that number, and the number of the last change.

        Args:
            change: None: all documents are wanted.

        Returns:
            Documents by device; None for one that was removed.
        """
        devices = select(_DEVICES.c.name, _DEVICES.c.desired).order_by(_DEVICES.c.name)
        gone = select(_REMOVED.c.name).where(_REMOVED.c.name.not_in(select(_DEVICES.c.name)))
        changed = select(_CHANGES.c.device, _DEVICES.c.desired).outerjoin(_DEVICES, _CHANGES.c.device == _DEVICES.c.name)
        rows: list[tuple[str, bytes | None]] = []
        with self._store.reading() as db:
            last = _last_change(db)  # before the documents: what is committed in between is told twice, not never
            if change is None:
                rows += [(name, document) for name, document in db.execute(devices)]
                rows += [(name, None) for (name,) in db.execute(gone)]
            elif last != change:  # in order of the changes: in that of the names SQLite would look at all of them
                rows += [
                    (name, document) for name, document in db.execute(changed.where(_CHANGES.c.number > change).order_by(_CHANGES.c.number))
                ]
        return {name: None if document is None else decode_desired(document) for name, document in rows}, last

    def set_desired(self, device: str, bundle: BundleRef | None) -> Desired:
        """Ask `device` for a bundle, or for none: the new document, its version raised by one."""
        with self._store.writing() as db:
            before = _desired(db, device)
            desired = Desired(version=before.version + 1, bundle=bundle, zones=before.zones)
            _ask(db, {device: desired})
        return desired

    def zones(self) -> ZonesRef | None:
        """The zone policy that every device should have; None before the first publication."""
        with self._store.reading() as db:
            return _zones(db)

    def set_zones(self, ref: ZonesRef) -> None:
        """Ask every device, those to come too, for this zone policy; devices that are asked for it already hear nothing new."""
        with self._store.writing() as db:
            db.execute(delete(_POLICY))
            db.execute(insert(_POLICY).values(one=1, ref=msgspec.json.encode(ref)))
            documents = db.execute(select(_DEVICES.c.name, _DEVICES.c.desired)).all()
            before = {str(name): decode_desired(document) for name, document in documents}
            _ask(db, {name: Desired(version=d.version + 1, bundle=d.bundle, zones=ref) for name, d in before.items() if d.zones != ref})

    def all_reported(self) -> dict[str, tuple[Reported, int]]:
        """The last report of each device that sent one, and when it came (us)."""
        columns = select(_DEVICES.c.name, _DEVICES.c.reported, _DEVICES.c.reported_us)
        rows = self._rows(columns.where(_DEVICES.c.reported.is_not(None)).order_by(_DEVICES.c.name))
        return {str(name): (decode_reported(document), int(at_us)) for name, document, at_us in rows}

    def record_reported(self, reported: Reported, *, retained: bool = False) -> bool:
        """Keep a report; False if the device is unknown, or the report is an old one.

        Each broker keeps the last report it got, and a device reports over one at a time. So a live report is the newest, whatever
        the device's clock says; a retained one counts only if it is newer than the one kept, and than the last removal of such a device.
        """
        with self._store.writing() as db:
            row = db.execute(select(_DEVICES.c.reported).where(_DEVICES.c.name == reported.device)).first()
            if row is None:
                return False
            kept = decode_reported(row[0]) if row[0] is not None else None
            if retained and kept is not None and (kept.desired_version, kept.at_us) >= (reported.desired_version, reported.at_us):
                return False
            if retained and reported.desired_version < _removed_version(db, reported.device):
                return False
            values = {"reported": encode_state(reported), "reported_us": _now_us()}
            db.execute(update(_DEVICES).where(_DEVICES.c.name == reported.device).values(values))
        return True

    # Events

    def record_event(self, device: str, body: bytes) -> None:
        """Keep what a device had to say, cut at EVENT_BYTES_MAX; if that is one too many, the oldest of the device with the most goes."""
        text = body[:EVENT_BYTES_MAX].decode(errors="replace")
        with self._store.writing() as db:
            db.execute(insert(_EVENTS).values(at_us=_now_us(), device=device, body=text.encode()))
            total, first = select(func.count()).select_from(_EVENTS), func.min(_EVENTS.c.id)
            of_most = select(first).group_by(_EVENTS.c.device).order_by(func.count().desc(), first).limit(1)
            db.execute(delete(_EVENTS).where(total.scalar_subquery() > EVENTS_MAX, _EVENTS.c.id == of_most.scalar_subquery()))

    def events(self, limit: int = 100, device: str | None = None) -> list[Event]:
        """The last events, of one device or of all, the newest first."""
        newest = select(_EVENTS.c.at_us, _EVENTS.c.device, _EVENTS.c.body).order_by(_EVENTS.c.id.desc()).limit(limit)
        newest = newest if device is None else newest.where(_EVENTS.c.device == device)
        return [Event(at_us, device, body.decode()) for at_us, device, body in self._rows(newest)]

    def _rows(self, query: Select) -> list[Row]:
        with self._store.reading() as db:
            return list(db.execute(query).all())


def _desired(db: Connection, device: str) -> Desired:
    row = db.execute(select(_DEVICES.c.desired).where(_DEVICES.c.name == device)).first()
    if row is None:
        raise ConfigError(f"there is no device {device!r}; fenceline device list shows all")
    return decode_desired(row[0])


def _removed_version(db: Connection, device: str) -> int:
    """The version that the removal of a device of this name has; 0 if there was none."""
    row = db.execute(select(_REMOVED.c.version).where(_REMOVED.c.name == device)).first()
    return int(row[0]) if row else 0


def _zones(db: Connection) -> ZonesRef | None:
    row = db.execute(select(_POLICY.c.ref)).first()
    return msgspec.json.decode(row[0], type=ZonesRef) if row else None


def _ask(db: Connection, documents: Mapping[str, Desired]) -> None:
    """Write new desired documents down, and that they changed."""
    if documents:
        change = update(_DEVICES).where(_DEVICES.c.name == bindparam("device")).values(desired=bindparam("document"))
        db.execute(change, [{"device": name, "document": encode_state(desired)} for name, desired in documents.items()])
        _count(db, list(documents))


def _count(db: Connection, devices: Sequence[str]) -> None:
    """Number the changes of these devices' documents. Writers take turns, so that a number that is seen has none below it to come."""
    following = _last_change(db) + 1  # before the row that says it goes
    db.execute(delete(_CHANGES).where(_CHANGES.c.device == bindparam("name")), [{"name": device} for device in devices])
    db.execute(insert(_CHANGES), [{"device": device, "number": number} for number, device in enumerate(devices, following)])


def _last_change(db: Connection) -> int:
    return int(db.execute(select(func.coalesce(func.max(_CHANGES.c.number), 0))).scalar_one())


def _now_us() -> int:
    return time.time_ns() // 1_000
