"""Golden vectors: readings with the features and scores that they must give, wherever a bundle is to run.

The features must be equal in every bit: they are made by the same code. The scores may differ by the tolerance: runtimes
and processors round differently.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_agent.contract.bundle import Golden, Manifest
from edge_agent.contract.columns import Floats, Ints, Strings, Table
from edge_agent.contract.errors import BundleError, ContractError
from edge_agent.core.features import Windows


def check_golden(manifest: Manifest, score: Callable[[Floats], Floats]) -> None:
    """Check that this machine gives the golden vectors; `score` runs the bundle's model on features (rows, features).

    Raises:
        BundleError: it does not; the message names the first reading that differs.
    """
    features = _features(manifest)
    _check_scores(manifest.golden, score(features))


def golden_readings(golden: Golden) -> tuple[Strings, Ints, Table]:
    """The readings of golden vectors, ready for `Windows.push`."""
    fields: Table = {name: np.array([np.nan if v is None else v for v in column]) for name, column in golden.fields.items()}
    return Strings.of(golden.entity), np.array(golden.event_us, np.int64), fields


def _features(manifest: Manifest) -> Floats:
    entity, event_us, table = golden_readings(manifest.golden)
    try:
        features = Windows(manifest.features).push(entity, event_us, table)
    except ContractError as e:
        raise BundleError(f"self-test: {e}") from e
    want = np.array([[np.nan if v is None else v for v in row] for row in manifest.golden.features])
    equal = (features.view(np.int64) == want.view(np.int64)) | (np.isnan(features) & np.isnan(want))
    if not equal.all():
        row, column = np.argwhere(~equal)[0]
        name = manifest.features.names[column]
        raise BundleError(f"self-test: feature {name} of golden reading {row} is {features[row, column]!r}; want {want[row, column]!r}")
    return features


def _check_scores(golden: Golden, scores: Floats) -> None:
    off = np.abs(scores - np.array(golden.scores))
    if not (off <= golden.tolerance).all():  # a golden NaN fails here too
        row = int(np.argmax(np.where(np.isnan(off), np.inf, off)))
        raise BundleError(f"self-test: score of golden reading {row} is {scores[row]}; want {golden.scores[row]} within {golden.tolerance}")
