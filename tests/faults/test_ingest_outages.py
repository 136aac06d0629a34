"""Ingest while something that it needs is away: the metadata database, the S3 server. Real brokers, real PostgreSQL, a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud import refusals
from cloud.audit import Audit
from cloud.config import Settings
from cloud.lake import Lake
from cloud.roots import Roots
from edge_agent.contract.errors import UnavailableError
from tests.cloud.blocks import block_bytes
from tests.cloud.ingests import Device, broker, device, running, settings, wait_until
from tests.object_store import credentials_in_environment, object_store_server
from tests.postgres import Postgres, postgres

__all__ = ["broker", "device", "settings"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Postgres]:
    with postgres(tmp_path) as found:
        yield found


def refuse_one(device: Device, sequence: int) -> None:
    device.send(block_bytes(sequence, lane="atlantis"), "atlantis")


@pytest.mark.needs_postgres
def test_blocks_are_stored_and_receipted_while_the_metadata_database_is_away_and_refusals_are_written_later(
    settings: Settings, device: Device, server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "ALARM_S", 0.5)
    settings = replace(settings, metadata_url=server.url)
    with running(settings) as work:
        device.send(block_bytes(1))
        refuse_one(device, 1)
        device.wait_for(1)
        wait_until(lambda: Audit(server.url).counts() == {"wrong_region": 1})
        server.stop()
        refuse_one(device, 2)
        device.send(block_bytes(2))
        device.wait_for(2)
        wait_until(lambda: not work.status.audit_available)
        device.send(block_bytes(3))
        refuse_one(device, 3)
        device.wait_for(3)
        server.start()
        wait_until(lambda: Audit(server.url).counts() == {"wrong_region": 3})
        wait_until(lambda: work.status.audit_available)
    assert Audit(server.url).verify() is None and Lake(settings.lake).read("pump").num_rows == 9


@pytest.mark.needs_postgres
def test_an_ingest_starts_while_the_metadata_database_is_away(settings: Settings, device: Device, server: Postgres) -> None:
    server.stop()
    with running(replace(settings, metadata_url=server.url)):
        device.send(block_bytes(1))
        device.wait_for(1)
    with pytest.raises(UnavailableError):
        Audit(server.url).entries()
    server.start()


def test_blocks_wait_while_the_s3_server_is_away_and_are_stored_once(settings: Settings, device: Device, tmp_path: Path) -> None:
    with credentials_in_environment(), object_store_server(tmp_path / "s3") as store:
        settings = replace(settings, lake=Roots(store.root("lake")))
        with running(settings) as work:
            device.send(block_bytes(1))
            device.wait_for(1)
            store.kill()
            for sequence in (3, 2, 2):
                device.send(block_bytes(sequence))
            wait_until(lambda: not work.status.lake_available, timeout_s=90.0)
            while not device.receipts.empty():
                assert device.receipts.get().lanes[0].cumulative == 1
            store.start()
            device.wait_for(3, timeout_s=90.0)
        assert Lake(settings.lake).read("pump").num_rows == 9
