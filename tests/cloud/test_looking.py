"""`fenceline query|quarantine|lake` on a lake with rows, quarantine and labels: who may see what, and every mistake is one line."""

from __future__ import annotations

import json
import os
import pwd
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from cloud import cli, config, labels
from cloud.fleet import Fleet
from cloud.lake import Lake
from cloud.watch import open_lake
from edge_agent.contract.columns import Strings
from edge_agent.contract.state import Phase, Reported
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON, block
from tests.cloud.test_quarantine import bad
from tests.cloud.test_readmission import refused

ROOT = Path(__file__).parents[2]
BASE = "contracts = ['pump.yaml']\nzones = 'zones.geojson'\n"
ME = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose lake has two blocks of each of two lanes, the second of each with a bad row."""
    path = tmp_path_factory.mktemp("project")
    (path / "pump.yaml").write_text(CONTRACT_YAML)
    (path / "zones.geojson").write_bytes(ZONES_JSON)
    (path / "fenceline.toml").write_text(BASE)
    lake = open_lake(config.load(path))
    lake.append("eu", [b for lane in ("europe", "canada") for b in (block(1, lane=lane), bad(2, [1], lane=lane))])
    header, payload = refused(77, [b"\x1b]0;owned\x07\x1b[2J hi"])
    lake.append("eu", [(header, {**payload, "detail": Strings.of(["[/x]"])})])
    return path


class Answer:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused(self, code: int = 2) -> str:
        """The one line that says why."""
        assert (self.code, self.out) == (code, ""), (self.code, self.out, self.err)
        assert self.err.startswith("fenceline: ") and self.err.count("\n") == 1
        return self.err


class Shell:
    """Runs commands in a project."""

    def __init__(self, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._project, self._capsys = project, capsys

    def __call__(self, *words: str) -> Answer:
        self._capsys.readouterr()
        try:
            code = cli.main(["--project", str(self._project), *words])
        except SystemExit as e:
            code = int(str(e.code))
        return Answer(code, *self._capsys.readouterr())

    def allow(self, users: str) -> None:
        """Set `[query.users]`."""
        (self._project / "fenceline.toml").write_text(f"{BASE}[query.users]\n{users}\n")


@pytest.fixture
def shell(project: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    yield Shell(project, capsys)
    (project / "fenceline.toml").write_text(BASE)


def test_quarantine_shows_and_releases_only_what_the_caller_may_see(shell: Shell) -> None:
    everything = shell("quarantine", "list", "--json").json
    assert {group["lane"] for group in everything} == {"canada", "europe"}
    shell.allow(f'{ME} = ["europe"]')
    assert {group["lane"] for group in shell("quarantine", "list", "--json").json} == {"europe"}
    shown = shell("quarantine", "show", "--stream", "pump", "--json").json
    assert [row["name"] for row in shown if row["origin"] == "ingest"] == ["d1/e1/europe/2/1"]
    assert "no such row" in shell("quarantine", "show", "d1/e1/canada/2/1").refused()
    assert "no such row" in shell("quarantine", "release", "d1/e1/canada/2/1", "--as-is", "--by", "me").refused()
    shell.allow('anna = ["*"]')
    for words in (["list"], ["show", "--stream", "pump"], ["release", "--stream", "pump", "--as-is", "--by", "me"]):
        assert f"user '{ME}' may see no zone" in shell("quarantine", *words).refused()
    assert "may see no zone" in shell("query", "SELECT * FROM pump_quarantine").refused()


def test_what_a_device_wrote_is_printed_without_its_escape_codes(shell: Shell) -> None:
    assert "[/x]" in shell("quarantine", "list").out
    shown = shell("quarantine", "show", "d1/e1/europe/77/0").out
    assert r"\x1b]0;owned\x07\x1b[2J hi" in shown and "\x1b" not in shown


def test_a_zone_that_a_device_reported_breaks_no_list(shell: Shell, project: Path) -> None:
    fleet = Fleet(config.load(project).fleet_db)
    fleet.add("gw")
    fleet.record_reported(Reported(device="gw", agent_version="1", desired_version=1, phase=next(iter(Phase)), zone="[/x]"))
    for command in ("device list", "status"):
        answer = shell(*command.split())
        assert answer.code == 0 and "[/x]" in answer.out


def test_the_answer_of_a_query_in_every_form(shell: Shell, tmp_path: Path) -> None:
    sql = "SELECT count(*) AS n, sum(count) AS n, lane FROM pump GROUP BY lane ORDER BY lane"
    rows = shell("query", "--json", sql).json
    assert [row["lane"] for row in rows] == ["canada", "europe"] and all(type(row["n_1"]) is int for row in rows)
    file = tmp_path / "x.parquet"
    assert shell("query", "--json", "--parquet", str(file), sql).json == {"file": str(file), "rows": 2}
    assert pyarrow.parquet.read_table(file).column_names == ["n", "n_1", "lane"]
    assert shell("query", sql).out.split()[:3] == ["n", "n_1", "lane"]
    assert [row["lane"] for row in shell("query", "--json", "--zones", "canada, europe", sql).json] == ["canada", "europe"]
    assert "[/x]" in shell("query", "SELECT '[/x]' AS a").out


def test_a_file_that_is_there_stays_if_the_answer_does_not_fit_into_parquet_or_its_disk(shell: Shell, tmp_path: Path) -> None:
    """Arrow takes away what it could not write: a device's node, for root."""
    file, full = tmp_path / "x.parquet", tmp_path / "full"
    file.write_text("precious")
    full.symlink_to("/dev/full")
    assert "cast" in shell("query", "--parquet", str(file), "SELECT interval 1 day AS i").refused() and file.read_text() == "precious"
    assert "full cannot be written: No space left" in shell("query", "--parquet", str(full), "SELECT 1").refused(1)
    assert full.is_symlink()
    with files_at_most(100):
        answer = shell("query", "--parquet", str(file), "SELECT 1")
    assert "x.parquet cannot be written: File too large" in answer.refused(1) and file.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "x.parquet"]


@contextmanager
def files_at_most(length_bytes: int) -> Iterator[None]:
    """A disk that becomes full while a file is written, as far as this process can tell."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_is_replaced_where_its_name_leads_and_keeps_its_rights(shell: Shell, tmp_path: Path) -> None:
    file, link = tmp_path / "x.parquet", tmp_path / "newest"
    file.write_text("of before")
    file.chmod(0o660)
    link.symlink_to("x.parquet")
    with file.open() as reader:
        assert shell("query", "--parquet", str(link), "SELECT 1 AS a").code == 0
        assert reader.read() == "of before"
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o660
    assert pyarrow.parquet.read_table(file).to_pylist() == [{"a": 1}]


def test_pipes_and_what_a_shell_has_opened_are_written_to(project: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cloud.cli", "--project", str(project), "query", "--parquet", "/dev/stdout", "SELECT 1 AS a"]
    piped = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120).stdout
    assert pyarrow.parquet.read_table(pa.BufferReader(piped)).to_pylist() == [{"a": 1}]
    with (tmp_path / "opened").open("wb") as opened:
        before = os.fstat(opened.fileno()).st_ino
        subprocess.run(command, cwd=ROOT, stdout=opened, check=True, timeout=120)
    assert (tmp_path / "opened").stat().st_ino == before and (tmp_path / "opened").read_bytes() == piped


def test_times_that_python_has_no_object_for_are_text(shell: Shell) -> None:
    sql = "SELECT TIMESTAMPTZ '20000-01-01' AS t, TIMESTAMP 'infinity' AS i, DATE '20000-01-01' AS d, [TIMESTAMP '20000-01-01'] AS l"
    (row,) = shell("query", "--json", sql).json
    assert row["t"].startswith("20000-01-01 00:00:00") and row["i"] == "infinity" and row["d"] == "20000-01-01" and "20000" in row["l"]
    assert "20000-01-01" in shell("query", sql).out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["query", "SELECT error('x') FROM pump"], "x"),
        (["query", "--csv", "--json", "SELECT 1"], "exclude each other"),
        (["query", "--csv", "SELECT [1] AS l"], "cast that column to text"),
        (["query", "--parquet", "/nonexistent/x.parquet", "SELECT 1"], "/nonexistent/x.parquet cannot be written: No such file"),
        (["query", "--parquet", "{tmp}/i.parquet", "SELECT interval 1 day AS i"], "cast that column to text"),
        (["query", "--zones", "mars", "SELECT * FROM pump"], "there is no zone 'mars'; known: *, canada, europe"),
        (["query", "--zones", "canada, europ", "SELECT * FROM pump"], "there is no zone 'europ'; did you mean 'europe'"),
        (["quarantine", "show", "d1/e1/europe/²/0"], "names no row"),
        (["quarantine", "show", "d1/e1/europe/99999999999999999999/0"], "names no row"),
        (["quarantine", "show", "--reason", "nope"], "no such row"),
        (["lake", "show", "--lane", "mars"], "no lane 'mars'; known: _quarantine/canada, _quarantine/europe, canada, europe"),
        (["lake", "compact", "--stream", "pumb"], "no stream 'pumb'; did you mean 'pump'"),
        (["lake", "vacuum", "--stream", "quarantine", "--lane", "canada"], "'quarantine' has no rows in lane 'canada'"),
        (["lake", "vacuum", "--hours", "5"], "at least 168 hours"),
        (["lake", "vacuum", "--hours", "99999999999999999"], "at most 876000 hours"),
        (["labels", "add", "{project}/fenceline.toml", "--column", "x", "--mapping", "{latin}"], "latin.toml is not UTF-8 at byte 0"),
        (["labels", "add", "{tmp}", "--column", "x"], "no file"),
        (["ingest", "--region", "eu", "--worker-name", "BAD"], "worker name 'BAD'"),
        (["completeness", "nosuch"], "no device or stream 'nosuch'"),
        (["device", "add", "d1", "--out", "{latin}/agent.toml"], "latin.toml"),
    ],
)
def test_a_mistake_is_one_line_and_exits_2(shell: Shell, project: Path, tmp_path: Path, words: list[str], says: str) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"\xff")
    if words[0] == "device":
        assert shell("keys", "init").code in (0, 2)
    assert says in shell(*(word.format(tmp=tmp_path, project=project, latin=latin) for word in words)).refused()


@pytest.mark.parametrize(
    "words",
    [
        ["quarantine", "show", "--stream", "pump", "--limit", "0"],
        ["completeness", "--grace", "nan"],
        ["completeness", "--since", "yesterday"],
        ["completeness", "--since", "99999999999999d"],
        ["completeness", "--since", "²h"],
        ["device", "add", "gw", "--home", "1"],
        ["ingest", "--region", "eu", "--workers", "0"],
        ["ingest", "--region", "eu", "--workers", "2", "--only", "1,1"],
        ["replay", "x.csv", "--limit", "-1"],
        ["replay", "x.csv", "--start", "noon"],
    ],
)
def test_an_argument_that_makes_no_sense_is_said_so(shell: Shell, words: list[str]) -> None:
    answer = shell(*words)
    assert (answer.code, answer.out) == (2, "") and ("is not" in answer.err or "is neither" in answer.err)
    assert "Traceback" not in answer.err and "invalid _" not in answer.err


@pytest.mark.parametrize("form", ["--csv", "--json", None])
def test_a_reader_that_has_seen_enough_ends_it_quietly(project: Path, form: str | None) -> None:
    wide = ", ".join(f"repeat('x', 60) AS c{n}" for n in range(10))  # a thousand rows are more than any pipe holds
    command = [sys.executable, "-m", "cloud.cli", "--project", str(project), "query", f"SELECT {wide} FROM range(10000)"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # with it, Python drops what a write did not take, and says nothing
    with subprocess.Popen(
        [*command, *filter(None, [form])], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.readline()
        running.stdout.close()
        said = running.stderr.read().decode()
    assert running.returncode == 141 and said == ""


def test_labels_are_shown_and_vacuumed_with_the_lake(shell: Shell, project: Path) -> None:
    lake = Lake(config.load(project).lake)
    for value in (1.0, 2.0, 3.0):
        labels.add(lake, "pump", pa.table([["p1"], [datetime(2024, 1, 1, tzinfo=UTC)], [value]], schema=labels.SCHEMA))
    (table,) = shell("lake", "show", "--json", "--lane", "_labels").json
    assert (table["stream"], table["version"], table["rows"], table["files"], table["dates"]) == ("pump", 3, 1, 1, 0)
    assert {t["lane"] for t in shell("lake", "show", "--json").json} == {
        "_labels",
        "_quarantine/canada",
        "_quarantine/europe",
        "canada",
        "europe",
    }
    assert [t["files"] for t in shell("lake", "vacuum", "--json", "--dry-run", "--lane", "_labels").json] == [[]]
    old = datetime(2024, 1, 1, tzinfo=UTC).timestamp()
    files = list(Path(lake.roots.default.path("_labels", "pump")).glob("*.parquet"))
    for file in files:
        os.utime(file, (old, old))
    for commit in Path(lake.roots.default.path("_labels", "pump/_delta_log")).glob("*.json"):
        lines = [json.loads(line) for line in commit.read_text().splitlines()]
        for line in lines:
            for action in line.values():
                if "deletionTimestamp" in action:
                    action["deletionTimestamp"] = int(old * 1e3)
        commit.write_text("\n".join(map(json.dumps, lines)))
    (removed,) = shell("lake", "vacuum", "--json", "--lane", "_labels").json
    assert len(files) == 3 and len(removed["files"]) == 2
    stored = lake.labels("pump")
    assert stored is not None and stored["label"].to_pylist() == [3.0]
    assert shell("lake", "compact", "--json").code == 0
    assert "no lane '_labels'" in shell("lake", "compact", "--lane", "_labels").refused()
