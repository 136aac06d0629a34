"""A zone policy on its way to the device: signed, never older, kept over restarts and damage, swapped between two batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from securesystemslib.signer import CryptoSigner

from edge_agent.contract.errors import Reason
from edge_agent.contract.state import BundleRef, Desired, Phase, ZonesRef
from edge_agent.core.fix import Position, Precision, Rules
from edge_agent.core.track import Track
from edge_agent.core.zones import Zones, parse_zones
from edge_agent.fence import Fence
from edge_agent.metrics import Metrics
from edge_agent.policy import PolicyStore
from edge_agent.policy_updates import PolicyUpdates
from edge_agent.releases import RefusedError, RepositoryConfig
from edge_agent.updater import Updater, UpdaterConfig
from tests.edge_agent import models
from tests.edge_agent.core.test_zones import policy, square
from tests.edge_agent.tuf_repository import TufRepository

WEST, EAST = [square(0, 0, 10, 10)], [square(10, 0, 20, 10)]
FIRST = policy(west=(WEST, ["eu"]), east=(EAST, ["us"]))
SECOND = policy(west=(WEST, ["us"]), east=(EAST, []))
THIRD = policy(west=(WEST, ["eu", "us"]))


class Device:
    """An updater with its policy store, and what it said."""

    def __init__(self, repository: TufRepository, folder: Path) -> None:
        self.repository, self.folder = repository, folder
        self.taken: list[Zones] = []
        self.told: list[dict[str, str]] = []
        self.version = 0
        self.start()

    def start(self) -> None:
        self.store = PolicyStore(self.folder / "policy")
        self.zones = self.store.load(parse_zones(FIRST))
        config = RepositoryConfig(self.repository.url, self.repository.root, silence_s_max=2.0, download_s_max=5.0)
        self.updater = Updater(
            UpdaterConfig(config, {"pump": "1.0.0"}, retry_s_min=0.05, retry_s_max=0.1),
            self.folder / "models",
            here=lambda: "west",
            on_activate=lambda activation: None,
            on_report=lambda state: None,
            policies=PolicyUpdates(self.store, self.taken.append, lambda event, **fields: self.told.append({"event": event, **fields})),
        )
        self.updater.start()

    def restart(self) -> None:
        self.updater.stop()
        assert self.updater.failure is None
        self.taken.clear()
        self.told.clear()
        self.start()

    def desire(self, zones: ZonesRef | None, bundle: BundleRef | None = None) -> None:
        self.version += 1
        self.updater.handle(Desired(version=self.version, bundle=bundle, zones=zones))

    def accepted(self, ref: ZonesRef) -> Zones:
        until(lambda: bool(self.taken) and self.taken[-1].digest == ref.sha256)
        assert self.store.ref == ref
        return self.taken[-1]

    def refused(self, ref: ZonesRef) -> str:
        """The policy is refused, and the one before goes on; the reason."""
        before, told = self.store.ref, len(self.told)
        self.desire(ref)
        until(lambda: len(self.told) > told)
        assert self.store.ref == before and all(z.digest != ref.sha256 for z in self.taken)
        return self.told[-1]["reason"]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    repository = TufRepository(tmp_path / "repository")
    repository.start()
    made = Device(repository, tmp_path / "device")
    yield made
    made.updater.stop()
    assert made.updater.failure is None
    repository.stop()


def test_a_signed_policy_is_taken_and_still_there_after_a_restart(device: Device) -> None:
    assert device.zones.digest == parse_zones(FIRST).digest
    ref = device.repository.add_zones(SECOND, 1)
    device.desire(ref)
    assert device.accepted(ref).endpoints("west") == ("us",)
    device.repository.stop()
    device.restart()
    assert device.zones.digest == ref.sha256 and device.zones.endpoints("east") == ()


def test_an_older_policy_is_stale_though_its_signature_is_good(device: Device) -> None:
    device.desire(newer := device.repository.add_zones(SECOND, 2))
    device.accepted(newer)
    assert device.refused(device.repository.add_zones(THIRD, 1)) == Reason.STALE
    device.restart()
    device.version = 2
    assert device.refused(device.repository.add_zones(THIRD, 1)) == Reason.STALE


def test_two_documents_under_one_version_are_not_both_believed(device: Device) -> None:
    device.desire(ref := device.repository.add_zones(SECOND, 2))
    device.accepted(ref)
    assert device.refused(device.repository.add_zones(THIRD, 2)) == Reason.TAMPERED


def test_a_policy_that_is_not_signed_is_refused(device: Device) -> None:
    ref = ZonesRef(target="zones/zones.geojson", version=1, sha256="0" * 64)
    assert device.refused(ref) == Reason.UNSIGNED
    signed = device.repository.add_zones(SECOND, 1)
    assert device.refused(msgspec.structs.replace(signed, version=9)) == Reason.TAMPERED
    assert device.refused(msgspec.structs.replace(signed, sha256="../../outside")) == Reason.TAMPERED
    second = device.repository.add_zones(THIRD, 2)
    device.repository.publish(signers={"targets": CryptoSigner.generate_ed25519()})
    assert device.refused(second) == Reason.UNSIGNED


def test_a_signed_document_that_is_no_policy_is_refused(device: Device) -> None:
    assert device.refused(device.repository.add_zones(b'{"type":"FeatureCollection","features":[]}', 1)) == Reason.MALFORMED


def test_a_policy_waits_for_a_repository_that_is_away(device: Device) -> None:
    ref = device.repository.add_zones(SECOND, 1)
    device.repository.stop()
    device.desire(ref)
    time.sleep(0.3)
    assert not device.taken and not device.told
    device.repository.start()
    device.accepted(ref)


@pytest.mark.parametrize("broken", ["document", "name", "name unreadable", "document missing"])
def test_a_damaged_policy_holds_everything_until_it_is_fetched_again(device: Device, broken: str) -> None:
    device.desire(ref := device.repository.add_zones(SECOND, 1))
    device.accepted(ref)
    device.updater.stop()
    folder = device.folder / "policy"
    if broken == "document":
        (folder / f"{ref.sha256}.geojson").write_bytes(SECOND[:-3])
    elif broken == "name":
        (folder / "policy.json").write_bytes(b"{")
    elif broken == "name unreadable":
        (folder / "policy.json").unlink()
        (folder / "policy.json").mkdir()
    else:
        (folder / f"{ref.sha256}.geojson").unlink()
    device.repository.stop()
    device.restart()
    assert device.zones.endpoints("west") == () and device.zones.endpoints("east") == ()
    device.repository.start()
    if broken == "name unreadable":
        (folder / "policy.json").rmdir()
    if broken.startswith("name"):  # which it was, the retained document says, at the next connection
        device.updater.handle(Desired(version=device.version, zones=ref))
    assert device.accepted(ref).endpoints("west") == ("us",)


def test_a_damaged_policy_that_is_the_one_of_the_installation_is_in_force_again_when_it_was_fetched(tmp_path: Path) -> None:
    ref = ZonesRef(target="zones/zones.geojson", version=1, sha256=parse_zones(FIRST).digest)
    PolicyStore(tmp_path).accept(ref, FIRST)
    PolicyStore(tmp_path).path(ref).write_bytes(FIRST[:-3])
    store = PolicyStore(tmp_path)
    fence = Fence(Track(store.load(parse_zones(FIRST)), Rules()), {}, Metrics(), lambda event, **fields: None)
    assert fence.endpoints("west") == ()
    fence.offer(store.accept(ref, FIRST))
    fence.swap(list)
    assert fence.endpoints("west") == ("eu",)


def test_a_new_policy_does_not_try_a_rejected_bundle_again(device: Device) -> None:
    good = device.repository.add(models.bundle(model_version="1"))
    bad = msgspec.structs.replace(good, sha256="0" * 64)
    device.desire(None, bad)
    until(lambda: device.updater.status().phase is Phase.REJECTED)
    requests = len(device.repository.requests)
    device.desire(ref := device.repository.add_zones(SECOND, 1), bad)
    device.accepted(ref)
    time.sleep(0.2)
    state = device.updater.status()
    assert (state.phase, state.desired_version) == (Phase.REJECTED, 2)
    assert not any(".bundle" in path for path in device.repository.requests[requests:])


def test_old_document_that_the_disk_does_not_let_go_holds_up_no_policy(device: Device) -> None:
    (device.folder / "policy" / "old.geojson").mkdir(parents=True)  # nothing that can be unlinked
    ref = device.repository.add_zones(SECOND, 1)
    device.desire(ref)
    assert device.accepted(ref).endpoints("west") == ("us",)


def test_the_store_refuses_what_the_name_does_not_say(tmp_path: Path) -> None:
    store = PolicyStore(tmp_path)
    with pytest.raises(RefusedError, match="does not hold"):
        store.accept(ZonesRef(target="zones/zones.geojson", version=1, sha256="0" * 64), SECOND)
    assert store.ref is None and store.load(parse_zones(FIRST)).digest == parse_zones(FIRST).digest


def test_a_policy_is_swapped_between_batches_and_lanes_without_an_endpoint_are_told() -> None:
    told: list[dict[str, str]] = []
    track = Track(parse_zones(FIRST), Rules())
    fence = Fence(track, {"pump": Precision.ZONE_ONLY}, Metrics(), lambda event, **fields: told.append({"event": event, **fields}))
    fence.take(Position(0, 5.0, 15.0), None)
    third = parse_zones(THIRD)
    fence.offer(parse_zones(SECOND))
    fence.offer(third)
    assert fence.endpoints("east") == ("us",)  # not before the batch is done
    fence.swap(lambda: ["east", "west", "nowhere"])
    assert fence.policy == third.digest and fence.endpoints("east") == () and fence.endpoints("west") == ("eu", "us")
    assert [e["event"] for e in told] == ["policy_adopted", "lane_held"] and told[1]["lane"] == "east"
    assert track.stamp(np.array([1], np.int64)).tolist() == ["nowhere"]  # the place is in no zone any more
    fence.swap(list)
    assert len(told) == 2


def test_refused_positions_are_told_once_in_a_while_and_counted() -> None:
    told: list[str] = []
    metrics = Metrics()
    fence = Fence(Track(parse_zones(FIRST), Rules()), {}, metrics, lambda event, **fields: told.append(fields["reason"]))
    for second in range(10):
        fix, refused = fence.take(Position(second, 95.0, 5.0), None)
        assert fix is None and refused is not None and refused[0] is Reason.OUT_OF_RANGE
    assert told == ["out_of_range"]
    assert metrics.registry.get_sample_value("fenceline_positions_refused_total", {"reason": "out_of_range"}) == 10


def test_a_policy_that_cannot_be_had_holds_no_bundle_up(device: Device) -> None:
    ref = device.repository.add_zones(SECOND, 1)
    device.repository.target_path(ref.target, ref.sha256).unlink()
    bundle = device.repository.add(models.bundle())
    device.desire(ref, bundle)
    until(lambda: device.updater.status().active == bundle)
    assert not device.taken and not device.told


def test_a_policy_that_was_withdrawn_before_it_could_be_fetched_is_not_taken_later(device: Device) -> None:
    device.desire(first := device.repository.add_zones(SECOND, 1))
    device.accepted(first)
    second = device.repository.add_zones(THIRD, 2)
    path = device.repository.target_path(second.target, second.sha256)
    document = path.read_bytes()
    path.unlink()
    device.desire(second)
    until(lambda: sum(second.sha256 in request for request in device.repository.requests) > 1)
    device.desire(first)
    until(lambda: device.updater.status().desired_version == device.version)
    path.write_bytes(document)
    time.sleep(0.5)
    assert device.store.ref == first and [z.digest for z in device.taken] == [first.sha256]
