"""Releases: keys and metadata on disk, fetched by TUF's own client over HTTP, and from a real MLflow registry."""

from __future__ import annotations

import dataclasses
import functools
import http.server
import json
import stat
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tuf.api.exceptions import RepositoryError
from tuf.ngclient import Updater

from cloud import files, keys
from cloud.release import SHA256_TAG, find, publish, refresh, release, released
from edge_agent.contract.bundle import Bundle, read_bundle
from edge_agent.contract.errors import BundleError, ConfigError, UnavailableError
from edge_agent.contract.state import BundleRef
from tests.edge_agent.models import bundle as a_bundle
from tests.servers import free_port

NOW = datetime.now(UTC)


class House:
    """Keys and releases of one test."""

    def __init__(self, root: Path) -> None:
        self.keys_dir, self.releases_dir = root / "keys", root / "releases"

    def init(self, now: datetime = NOW) -> Path:
        return keys.init(self.keys_dir, self.releases_dir, now)

    def publish(self, bundle: Bundle, now: datetime = NOW) -> BundleRef:
        return publish(bundle, keys_dir=self.keys_dir, releases_dir=self.releases_dir, now=now)

    def refresh(self, now: datetime) -> list[str]:
        return refresh(keys_dir=self.keys_dir, releases_dir=self.releases_dir, now=now)

    def files(self) -> dict[str, bytes]:
        return {str(p.relative_to(self.releases_dir)): p.read_bytes() for p in self.releases_dir.rglob("*") if p.is_file()}


class Device:
    """A TUF client with its own store, and the root that it was given."""

    def __init__(self, url: str, store: Path, root: bytes) -> None:
        self.url, self.store, self.root = url, store, root
        (store / "metadata").mkdir(parents=True)
        (store / "targets").mkdir()

    def fetch(self, target: str) -> bytes:
        updater = Updater(
            str(self.store / "metadata"), f"{self.url}/metadata/", str(self.store / "targets"), f"{self.url}/targets/", bootstrap=self.root
        )
        updater.refresh()
        info = updater.get_targetinfo(target)
        assert info is not None, f"{target} is not in the repository"
        return Path(updater.download_target(info)).read_bytes()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """The tests' output is for the tests."""


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


@pytest.fixture
def device(house: House, tmp_path: Path) -> Iterator[Device]:
    root = house.init().read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(house.releases_dir))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Device(f"http://127.0.0.1:{server.server_port}", tmp_path / "device", root)
        server.shutdown()
        thread.join()


def version(number: str, **changes: object) -> Bundle:
    return a_bundle(model="turbofan-rul", model_version=number, **changes)


def in_float64(model: bytes) -> bytes:
    """The same model with a cast behind it: its scores are equal, of a type that the device's worker refuses."""
    import onnx

    loaded = onnx.load_model_from_string(model)
    output = loaded.graph.output[0]
    loaded.graph.node.append(onnx.helper.make_node("Cast", [output.name], ["wide"], to=onnx.TensorProto.DOUBLE))
    shape = [d.dim_value or d.dim_param or None for d in output.type.tensor_type.shape.dim]
    del loaded.graph.output[:]
    loaded.graph.output.append(onnx.helper.make_tensor_value_info("wide", onnx.TensorProto.DOUBLE, shape))
    return loaded.SerializeToString()


# --- keys ---


def test_keys_are_private_and_never_overwritten(house: House) -> None:
    root = house.init()
    assert root == keys.root_path(house.releases_dir)
    assert keys.is_initialised(house.keys_dir, house.releases_dir)
    assert stat.S_IMODE(house.keys_dir.stat().st_mode) == 0o700
    before = {p.name: p.read_bytes() for p in house.keys_dir.iterdir()}
    assert set(before) == {f"{role}.pem" for role in keys.ROLES}
    assert {stat.S_IMODE(p.stat().st_mode) for p in house.keys_dir.iterdir()} == {0o600}
    with pytest.raises(ConfigError, match="never overwritten"):
        house.init()
    assert {p.name: p.read_bytes() for p in house.keys_dir.iterdir()} == before


def test_one_key_left_over_stops_init_before_anything_is_made(house: House) -> None:
    house.keys_dir.mkdir()
    (house.keys_dir / "snapshot.pem").write_text("old")
    with pytest.raises(ConfigError, match=r"snapshot\.pem exists"):
        house.init()
    assert not house.releases_dir.exists()
    assert [p.name for p in house.keys_dir.iterdir()] == ["snapshot.pem"]


def test_each_role_has_its_own_key_and_lifetime(house: House) -> None:
    root = json.loads(house.init().read_bytes())["signed"]
    keyids = [tuple(role["keyids"]) for role in root["roles"].values()]
    assert len(set(keyids)) == 4
    assert root["consistent_snapshot"] is True
    for name, days in (("1.root", 365), ("1.targets", 90), ("1.snapshot", 90), ("timestamp", 7)):
        signed = json.loads((house.releases_dir / "metadata" / f"{name}.json").read_bytes())["signed"]
        left = datetime.fromisoformat(signed["expires"]) - NOW
        assert timedelta(days=days, seconds=-1) <= left <= timedelta(days=days), name


@pytest.mark.parametrize("missing", ["targets", "snapshot", "timestamp"])
def test_release_without_a_key_names_the_command_and_changes_nothing_visible(house: House, missing: str) -> None:
    house.init()
    (house.keys_dir / f"{missing}.pem").unlink()
    before = (house.releases_dir / "metadata/timestamp.json").read_bytes()
    with pytest.raises(ConfigError, match="fenceline keys init"):
        house.publish(version("1"))
    assert (house.releases_dir / "metadata/timestamp.json").read_bytes() == before


@pytest.mark.parametrize("role", ["targets", "snapshot", "timestamp"])
def test_key_of_another_house_signs_nothing(house: House, tmp_path: Path, role: str) -> None:
    house.init()
    other = House(tmp_path / "other")
    other.init()
    (house.keys_dir / f"{role}.pem").write_bytes((other.keys_dir / f"{role}.pem").read_bytes())
    before = (house.releases_dir / "metadata/timestamp.json").read_bytes()
    with pytest.raises(ConfigError, match=rf"{role}\.pem is not the {role} key of this repository"):
        house.publish(version("1"))
    assert (house.releases_dir / "metadata/timestamp.json").read_bytes() == before


def test_release_before_init_names_the_command(house: House) -> None:
    with pytest.raises(ConfigError, match="fenceline keys init"):
        house.publish(version("1"))
    with pytest.raises(ConfigError, match="fenceline keys init"):
        released(house.releases_dir)


# --- publishing ---


def test_device_fetches_exactly_what_was_released(house: House, device: Device) -> None:
    ref = house.publish(version("1"))
    assert (ref.target, ref.model, ref.model_version) == ("bundles/turbofan-rul/1.bundle", "turbofan-rul", "1")
    data = device.fetch(ref.target)
    assert read_bundle(data) == version("1")
    second = house.publish(version("2"))
    assert read_bundle(device.fetch(second.target)).manifest.model_version == "2"
    assert device.fetch(ref.target) == data, "older releases stay, for devices that go back"


def test_same_version_again_gives_the_same_reference_and_signs_nothing(house: House) -> None:
    house.init()
    ref = house.publish(version("1"))
    before = house.files()
    assert house.publish(version("1")) == ref
    assert house.files() == before


def test_same_version_with_other_content_is_refused(house: House) -> None:
    house.init()
    house.publish(version("1"))
    before = house.files()
    with pytest.raises(BundleError, match="released with other content"):
        house.publish(version("1", probation_rows=99))
    assert house.files() == before


def test_bundle_that_fails_its_self_test_is_not_released(house: House) -> None:
    house.init()
    before = house.files()
    golden = version("1").manifest.golden
    with pytest.raises(BundleError, match="self-test"):
        house.publish(version("1", golden=msgspec.structs.replace(golden, scores=[s + 1 for s in golden.scores])))
    assert house.files() == before


def test_model_that_devices_could_not_run_is_not_released(house: House) -> None:
    house.init()
    with pytest.raises(BundleError, match=r"model\.onnx does not run"):
        house.publish(dataclasses.replace(version("1"), model=b"no model"))
    with pytest.raises(BundleError, match=r"float64 scores of shape .* want one input, float32 scores"):
        house.publish(dataclasses.replace(version("1"), model=in_float64(version("1").model)))
    assert released(house.releases_dir) == []


def test_release_cut_off_before_the_timestamp_is_invisible_and_made_good_by_the_next(
    house: House, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = house.publish(version("1"))
    whole = files.write_atomically

    def power_cut(path: Path, data: bytes) -> None:
        if path.name == "timestamp.json":
            raise OSError("power cut")
        whole(path, data)

    monkeypatch.setattr("cloud.release.write_atomically", power_cut)
    with pytest.raises(OSError, match="power cut"):
        house.publish(version("2"))
    monkeypatch.undo()
    assert released(house.releases_dir) == [first]
    device.fetch(first.target)
    with pytest.raises(AssertionError, match="not in the repository"):
        device.fetch("bundles/turbofan-rul/2.bundle")
    ref = house.publish(version("2"))
    assert read_bundle(device.fetch(ref.target)) == version("2")


def test_flipped_byte_on_the_server_is_refused_by_the_device(house: House, device: Device) -> None:
    ref = house.publish(version("1"))
    (stored,) = (house.releases_dir / "targets/bundles/turbofan-rul").iterdir()
    data = bytearray(stored.read_bytes())
    data[len(data) // 2] ^= 1
    stored.write_bytes(data)
    with pytest.raises(RepositoryError):
        device.fetch(ref.target)


def test_metadata_of_another_house_is_refused_by_the_device(house: House, device: Device, tmp_path: Path) -> None:
    house.publish(version("1"))
    stranger = House(tmp_path / "stranger")
    stranger.init()
    stranger.publish(version("1"))
    for path in (stranger.releases_dir / "metadata").glob("[!1]*"):
        (house.releases_dir / "metadata" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(RepositoryError):
        device.fetch("bundles/turbofan-rul/1.bundle")


def test_releases_are_found_by_version_or_as_the_newest(house: House) -> None:
    house.init()
    refs = {n: house.publish(version(n)) for n in ("2", "10", "9")}
    assert released(house.releases_dir) == [refs["2"], refs["9"], refs["10"]]
    assert find(house.releases_dir, "turbofan-rul") == refs["10"]
    assert find(house.releases_dir, "turbofan-rul", "9") == refs["9"]
    with pytest.raises(ConfigError, match=r"version 3 .* released: 2, 9, 10"):
        find(house.releases_dir, "turbofan-rul", "3")
    with pytest.raises(ConfigError, match="did you mean 'turbofan-rul'"):
        find(house.releases_dir, "turbofan")


# --- refresh ---


@pytest.mark.parametrize(
    ("days", "roles"),
    [
        (1, []),
        (4, ["timestamp"]),
        (50, ["targets", "snapshot", "timestamp"]),
        (200, ["root", "targets", "snapshot", "timestamp"]),
    ],
)
def test_metadata_is_signed_again_at_half_of_its_lifetime(house: House, days: int, roles: list[str]) -> None:
    house.init()
    ref = house.publish(version("1"))
    assert house.refresh(NOW + timedelta(days=days)) == roles
    assert house.refresh(NOW + timedelta(days=days)) == []
    assert released(house.releases_dir) == [ref]


def test_device_follows_a_repository_that_was_asleep_for_long(house: House, tmp_path: Path, device: Device) -> None:
    past = House(tmp_path / "past")
    root = past.init(NOW - timedelta(days=300))
    ref = past.publish(version("1"), NOW - timedelta(days=300))
    for path in (past.releases_dir).rglob("*"):  # put it where the server looks
        if path.is_file():
            served = house.releases_dir / path.relative_to(past.releases_dir)
            served.parent.mkdir(parents=True, exist_ok=True)
            served.write_bytes(path.read_bytes())
    device.root = root.read_bytes()
    with pytest.raises(RepositoryError, match="expired"):
        device.fetch(ref.target)
    house.keys_dir = past.keys_dir
    assert house.refresh(NOW) == ["root", "targets", "snapshot", "timestamp"]
    assert read_bundle(device.fetch(ref.target)) == version("1")


def test_root_key_may_be_offline(house: House) -> None:
    house.init()
    (house.keys_dir / "root.pem").unlink()
    assert house.refresh(NOW + timedelta(days=200)) == ["targets", "snapshot", "timestamp"]
    assert not (house.releases_dir / "metadata/2.root.json").exists()


# --- from the registry ---


def test_registered_model_version_becomes_a_release(house: House, device: Device, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    url = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(tracking_uri=url, registry_uri=url)
    experiment = client.create_experiment("turbofan", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment)
    logged = tmp_path / "bundle"
    logged.mkdir()
    bundle = version("")
    (logged / "manifest.json").write_bytes(msgspec.json.encode(bundle.manifest))
    (logged / "model.onnx").write_bytes(bundle.model)
    client.log_artifacts(run.info.run_id, str(logged), "bundle")
    client.create_registered_model("turbofan-rul")
    registered = client.create_model_version("turbofan-rul", f"{run.info.artifact_uri}/model", run.info.run_id)
    client.set_registered_model_alias("turbofan-rul", "champion", registered.version)
    steps: list[str] = []

    def released_as(which: str, model: str = "turbofan-rul") -> BundleRef:
        return release(
            model,
            which,
            mlflow_url=url,
            keys_dir=house.keys_dir,
            releases_dir=house.releases_dir,
            now=NOW,
            progress=steps.append,
        )

    ref = released_as("champion")
    assert ref == released_as("1")
    assert steps[:3] == ["looking up turbofan-rul@champion", "downloading version 1", "running the golden self-test"]
    assert read_bundle(device.fetch(ref.target)) == version("1")
    assert client.get_model_version("turbofan-rul", "1").tags == {SHA256_TAG: ref.sha256}

    with pytest.raises(ConfigError, match="no alias 'champ'; aliases: champion"):
        released_as("champ")
    with pytest.raises(ConfigError, match="no version 7; versions: 1"):
        released_as("7")
    with pytest.raises(ConfigError, match="did you mean 'turbofan-rul'"):
        released_as("champion", "turbofan-rull")
    empty = client.create_model_version("turbofan-rul", "file:///nowhere", client.create_run(experiment).info.run_id)
    with pytest.raises(BundleError, match=r"no usable bundle/manifest\.json"):
        released_as(str(empty.version))
    with_a_server = client.create_run(client.create_experiment("served", artifact_location="mlflow-artifacts:/2"))
    served = client.create_model_version("turbofan-rul", "mlflow-artifacts:/2/model", with_a_server.info.run_id)
    with pytest.raises(UnavailableError, match="at the stack's MLflow, which does not run; start it with: fenceline up"):
        released_as(str(served.version))


@pytest.mark.parametrize("url", ["http://ml:s3cret@127.0.0.1:{port}", "sqlite:///{folder}/damaged.db", "nowhere://ml:s3cret@127.0.0.1/db"])
def test_mlflow_that_does_not_answer_or_refuses_is_said_at_once_without_its_password(house: House, tmp_path: Path, url: str) -> None:
    house.init()
    (tmp_path / "damaged.db").write_bytes(b"no database" * 1_000)
    with pytest.raises(UnavailableError, match="fenceline up") as raised:
        release(
            "m",
            "champion",
            mlflow_url=url.format(port=free_port(), folder=tmp_path),
            keys_dir=house.keys_dir,
            releases_dir=house.releases_dir,
            now=NOW,
        )
    assert "s3cret" not in str(raised.value) and "\n" not in str(raised.value)
