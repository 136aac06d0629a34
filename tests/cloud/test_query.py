"""SQL over the lake: what may be seen, and that nothing else can be reached from it."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from cloud import config
from cloud.config import QueryLimits
from cloud.quarantine import CheckedLake
from cloud.query import Query, rights
from cloud.roots import may_see
from cloud.tables import read_table, text_field
from edge_agent.contract.errors import ConfigError, FencelineError, UnavailableError
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block
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
def test_nothing_but_the_streams_can_be_reached(lake: CheckedLake, european: Query, tmp_path: Path, sql: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text("a\n1\n")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FencelineError) as refused:
        european.run(sql.format(file=file, lake=lake.lake.roots.default))
    assert "root:" not in str(refused.value) and sorted(tmp_path.iterdir()) == before and file.read_text() == "a\n1\n"
    assert european.run("SELECT count(*) AS n FROM pump").to_pylist() == [{"n": 6}]


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


def test_rights_come_from_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    (tmp_path / ".fenceline").mkdir()
    base = "contracts = ['pump.yaml']\nzones = 'zones.geojson'\n"
    toml = tmp_path / "fenceline.toml"
    toml.write_text(base)
    assert rights(config.load(tmp_path)) == ("*",) and rights(config.load(tmp_path), ["europe"]) == ("europe",)
    me = pwd.getpwuid(os.geteuid()).pw_name
    toml.write_text(f'{base}[query.users]\n{me} = ["europe"]\n')
    assert rights(config.load(tmp_path)) == ("europe",)
    with pytest.raises(ConfigError, match="may not query canada"):
        rights(config.load(tmp_path), ["europe", "canada"])
    toml.write_text(f'{base}[query.users]\nanna = ["*"]\n')
    with pytest.raises(ConfigError, match=r"may query no zone; \[query.users\] .* names anna"):
        rights(config.load(tmp_path))
    toml.write_text(base)
    monkeypatch.setattr(os, "geteuid", lambda: 65_534)
    with pytest.raises(ConfigError, match="does not own"):
        rights(config.load(tmp_path))
