"""Bundles: equal content gives equal bytes, damage of any kind is a BundleError."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.contract.bundle import (
    MANIFEST_BYTES_MAX,
    Bundle,
    Golden,
    Limits,
    Manifest,
    Provenance,
    check_manifest,
    pack_bundle,
    read_bundle,
)
from edge_agent.contract.errors import BundleError
from edge_agent.contract.feature_spec import FEATURES_MAX, WINDOW_ROWS_MAX, Feature, FeatureSpec

SPEC = FeatureSpec(features=[Feature("t", "mean"), Feature("t", "count")], window_rows=3, window_s=60.0)
GOLDEN = Golden(
    entity=["a", "a"], event_us=[0, 1], fields={"t": [1.5, None]}, features=[[1.5, 1.0], [1.5, 1.0]], scores=[2.0, 2.0], tolerance=1e-4
)
MANIFEST = Manifest(
    model="turbofan-rul",
    model_version="3",
    stream="turbofan",
    contract_version="1.0.0",
    features=SPEC,
    golden=GOLDEN,
    provenance=Provenance(run_id="r", git_commit="c", dvc_lock_sha256="d", lake_version={"europe": 4}),
    score_min=-1.0,
    score_max=200.0,
    zones=["europe"],
)
MANIFEST_JSON = (
    b'{"model":"turbofan-rul","model_version":"3","stream":"turbofan","contract_version":"1.0.0",'
    b'"features":{"features":[["t","mean"],["t","count"]],"window_rows":3,"window_s":60.0},'
    b'"golden":{"entity":["a","a"],"event_us":[0,1],"fields":{"t":[1.5,null]},"features":[[1.5,1.0],[1.5,1.0]],"scores":[2.0,2.0],'
    b'"tolerance":0.0001},"provenance":{"run_id":"r","git_commit":"c","dvc_lock_sha256":"d","lake_version":{"europe":4}},'
    b'"score_min":-1.0,"score_max":200.0,"probation_rows":20,"zones":["europe"],'
    b'"limits":{"memory_mb":512,"score_timeout_s":2.0},"format":1}'
)
BUNDLE = Bundle(MANIFEST, b"onnx bytes " * 20)


def with_features(**fields: Any) -> Manifest:
    return changed(features=msgspec.structs.replace(SPEC, **fields))


def with_golden(**fields: Any) -> Manifest:
    return changed(golden=msgspec.structs.replace(GOLDEN, **fields))


def changed(**fields: Any) -> Manifest:
    return msgspec.structs.replace(MANIFEST, **fields)


def zipped(**members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name.replace("_", "."), data)
    return out.getvalue()


def test_golden_manifest_is_written_and_read() -> None:
    assert msgspec.json.encode(MANIFEST) == MANIFEST_JSON
    assert read_bundle(zipped(manifest_json=MANIFEST_JSON, model_onnx=BUNDLE.model)) == BUNDLE


def test_equal_bundles_give_equal_bytes_and_come_back() -> None:
    packed = pack_bundle(BUNDLE)
    assert packed == pack_bundle(Bundle(msgspec.structs.replace(MANIFEST), BUNDLE.model))
    assert read_bundle(packed) == BUNDLE


def test_any_flipped_bit_is_refused_or_changes_nothing() -> None:
    """Zip has bytes that mean nothing (dates, attributes); the signature over the file covers those."""
    packed = pack_bundle(BUNDLE)
    refused = 0
    for place in range(len(packed)):
        for bit in (0, 3, 7):
            damaged = bytearray(packed)
            damaged[place] ^= 1 << bit
            try:
                assert read_bundle(bytes(damaged)) == BUNDLE
            except BundleError:
                refused += 1
    assert refused > len(packed)


@given(st.data())
def test_damaged_bundles_raise_nothing_but_bundle_errors(data: st.DataObject) -> None:
    damaged = bytearray(pack_bundle(BUNDLE))
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(damaged) - 1))
        damaged[start : start + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    check_reads_or_refuses(bytes(damaged))


@given(st.binary(max_size=300))
def test_foreign_bytes_raise_nothing_but_bundle_errors(data: bytes) -> None:
    check_reads_or_refuses(data)
    check_reads_or_refuses(zipped(manifest_json=data, model_onnx=data))


def check_reads_or_refuses(data: bytes) -> None:
    try:
        bundle = read_bundle(data)
    except BundleError:
        return
    check_manifest(bundle.manifest)


@pytest.mark.parametrize("manifest", [b'{"model":"\xff"}', b'{"later":' + b"[" * 50_000, b""])
def test_manifest_that_does_not_decode_is_refused(manifest: bytes) -> None:
    with pytest.raises(BundleError, match="does not read"):
        read_bundle(zipped(manifest_json=manifest, model_onnx=b""))


@pytest.mark.parametrize(
    "members", [{}, {"manifest_json": b""}, {"manifest_json": b"", "model_onnx": b"", "more": b""}, {"../model_onnx": b"", "x": b""}]
)
def test_bundle_holds_exactly_its_two_members(members: dict[str, bytes]) -> None:
    with pytest.raises(BundleError, match="want exactly"):
        read_bundle(zipped(**members))


def test_manifest_may_not_be_huge() -> None:
    with pytest.raises(BundleError, match="at most"):
        read_bundle(zipped(manifest_json=b" " * (MANIFEST_BYTES_MAX + 1), model_onnx=b""))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (changed(format=3), "format 3"),
        (changed(limits=Limits(memory_mb=0)), "memory_mb 0"),
        (changed(limits=Limits(memory_mb=-1)), "memory_mb -1"),
        (changed(limits=Limits(memory_mb=2**32)), "memory_mb 4294967296"),
        (changed(limits=Limits(score_timeout_s=0.0)), "score_timeout_s 0"),
        (changed(limits=Limits(score_timeout_s=1e300)), "at most 3600"),
        (changed(limits=Limits(score_timeout_s=float("nan"))), "score_timeout_s nan"),
        (changed(probation_rows=-1), "probation_rows -1"),
        (with_golden(event_us=[2**63] * len(GOLDEN.event_us)), "event times beyond 64 bits"),
        (with_features(features=[]), "0 features"),
        (with_features(features=[Feature("t", "mean")] * (FEATURES_MAX + 1)), "features"),
        (with_features(window_rows=0), "over 0 rows"),
        (with_features(window_rows=WINDOW_ROWS_MAX + 1), "rows"),
        (with_features(window_s=0.0), "positive time"),
        (with_features(window_s=float("nan")), "positive time"),
        (
            changed(features=msgspec.structs.replace(SPEC, features=[Feature("t", "mean"), Feature("t", "mode")])),
            r"unknown aggregates \['mode'",
        ),
        (with_features(features=[Feature("t", "mean"), Feature("u", "mean")]), r"lack the fields \['u'"),
        (changed(score_min=5.0, score_max=5.0), "not below"),
        (changed(score_min=float("nan")), "not below"),
        (with_golden(entity=[]), "empty or of unequal length"),
        (with_golden(scores=[1.0]), "unequal length"),
        (with_golden(features=[[1.0], [1.0]]), "unequal length"),
        (with_golden(fields={"t": [1.0]}), "unequal length"),
    ],
)
def test_manifest_that_does_not_hold_together_is_refused(manifest: Manifest, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        check_manifest(manifest)
