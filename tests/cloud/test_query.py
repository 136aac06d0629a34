"""SQL over the lake: what may be seen, and that nothing else can be reached from it."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cloud.commands.output import short
from cloud.config import QueryLimits
from cloud.quarantine import CheckedLake
from cloud.query import Query
from cloud.roots import may_see
from cloud.tables import read_table, text_field
from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError
from tests.cloud.blocks import block
from tests.cloud.test_quarantine import bad, checked

LANES = ("canada", "canada_europe", "europe")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> CheckedLake:
    found = checked(tmp_path_factory.mktemp("lake"))
    found.append("eu", [block(n, lane=lane) for n, lane in enumerate(LANES, 1)] + [bad(9, [1], lane="europe")])
    return found


@pytest.fixture
def european(lake: CheckedLake) -> Iterator[Query]:
    with Query(lake, ["europe"], QueryLimits()) as query:
        yield query


def test_a_caller_sees_the_lanes_of_his_zones_only(lake: CheckedLake, european: Query) -> None:
    count = "SELECT lane, count(*) AS n FROM pump GROUP BY lane ORDER BY lane"
    assert european.run(count).to_pylist() == [{"lane": "europe", "n": 6}]
    assert european.run("SELECT violation_field, pressure FROM pump_quarantine").to_pylist() == [
        {"violation_field": "pressure", "pressure": 1_001.0}
    ]
    with Query(lake, ["*"], QueryLimits()) as everything, Query(lake, ["europe", "canada"], QueryLimits()) as both:
        assert (
            [row["lane"] for row in everything.run(count).to_pylist()]
            == [row["lane"] for row in both.run(count).to_pylist()]
            == list(LANES)
        )
    assert not may_see("canada_europe", ["europe"]) and may_see("canada_europe", ["canada", "europe"])


def test_text_is_found_after_files_were_merged(tmp_path: Path) -> None:
    """What Delta's update writes says that its text is of another type, which Arrow does not compare with plain text."""
    lake = checked(tmp_path)
    for n in (1, 2):
        lake.append("eu", [block(n, lane="europe")])
    assert lake.compact(0)
    table = lake.lake.table("pump", "europe")
    assert pa.string_view() in next(table.to_pyarrow_dataset().get_fragments()).physical_schema.types
    stored = read_table(table, columns=["device"])["device"]
    before, device = len(stored), stored[0].as_py()
    assert read_table(table, filter=text_field("device") == device).num_rows == before > 0
    with Query(lake, ["*"], QueryLimits()) as query:
        for sql in (f"device = '{device}'", f"device IN ('{device}', 'x') AND sequence < 9 AND lane > 'a'"):
            assert query.run(f"SELECT count(*) AS n FROM pump WHERE {sql}").to_pylist() == [{"n": before}]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_csv('{file}')",
        "SELECT * FROM '{file}'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM read_parquet('{lake}/canada/pump/*/*.parquet')",
        "SELECT * FROM delta_scan('{lake}/canada/pump')",
        "SELECT * FROM query('SELECT * FROM read_csv(''{file}'')')",
        "SELECT * FROM query_table('pump@canada')",
        'SELECT * FROM "pump@canada"',
        'SELECT * FROM "pump@canada_europe"',
        "SELECT * FROM sniff_csv('{file}')",
        "SELECT * FROM duckdb_secrets()",
        "SELECT content FROM read_text('.tmp/secret.txt')",
        "SELECT * FROM glob('.tmp/*')",
        "SELECT * FROM read_blob('{tmp}/.tmp/secret.txt')",
        "SELECT * FROM read_csv('https://localhost:1/x.csv')",
        "SELECT * FROM 's3://bucket/x.parquet'",
        "SELECT getenv('HOME')",
        "SELECT * FROM lake",
        "COPY (SELECT * FROM pump) TO '{file}'",
        "EXPORT DATABASE '{file}'",
        "ATTACH '{file}' AS other",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA database_list",
        "CREATE TABLE x AS SELECT 1",
        "CREATE OR REPLACE VIEW pump AS SELECT 1",
        "DROP VIEW pump",
        "INSERT INTO pump VALUES (1)",
        "DELETE FROM pump",
        "SELECT 1; SELECT 2",
        "SELECT 1; DROP VIEW pump",
        "CALL pragma_version()",
        "",
        "SELEC 1",
    ],
)
def test_nothing_but_the_streams_can_be_reached(lake: CheckedLake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sql: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a\n1\n")
    (tmp_path / ".tmp").mkdir()  # where DuckDB would spill to
    (tmp_path / ".tmp/secret.txt").write_text("root: hidden")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with Query(lake, ["europe"], QueryLimits()) as european:
        with pytest.raises(FencelineError) as refused:
            european.run(sql.format(file=file, lake=lake.lake.roots.default, tmp=tmp_path))
        assert "root:" not in str(refused.value) and sorted(tmp_path.rglob("*")) == before and file.read_text() == "a\n1\n"
        assert european.run("SELECT count(*) AS n FROM pump").to_pylist() == [{"n": 6}]


def test_no_directory_stays_open_to_sql(european: Query) -> None:
    found = european.run(
        "SELECT name, value FROM duckdb_settings() WHERE name IN ('allowed_directories', 'allowed_paths', 'temp_directory')"
    )
    assert {row["name"]: row["value"] for row in found.to_pylist()} == {
        "allowed_directories": "[]",
        "allowed_paths": "[]",
        "temp_directory": "",
    }


def test_columns_of_one_name_are_told_apart(european: Query) -> None:
    assert european.run("SELECT 1 AS a, 2 AS b, 3 AS a").to_pylist() == [{"a": 1, "b": 2, "a_1": 3}]
    both = european.run("SELECT p.row, q.row FROM pump p, pump q WHERE p.row = 0 AND q.row = 2 LIMIT 1").to_pylist()
    assert both == [{"row": 0, "row_1": 2}]
    assert european.run("SELECT * FROM range(9) ORDER BY 1 DESC LIMIT 2 -- as asked").to_pylist() == [{"range": 8}, {"range": 7}]


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT CASE WHEN range = 500000 THEN error('boom') ELSE range END AS x FROM range(1000000)", "boom"),
        ("SELECT CAST(CASE WHEN range = 500000 THEN 'a' ELSE '1' END AS INT) AS x FROM range(1000000)", "Could not convert string 'a'"),
        ("SELECT $1", "parameters"),
    ],
)
def test_an_error_behind_the_first_rows_is_told_like_any_other(european: Query, sql: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        european.run(sql)


def test_a_lake_that_does_not_read_is_no_mistake_of_the_query(tmp_path: Path) -> None:
    lake = checked(tmp_path)
    lake.append("eu", [block(1)])
    with Query(lake, ["*"], QueryLimits()) as query:
        next((tmp_path / "europe/pump").glob("*/*.parquet")).unlink()
        with pytest.raises(UnavailableError, match="the lake does not read"):
            query.run("SELECT * FROM pump")


def test_the_memory_limit_counts_the_answer(lake: CheckedLake) -> None:
    """1.5 GB of text; without a limit of the answer all of it would come."""
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with Query(lake, ["europe"], QueryLimits(memory_mib_max=200)) as query:
        with pytest.raises(UnavailableError, match="more than 200 MiB"):
            query.run("SELECT repeat('x', 10000000) AS x FROM range(150)")
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < peak_mib + 600
        assert query.run("SELECT repeat('x', 10000000) AS x FROM range(10)").nbytes > 100_000_000


def test_an_unknown_stream_is_answered_with_the_nearest_name(european: Query) -> None:
    with pytest.raises(ConfigError, match=r"there is no stream 'pumb'.*pump.*there are: \"pump\", \"pump_quarantine\""):
        european.run("SELECT * FROM pumb")
    with pytest.raises(ConfigError, match="presure"):
        european.run("SELECT presure FROM pump")


@pytest.mark.parametrize(
    ("limits", "sql", "words"),
    [
        (
            QueryLimits(time_s_max=0.3),
            "SELECT count(*) FROM range(1000000000) a, range(1000000) b WHERE a.range % 7 = b.range",
            "longer than 0.3 s",
        ),
        (QueryLimits(memory_mib_max=100), "SELECT list(range) FROM range(200000000)", "more than 100 MiB"),
        (QueryLimits(rows_max=5), "SELECT * FROM pump", "more than 5 rows"),
    ],
)
def test_a_query_has_limits(lake: CheckedLake, limits: QueryLimits, sql: str, words: str) -> None:
    with Query(lake, ["europe"], limits) as query, pytest.raises(UnavailableError, match=words):
        query.run(sql)


def test_times_are_in_utc_wherever_it_is_asked(
    lake: CheckedLake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        with Query(lake, ["*"], QueryLimits()) as query:
            dates = query.run("SELECT count(*) AS n FROM pump WHERE ts::DATE <> event_date").to_pylist()
            (row,) = query.run("SELECT TIMESTAMP '2026-01-01' AS plain, TIMESTAMPTZ '2026-01-01 00:00:00+00' AS zoned").to_pylist()
        assert dates == [{"n": 0}] and row["zoned"].isoformat() == "2026-01-01T00:00:00+00:00"
        assert {short(value) for value in row.values()} == {"2026-01-01 00:00:00"}
    finally:
        monkeypatch.undo()
        time.tzset()
