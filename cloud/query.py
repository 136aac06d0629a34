"""SQL over the lake, for people who want to look: one view per stream, only the zones that the caller may see, and nothing else.

- A view has the rows of all lanes that the caller may see; a lane of several zones only if he may see each of them. `lane` is a column.
  `"STREAM_quarantine"` has what ingest took out of a stream; the streams `quarantine` and `losses` are the devices' own.
- DuckDB runs in memory, with the tables registered and then everything locked: no file, no network, no extension, no setting can be
  reached from SQL. Tables of other lanes are not hidden, they are not there.
- One SELECT at a time, with limits of memory, time and rows. Nothing can be written to the lake.
- DuckDB holds the whole answer before any of it is given away: its memory limit counts all of it, and an error in the last row is an
  error. To be handed over it is copied once, so a query takes up to twice its limit.
- Times are in UTC, wherever it is asked: `ts::DATE` is the row's `event_date`.
- Columns of one name are told apart as DuckDB does it: `a`, `a_1`.
- `cloud.viewers` says which zones the caller may see.

    with Query(lake, zones=["europe"]) as query:
        query.run('SELECT engine, avg(sensor_2) FROM turbofan GROUP BY engine').read_all()
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType

import duckdb
import pyarrow as pa

from cloud.config import QueryLimits
from cloud.lake import Lake
from cloud.quarantine import CheckedLake
from cloud.tables import query_dataset
from edge_agent.contract.errors import ConfigError, UnavailableError
from edge_agent.core.settings import nearest

ANSWER = "@answer"
"""No stream has such a name."""
BATCH_ROWS = 10_000
UNREAD = "reading the stream registered as"
"""What DuckDB says when the files of a table are the cause."""
_SETTINGS: dict[str, str | bool | int | float | list[str]] = {
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "python_enable_replacements": "false",
    "temp_directory": "",  # DuckDB leaves it open to SQL
    "max_temp_directory_size": "0KB",
}
UTC = "SET TimeZone = 'UTC'"
_LOCKS = (UTC, "SET enable_external_access = false", "SET lock_configuration = true")


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
        """The answer to one SELECT; no two columns have one name.

        Raises:
            ConfigError: it is no single SELECT, or asks for what is not there; the message says what is.
            UnavailableError: it takes more memory, time or rows than allowed, or the lake does not read.
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
            if UNREAD in str(e):
                raise UnavailableError(f"the lake does not read: {_first_line(e)}") from e
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
        rows_max = self._limits.rows_max
        self._db.execute(f"DROP TABLE IF EXISTS {_quoted(ANSWER)}")
        self._db.sql(sql).limit(rows_max + 1).create(ANSWER)
        found = self._db.table(_quoted(ANSWER)).to_arrow_table(BATCH_ROWS)
        if found.num_rows > rows_max:
            raise UnavailableError(f"the answer has more than {rows_max} rows; add a LIMIT, or raise [query] rows_max")
        return found

    def _explain(self, text: str) -> str:
        """What DuckDB says of a name that is not there, with the names that are."""
        head = text.splitlines()[0]
        if "Table with name" not in head:
            return head
        name = head.split("Table with name ")[1].split(" ")[0].strip('"')
        listed = ", ".join(map(_quoted, self.streams)) or "none: the lake is empty, or none of it may be seen"
        return f"there is no stream {name!r}{nearest(name, self.streams) if self.streams else ''}; there are: {listed}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
