"""fenceline.toml: strict keys, and where things are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cloud import config
from cloud.parts import check_ports, parts
from edge_agent.contract.errors import ConfigError


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "fenceline.toml").write_text("")
    return tmp_path


def write(project: Path, text: str) -> None:
    (project / "fenceline.toml").write_text(text)


def test_an_empty_file_gives_the_documented_defaults(project: Path) -> None:
    settings = config.load(project)
    assert settings.ports == {"sensors": 1883, "release": 18880, "mlflow": 5000, "api": 18800, "eu": 18831, "us": 18832}
    assert settings.state_dir == project / ".fenceline" and settings.mlflow_url == "http://127.0.0.1:5000"


def test_the_file_in_the_repository_says_what_the_defaults_are() -> None:
    root = Path(__file__).parents[2]
    ours, default = config.load(root, root / "x"), config._File()
    assert config.parse_settings((root / "fenceline.toml").read_text(), config._File, "fenceline.toml") == default
    assert all(path.is_file() for path in (*ours.contracts, ours.zones_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sensor = 1", "unknown key sensor; did you mean 'sensors'"),
        ("[sensors]\nprot = 1", "unknown key sensors.prot; did you mean 'port'"),
        ("[[regions]]\nname = 'eu'\nport = 1\nhots = 'x'", r"unknown key regions\[0\].hots; did you mean 'host'"),
        ("[sensors]\nport = 'x'", "Expected `int`"),
        ("[sensors]\nport = 70000", "port 70000 of sensors"),
        ("[sensors]\nport = 5000", "share a port"),
        ("regions = []", "at least one"),
        ("[[regions]]\nname = 'EU'\nport = 1", "region 'EU'"),
        ("[ingest]\nbatch_blocks_max = 0", "must be positive"),
        ("[ingest]\nbatch_rows_max = 0", "must be positive"),
        ("[lake]\nvacuum_hours = 24", "lake.vacuum_hours 24 must be at least 168, or 0"),
        ("[quality]\ngrace_s = nan", r"nan is no setting; write a number - at `\$.quality.grace_s`"),
        ("[query]\ntime_s_max = inf", r"inf is no setting; write a number - at `\$.query.time_s_max`"),
        ("[quality]\ncheck_s = 1e300", r"are seconds, at most 31622400 \(a year\)"),
        ("[ingest]\nworkers = 0", "ingest.workers 0 is not between 1 and 32"),
        ("[metadata]\nurl = 'mysql://x/y'", "must be postgresql://USER@HOST:PORT/DATABASE"),
        ("[metadata]\nurl = 'postgresql://me:secret@h/d'", "holds a password; put it in a file"),
        ("[metadata]\nurl = 'postgresql://me@h/d'\npassword_file = 'none'", r"metadata.password_file /.*/none: No such file"),
        ("[[regions]]\nname = 'eu'\nport = 1\nmqtt = 6", "Invalid enum value 6"),
        ("[[regions]]\nname = 'eu'\nport = 1\ntls = {ca = 'x'}", r"unknown key regions\[0\].tls.ca; known: ca_file"),
        ("x = [", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_change(project: Path, text: str, message: str) -> None:
    write(project, text)
    with pytest.raises(ConfigError, match=message):
        config.load(project)


@pytest.mark.parametrize(
    "url",
    [
        "postgres://me:s3cret@h/d",
        "postgresql://me:s3cret@h/d",
        "postgresql://me@h/d?password=s3cret",
        "postgresql://me@h/d?sslmode=require&PASSWORD=s3cret@x",
        "postgresql:///d?user=me&sslpassword=s3cret",
    ],
)
def test_a_password_in_the_metadata_url_is_refused_and_not_repeated(project: Path, url: str) -> None:
    write(project, f"[metadata]\nurl = '{url}'")
    with pytest.raises(ConfigError, match=r"metadata\.url") as refused:
        config.load(project)
    assert "s3cret" not in str(refused.value)


def test_a_file_that_is_not_utf8_is_refused_with_the_place(project: Path) -> None:
    (project / "fenceline.toml").write_bytes(b'state = "\xff"')
    with pytest.raises(ConfigError, match=r"fenceline\.toml is not UTF-8 at byte 9"):
        config.load(project)


def test_a_state_directory_that_is_a_file_is_named(project: Path) -> None:
    (project / "here").touch()
    with pytest.raises(ConfigError, match=r"state directory .*here is a file; give another --state"):
        config.load(project, project / "here")


def test_live_features_are_a_part_of_the_stack_when_asked_for(project: Path) -> None:
    assert "features-live" not in [part.name for part in parts(config.load(project))]
    write(project, "[features]\nlive = true")
    assert "features-live" in [part.name for part in parts(config.load(project))]


def test_the_project_is_found_upward_and_its_absence_is_named(
    project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    inner = project / "a/b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert config.load().project == project

    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(ConfigError, match="--project DIR"):
        config.load()


def test_the_state_directory_comes_from_option_then_environment_then_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(project, "state = 'mine'")
    assert config.load(project).state_dir == project / "mine"
    monkeypatch.setenv("FENCELINE_STATE", str(project / "env"))
    assert config.load(project).state_dir == project / "env"
    assert config.load(project, project / "option").state_dir == project / "option"


def test_the_ports_of_a_running_stack_win_and_those_of_a_dead_one_do_not(project: Path) -> None:
    settings = config.load(project)
    settings.state_dir.mkdir()
    ports = {**settings.ports, "eu": 2222}

    settings.stack_path.write_text(json.dumps({"pid": os.getpid(), "start_ticks": config.start_ticks(os.getpid()), "ports": ports}))
    assert config.load(project).region("eu").port == 2222

    settings.stack_path.write_text(json.dumps({"pid": 2**22 + 1, "start_ticks": 1, "ports": ports}))
    assert config.load(project).region("eu").port == 18831

    settings.stack_path.write_text(json.dumps({"pid": os.getpid(), "start_ticks": 1, "ports": ports}))  # its number is another's now
    assert config.load(project).region("eu").port == 18831

    for other in (b"{", b"[]", b'{"a": 1}', b'{"pid": "x", "ports": {}}', b'{"pid": \xff'):
        settings.stack_path.write_bytes(other)
        with pytest.raises(ConfigError, match=r"was not written by a stack .* delete it"):
            config.load(project)


def test_unknown_port_names_and_regions_are_named(project: Path) -> None:
    settings = config.load(project)
    with pytest.raises(ConfigError, match="unknown ports asia"):
        settings.with_ports({"asia": 1})
    with pytest.raises(ConfigError, match="no region 'asia'"):
        settings.region("asia")


def test_two_parts_with_one_address_are_named_wherever_their_ports_come_from(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"eu and us share a port: 127\.0\.0\.1:2222"):
        config.load(project).with_ports({"eu": 2222, "us": 2222})


def test_brokers_on_hosts_of_their_own_may_have_the_same_port(project: Path) -> None:
    regions = [f"[[regions]]\nname = '{name}'\nhost = '{name}.example.org'\nport = 8883\n" for name in ("eu", "us")]
    write(project, "".join(regions))
    assert [r.port for r in config.load(project).regions] == [8883, 8883]


def test_a_stack_that_would_listen_beyond_loopback_is_refused(project: Path) -> None:
    write(project, "mlflow = {host = '0.0.0.0', port = 5000}")
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0' of mlflow is not loopback"):
        check_ports(config.load(project))


def test_the_metadata_password_comes_from_the_environment_or_a_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load(project).audit_db == project / ".fenceline/audit.db"
    write(project, "[metadata]\nurl = 'postgresql://me@db:5432/fenceline'\npassword_file = 'secret'")
    (project / "secret").write_text("a b/c\n")
    found = config.load(project)
    assert found.audit_db == found.fleet_db == found.rollouts_db == "postgresql://me:a%20b%2Fc@db:5432/fenceline"
    monkeypatch.setenv(config.PASSWORD_VARIABLE, "other")
    assert config.load(project).audit_db == "postgresql://me:other@db:5432/fenceline"


def test_a_region_of_its_own_broker_has_certificates_by_session_and_no_place_in_the_stack(project: Path) -> None:
    tls = "tls = {ca_file = 'ca.crt', cert_file = 'certs/{name}.crt', key_file = 'certs/{name}.key'}"
    write(project, f"[[regions]]\nname = 'eu'\nport = 8883\nmqtt = 5\nshared_subscriptions = true\n{tls}")
    region = config.load(project).region("eu")
    assert (region.mqtt, region.shared_subscriptions) == (5, True) and region.tls is not None
    assert region.tls.cert_file == str(project / "certs/{name}.crt")
    with pytest.raises(ConfigError, match=r"certs/ingest-1\.crt"):
        region.tls.context("ingest-1")
    with pytest.raises(ConfigError, match="fenceline ingest --region eu"):
        check_ports(config.load(project))


def test_the_stack_runs_as_many_workers_as_the_settings_say(project: Path) -> None:
    write(project, "[ingest]\nworkers = 2")
    settings = config.load(project, project / "state")
    names = [part.name for part in parts(settings) if part.name.startswith("ingest")]
    assert names == ["ingest-eu", "ingest-eu-2", "ingest-us", "ingest-us-2"]
