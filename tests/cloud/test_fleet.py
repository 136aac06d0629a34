"""The fleet's registry: names, desired and reported state."""

from __future__ import annotations

import errno
import threading
import tomllib
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloud import config, keys
from cloud.config import Settings, Tls
from cloud.enrol import enrol, reload_brokers
from cloud.fleet import EVENTS_MAX, Fleet
from edge_agent.contract.errors import ConfigError
from edge_agent.contract.state import Desired, Phase, Reported, ZonesRef
from tests.cloud.refs import a_ref

REF = a_ref(1)


def report(at_us: int, phase: Phase = Phase.IDLE, desired_version: int = 1) -> Reported:
    return Reported(device="d1", agent_version="0", desired_version=desired_version, phase=phase, at_us=at_us)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    fleet = Fleet(tmp_path / "fleet.db")
    fleet.add("d1")
    return fleet


def test_a_new_device_has_a_password_and_wants_nothing_in_version_1(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.devices() == ["d1"] and len(fleet.passwords()["d1"]) >= 32
    assert fleet.desired("d1") == Desired(version=1) and fleet.all_reported() == {}
    assert (tmp_path / "fleet.db").stat().st_mode & 0o077 == 0


def test_every_change_raises_the_desired_version_for_ever(fleet: Fleet, tmp_path: Path) -> None:
    assert fleet.set_desired("d1", REF) == Desired(version=2, bundle=REF)
    assert fleet.set_desired("d1", None) == Desired(version=3)
    assert Fleet(tmp_path / "fleet.db").desired("d1").version == 3


def test_changes_at_the_same_time_never_share_a_version(fleet: Fleet) -> None:
    versions: list[int] = []
    threads = [threading.Thread(target=lambda: versions.append(fleet.set_desired("d1", REF).version)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(versions) == list(range(2, 10))


@pytest.mark.parametrize("name", ["d1", "Plane", "", "a/b", "a" * 64])
def test_a_taken_or_impossible_name_is_refused(fleet: Fleet, name: str) -> None:
    with pytest.raises(ConfigError):
        fleet.add(name)


def test_a_device_that_is_not_there_is_named(fleet: Fleet) -> None:
    with pytest.raises(ConfigError, match="'d9'"):
        fleet.desired("d9")
    with pytest.raises(ConfigError, match="'d9'"):
        fleet.set_desired("d9", None)
    with pytest.raises(ConfigError, match="'d9'"):
        fleet.renew("d9")
    with pytest.raises(ConfigError, match="'d9'"):
        fleet.remove("d9")


def test_a_removed_device_leaves_nothing_but_its_events_and_the_removal(fleet: Fleet) -> None:
    fleet.add("d2")
    fleet.record_reported(report(at_us=1))
    fleet.record_event("d1", b"said")
    assert fleet.remove("d1") and not fleet.remove("d1")
    assert fleet.devices() == list(fleet.passwords()) == list(fleet.all_desired()) == ["d2"] and fleet.all_reported() == {}
    assert [e.body for e in fleet.events()] == ["said"] and not fleet.record_reported(report(at_us=2))
    (removal,) = fleet.removals().values()
    assert (removal.version, removal.back) == (2, False)


def test_a_device_that_is_added_again_has_a_new_password_and_versions_that_go_on(fleet: Fleet) -> None:
    before = fleet.passwords()["d1"]
    fleet.set_desired("d1", REF)
    fleet.remove("d1")
    assert fleet.add("d1") != before and fleet.desired("d1") == Desired(version=4)
    assert fleet.removals()["d1"].back
    fleet.remove("d1")
    assert fleet.removals()["d1"].version == 5 and not fleet.removals()["d1"].back


def test_a_report_that_a_broker_kept_of_a_removed_device_is_not_its_successors(fleet: Fleet) -> None:
    old = report(at_us=5_000)
    fleet.remove("d1")
    fleet.add("d1")
    assert not fleet.record_reported(old, retained=True) and fleet.all_reported() == {}
    assert fleet.record_reported(report(at_us=1, desired_version=3), retained=True)


def test_a_removal_that_cannot_be_written_down_does_not_take_place(fleet: Fleet) -> None:
    with pytest.raises(ZeroDivisionError):
        fleet.remove("d1", lambda: 1 // 0)
    assert fleet.devices() == ["d1"] and fleet.removals() == {}


def test_a_live_report_counts_even_if_the_devices_clock_went_back(fleet: Fleet) -> None:
    fleet.record_reported(report(at_us=2_000, phase=Phase.ACTIVE))
    assert fleet.record_reported(report(at_us=1_000, phase=Phase.ROLLED_BACK))
    found, _ = fleet.all_reported()["d1"]
    assert found.phase is Phase.ROLLED_BACK


def test_a_report_that_a_broker_had_kept_does_not_replace_a_newer_one(fleet: Fleet) -> None:
    fleet.record_reported(report(at_us=2_000, phase=Phase.ACTIVE, desired_version=2))
    assert not fleet.record_reported(report(at_us=1_000), retained=True)
    assert not fleet.record_reported(report(at_us=3_000, desired_version=1), retained=True)
    assert fleet.record_reported(report(at_us=3_000, desired_version=2), retained=True)


def test_a_report_of_a_stranger_is_not_kept(fleet: Fleet) -> None:
    stranger = Reported(device="d9", agent_version="0", desired_version=1, phase=Phase.IDLE)
    assert not fleet.record_reported(stranger) and fleet.devices() == ["d1"]


def test_events_are_kept_newest_first_cut_and_bounded(fleet: Fleet) -> None:
    fleet.record_event("d1", b'{"event": "a"}')
    fleet.record_event("d1", b"\xff" * 100_000)

    newest, oldest = fleet.events()
    assert oldest.body == '{"event": "a"}' and len(newest.body) < 20_000 and EVENTS_MAX <= 10_000


def test_a_device_whose_files_cannot_be_written_keeps_its_name_free(tmp_path: Path) -> None:
    settings = config.load(Path(__file__).parents[2], tmp_path / "state")
    keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    fleet, blocked = Fleet(settings.fleet_db), tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ConfigError, match="give another --out"):
        enrol(settings, fleet, "gw", blocked / "agent.toml")
    assert fleet.devices() == []


def test_enrolled_files_are_private_even_where_files_were(tmp_path: Path) -> None:
    settings = config.load(Path(__file__).parents[2], tmp_path / "state")
    keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    old = tmp_path / "gw" / "sensors.password"
    old.parent.mkdir()
    old.write_text("old")
    old.chmod(0o644)
    made = enrol(settings, Fleet(settings.fleet_db), "gw", tmp_path / "gw/agent.toml")
    assert {p.stat().st_mode & 0o777 for p in made.parent.iterdir()} == {0o600}


def test_a_missing_contract_is_named_before_a_device_is_added(tmp_path: Path) -> None:
    (tmp_path / "fenceline.toml").write_text(
        f"contracts = ['none.yaml']\nzones = '{Path(__file__).parents[2] / 'contracts/zones.geojson'}'\n"
    )
    settings = config.load(tmp_path)
    keys.init(settings.keys_dir, settings.releases_dir, datetime.now(UTC))
    fleet = Fleet(settings.fleet_db)
    with pytest.raises(ConfigError, match=r"cannot read .*none\.yaml"):
        enrol(settings, fleet, "gw")
    assert fleet.devices() == []


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    found = config.load(Path(__file__).parents[2], tmp_path / "state")
    keys.init(found.keys_dir, found.releases_dir, datetime.now(UTC))
    return found


def test_a_disk_that_is_full_at_the_last_file_keeps_the_name_free(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(settings.fleet_db)

    def full(path: Path, data: bytes) -> None:
        if path.name == "agent.toml":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("cloud.enrol._write", full)
        with pytest.raises(OSError, match="No space left"):
            enrol(settings, fleet, "gw")
    assert fleet.devices() == []
    assert enrol(settings, fleet, "gw").exists() and fleet.devices() == ["gw"]


def test_a_device_is_not_enrolled_into_the_directory_of_the_projects_own_zones(settings: Settings, tmp_path: Path) -> None:
    draft = tmp_path / "zones.geojson"
    draft.write_bytes(settings.zones_path.read_bytes())
    settings = replace(settings, zones_path=draft)
    with pytest.raises(ConfigError, match=r"holds contracts or zones of the project.* give another --out"):
        enrol(settings, Fleet(settings.fleet_db), "gw", tmp_path / "gw.toml")
    assert Fleet(settings.fleet_db).devices() == [] and not (tmp_path / "root.json").exists()


def test_contracts_of_one_name_do_not_replace_each_other_on_the_device(settings: Settings, tmp_path: Path) -> None:
    (contract,) = settings.contracts
    other = tmp_path / "other" / contract.name
    other.parent.mkdir()
    other.write_text(contract.read_text().replace("turbofan", "pump"))
    both = replace(settings, contracts=(contract, other))
    with pytest.raises(ConfigError, match=rf"two files called {contract.name}; rename a contract"):
        enrol(both, Fleet(both.fleet_db), "gw")
    assert Fleet(both.fleet_db).devices() == []


def test_devices_that_are_added_at_once_are_all_users_of_the_brokers(settings: Settings) -> None:
    """The first looks who there is; another is added meanwhile."""
    fleet = Fleet(settings.fleet_db)
    fleet.add("first")

    class Slow(Fleet):
        adding: threading.Thread | None = None

        def passwords(self) -> dict[str, str]:
            found = super().passwords()
            if self.adding is None:
                self.adding = threading.Thread(target=enrol, args=(settings, fleet, "second"))
                self.adding.start()
                self.adding.join(3.0)  # it either is done, or waits for us
            return found

    slow = Slow(settings.fleet_db)
    reload_brokers(settings, slow)
    assert slow.adding is not None
    slow.adding.join()
    users = (settings.nats_dir / "eu.users.conf").read_text()
    assert '"user":"first"' in users and '"user":"second"' in users


def test_a_device_that_is_added_while_a_policy_is_published_wants_that_policy(fleet: Fleet) -> None:
    ref = ZonesRef(target="zones/zones.geojson", version=1, sha256="0" * 64)
    publishing = threading.Thread(target=fleet.set_zones, args=(ref,))

    def deliver(password: str) -> None:
        publishing.start()
        publishing.join(0.5)

    fleet.add("gw", deliver)
    publishing.join()
    assert fleet.desired("gw").zones == fleet.desired("d1").zones == ref


def test_a_region_that_wants_tls_is_told_no_password_in_clear(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("authorities")
    eu, us = settings.regions
    tls = Tls(ca_file=str(tmp_path / "ca.pem"), cert_file="{name}.crt", key_file="{name}.key")
    settings = replace(settings, regions=(replace(eu, host="eu.example.org", port=8883, tls=tls), replace(us, tls=Tls())))
    path = enrol(settings, Fleet(settings.fleet_db), "gw")
    by_certificate, by_password = tomllib.loads(path.read_text())["endpoints"]
    assert by_certificate == {
        "name": "eu",
        "url": "mqtts://eu.example.org:8883",
        "ca_file": "eu.ca.crt",
        "cert_file": "gw.crt",
        "key_file": "gw.key",
    }
    assert by_password["url"] == f"mqtts://{us.host}:{us.port}" and by_password["username"] == "gw"
    assert (path.parent / "eu.ca.crt").read_text() == "authorities"
