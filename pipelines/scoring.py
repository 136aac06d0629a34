"""Scores of an ONNX model, as the device computes them.

One session option matters for equal bits: one intra-op thread, the device's setting. (Frozen models give the same bits anyway;
a champion from elsewhere may not.)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnxruntime

from edge_agent.contract.columns import Floats

BATCH_ROWS = 8_192
Scorer = Callable[[npt.NDArray[np.floating]], Floats]


def score(model: bytes, features: npt.NDArray[np.floating]) -> Floats:
    """The score of each row; features are cast to float32, scores come back as float64."""
    return scorer(model)(features)


def scorer(model: bytes) -> Scorer:
    """`score` with a model that is loaded once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def scores(features: npt.NDArray[np.floating]) -> Floats:
        out = np.empty(len(features))
        for first in range(0, len(features), BATCH_ROWS):
            batch = np.ascontiguousarray(features[first : first + BATCH_ROWS], dtype=np.float32)
            out[first : first + len(batch)] = session.run(None, {name: batch})[0].reshape(-1)
        return out

    return scores
