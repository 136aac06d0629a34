"""A new zone policy on the whole agent: swapped while readings flow, over a kill, and with a zone that is gone."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.contract.state import Desired, ZonesRef
from tests.brokers import nats_broker
from tests.edge_agent.gateway import Bench, reading, wait_for
from tests.edge_agent.tuf_repository import TufRepository

ZONES = json.loads((Path(__file__).parents[2] / "contracts/zones.geojson").read_text())


def document(**endpoints: list[str] | None) -> bytes:
    """The project's zones with other endpoints; None takes a zone out."""
    features: list[dict[str, Any]] = json.loads(json.dumps(ZONES["features"]))
    kept = [f for f in features if endpoints.get(f["properties"]["zone"], []) is not None]
    for feature in kept:
        feature["properties"]["endpoints"] = endpoints.get(feature["properties"]["zone"]) or feature["properties"]["endpoints"]
    return json.dumps({"type": "FeatureCollection", "features": kept}).encode()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with nats_broker(tmp_path / "sensors") as sensors, nats_broker(tmp_path / "eu") as eu:
        made = Bench(tmp_path, sensors, eu)
        yield made
        made.close()


def test_a_new_policy_is_in_force_between_two_batches_and_after_a_restart(bench: Bench, tmp_path: Path) -> None:
    repository = TufRepository(tmp_path / "repository")
    repository.start()
    (bench.path / "root.json").write_bytes(repository.root)
    bench.replace("[position]", f'[releases]\nurl = "{repository.url}"\nroot = "root.json"\n[position]')
    bench.start()
    first = bench.status()["policy"]
    bench.publish(reading(1))
    wait_for(lambda: len(bench.cloud.readings()) == 1, bench.log)

    # Europe may go to us only: this device has no such endpoint, so what comes now is held.
    held = repository.add_zones(document(europe=["us"]), 1)
    desire(bench, 1, held)
    assert first["version"] is None
    bench.publish(reading(2))
    bench.publish(reading(3))
    wait_for(lambda: bench.status()["lanes"]["europe"]["held"] == "not_allowed", bench.log)
    wait_for(lambda: bench.status()["lanes"]["europe"]["waiting"] >= 1, bench.log)
    assert len(bench.cloud.readings()) == 1

    # The policy outlives a kill, though agent.toml still names the first one.
    bench.kill(signal.SIGKILL)
    repository.stop()
    bench.start()
    assert bench.status()["policy"] == {"digest": held.sha256, "version": 1}
    bench.publish(reading(4))
    wait_for(lambda: bench.status()["buffer"]["readings_stored"] == 4, bench.log)
    assert len(bench.cloud.readings()) == 1

    # An older one is refused, a newer one lets them go: to where it allows, under the policy that they were sealed under.
    repository.start()
    open_again = repository.add_zones(document(), 2)
    desire(bench, 2, open_again)
    wait_for(lambda: len(bench.cloud.readings()) == 4, bench.log)
    policies = {h.policy for h in bench.cloud.headers.values()}
    assert policies == {first["digest"], held.sha256}
    wait_for(lambda: bench.cloud.reported["policy"] == open_again.sha256, bench.log)
    repository.stop()


def test_a_policy_without_the_zone_of_waiting_blocks_holds_them_and_says_so(bench: Bench, tmp_path: Path) -> None:
    repository = TufRepository(tmp_path / "repository")
    repository.start()
    (bench.path / "root.json").write_bytes(repository.root)
    bench.replace("[position]", f'[releases]\nurl = "{repository.url}"\nroot = "root.json"\n[position]')
    bench.cloud.answering = False
    bench.start()
    bench.publish(reading(1))
    wait_for(lambda: len(bench.cloud.readings()) == 1, bench.log)
    gone = repository.add_zones(document(europe=None), 1)
    desire(bench, 1, gone)
    wait_for(lambda: f"policy adopted digest={gone.sha256}" in bench.log() and "held=europe" in bench.log(), bench.log)
    wait_for(lambda: bench.status()["lanes"]["europe"]["held"] == "not_allowed", bench.log)
    assert bench.status()["zone"] == "nowhere"  # where the device stands is in no zone any more
    repository.stop()


def desire(bench: Bench, version: int, zones: ZonesRef) -> None:
    bench.cloud.desire(Desired(version=version, zones=zones))
    wait_for(lambda: bench.status()["policy"] == {"digest": zones.sha256, "version": zones.version}, bench.log)
