"""What a removal and a new password leave on disk, also where they are cut off; with running brokers: test_stack.py."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud import config, enrol, keys, rollout
from cloud.audit import Audit
from cloud.config import Settings, Tls
from cloud.fleet import Fleet
from cloud.removal import REMOVED, remove
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import Phase, Reported
from tests.cloud.refs import a_ref

REF = a_ref(1)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A project whose fleet has the devices gw and other."""
    found = config.load(Path(__file__).parents[2], tmp_path / "state")
    keys.init(found.keys_dir, found.releases_dir, datetime.now(UTC))
    for name in ("gw", "other"):
        enrol.enrol(found, Fleet(found.fleet_db), name)
    return found


def users(settings: Settings) -> str:
    """The users of all regions' brokers."""
    return "".join((settings.nats_dir / f"{region.name}.users.conf").read_text() for region in settings.regions)


def in_force(settings: Settings, password: str) -> bool:
    """Whether the brokers of all regions take it."""
    return users(settings).count(f'"{password}"') == len(settings.regions)


def held(settings: Settings) -> str:
    """The password in gw's file."""
    return enrol.password_path(settings, "gw").read_text().strip()


def fails(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_removed_device_is_no_user_of_any_broker_and_the_audit_trail_says_who_did_it(settings: Settings) -> None:
    fleet, audit = Fleet(settings.fleet_db), Audit(settings.audit_db)
    fleet.record_reported(Reported(device="gw", agent_version="0", desired_version=1, phase=Phase.IDLE, epoch="e7", blocks_waiting=41))
    assert in_force(settings, held(settings))
    assert remove(settings, fleet, "gw", "ann")
    assert '"gw"' not in users(settings) and "/gw/" not in users(settings) and '"other"' in users(settings)
    (entry,) = audit.entries()
    assert (entry.kind, entry.subject, audit.verify()) == (REMOVED, "gw", None)
    assert entry.detail.startswith("by ann; it reported last at ") and "41 blocks waiting on it, epoch e7" in entry.detail
    with pytest.raises(ConfigError, match="there is no device 'stranger'"):
        remove(settings, fleet, "stranger", "ann")
    assert len(audit.entries()) == 1


def test_a_removed_device_may_be_added_again_where_it_was_and_its_buffer_stays(settings: Settings) -> None:
    fleet, old = Fleet(settings.fleet_db), held(settings)
    buffer = enrol.agent_path(settings, "gw").with_name("state") / "buffer.db"
    buffer.parent.mkdir()
    buffer.write_bytes(b"what an agent that runs here has not sent yet")
    remove(settings, fleet, "gw", "ann")
    assert buffer.exists() and not enrol.password_path(settings, "gw").exists()
    assert enrol.enrol(settings, fleet, "gw") == enrol.agent_path(settings, "gw")
    assert held(settings) != old and in_force(settings, held(settings)) and not in_force(settings, old)


@pytest.mark.parametrize("cut", ["cloud.removal.reload_brokers", "cloud.rollout.leave", "cloud.removal.password_path"])
def test_a_removal_that_is_cut_off_is_finished_by_doing_it_again(settings: Settings, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    fleet = Fleet(settings.fleet_db)
    rollout.start(settings, fleet, REF, now=0.0, canary=0)
    with monkeypatch.context() as patch:
        patch.setattr(cut, fails)
        with pytest.raises(OSError, match="No space left"):
            remove(settings, fleet, "gw", "ann")
    assert fleet.devices() == ["other"]
    assert not remove(settings, fleet, "gw", "ann")
    assert '"gw"' not in users(settings) and rollout.status(settings).present == {"other"}
    assert not enrol.agent_path(settings, "gw").exists() and [e.kind for e in Audit(settings.audit_db).entries()] == [REMOVED]


def test_a_removal_that_the_audit_trail_does_not_take_does_not_take_place(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloud.audit.Audit.add", fails)
    with pytest.raises(OSError, match="No space left"):
        remove(settings, Fleet(settings.fleet_db), "gw", "ann")
    assert "gw" in Fleet(settings.fleet_db).devices() and in_force(settings, held(settings))


def test_a_new_password_is_in_a_private_file_and_the_old_one_is_none_any_more(settings: Settings, tmp_path: Path) -> None:
    fleet, old = Fleet(settings.fleet_db), held(settings)
    path = enrol.renew(settings, fleet, "gw")
    assert path == enrol.password_path(settings, "gw") and path.stat().st_mode & 0o777 == 0o600
    assert held(settings) == fleet.passwords()["gw"] != old
    assert in_force(settings, held(settings)) and not in_force(settings, old)
    elsewhere = enrol.renew(settings, fleet, "gw", tmp_path / "made" / "uplink-password")
    assert elsewhere.read_text().strip() == fleet.passwords()["gw"] != held(settings)
    assert [p.name for p in elsewhere.parent.iterdir()] == ["uplink-password"]


def test_a_new_password_for_a_device_that_is_not_there_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no device 'stranger'"):
        enrol.renew(settings, Fleet(settings.fleet_db), "stranger", tmp_path / "new" / "password")
    assert not (tmp_path / "new").exists()


def test_regions_that_ask_for_certificates_have_no_use_for_a_new_password(settings: Settings) -> None:
    eu, us = (replace(region, tls=Tls(cert_file="{name}.crt", key_file="{name}.key")) for region in settings.regions)
    with pytest.raises(ConfigError, match="ask for certificates, not for passwords"):
        enrol.renew(replace(settings, regions=(eu, us)), Fleet(settings.fleet_db), "gw")


def full_disk(patch: pytest.MonkeyPatch) -> None:
    """The file cannot be written."""
    patch.setattr("cloud.files.write_atomically", fails)


def lost_commit(patch: pytest.MonkeyPatch) -> None:
    """The file is written, and the database then has no room."""

    def renew(fleet: Fleet, device: str, deliver: Callable[[str], object]) -> None:
        deliver("never in force")
        fails()

    patch.setattr("cloud.fleet.Fleet.renew", renew)


def cut_before_the_file(patch: pytest.MonkeyPatch) -> None:
    """Killed after the database has the new password."""
    replace_file = Path.replace
    patch.setattr("pathlib.Path.replace", lambda old, new: fails() if old.suffix == ".new" else replace_file(old, new))


@pytest.mark.parametrize("fault", [full_disk, lost_commit, cut_before_the_file])
def test_a_new_password_that_is_cut_off_leaves_the_device_the_one_in_its_file(
    settings: Settings, fault: Callable[[pytest.MonkeyPatch], None]
) -> None:
    fleet, old = Fleet(settings.fleet_db), held(settings)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises(OSError, match="No space left"):
            enrol.renew(settings, fleet, "gw")
    assert held(settings) == old and in_force(settings, old)
    assert (fleet.passwords()["gw"] == old) == (fault is not cut_before_the_file)
    enrol.renew(settings, fleet, "gw")
    assert held(settings) == fleet.passwords()["gw"] != old and in_force(settings, held(settings))
    assert {p.name for p in enrol.password_path(settings, "gw").parent.iterdir() if p.name.startswith(".")} == set()


def test_of_two_new_passwords_at_once_the_brokers_take_the_one_in_the_file(settings: Settings) -> None:
    threads = [threading.Thread(target=enrol.renew, args=(settings, Fleet(settings.fleet_db), "gw")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(settings) == Fleet(settings.fleet_db).passwords()["gw"] and in_force(settings, held(settings))
