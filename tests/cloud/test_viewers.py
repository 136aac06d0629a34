"""Who may see which zones, and that he is told clearly when he cannot."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest

from cloud import config, viewers
from cloud.roots import may_see
from cloud.viewers import rights
from edge_agent.contract.errors import ConfigError
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON

BASE = "contracts = ['pump.yaml']\nzones = 'zones.geojson'\n"
STRANGER = 54_321


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    (tmp_path / ".fenceline").mkdir()
    (tmp_path / "fenceline.toml").write_text(BASE)
    return tmp_path


def allow(project: Path, users: str, base: str = BASE) -> config.Settings:
    (project / "fenceline.toml").write_text(f"{base}[query.users]\n{users}\n")
    return config.load(project)


def test_rights_come_from_the_settings(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rights(config.load(project)) == ("*",) and rights(config.load(project), ["europe"]) == ("europe",)
    me = pwd.getpwuid(os.geteuid()).pw_name
    allowed = allow(project, f'{me} = ["europe"]')
    assert rights(allowed) == ("europe",)
    with pytest.raises(ConfigError, match="may not see canada"):
        rights(allowed, ["europe", "canada"])
    with pytest.raises(ConfigError, match=r"may see no zone; \[query.users\] .* names anna"):
        rights(allow(project, 'anna = ["*"]'))
    (project / "fenceline.toml").write_text(BASE)
    monkeypatch.setattr(os, "geteuid", lambda: 65_534)
    with pytest.raises(ConfigError, match="does not own"):
        rights(config.load(project))


def test_a_lane_of_several_zones_wants_all_of_them() -> None:
    assert not may_see("canada_europe", ["europe"]) and may_see("canada_europe", ["canada", "europe"]) and may_see("canada", ["*"])


def test_a_user_without_a_name_goes_by_his_number(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert viewers.user_name() == str(STRANGER)
    with pytest.raises(ConfigError, match=f"user '{STRANGER}' does not own"):
        rights(config.load(project))
    assert rights(allow(project, f'{STRANGER} = ["europe"]')) == ("europe",)


def test_without_a_state_directory_there_is_nothing_to_see(project: Path) -> None:
    (project / ".fenceline").rmdir()
    with pytest.raises(ConfigError, match=r"no state directory .*\.fenceline.*fenceline up"):
        rights(config.load(project))


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_listed_user_sees_a_lake_that_he_can_read_and_is_told_of_one_that_he_cannot(project: Path) -> None:
    """The state directory as `fenceline up` leaves it: the lake in it is closed, one beside it is open."""
    for place in (project, *project.parents[:2]):
        place.chmod(0o755)
    (project / "lake").mkdir()
    (project / ".fenceline/lake").mkdir()
    (project / ".fenceline").chmod(0o700)
    name = pwd.getpwuid(65_534).pw_name
    allow(project, f'{name} = ["europe"]')
    inside = as_user(65_534, project)
    assert f"user '{name}' cannot read the lake in {project}/.fenceline/lake: Permission denied" in inside and "[lake] root" in inside
    allow(project, f'{name} = ["europe"]', f"{BASE}[lake]\nroot = 'lake'\n")
    assert as_user(65_534, project) == "europe"
    (project / "fenceline.toml").write_text(BASE)
    assert f"user '{name}' does not own" in as_user(65_534, project)


def as_user(user: int, project: Path) -> str:
    """What `rights` says to another user, who reads the settings himself."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:  # only a process can change its user for good
        try:
            os.setuid(user)
            os.write(writing, ",".join(rights(config.load(project))).encode())
        except ConfigError as e:
            os.write(writing, str(e).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


def test_a_zone_that_there_is_not_is_refused_with_the_nearest_name(project: Path) -> None:
    with pytest.raises(ConfigError, match="there is no zone 'europ'; did you mean 'europe'"):
        rights(config.load(project), ["canada", "europ"])


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_the_root_of_a_zone_that_is_not_his_may_be_closed_to_a_user(project: Path) -> None:
    for place in (project, *project.parents[:2]):
        place.chmod(0o755)
    for root, mode in (("lake", 0o755), ("canada", 0o700)):
        (project / root).mkdir(mode=mode)
    name = pwd.getpwuid(65_534).pw_name
    base = f"{BASE}[lake]\nroot = 'lake'\n[lake.zones]\ncanada = 'canada'\n"
    allow(project, f'{name} = ["europe"]', base)
    assert as_user(65_534, project) == "europe"
    allow(project, f'{name} = ["canada", "europe"]', base)
    assert f"user '{name}' cannot read the lake in {project}/canada" in as_user(65_534, project)
