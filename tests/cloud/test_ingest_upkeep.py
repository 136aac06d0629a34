"""What keeps a region's ingest at work: upkeep of the lake in its turn; workers that share, are started again and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cloud import brokers, cli, ingest, intake
from cloud.config import IngestLimits, Settings
from cloud.ingest_status import read_status, read_worker, status_path
from cloud.intake import Received
from cloud.quarantine import CheckedLake
from cloud.workers import ONE, Pool, Worker, command, end_unused
from edge_agent.contract.errors import UnavailableError
from edge_agent.contract.topics import DeviceTopics
from tests.brokers import Broker, User, mosquitto_broker
from tests.cloud.blocks import block_bytes
from tests.cloud.ingests import SECRET, Device, broker, device, rows, running, settings, wait_until

__all__ = ["broker", "device", "settings"]


def test_an_idle_ingest_rests_between_upkeep(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_up: list[int] = []
    monkeypatch.setattr(CheckedLake, "compact", lambda self, files_max: kept_up.append(files_max))
    with running(settings):
        kept_up.clear()
        time.sleep(4 * ingest.IDLE_S)
        assert 1 <= len(kept_up) <= 5


def test_upkeep_has_its_turn_however_busy_the_lake_is(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "UPKEEP_S", 0.2)
    work, done = ingest.build(settings, "eu"), list[int]()
    monkeypatch.setattr(work, "_upkeep", lambda: done.append(work.status.blocks))
    for sequence in range(1, 400):
        work.intake.queue.put(Received("fenceline/v1/d1/up/europe/pump", block_bytes(sequence), 1, sequence, False))
    work.limits = IngestLimits(batch_blocks_max=4)
    thread = threading.Thread(target=work.run)
    thread.start()
    try:
        wait_until(lambda: work.status.blocks >= 399)
    finally:
        work.stop = True
        thread.join()
    assert [blocks for blocks in done if 0 < blocks < 380], f"only before or after all of it: {done}"


def test_on_a_broker_without_shared_subscriptions_each_device_has_its_worker(settings: Settings, broker: Broker, device: Device) -> None:
    region = settings.region("eu")
    workers = [Worker(number, 3) for number in (1, 2, 3)]
    names = [f"gw-{i}" for i in range(60)]
    kept = {name: [w.number for w in workers if w.kept(region)(DeviceTopics(name).up("europe", "pump"))] for name in names}
    assert all(len(owners) == 1 for owners in kept.values()) and {owners[0] for owners in kept.values()} == {1, 2, 3}
    assert sum(w.kept(region)("no/device") for w in workers) == sum(w.kept(region)("odd") for w in workers) == 1

    with running(settings, workers[0]) as first, running(settings, workers[1]) as second, running(settings, workers[2]) as third:
        for sequence in (1, 2, 3):
            device.send(block_bytes(sequence))
        device.wait_for(3)
        wait_until(lambda: sorted(w.status.blocks for w in (first, second, third)) == [0, 0, 3])
        assert read_status(settings, "eu") is not None
    assert len(rows(settings)) == 9


@pytest.mark.needs_mosquitto
def test_what_a_worker_would_have_got_goes_to_the_others_once_its_session_is_ended(settings: Settings, tmp_path: Path) -> None:
    with mosquitto_broker(tmp_path, [User("cloud", SECRET), User("d1", "p")]) as shared:
        region = replace(settings.region("eu"), port=shared.port, shared_subscriptions=True)
        settings = replace(settings, regions=(region,))
        device = Device(shared)
        with running(settings, Worker(1, 2)), running(settings, Worker(2, 2)):
            pass  # both sessions are there, and status files
        device.send(block_bytes(1))
        device.send(block_bytes(2))
        with running(settings, ONE):
            wait_until(lambda: len(rows(settings)) == 3)  # the other block waits for a worker that never comes
        end_unused(settings, region, ONE)
        assert [path.name for path in settings.run_dir.glob("ingest-eu*")] == ["ingest-eu.ingest-1.json"]
        with running(settings, ONE):
            for sequence in (1, 2, 3):
                device.send(block_bytes(sequence))
            device.wait_for(3)
        device.client.disconnect()
        device.client.loop_stop()
    assert len(rows(settings)) == 9


def test_a_session_that_the_broker_refuses_to_end_is_tried_again_at_the_next_start(
    settings: Settings, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FORGET_S", 1.0)
    unused = status_path(settings, "eu", "ingest-2")
    unused.parent.mkdir(parents=True, exist_ok=True)
    unused.write_text("{}")
    password = brokers.password_path(settings, brokers.CLOUD_USER)
    password.write_text("of yesterday")
    end_unused(settings, settings.region("eu"), ONE)
    assert unused.exists()
    with pytest.raises(UnavailableError, match="refused"):
        intake.forget(settings.region("eu"), "ingest-2", brokers.CLOUD_USER, "of yesterday")
    password.write_text(SECRET)
    end_unused(settings, settings.region("eu"), ONE)
    assert not unused.exists()


def test_a_pool_starts_its_workers_again_and_ends_them(settings: Settings, device: Device) -> None:
    stop = threading.Event()
    commands = [command(settings, "eu", Worker(number, 2)) for number in (1, 2)]
    pool = threading.Thread(target=Pool(commands, stop).run)
    pool.start()
    try:
        files = [status_path(settings, "eu", f"ingest-{number}") for number in (1, 2)]
        wait_until(lambda: all((status := read_worker(path)) is not None and status.connected for path in files), 60.0)
        before = [status.pid for path in files if (status := read_worker(path)) is not None]
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: (status := read_worker(files[0])) is not None and status.pid != before[0] and status.connected, 60.0)
        device.send(block_bytes(1))
        device.wait_for(1)
    finally:
        stop.set()
        pool.join()
    assert not Path(f"/proc/{before[1]}").exists()


def test_a_mistake_that_every_worker_would_end_with_is_said_once(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    (settings.project / "pump.yaml").write_text("not: a contract")
    assert cli.main(["--project", str(settings.project), "ingest", "--region", "eu", "--workers", "2"]) == 2
    assert "pump.yaml" in capsys.readouterr().err
