"""Bundles: what a device needs to run one model, in one signed file.

A bundle is a zip of exactly two members: `manifest.json` and `model.onnx`. The model takes one float32 input of shape
(rows, features) and gives one float32 output of shape (rows, 1) or (rows,). The manifest says how the
features are made, what the answers should look like, and where all of it came from.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from edge_agent.contract.errors import UNREADABLE, BundleError
from edge_agent.contract.feature_spec import FORMAT_MAX, FeatureSpec, WindowKind, check_spec

BUNDLE_BYTES_MAX = 256 * 1024 * 1024
MANIFEST_BYTES_MAX = 8 * 1024 * 1024
MEMORY_MB_MAX = 1024 * 1024
SCORE_TIMEOUT_S_MAX = 3_600.0
_INT64 = range(-(2**63), 2**63)
# What zipfile raises for bytes that are no zip: it was not made for hostile ones.
_NO_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, ValueError, KeyError, OverflowError, EOFError, OSError, RuntimeError)


class Golden(msgspec.Struct, frozen=True, kw_only=True):
    """Readings in the order seen, with the features and scores that they must give; None stands for NaN.

    One row of features and one score per reading; with windows that close, per window, in the order in which they close.
    The features must be equal in every bit, the scores within `tolerance`.
    """

    entity: list[str]
    event_us: list[int]
    fields: dict[str, list[float | None]]
    features: list[list[float | None]]
    scores: list[float]
    tolerance: float = 1e-4


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where a model came from: MLflow run, code, pipeline and data versions."""

    run_id: str
    git_commit: str = ""
    dvc_lock_sha256: str = ""
    lake_version: dict[str, int] = {}


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the model worker may use; past a limit it is ended and the bundle rolled back.

    `memory_mb`: 1 to MEMORY_MB_MAX, above the bare runtime; `score_timeout_s`: above 0, at most SCORE_TIMEOUT_S_MAX.
    """

    memory_mb: int = 512
    score_timeout_s: float = 2.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a model but its weights.

    Scores outside [score_min, score_max] count as bad; `probation_rows` scored readings after activation must hold none (0: there is no
    probation). An empty `zones` allows all. `format` is at least that of `features`, so that a device that would misread them refuses.
    """

    model: str
    model_version: str
    stream: str
    contract_version: str
    features: FeatureSpec
    golden: Golden
    provenance: Provenance
    score_min: float
    score_max: float
    probation_rows: int = 20
    zones: list[str] = []
    limits: Limits = Limits()
    format: int = 1


@dataclass(frozen=True)
class Bundle:
    """A manifest and the bytes of an ONNX model."""

    manifest: Manifest
    model: bytes


def pack_bundle(bundle: Bundle) -> bytes:
    """The bundle as a file; equal bundles give equal bytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in (("manifest.json", msgspec.json.encode(bundle.manifest)), ("model.onnx", bundle.model)):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def read_bundle(data: bytes) -> Bundle:
    """Read a bundle file.

    Raises:
        BundleError: it is not one, passes a limit, or its manifest does not hold together.
    """
    if len(data) > BUNDLE_BYTES_MAX:
        raise BundleError(f"bundle of {len(data)} bytes; at most {BUNDLE_BYTES_MAX}")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            sizes = {m.filename: m.file_size for m in members}
            if sorted(m.filename for m in members) != ["manifest.json", "model.onnx"]:
                raise BundleError(f"bundle holds {sorted(m.filename for m in members)}; want exactly manifest.json and model.onnx")
            if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
                raise BundleError("bundle members must be stored or deflated")
            if sizes["manifest.json"] > MANIFEST_BYTES_MAX or sizes["model.onnx"] > BUNDLE_BYTES_MAX:
                raise BundleError(f"bundle members of {sizes} bytes; at most {MANIFEST_BYTES_MAX} and {BUNDLE_BYTES_MAX}")
            manifest = msgspec.json.decode(archive.read("manifest.json"), type=Manifest)
            model = archive.read("model.onnx")
    except (*UNREADABLE, *_NO_ZIP) as e:
        raise BundleError(f"bundle does not read: {e}") from e
    check_manifest(manifest)
    return Bundle(manifest, model)


def check_manifest(manifest: Manifest) -> None:
    """Raise BundleError unless the manifest is within limits and agrees with itself."""
    spec, limits = manifest.features, manifest.limits
    if not 1 <= manifest.format <= FORMAT_MAX:
        raise BundleError(f"manifest format {manifest.format}; this version reads formats 1 to {FORMAT_MAX}")
    check_spec(spec)
    if manifest.format < spec.format:
        raise BundleError(f"manifest format {manifest.format} has no such features; they need format {spec.format}")
    if not manifest.score_min < manifest.score_max:
        raise BundleError(f"score_min {manifest.score_min} is not below score_max {manifest.score_max}")
    if not 1 <= limits.memory_mb <= MEMORY_MB_MAX or not 0 < limits.score_timeout_s <= SCORE_TIMEOUT_S_MAX or manifest.probation_rows < 0:
        raise BundleError(
            f"memory_mb {limits.memory_mb}, score_timeout_s {limits.score_timeout_s}, probation_rows {manifest.probation_rows}; "
            f"want 1 to {MEMORY_MB_MAX}, above 0 and at most {SCORE_TIMEOUT_S_MAX:g}, 0 or more"
        )
    _check_golden(spec, manifest.golden)


def _check_golden(spec: FeatureSpec, golden: Golden) -> None:
    rows, made = len(golden.entity), len(golden.scores)
    columns: list[Sequence[object]] = [golden.event_us, *golden.fields.values()]
    if (
        not 0 < made <= (rows if spec.kind is WindowKind.TRAILING else rows * spec.overlap)
        or (made != rows and spec.kind is WindowKind.TRAILING)
        or any(len(c) != rows for c in columns)
        or len(golden.features) != made
        or any(len(f) != len(spec.features) for f in golden.features)
    ):
        raise BundleError("golden vectors are empty or of unequal length")
    if any(t not in _INT64 for t in golden.event_us):
        raise BundleError("golden vectors have event times beyond 64 bits")
    missing = sorted({f.field for f in spec.features} - set(golden.fields))
    if missing:
        raise BundleError(f"golden vectors lack the fields {missing}")
