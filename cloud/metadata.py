"""Where fleet, rollouts and audit keep their tables: SQLite files, or one PostgreSQL for all of them.

- A *database* is the path of a SQLite file (made 0600, WAL, every commit on disk) or the URL of a PostgreSQL database. Nothing is connected
  before it is used, and tables are made at the first use: a service starts while its database is away.
- `writing` is a transaction that no other writer of the same tables overlaps, on both: what it read is still so when it commits. `reading`
  sees one state of the tables, and waits for nobody.
- A database that is away, busy for BUSY_S, out of room or damaged is UnavailableError. Nothing is tried again here.

    store = Store(settings.fleet_db, _TABLES)
    with store.writing() as db:
        db.execute(insert(_DEVICES).values(name="plane-01"))
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, NullPool, create_engine, event, text
from sqlalchemy.exc import DatabaseError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from edge_agent.contract.errors import ConfigError, UnavailableError

Database = Path | str

BUSY_S = 10.0
CONNECT_S = 5
POOL_MAX = 5
POSTGRESQL = "postgresql"
MAKING_TABLES = 7307  # the number of a lock
WRITES = "fenceline_writes"


class Store:
    """Some tables in a database. Safe to use from several threads and processes."""

    def __init__(self, database: Database, tables: MetaData) -> None:
        self._database, self._tables = database, tables
        self._ready = False

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads.

        Raises:
            UnavailableError: the database does not answer.
        """
        with self._begun(writes=False) as db:
            yield db

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction alone among the writers of these tables; undone if the block raises.

        Raises:
            UnavailableError: the database does not answer. Whether the transaction took place is not known.
        """
        with self._begun(writes=True) as db:
            if db.dialect.name == POSTGRESQL:
                names = ", ".join(table.name for table in self._tables.sorted_tables)
                db.execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))
            yield db

    @contextmanager
    def _begun(self, writes: bool) -> Iterator[Connection]:
        try:
            engine = _engine(self._database)
            if not self._ready:
                self._make_tables(engine)
            with engine.connect().execution_options(**{WRITES: writes}) as db, db.begin():
                yield db
        except (OperationalError, PoolTimeoutError) as e:  # away, locked, full, or ended by an operator
            raise UnavailableError(f"metadata database {_shown(self._database)}: {getattr(e, 'orig', e)}") from e
        except DBAPIError as e:
            if type(e) is DatabaseError:  # a file that is none, or is damaged; other errors have classes of their own
                raise UnavailableError(f"metadata database {_shown(self._database)}: {e.orig}") from e
            if e.connection_invalidated:
                raise UnavailableError(f"metadata database {_shown(self._database)} was lost: {e.orig}") from e
            raise

    def _make_tables(self, engine: Engine) -> None:
        if isinstance(self._database, Path) and not self._database.exists():  # opened and closed while in use, it would lose its locks
            self._database.parent.mkdir(parents=True, exist_ok=True)
            self._database.touch(0o600)
        with engine.connect().execution_options(**{WRITES: True}) as db, db.begin():
            if db.dialect.name == POSTGRESQL:  # two that make the same table at once would fail there
                db.execute(text(f"SELECT pg_advisory_xact_lock({MAKING_TABLES})"))
            self._tables.create_all(db)
            for index in (index for table in self._tables.sorted_tables for index in table.indexes):
                index.create(db, checkfirst=True)  # of a table that was there before its index
        self._ready = True


@functools.cache
def _engine(database: Database) -> Engine:
    if isinstance(database, Path):
        engine = create_engine(f"sqlite:///{database}", poolclass=NullPool, connect_args={"timeout": BUSY_S})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        import psycopg  # noqa: F401
    except ImportError as e:
        raise ConfigError("PostgreSQL needs psycopg: pip install 'fenceline[cloud,postgres]'") from e
    options = f"-c lock_timeout={int(BUSY_S * 1_000)} -c synchronous_commit=on"
    arguments = {"connect_timeout": CONNECT_S, "options": options, "application_name": "fenceline"}
    url = database.replace(f"{POSTGRESQL}://", f"{POSTGRESQL}+psycopg://", 1)
    return create_engine(url, pool_size=POOL_MAX, pool_pre_ping=True, pool_timeout=BUSY_S, connect_args=arguments)


def _prepare_sqlite(connection: Any, record: object) -> None:
    """Transactions are begun by us, not by the driver; what was committed is on disk."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")


def _begin_sqlite(db: Connection) -> None:
    """A writer takes its turn at the start: one that had read first could not, once another has written."""
    db.exec_driver_sql("BEGIN IMMEDIATE" if db.get_execution_options().get(WRITES) else "BEGIN")


def _shown(database: Database) -> str:
    """A database in a message: without user and password, and without options, which could hold another."""
    return str(database) if isinstance(database, Path) else database.partition("?")[0].rpartition("@")[2]
