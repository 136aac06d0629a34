"""A published policy stands in the audit trail, wherever its publication was cut off."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cloud import config, keys, policy
from cloud.audit import Audit
from cloud.config import Settings
from cloud.fleet import Fleet
from cloud.gate import policy_path
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.state import ZonesRef
from tests.cloud.blocks import CONTRACT_YAML, ZONES_JSON

NOW = datetime.now(UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "pump.yaml").write_text(CONTRACT_YAML)
    (tmp_path / "zones.geojson").write_bytes(ZONES_JSON)
    (tmp_path / "stricter.geojson").write_bytes(ZONES_JSON.replace(b'["us", "eu"]', b'["us"]'))
    (tmp_path / "fenceline.toml").write_text("contracts = ['pump.yaml']\nzones = 'zones.geojson'\n")
    found = config.load(tmp_path)
    keys.init(found.keys_dir, found.releases_dir, NOW)
    return found


def publish(settings: Settings) -> ZonesRef:
    return policy.publish(settings, Fleet(settings.fleet_db), settings.project / "stricter.geojson", now=NOW)


def gone(*_: object, **__: object) -> Any:
    raise UnavailableError("gone")


@pytest.mark.parametrize("where", ["write_atomically", "reload_brokers"])
def test_a_publication_that_was_cut_off_is_audited(settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(policy, where, gone)
        with pytest.raises(UnavailableError):
            publish(settings)
    assert Audit(settings.audit_db).entries()[0].kind == policy.PUBLISHED
    ref = publish(settings)
    assert ref.version == 1 and policy.show(settings, Fleet(settings.fleet_db)).zones.digest == ref.sha256


def test_a_policy_that_the_audit_trail_cannot_tell_is_not_in_force(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "add", gone)
        with pytest.raises(UnavailableError):
            publish(settings)
    assert not policy_path(settings).exists() and Fleet(settings.fleet_db).zones() is None
    assert publish(settings) == Fleet(settings.fleet_db).zones()
    assert [e.kind for e in Audit(settings.audit_db).entries()] == [policy.PUBLISHED]


def test_of_two_publications_at_once_one_is_the_later_in_every_place(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, audited = Fleet(settings.fleet_db), Audit.add
    other = threading.Thread(target=policy.publish, args=(settings, fleet, settings.project / "zones.geojson"), kwargs={"now": NOW})

    def add(audit: Audit, *args: Any, **kwargs: Any) -> Any:
        if other.ident is None:
            other.start()
            other.join(2.0)  # it either is done, or waits for us
        return audited(audit, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Audit, "add", add)
        assert publish(settings).version == 1
        other.join()
    ref = fleet.zones()
    assert ref is not None and ref.version == 2
    assert policy.show(settings, fleet).zones.digest == ref.sha256
