"""Tiny ONNX models for tests, and bundles around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from onnx import NodeProto, TensorProto, helper

from edge_agent.contract.bundle import Bundle, Golden, Limits, Manifest, Provenance
from edge_agent.contract.columns import Strings
from edge_agent.contract.feature_spec import Feature, FeatureSpec
from edge_agent.core.features import Windows

OPSET = 15
IR_VERSION = 8


def model(nodes: Sequence[NodeProto], features: int = 2, *, rank: int = 2, constants: dict[str, Any] | None = None) -> bytes:
    """A model from `x` (rows, features) to `y`."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None if rank == 0 else ["rows", 1][:rank])],
        [helper.make_tensor(name, _kind(v), v.shape, v.ravel()) for name, v in (constants or {}).items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    made.ir_version = IR_VERSION
    return bytes(made.SerializeToString())


def _kind(values: np.ndarray[Any, Any]) -> int:
    return int(TensorProto.FLOAT if values.dtype == np.float32 else TensorProto.BOOL if values.dtype == bool else TensorProto.INT64)


def linear(weights: Sequence[float]) -> bytes:
    """The weighted sum of the features."""
    w = np.array(weights, np.float32)[:, None]
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], len(weights), constants={"w": w})


def logarithm() -> bytes:
    """The logarithm of the first feature of two: NaN below zero, infinite at zero."""
    w = np.array([[1.0], [0.0]], np.float32)
    return model([helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Log", ["s"], ["y"])], constants={"w": w})


def wide() -> bytes:
    """Gives back its input: two scores per row."""
    return model([helper.make_node("Identity", ["x"], ["y"])], rank=0)


def hog(floats: int) -> bytes:
    """Fills `floats` float32 numbers before it answers zero."""
    nodes = [
        helper.make_node("ConstantOfShape", ["size"], ["big"], value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.0])),
        helper.make_node("ReduceSum", ["big"], ["zero"], keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Mul", ["s", "factor"], ["t"]),
        helper.make_node("Add", ["t", "zero"], ["y"]),
    ]
    constants = {"first": np.array([0]), "w": np.ones((2, 1), np.float32), "factor": np.zeros(1, np.float32), "count": np.array([floats])}
    # The size depends on the input, or the optimiser would fill the array while it loads the model.
    shape = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Mul", ["rows", "count"], ["size"]),
    ]
    return model([*shape, *nodes], constants=constants)


def endless() -> bytes:
    """Never answers: a loop over a small product."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Mul", ["state_in", "one"], ["state_out"])],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["start"]),
        helper.make_node("Loop", ["turns", "go", "start"], ["y"], body=body),
    ]
    constants = {"w": np.ones((2, 1), np.float32), "turns": np.array(2**62), "go": np.array(True)}
    return model(nodes, constants=constants)


SPEC = FeatureSpec(features=[Feature("t", "last"), Feature("t", "mean")], window_rows=3, window_s=3600.0)


def golden(weights: Sequence[float] = (1.0, 2.0)) -> Golden:
    """Golden vectors of a linear model."""
    values = np.array([1.0, 2.5, 4.0])
    event_us = np.arange(3) * 1_000_000
    features = Windows(SPEC).push(Strings.of(["a"] * 3), event_us, {"t": values}).features
    return Golden(
        entity=["a"] * 3,
        event_us=event_us.tolist(),
        fields={"t": values.tolist()},
        features=features.tolist(),
        scores=(features @ np.array(weights)).tolist(),
    )


def bundle(*, weights: Sequence[float] = (1.0, 2.0), onnx: bytes | None = None, **manifest: Any) -> Bundle:
    """A bundle of a linear model that passes its self-test, with `manifest` fields changed."""
    made = Manifest(
        model="pump-wear",
        model_version="1",
        stream="pump",
        contract_version="1.0.0",
        features=SPEC,
        golden=golden(weights),
        provenance=Provenance(run_id="run"),
        score_min=-1e6,
        score_max=1e6,
        limits=Limits(memory_mb=256, score_timeout_s=5.0),
    )
    return replace(Bundle(made, linear(weights) if onnx is None else onnx), manifest=msgspec.structs.replace(made, **manifest))
