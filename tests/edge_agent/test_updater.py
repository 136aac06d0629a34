"""The updater against a real TUF repository over HTTP, with real self-tests."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner

from edge_agent import releases, updater
from edge_agent.contract.bundle import Limits
from edge_agent.contract.errors import ConfigError, Reason, UnavailableError
from edge_agent.contract.state import BundleRef, Desired, Phase
from edge_agent.inference import WorkerError
from edge_agent.releases import RefusedError, Repository, RepositoryConfig
from edge_agent.updater import Activation, Updater, UpdaterConfig, UpdaterState
from tests.certificates import Authority, Identity
from tests.edge_agent import models
from tests.edge_agent.tuf_repository import TufRepository


class Device:
    """An updater and what it said."""

    def __init__(self, repository: TufRepository, store: Path) -> None:
        self.repository, self.store = repository, store
        self.lane = "europe"
        self.activations: list[Activation | None] = []
        self.reports: list[UpdaterState] = []
        self.bad_models: set[str] = set()
        self.may_load = threading.Event()
        self.may_load.set()
        self.updater = self.make()

    def make(self) -> Updater:
        config = UpdaterConfig(
            RepositoryConfig(self.repository.url, self.repository.root, silence_s_max=2.0, download_s_max=5.0),
            {"pump": "1.0.0"},
            retry_s_min=0.05,
            retry_s_max=0.2,
        )
        return Updater(config, self.store, here=lambda: self.lane, on_activate=self._activate, on_report=self.reports.append)

    def _activate(self, activation: Activation | None) -> None:
        self.activations.append(activation)
        self.may_load.wait(60.0)
        if activation is not None and activation.sha256 in self.bad_models:
            raise WorkerError(Reason.WORKER_DIED, "no memory left")

    def restart(self) -> None:
        self.updater.stop()
        assert self.updater.failure is None
        self.activations.clear()
        self.reports.clear()
        self.updater = self.make()
        self.updater.start()

    def desire(self, version: int, bundle: BundleRef | None, phase: Phase) -> UpdaterState:
        """Hand over a desired document and wait for what becomes of it."""
        self.updater.handle(Desired(version=version, bundle=bundle))
        return self.until(version, phase)

    def until(self, version: int, phase: Phase) -> UpdaterState:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            state = self.updater.status()
            if (state.desired_version, state.phase) == (version, phase):
                return state
            time.sleep(0.01)
        raise AssertionError(f"not {phase} at {version}, but {self.updater.status()}")

    def rejected(self, version: int, bundle: BundleRef) -> UpdaterState:
        """The bundle is refused, and the one before it goes on."""
        before = self.updater.status()
        state = self.desire(version, bundle, Phase.REJECTED)
        assert (state.active, state.previous) == (before.active, before.previous)
        assert [a for a in self.activations if a is not None and a.ref == bundle] == []
        return state


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[TufRepository]:
    made = TufRepository(tmp_path / "repository")
    made.start()
    yield made
    made.stop()


@pytest.fixture
def device(repository: TufRepository, tmp_path: Path) -> Iterator[Device]:
    made = Device(repository, tmp_path / "store")
    made.updater.start()
    yield made
    made.updater.stop()
    assert made.updater.failure is None


def bundle_of(version: int, **changes: Any) -> Any:
    return models.bundle(weights=(float(version), 1.0), model_version=str(version), **changes)


def test_signed_bundle_is_activated_on_probation_and_confirmed(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    state = device.desire(1, ref, Phase.PROBATION)
    assert (state.active, state.previous, state.wanted) == (ref, None, None)
    activation = device.activations[-1]
    assert activation is not None
    assert activation.bundle.manifest.model_version == "1"
    assert activation.on_probation
    device.updater.confirm("another")
    device.updater.confirm(ref.sha256)
    device.until(1, Phase.ACTIVE)
    assert [r.phase for r in device.reports] == [Phase.IDLE, Phase.FETCHING, Phase.PROBATION, Phase.ACTIVE]


def test_flipped_byte_is_rejected_and_the_active_bundle_goes_on(device: Device) -> None:
    good = device.repository.add(bundle_of(1))
    device.desire(1, good, Phase.PROBATION)
    bad = device.repository.add(bundle_of(2))
    path = device.repository.target_path(bad.target, bad.sha256)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert device.rejected(2, bad).reason is Reason.TAMPERED


def test_flipped_byte_in_metadata_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    path = device.repository.path / "metadata" / f"{device.repository.targets.version}.targets.json"
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 3', 1).replace(ref.sha256.encode(), b"0" * 64))
    assert device.rejected(1, ref).reason in (Reason.TAMPERED, Reason.UNSIGNED)


def test_metadata_that_is_no_json_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    (device.repository.path / "metadata" / "timestamp.json").write_bytes(b"{nonsense")
    assert device.rejected(1, ref).reason is Reason.TAMPERED


def test_bundle_that_is_not_in_the_signed_list_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    del device.repository.targets.targets[ref.target]
    device.repository.publish()
    assert device.rejected(1, ref).reason is Reason.UNSIGNED


def test_metadata_signed_by_another_key_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    device.repository.publish(signers={"targets": CryptoSigner.generate_ed25519()})
    assert device.rejected(1, ref).reason is Reason.UNSIGNED


def test_desired_digest_other_than_the_signed_one_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    assert device.rejected(1, msgspec.structs.replace(ref, sha256="0" * 64)).reason is Reason.TAMPERED


def test_digest_that_is_a_path_is_rejected_before_any_file_is_touched(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    assert device.rejected(1, msgspec.structs.replace(ref, sha256="../../outside")).reason is Reason.TAMPERED
    assert device.repository.requests == []


def test_expired_timestamp_is_rejected_as_stale(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    device.repository.timestamp.expires = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
    device.repository.publish()
    assert device.rejected(1, ref).reason is Reason.STALE


def test_repository_that_goes_back_in_time_is_rejected_as_stale(device: Device) -> None:
    old = device.repository.timestamp.version
    first = device.repository.add(bundle_of(1))
    device.desire(1, first, Phase.PROBATION)
    second = device.repository.add(bundle_of(2))
    device.repository.timestamp.version = old
    device.repository.publish(versions=False)
    assert device.rejected(2, second).reason is Reason.STALE


def test_lower_desired_version_is_refused_and_the_same_one_changes_nothing(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    device.desire(5, ref, Phase.PROBATION)
    count = len(device.reports)
    device.updater.handle(Desired(version=4, bundle=None))
    device.updater.handle(Desired(version=5, bundle=None))
    time.sleep(0.2)
    assert (device.updater.status().active, len(device.reports)) == (ref, count)
    device.restart()
    device.updater.handle(Desired(version=4, bundle=None))
    time.sleep(0.2)
    assert device.updater.status().active == ref


def test_repository_that_is_down_is_asked_again_while_the_active_bundle_goes_on(device: Device) -> None:
    first = device.repository.add(bundle_of(1))
    device.desire(1, first, Phase.PROBATION)
    second = device.repository.add(bundle_of(2))
    device.repository.stop()
    state = device.desire(2, second, Phase.RETRYING)
    assert (state.active, state.wanted) == (first, second)
    device.restart()
    activation = device.activations[0]
    assert activation is not None
    assert activation.ref == first
    device.repository.start()
    assert device.until(2, Phase.PROBATION).active == second


def test_failed_self_test_is_rejected_and_not_tried_again(device: Device) -> None:
    ref = device.repository.add(bundle_of(1, golden=models.golden((1.0, 1.5))))
    state = device.rejected(1, ref)
    assert state.reason is Reason.SELF_TEST
    assert "score of golden window" in state.detail
    asked = len(device.repository.requests)
    device.restart()
    device.updater.handle(Desired(version=1, bundle=ref))
    time.sleep(0.3)
    assert (device.updater.status().phase, len(device.repository.requests)) == (Phase.REJECTED, asked)
    assert list((device.store / "bundles").iterdir()) == []


def test_signed_file_that_is_no_bundle_is_rejected(device: Device) -> None:
    sha256 = device.repository.add_bytes("bundles/x/1.bundle", b"not a zip")
    state = device.rejected(1, BundleRef(target="bundles/x/1.bundle", model="x", model_version="1", sha256=sha256))
    assert state.reason is Reason.SELF_TEST


@pytest.mark.parametrize(
    "changes",
    [{"stream": "turbofan"}, {"contract_version": "2.0.0"}, {"zones": ["canada", "united-states"]}],
    ids=["stream", "contract", "zone"],
)
def test_bundle_for_another_stream_contract_or_zone_is_rejected_as_foreign(device: Device, changes: dict[str, Any]) -> None:
    assert device.rejected(1, device.repository.add(bundle_of(1, **changes))).reason is Reason.FOREIGN


def test_bundle_must_be_allowed_in_every_zone_that_the_device_may_be_in(device: Device) -> None:
    ref = device.repository.add(bundle_of(1, zones=["europe"]))
    device.lane = "europe_switzerland"
    assert device.rejected(1, ref).reason is Reason.FOREIGN
    device.lane = "europe"
    device.desire(2, ref, Phase.PROBATION)


def test_bundle_of_another_model_than_desired_is_rejected_as_foreign(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    assert device.rejected(1, msgspec.structs.replace(ref, model_version="9")).reason is Reason.FOREIGN


def test_rollback_activates_the_previous_bundle_without_the_network(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.updater.confirm(first.sha256)
    device.desire(2, second, Phase.PROBATION)
    device.repository.stop()
    device.updater.rollback(first.sha256, Reason.PROBATION, "an old message")
    device.updater.rollback(second.sha256, Reason.PROBATION, "score 9999")
    state = device.until(2, Phase.ROLLED_BACK)
    assert (state.active, state.previous, state.reason, state.detail) == (first, None, Reason.PROBATION, "score 9999")
    assert device.activations[-1] is not None
    assert device.activations[-1].ref == first
    device.restart()
    assert device.activations[0] is not None
    assert device.activations[0].ref == first
    device.updater.rollback(first.sha256, Reason.BAD_SCORES, "worse")
    while device.updater.status().active is not None:
        time.sleep(0.01)
    assert device.activations[-1] is None


def test_old_bundle_that_the_disk_does_not_let_go_ends_nothing(device: Device) -> None:
    (device.store / "bundles" / "lost+found").mkdir(parents=True)  # nothing that can be unlinked
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.desire(2, second, Phase.PROBATION)
    device.updater.rollback(second.sha256, Reason.BAD_SCORES, "score 9999")
    assert device.until(2, Phase.ROLLED_BACK).active == first
    assert device.updater.alive


def test_model_that_does_not_start_is_rejected(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.bad_models.add(second.sha256)
    state = device.desire(2, second, Phase.REJECTED)
    assert (state.active, state.reason) == (first, Reason.WORKER_DIED)


def test_model_that_does_not_start_any_more_gives_way_to_the_previous_one_then_to_none(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.desire(2, second, Phase.PROBATION)
    device.bad_models.add(second.sha256)
    device.restart()
    assert (device.updater.status().active, device.updater.status().phase) == (first, Phase.ROLLED_BACK)
    device.bad_models.add(first.sha256)
    device.restart()
    assert (device.updater.status().active, device.activations[-1]) == (None, None)


def test_restart_resumes_the_active_bundle_and_its_phase(device: Device) -> None:
    ref = device.repository.add(bundle_of(1))
    device.desire(3, ref, Phase.PROBATION)
    device.repository.stop()
    device.restart()
    assert (device.updater.status().phase, device.activations[0] and device.activations[0].on_probation) == (Phase.PROBATION, True)
    device.updater.confirm(ref.sha256)
    device.until(3, Phase.ACTIVE)
    device.restart()
    assert (device.updater.status().phase, device.activations[0] and device.activations[0].on_probation) == (Phase.ACTIVE, False)


def test_damaged_bundle_file_is_not_activated_at_a_restart(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.desire(2, second, Phase.PROBATION)
    path = device.store / "bundles" / f"{second.sha256}.bundle"
    path.write_bytes(path.read_bytes()[:-1])
    device.restart()
    state = device.updater.status()
    assert (state.active, state.phase, state.reason) == (first, Phase.ROLLED_BACK, Reason.TAMPERED)


def test_damaged_state_file_is_moved_aside(device: Device) -> None:
    device.desire(1, device.repository.add(bundle_of(1)), Phase.PROBATION)
    device.updater.stop()
    (device.store / "state.json").write_bytes(b"{")
    device.restart()
    assert device.updater.status() == UpdaterState()
    assert (device.store / "state.damaged").exists()


def test_state_file_that_the_disk_does_not_give_back_ends_nothing(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(5, first, Phase.PROBATION)
    device.updater.stop()
    (device.store / "state.json").unlink()
    (device.store / "state.json").mkdir()  # it can be neither read nor replaced
    device.restart()
    assert device.updater.status() == UpdaterState()
    assert device.desire(6, second, Phase.PROBATION).active == second
    (device.store / "state.json").rmdir()
    device.updater.confirm(second.sha256)
    device.until(6, Phase.ACTIVE)
    device.restart()
    assert (device.updater.status().desired_version, device.updater.status().active) == (6, second)


def test_model_that_hangs_while_it_loads_does_not_hold_the_start(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updater, "RESUME_S", 0.2)
    ref = device.repository.add(bundle_of(1))
    device.desire(1, ref, Phase.PROBATION)
    device.may_load.clear()
    device.bad_models.add(ref.sha256)
    began = time.monotonic()
    device.restart()
    assert time.monotonic() - began < 10.0
    assert device.updater.alive
    device.may_load.set()
    state = device.until(1, Phase.ROLLED_BACK)
    assert (state.active, state.reason) == (None, Reason.WORKER_DIED)


def test_bundle_with_impossible_limits_is_rejected(device: Device) -> None:
    ref = device.repository.add(bundle_of(1, limits=Limits(memory_mb=-1)))
    assert "memory_mb -1" in device.rejected(1, ref).detail


def test_bundle_without_probation_is_active_at_once(device: Device) -> None:
    ref = device.repository.add(bundle_of(1, probation_rows=0))
    assert device.desire(1, ref, Phase.ACTIVE).active == ref
    assert [a and a.on_probation for a in device.activations] == [False]


def test_desired_state_without_bundle_ends_the_model(device: Device) -> None:
    device.desire(1, device.repository.add(bundle_of(1)), Phase.PROBATION)
    state = device.desire(2, None, Phase.IDLE)
    assert (state.active, device.activations[-1]) == (None, None)


def test_undo_to_the_previous_bundle_downloads_nothing_again(device: Device) -> None:
    first, second = device.repository.add(bundle_of(1)), device.repository.add(bundle_of(2))
    device.desire(1, first, Phase.PROBATION)
    device.desire(2, second, Phase.PROBATION)
    device.repository.requests.clear()
    device.desire(3, first, Phase.PROBATION)
    assert [r for r in device.repository.requests if "/targets/" in r] == []
    assert sorted(p.name for p in (device.store / "bundles").iterdir()) == sorted(f"{r.sha256}.bundle" for r in (first, second))


def test_new_desired_state_replaces_one_that_cannot_be_fetched(device: Device) -> None:
    missing = BundleRef(target="bundles/x/1.bundle", model="x", model_version="1", sha256="1" * 64)
    good = device.repository.add(bundle_of(1))
    device.repository.stop()
    device.desire(1, missing, Phase.RETRYING)
    device.repository.start()
    device.updater.handle(Desired(version=2, bundle=good))
    assert device.until(2, Phase.PROBATION).active == good


@pytest.mark.parametrize("url", ["http://example.org", "ftp://127.0.0.1", "http://10.0.0.1:80", "releases"])
def test_plain_http_beyond_loopback_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="https"):
        RepositoryConfig(url, b"")


@pytest.mark.parametrize("url", ["https://", "https://[::1", "https://host:port", "https://host:0"])
def test_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"releases\.url"):
        RepositoryConfig(url, b"")


def test_authorities_that_do_not_load_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"releases\.ca_file .*missing\.pem does not load"):
        RepositoryConfig("https://host", b"", tmp_path / "missing.pem")
    (tmp_path / "empty.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"releases\.ca_file .*empty\.pem does not load"):
        RepositoryConfig("https://host", b"", tmp_path / "empty.pem")


def fetch(repository: TufRepository, path: Path, ref: BundleRef, **limits: Any) -> bytes:
    return Repository(RepositoryConfig(repository.url, repository.root, **limits), path / "cache").fetch(ref, path / "out")


def test_download_that_breaks_off_is_tried_again_not_rejected(repository: TufRepository, tmp_path: Path) -> None:
    ref = repository.add(bundle_of(1))

    class Breaks(SimpleHTTPRequestHandler):
        def __init__(self, *values: Any) -> None:
            super().__init__(*values, directory=str(repository.path))

        def do_GET(self) -> None:
            if "/targets/" not in self.path:
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            return None

        def log_message(self, format: str, *values: Any) -> None: ...

    repository.stop()
    repository.start(Breaks)
    with pytest.raises(UnavailableError, match="broke off"):
        fetch(repository, tmp_path, ref)


def test_answer_that_breaks_off_in_its_head_is_tried_again_not_rejected(tmp_path: Path) -> None:
    made = TufRepository(tmp_path / "repository")
    ref = made.add(bundle_of(1))
    with socket.create_server(("127.0.0.1", 0)) as server:
        made.port = server.getsockname()[1]

        def answer() -> None:
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 200 OK\r\nServer: x\r\nContent-Le")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UnavailableError, match="does not say where it ends"):
            fetch(made, tmp_path, ref)


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-",
    ],
    ids=["body", "head", "size of a chunk", "trailer"],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_server_that_drips_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, head: bytes) -> None:
    monkeypatch.setattr(releases, "HEAD_S_MAX", 0.5)
    made, identity = TufRepository(tmp_path / "repository"), Authority(tmp_path / "tls").issue("releases", address="127.0.0.1")
    ref = made.add(bundle_of(1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = _with_tls(listening, identity) if scheme == "https" else listening
        config = RepositoryConfig(
            f"{scheme}://127.0.0.1:{server.getsockname()[1]}", made.root, identity.ca, silence_s_max=1.0, download_s_max=0.5
        )
        threading.Thread(target=_drip, args=(server, head), daemon=True).start()
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            Repository(config, tmp_path / "cache").fetch(ref, tmp_path / "out")
        assert time.monotonic() - began < 4.0


def _with_tls(listening: socket.socket, identity: Identity) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    return context.wrap_socket(listening, server_side=True)


def _drip(server: socket.socket, head: bytes) -> None:
    peer, _ = server.accept()
    peer.recv(4096)
    peer.sendall(head)
    for _ in range(100):
        try:
            peer.sendall(b"{")
        except OSError:
            return
        time.sleep(0.1)


def test_bundle_above_the_limit_is_refused_before_its_download(repository: TufRepository, tmp_path: Path) -> None:
    ref = repository.add(bundle_of(1))
    with pytest.raises(RefusedError) as caught:
        fetch(repository, tmp_path, ref, bundle_bytes_max=100)
    assert caught.value.reason is Reason.OVERSIZE
    assert [r for r in repository.requests if "/targets/" in r] == []


def test_redirect_is_not_followed(repository: TufRepository, tmp_path: Path) -> None:
    ref = repository.add(bundle_of(1))

    class Redirects(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()

        def log_message(self, format: str, *values: Any) -> None: ...

    repository.stop()
    repository.start(Redirects)
    with pytest.raises(UnavailableError, match="302"):
        fetch(repository, tmp_path, ref)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_full_disk_holds_nothing_up_and_the_state_is_stored_later(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = device.repository.add(bundle_of(1))
    monkeypatch.setattr("edge_agent.updater.SAVE_RETRY_S", 0.1)
    (device.store / "state.part").mkdir(parents=True)  # the state file cannot be written
    device.desire(1, ref, Phase.PROBATION)
    assert device.activations[-1] is not None
    assert not (device.store / "state.json").exists()
    (device.store / "state.part").rmdir()
    wait_for((device.store / "state.json").exists)
