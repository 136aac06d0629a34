"""Releases: a registered model version becomes a signed bundle that devices may fetch.

- A release is a TUF target `bundles/<model>/<model version>.bundle`, stored under its hash (consistent snapshots).
- It must pass the same golden self-test here that it will have to pass on the device.
- A model version is released once. Releasing it again gives the same reference; other bytes under that version are refused.
- Files are written whole, the timestamp last: a reader sees the repository before or after a release, never between.
  A release that was cut off leaves files that no published metadata names.
- One writer at a time (a lock file), so `release` and `refresh` may run in different processes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp  # type: ignore[attr-defined]

from cloud.files import held, write_atomically
from cloud.keys import (
    INIT_COMMAND,
    LIFETIME,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    key_path,
    load_signer,
    signed_bytes,
)
from cloud.tracking_server import errors_told, public
from edge_agent.contract.bundle import Bundle, Manifest, pack_bundle, read_bundle
from edge_agent.contract.columns import Floats
from edge_agent.contract.errors import BundleError, ConfigError, UnavailableError
from edge_agent.contract.state import BundleRef, ZonesRef
from edge_agent.contract.topics import check_name
from edge_agent.core.functions import NO_FUNCTIONS, Functions
from edge_agent.core.golden import check_golden
from edge_agent.core.settings import nearest

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

ARTIFACT_DIR = "bundle"
ZONES_TARGET = "zones/zones.geojson"
SERVED = "mlflow-artifacts:"
"""How the place of a run's files begins that only the MLflow server gives out."""
SHA256_TAG = "release.sha256"
REFRESH_SHARE = 0.5
"""Metadata is signed again when less than this share of its lifetime is left."""
CONNECT_TIMEOUT_S = 5.0
MODELS_MAX = 1_000

Progress = Callable[[str], None]


def release(
    model: str,
    alias_or_version: str,
    *,
    mlflow_url: str,
    keys_dir: Path,
    releases_dir: Path,
    now: datetime,
    progress: Progress = lambda step: None,
    functions: Functions = NO_FUNCTIONS,
) -> BundleRef:
    """Publish a registered model version to the fleet's release server.

    Args:
        alias_or_version: an alias such as `champion`, or a version number.
        mlflow_url: the tracking and registry server (or `sqlite:///…`).
        progress: is told each step in a few words.
        functions: those of the user's own that features may be made with here.

    Raises:
        ConfigError: there is no such model, alias, version or key; the message names the known ones.
        BundleError: the logged bundle does not read, or fails its self-test.
        UnavailableError: MLflow does not answer, or refuses.
    """
    progress(f"looking up {model}@{alias_or_version}")
    with errors_told(mlflow_url):
        client = _client(mlflow_url)
        version = _find_version(client, model, alias_or_version)
    progress(f"downloading version {version.version}")
    bundle = _download(client, version, mlflow_url)
    ref = publish(bundle, keys_dir=keys_dir, releases_dir=releases_dir, now=now, progress=progress, functions=functions)
    with errors_told(mlflow_url):
        client.set_model_version_tag(model, version.version, SHA256_TAG, ref.sha256)
    return ref


def publish(
    bundle: Bundle,
    *,
    keys_dir: Path,
    releases_dir: Path,
    now: datetime,
    progress: Progress = lambda step: None,
    functions: Functions = NO_FUNCTIONS,
) -> BundleRef:
    """Test, pack and sign a bundle, and add it to the repository.

    Raises:
        BundleError: it fails its self-test, or its model version was released with other content.
        ConfigError: there are no keys.
    """
    manifest = bundle.manifest
    target = f"bundles/{check_name(manifest.model, 'model')}/{check_name(manifest.model_version, 'model version')}.bundle"
    packed = pack_bundle(bundle)
    bundle = read_bundle(packed)  # as the device will read it
    progress("running the golden self-test")
    _self_test(bundle, functions)
    with _writing(releases_dir) as repository:
        known = repository.targets.targets.get(target)
        if known is not None:
            return _same_again(target, known, bundle, releases_dir)
        progress("signing")
        file = TargetFile.from_data(target, packed)
        _add(repository, file, packed, keys_dir=keys_dir, releases_dir=releases_dir, now=now)
    ref = _ref(target, file)
    log.info("release published target=%s sha256=%s", ref.target, ref.sha256)
    return ref


def publish_zones(document: bytes, *, keys_dir: Path, releases_dir: Path, now: datetime) -> ZonesRef:
    """Sign a zone policy under the next version and add it to the repository; the newest one again gives the same reference.

    Raises:
        ConfigError: there are no keys.
    """
    with _writing(releases_dir) as repository:
        known = repository.targets.targets.get(ZONES_TARGET)
        if known is not None and known.hashes["sha256"] == hashlib.sha256(document).hexdigest():
            return _zones_ref(known)
        file = TargetFile.from_data(ZONES_TARGET, document)
        file.unrecognized_fields["custom"] = {"version": 1 if known is None else _zones_ref(known).version + 1}
        _add(repository, file, document, keys_dir=keys_dir, releases_dir=releases_dir, now=now)
    return _zones_ref(file)


def _add(repository: _Repository, file: TargetFile, data: bytes, *, keys_dir: Path, releases_dir: Path, now: datetime) -> None:
    """Write a target, then the metadata that names it."""
    signer = repository.signer(keys_dir, TARGETS)
    for path in file.get_prefixed_paths():
        (releases_dir / "targets" / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(releases_dir / "targets" / path, data)
    repository.targets.targets[file.path] = file
    repository.renew(TARGETS, now, signer)
    repository.publish_snapshot(keys_dir, now)


def released(releases_dir: Path) -> list[BundleRef]:
    """Every release, by model and rising version.

    Raises:
        ConfigError: there is no repository.
    """
    targets = _Repository(releases_dir / "metadata").targets.targets
    refs = [_ref(path, file) for path, file in targets.items() if path.startswith("bundles/")]
    return sorted(refs, key=lambda r: (r.model, len(r.model_version), r.model_version))


def find(releases_dir: Path, model: str, model_version: str | None = None) -> BundleRef:
    """The release of `model` with that version, or its newest one.

    Raises:
        ConfigError: it was not released; the message names what was.
    """
    refs = released(releases_dir)
    of_model = [r for r in refs if r.model == model]
    if not of_model:
        hint = nearest(model, {r.model for r in refs}) if refs else ""
        raise ConfigError(f"no release of model {model!r}{hint}; release one with: fenceline release {model}@champion")
    if model_version is None:
        return of_model[-1]
    for ref in of_model:
        if ref.model_version == model_version:
            return ref
    raise ConfigError(f"version {model_version} of {model!r} is not released; released: {', '.join(r.model_version for r in of_model)}")


def refresh(*, keys_dir: Path, releases_dir: Path, now: datetime) -> list[str]:
    """Sign again what has passed half of its lifetime, so that devices never see expired metadata. Call it daily.

    The root is included only where its key is: it may be kept offline.

    Returns:
        The roles that were signed again.
    """
    with _writing(releases_dir) as repository:
        due = [role for role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP) if repository.expires_soon(role, now)]
        if ROOT in due and not key_path(keys_dir, ROOT).exists():
            log.warning("root metadata expires soon expires=%s: bring %s back", repository.root.expires, key_path(keys_dir, ROOT))
            due.remove(ROOT)
        for role in (ROOT, TARGETS):
            if role in due:
                repository.renew(role, now, repository.signer(keys_dir, role))
        if TARGETS in due or SNAPSHOT in due:
            repository.publish_snapshot(keys_dir, now)
            due = [*(r for r in due if r in (ROOT, TARGETS)), SNAPSHOT, TIMESTAMP]
        elif TIMESTAMP in due:
            repository.renew(TIMESTAMP, now, repository.signer(keys_dir, TIMESTAMP))
    if due:
        log.info("release metadata signed again roles=%s", ",".join(due))
    return due


class _Repository:
    """The newest published metadata, found by way of the timestamp as a client finds it."""

    def __init__(self, metadata_dir: Path) -> None:
        self._dir = metadata_dir
        if not (metadata_dir / "timestamp.json").exists():
            raise ConfigError(f"no release repository at {metadata_dir.parent}; make it with: {INIT_COMMAND}")
        self.timestamp: Timestamp = self._read("timestamp.json")
        self.snapshot: Snapshot = self._read(f"{self.timestamp.snapshot_meta.version}.snapshot.json")
        self.targets: Targets = self._read(f"{self.snapshot.meta['targets.json'].version}.targets.json")
        newest_root = max(int(path.name.split(".")[0]) for path in metadata_dir.glob("*.root.json"))
        self.root: Root = self._read(f"{newest_root}.root.json")

    def expires_soon(self, role: str, now: datetime) -> bool:
        left: timedelta = self._document(role).expires - now
        return left < LIFETIME[role] * REFRESH_SHARE

    def signer(self, keys_dir: Path, role: str) -> CryptoSigner:
        """The signer of `role`, or ConfigError: its key is not there, or is not the one that devices trust for it."""
        signer = load_signer(keys_dir, role)
        trusted = [self.root.keys[keyid].keyval for keyid in self.root.roles[role].keyids]
        if signer.public_key.keyval not in trusted:
            raise ConfigError(f"{key_path(keys_dir, role)} is not the {role} key of this repository, so devices would refuse what it signs")
        return signer

    def renew(self, role: str, now: datetime, signer: Any) -> None:
        """Write the role's document as a new version that expires a full lifetime from now."""
        document = self._document(role)
        document.version += 1
        document.expires = now.replace(microsecond=0) + LIFETIME[role]
        name = "timestamp.json" if role == TIMESTAMP else f"{document.version}.{role}.json"
        write_atomically(self._dir / name, signed_bytes(document, signer))

    def publish_snapshot(self, keys_dir: Path, now: datetime) -> None:
        """Make the current targets visible: a new snapshot, then a new timestamp."""
        snapshot_signer, timestamp_signer = self.signer(keys_dir, SNAPSHOT), self.signer(keys_dir, TIMESTAMP)
        self.snapshot.meta["targets.json"].version = self.targets.version
        self.renew(SNAPSHOT, now, snapshot_signer)
        self.timestamp.snapshot_meta.version = self.snapshot.version
        self.renew(TIMESTAMP, now, timestamp_signer)

    def _document(self, role: str) -> Any:
        return {ROOT: self.root, TARGETS: self.targets, SNAPSHOT: self.snapshot, TIMESTAMP: self.timestamp}[role]

    def _read(self, name: str) -> Any:
        metadata: Metadata[Any] = Metadata.from_file(str(self._dir / name))
        return metadata.signed


@contextmanager
def _writing(releases_dir: Path) -> Iterator[_Repository]:
    """The repository, held by this writer alone."""
    metadata_dir = releases_dir / "metadata"
    if not metadata_dir.exists():
        raise ConfigError(f"no release repository at {releases_dir}; make it with: {INIT_COMMAND}")
    with held(releases_dir / ".lock"):
        yield _Repository(metadata_dir)


def _zones_ref(file: TargetFile) -> ZonesRef:
    return ZonesRef(target=ZONES_TARGET, version=int(file.custom["version"]), sha256=file.hashes["sha256"])


def _ref(target: str, file: TargetFile) -> BundleRef:
    _, model, name = target.split("/")
    return BundleRef(target=target, model=model, model_version=name.removesuffix(".bundle"), sha256=file.hashes["sha256"])


def _same_again(target: str, known: TargetFile, bundle: Bundle, releases_dir: Path) -> BundleRef:
    stored = (releases_dir / "targets" / next(iter(known.get_prefixed_paths()))).read_bytes()
    if hashlib.sha256(stored).hexdigest() != known.hashes["sha256"] or read_bundle(stored) != bundle:
        raise BundleError(f"{target} was released with other content (sha256 {known.hashes['sha256']}); register a new model version")
    return _ref(target, known)


def _self_test(bundle: Bundle, functions: Functions) -> None:
    """Check the golden vectors here before anything is signed; the device checks them again there."""
    check_golden(bundle.manifest, lambda features: _score(bundle.model, features), functions)


def _score(model: bytes, features: Floats) -> Floats:
    """What a model says of features (rows, features), as the device's worker takes it: one input, float32 scores, one for each row."""
    from onnxruntime import InferenceSession

    try:
        session = InferenceSession(model, providers=["CPUExecutionProvider"])
        inputs, outputs = session.get_inputs(), session.get_outputs()
        scores = session.run([outputs[0].name], {inputs[0].name: features.astype("float32")})[0]
    except Exception as e:  # its errors have no base of their own
        raise BundleError(f"self-test: model.onnx does not run: {e}") from e
    rows = len(features)
    if len(inputs) != 1 or scores.shape not in ((rows,), (rows, 1)) or scores.dtype != "float32":
        found = f"{len(inputs)} inputs, {scores.dtype} scores of shape {scores.shape}"
        raise BundleError(f"self-test: model.onnx has {found}; want one input, float32 scores of ({rows},) or ({rows}, 1)")
    return scores.reshape(-1)


def _client(mlflow_url: str) -> MlflowClient:
    if mlflow_url.startswith("http"):
        try:  # MLflow itself would retry for minutes
            httpx.get(f"{mlflow_url}/health", timeout=CONNECT_TIMEOUT_S)
        except httpx.TransportError as e:
            raise UnavailableError(f"MLflow at {public(mlflow_url)} does not answer: {e}; start it with: fenceline up") from e
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=mlflow_url, registry_uri=mlflow_url)


def _find_version(client: MlflowClient, model: str, alias_or_version: str) -> ModelVersion:
    models = {m.name: m for m in client.search_registered_models(max_results=MODELS_MAX)}
    if model not in models:
        hint = nearest(model, models) if models else "; none yet, train one with: fenceline train"
        raise ConfigError(f"no registered model {model!r}{hint}")
    wanted = alias_or_version
    if not wanted.isdecimal():
        aliases: dict[str, Any] = models[model].aliases
        if wanted not in aliases:
            known = ", ".join(sorted(aliases)) or "none"
            raise ConfigError(f"model {model!r} has no alias {wanted!r}; aliases: {known} (or give a version number)")
        wanted = str(aliases[wanted])
    versions = {str(v.version): v for v in client.search_model_versions(f"name = '{model}'")}
    if wanted not in versions:
        raise ConfigError(f"model {model!r} has no version {wanted}; versions: {', '.join(sorted(versions, key=int))}")
    return versions[wanted]


def _download(client: MlflowClient, version: ModelVersion, mlflow_url: str) -> Bundle:
    """The bundle's two parts as the pipeline's run logged them, with the model version filled in."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # `progress` tells the steps
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    origin = f"run {version.run_id} of {version.name} version {version.version}"
    with tempfile.TemporaryDirectory() as temporary:
        try:
            served = version.run_id and client.get_run(version.run_id).info.artifact_uri.startswith(SERVED)
            if served and not mlflow_url.startswith("http"):
                raise UnavailableError(f"{origin} has its files at the stack's MLflow, which does not run; start it with: fenceline up")
            parts = {"run_id": version.run_id, "artifact_path": ARTIFACT_DIR}
            folder = Path(download_artifacts(**parts, dst_path=temporary, tracking_uri=mlflow_url))
            manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
            onnx = (folder / "model.onnx").read_bytes()
        except (MlflowException, OSError, msgspec.MsgspecError) as e:
            files = f"{ARTIFACT_DIR}/manifest.json and {ARTIFACT_DIR}/model.onnx"
            raise BundleError(f"{origin} has no usable {files}: {public(str(e))}") from e
    if manifest.model != version.name:
        raise BundleError(f"run {version.run_id} made a bundle for model {manifest.model!r}, not {version.name!r}")
    return Bundle(msgspec.structs.replace(manifest, model_version=str(version.version)), onnx)
