"""Golden vectors: readings with the features and scores that they must give, wherever a bundle is to run.

The features must be equal in every bit: they are made by the same code. The scores may differ by the tolerance: runtimes
and processors round differently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_agent.contract.bundle import Golden, Manifest
from edge_agent.contract.columns import Floats, Ints, Strings, Table, take
from edge_agent.contract.errors import BundleError, ContractError
from edge_agent.core.features import Windows
from edge_agent.core.functions import NO_FUNCTIONS, Functions


def check_golden(manifest: Manifest, score: Callable[[Floats], Floats], functions: Functions = NO_FUNCTIONS) -> None:
    """Check that this machine gives the golden vectors; `score` runs the bundle's model on features (rows, features).

    `functions` are those of the user's own that are installed here.

    Raises:
        BundleError: it does not; the message names the first window that differs.
    """
    features = _features(manifest, functions)
    _check_scores(manifest.golden, score(features))


def golden_readings(golden: Golden) -> tuple[Strings, Ints, Table]:
    """The readings of golden vectors, ready for `Windows.push`."""
    fields: Table = {name: np.array([np.nan if v is None else v for v in column]) for name, column in golden.fields.items()}
    return Strings.of(golden.entity), np.array(golden.event_us, np.int64), fields


def _features(manifest: Manifest, functions: Functions) -> Floats:
    entity, event_us, table = golden_readings(manifest.golden)
    want = np.array([[np.nan if v is None else v for v in row] for row in manifest.golden.features])
    try:
        features = Windows(manifest.features, functions).push(entity, event_us, table).features
        _check_features(manifest, features, want, "golden")
        if manifest.features.functions:
            windows, rows = Windows(manifest.features, functions), [slice(i, i + 1) for i in range(len(event_us))]
            alone = [windows.push(entity[row], event_us[row], take(table, row)).features for row in rows]
            _check_features(manifest, np.concatenate(alone), features, "one reading at a time, golden")
    except ContractError as e:
        raise BundleError(f"self-test: {e}") from e
    return features


def _check_features(manifest: Manifest, features: Floats, want: Floats, words: str) -> None:
    """Functions of the user's own are tried one reading at a time too: one that looks beyond its window gives other bits then."""
    if len(features) != len(want):
        raise BundleError(f"self-test: {len(features)} {words} windows; want {len(want)}")
    equal = (features.view(np.int64) == want.view(np.int64)) | (np.isnan(features) & np.isnan(want))
    if not equal.all():
        row, column = np.argwhere(~equal)[0]
        name = manifest.features.names[column]
        raise BundleError(f"self-test: feature {name} of {words} window {row} is {features[row, column]!r}; want {want[row, column]!r}")


def _check_scores(golden: Golden, scores: Floats) -> None:
    off = np.abs(scores - np.array(golden.scores))
    if not (off <= golden.tolerance).all():  # a golden NaN fails here too
        row = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
        raise BundleError(f"self-test: score of golden window {row} is {scores[row]}; want {golden.scores[row]} within {golden.tolerance}")
