"""Gradient-boosted trees as an ONNX model that takes every branch the trained model takes.

Written here because skl2onnx 1.20 cannot convert HistGradientBoostingRegressor with onnx 1.23 (it passes booleans where
integers are due), and because it rounds thresholds to the nearest float32: a value that equals the rounded threshold would go left in
ONNX and right in scikit-learn. The rules:

- Inputs are float32, in training as well. `x <= t` for a float32 x is the same as `x <= floor32(t)`, so `freeze` rounds thresholds down.
- `freeze` rounds leaf values to a multiple of a power of two so coarse that any sum of them, in any order, is exact in float32.
  So scikit-learn, ONNX Runtime with any number of threads, batch of any size, cloud and device give the same bits.
- A missing value (NaN) goes where training sent it.
- Opset 15, ai.onnx.ml 3 and IR 8, which ONNX Runtime reads since 1.10 (end of 2021).
- Input `features`, float32 (rows, features); output `score`, float32 (rows, 1).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper
from sklearn.ensemble import HistGradientBoostingRegressor

from edge_agent.contract.errors import ConfigError

OPSET = 15
OPSET_ML = 3
IR_VERSION = 8
INPUT, OUTPUT = "features", "score"

Float32s = npt.NDArray[np.float32]


def freeze(model: HistGradientBoostingRegressor) -> float:
    """Round the thresholds and leaves of a trained model, in place, to what float32 can hold; the step of the leaves.

    No decision on float32 inputs changes; a score moves by at most half a step per tree. A step is 2**-23 of the largest score
    that the trees could add up to.
    """
    trees = [predictor.nodes for (predictor,) in model._predictors]
    base = float(np.ravel(model._baseline_prediction)[0])
    bound = abs(base) + sum(float(np.abs(nodes["value"][nodes["is_leaf"].astype(bool)]).max()) for nodes in trees)
    step = 2.0 ** (math.ceil(math.log2(bound or 1.0)) - 23)
    for nodes in trees:
        nodes["num_threshold"] = floor32(nodes["num_threshold"])
        nodes["value"] = np.round(nodes["value"] / step) * step
    model._baseline_prediction = np.full_like(model._baseline_prediction, round(base / step) * step)
    return step


def to_onnx(model: HistGradientBoostingRegressor, features: int) -> bytes:
    """A frozen model as ONNX bytes.

    Raises:
        ConfigError: the model has another link than the identity, or splits on categories.
    """
    if model.loss not in ("squared_error", "absolute_error") or model.is_categorical_ is not None:
        raise ConfigError(f"loss {model.loss!r} or categorical features cannot be exported; use squared_error on numbers")
    nodes: dict[str, list[Any]] = {name: [] for name in _NODE_ATTRIBUTES}
    targets: dict[str, list[Any]] = {"nodeids": [], "treeids": [], "ids": [], "weights": []}
    for tree, (predictor,) in enumerate(model._predictors):
        _add_tree(tree, predictor.nodes, nodes, targets)
    attributes: dict[str, Any] = {f"nodes_{name}": values for name, values in nodes.items()}
    attributes |= {f"target_{name}": values for name, values in targets.items()}
    node = helper.make_node(
        "TreeEnsembleRegressor",
        [INPUT],
        [OUTPUT],
        domain="ai.onnx.ml",
        n_targets=1,
        post_transform="NONE",
        aggregate_function="SUM",
        base_values=[float(np.ravel(model._baseline_prediction)[0])],
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "gradient_boosting",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [None, features])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [None, 1])],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", OPSET_ML)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="fenceline")
    onnx.checker.check_model(proto)
    return bytes(proto.SerializeToString())


_NODE_ATTRIBUTES = ("treeids", "nodeids", "featureids", "values", "modes", "truenodeids", "falsenodeids", "missing_value_tracks_true")


def _add_tree(tree: int, nodes_in: Any, nodes: dict[str, list[Any]], targets: dict[str, list[Any]]) -> None:
    leaf = nodes_in["is_leaf"].astype(bool)
    rows = len(nodes_in)
    nodes["treeids"] += [tree] * rows
    nodes["nodeids"] += range(rows)
    nodes["featureids"] += np.where(leaf, 0, nodes_in["feature_idx"]).astype(int).tolist()
    nodes["values"] += np.where(leaf, 0.0, nodes_in["num_threshold"]).tolist()
    nodes["modes"] += np.where(leaf, "LEAF", "BRANCH_LEQ").tolist()
    nodes["truenodeids"] += np.where(leaf, 0, nodes_in["left"]).astype(int).tolist()
    nodes["falsenodeids"] += np.where(leaf, 0, nodes_in["right"]).astype(int).tolist()
    nodes["missing_value_tracks_true"] += np.where(leaf, 0, nodes_in["missing_go_to_left"]).astype(int).tolist()
    leaves = np.flatnonzero(leaf).tolist()
    targets["nodeids"] += leaves
    targets["treeids"] += [tree] * len(leaves)
    targets["ids"] += [0] * len(leaves)
    targets["weights"] += nodes_in["value"][leaf].tolist()


def floor32(values: npt.NDArray[np.float64]) -> Float32s:
    """The largest float32 that is not above each value.

    >>> float(floor32(np.array([0.1]))[0]) <= 0.1
    True
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    return np.where(nearest.astype(np.float64) > values, np.nextafter(nearest, np.float32(-np.inf)), nearest)
