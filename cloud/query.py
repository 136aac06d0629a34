"""SQL over the lake, for people who want to look: one view per stream, only the zones that the caller may see, and nothing else.

- A view has the rows of all lanes that the caller may see; a lane of several zones only if he may see each of them. `lane` is a column.
  `"STREAM_quarantine"` has what ingest took out of a stream; the streams `quarantine` and `losses` are the devices' own.
- DuckDB runs in memory, with the tables registered and then everything locked: no file, no network, no extension, no setting can be
  reached from SQL. Tables of other lanes are not hidden, they are not there.
- One SELECT at a time, with limits of memory, time and rows. Nothing can be written to the lake.
- Rights: `[query.users]` of fenceline.toml lists the zones of each user of this machine (`"*"`: all). Without that section only
  the owner of the state directory may ask, and sees all: the files are his anyway. It is a fence for tools; who can read the files can
  read the files.

    with Query(lake, zones=["europe"]) as query:
        query.run('SELECT engine, avg(sensor_2) FROM turbofan GROUP BY engine').read_all()
"""

from __future__ import annotations

import os
import pwd
import threading
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType

import duckdb
import pyarrow as pa

from cloud.config import QueryLimits, Settings
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.roots import ALL
from cloud.tables import query_dataset
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.core.settings import nearest

_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "max_temp_directory_size": "0KB",
}
_LOCKS = ("SET enable_external_access = false", "SET lock_configuration = true")


def rights(settings: Settings, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """The zones that this process's user may see; of these only `wanted`, if any are named. `*` stands for all.

    Raises:
        ConfigError: he may see none, or not all that are wanted.
    """
    user = pwd.getpwuid(os.geteuid()).pw_name
    users = settings.query.users
    if users:
        granted = tuple(users.get(user, ()))
        if not granted:
            raise ConfigError(f"user {user!r} may query no zone; [query.users] of fenceline.toml names {', '.join(sorted(users))}")
    else:
        owner = settings.state_dir.stat().st_uid
        if owner != os.geteuid():
            raise ConfigError(
                f"user {user!r} does not own {settings.state_dir}, and fenceline.toml has no [query.users] that lets others query the lake"
            )
        granted = (ALL,)
    if refused := [zone for zone in wanted if ALL not in granted and zone not in granted]:
        raise ConfigError(f"user {user!r} may not query {', '.join(refused)}; only {', '.join(granted)}")
    return tuple(wanted) or granted


class Query:
    """A look at the lake, for one caller."""

    def __init__(self, lake: CheckedLake, zones: Sequence[str], limits: QueryLimits) -> None:
        """Register what may be seen.

        Raises:
            UnavailableError: the lake does not read.
        """
        self._limits = limits
        config = {**_SETTINGS, "memory_limit": f"{limits.memory_mib_max}MiB", "threads": str(limits.threads)}
        self._db = duckdb.connect(":memory:", config=config)
        self.streams = [*self._register(lake.lake, "", zones), *self._register(lake.held, "_quarantine", zones)]
        for lock in _LOCKS:
            self._db.execute(lock)

    def __enter__(self) -> Query:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._db.close()

    def run(self, sql: str) -> pa.Table:
        """The answer to one SELECT.

        Raises:
            ConfigError: it is no single SELECT, or asks for what is not there; the message says what is.
            UnavailableError: it takes more memory, time or rows than allowed.
        """
        self._check(sql)
        alarm = threading.Timer(self._limits.time_s_max, self._db.interrupt)
        alarm.start()
        try:
            return self._fetch(sql)
        except duckdb.InterruptException as e:
            limit = f"{self._limits.time_s_max:g} s"
            raise UnavailableError(f"the query took longer than {limit}; ask for less, or raise [query] time_s_max") from e
        except duckdb.OutOfMemoryException as e:
            raise UnavailableError(
                f"the query needs more than {self._limits.memory_mib_max} MiB; ask for less, or raise [query] memory_mib_max"
            ) from e
        except duckdb.CatalogException as e:
            raise ConfigError(self._explain(str(e))) from e
        except duckdb.PermissionException as e:
            raise ConfigError(f"a query reads the streams of the lake and nothing else: {_first_line(e)}") from e
        except duckdb.Error as e:
            raise ConfigError(_first_line(e)) from e
        finally:
            alarm.cancel()

    def _register(self, lake: Lake, suffix: str, zones: Sequence[str]) -> list[str]:
        """Make a view of each stream, of the lanes that may be seen; their names."""
        parts: defaultdict[str, list[str]] = defaultdict(list)
        for stream, lane in lake.within(zones):
            name = f"{stream}{suffix}@{lane}"
            self._db.register(name, query_dataset(lake.table(stream, lane)))
            parts[stream + suffix].append(f"SELECT * FROM {_quoted(name)}")
        for view, selects in parts.items():
            self._db.execute(f"CREATE VIEW {_quoted(view)} AS {' UNION ALL BY NAME '.join(selects)}")
        return list(parts)

    def _check(self, sql: str) -> None:
        try:
            statements = self._db.extract_statements(sql)
        except duckdb.Error as e:
            raise ConfigError(_first_line(e)) from e
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise ConfigError("one SELECT at a time: the lake is only looked at here")

    def _fetch(self, sql: str) -> pa.Table:
        reader = self._db.sql(sql).to_arrow_reader(10_000)
        batches, rows = [], 0
        for batch in reader:
            batches.append(batch)
            rows += batch.num_rows
            if rows > self._limits.rows_max:
                raise UnavailableError(f"the answer has more than {self._limits.rows_max} rows; add a LIMIT, or raise [query] rows_max")
        return pa.Table.from_batches(batches, reader.schema)

    def _explain(self, text: str) -> str:
        """What DuckDB says of a name that is not there, with the names that are."""
        head = text.splitlines()[0]
        if "Table with name" not in head:
            return head
        name = head.split("Table with name ")[1].split(" ")[0].strip('"')
        listed = ", ".join(map(_quoted, self.streams)) or "none: the lake is empty, or none of it may be seen"
        return f"there is no stream {name!r}{nearest(name, self.streams)}; there are: {listed}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
