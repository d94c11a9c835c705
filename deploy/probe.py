"""The exported graph of an arch with weights of no meaning, built from its operators in milliseconds: what a latency is measured on.

A test holds that the operators and shapes are those of the real export, so the time is too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from deploy.export import INPUT, OPSET, OUTPUT
from supernet.arch import Arch
from supernet.operations import Operation, Operations
from supernet.space import Space

POINTWISE = {"sigmoid": "Sigmoid", "relu": "Relu", "hard_sigmoid": "HardSigmoid", "mul": "Mul", "add": "Add"}


def probe(space: Space, arch: Arch) -> bytes:
    """An ONNX file that takes as long as the exported child `arch` would."""
    return graph_of(spec.operations() for spec in space.plan(arch).values())


def graph_of(blocks: Iterable[Operations]) -> bytes:
    """An ONNX file of a chain of blocks, with random weights."""
    graph = _Graph()
    current = INPUT
    chain = list(blocks)
    for number, operations in enumerate(chain):
        names = {0: current}
        for operation in operations.listed:
            names[operation.output.index] = graph.add(
                operation, [names[value.index] for value in operation.inputs], f"b{number}"
            )
        current = names[len(operations.listed)]
    graph.nodes[-1].output[0] = OUTPUT
    first, last = chain[0].input, chain[-1].listed[-1].output
    into: list[str | int | None] = ["batch", first.channels, first.size, first.size]
    out: list[str | int | None] = ["batch", last.channels, *([last.size] * 2 if last.size > 1 else [])]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, "probe",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, into)],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, out)],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="nestling",
    )  # fmt: skip
    return bytes(model.SerializeToString())


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)

    def add(self, operation: Operation, inputs: list[str], prefix: str) -> str:
        output = f"{prefix}_{operation.output.index}"
        kind, attributes, constants = _onnx_form(operation)
        for number, (shape, integers) in enumerate(constants):
            name = f"{output}_c{number}"
            self.weights.append(
                numpy_helper.from_array(np.array(integers, np.int64) if integers else self._random(shape), name)
            )
            inputs.append(name)
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def _random(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        fan_in = math.prod(shape[1:])  # keeps the numbers of a deep chain within range
        return (self.rng.standard_normal(shape) / math.sqrt(fan_in)).astype(np.float32)


def _onnx_form(operation: Operation) -> tuple[str, dict[str, Any], list[tuple[tuple[int, ...], list[int]]]]:
    """Operator type, attributes, and constants as (shape of random numbers, or integers)."""
    x, y = operation.inputs[0], operation.output
    if operation.kind in {"conv", "depthwise"}:
        window = {"kernel_shape": [operation.kernel_size] * 2, "strides": [operation.stride] * 2,
                  "pads": [operation.kernel_size // 2] * 4, "group": operation.groups}  # fmt: skip
        weight = (y.channels, x.channels // operation.groups, operation.kernel_size, operation.kernel_size)
        return "Conv", window, [(weight, []), *([((y.channels,), [])] if operation.bias else [])]
    if operation.kind == "linear":
        return "Gemm", {"transB": 1}, [((y.channels, x.elements), []), ((y.channels,), [])]
    if operation.kind == "pool":
        window = {"kernel_shape": [operation.kernel_size] * 2, "strides": [operation.stride] * 2, "ceil_mode": 1}
        return "AveragePool", window, []
    if operation.kind == "mean":
        return "ReduceMean", {"keepdims": 1}, [((), [2, 3])]
    if operation.kind == "flatten":
        return "Reshape", {"allowzero": 1}, [((), [-1, x.elements])]
    return POINTWISE[operation.kind], {"alpha": 1 / 6} if operation.kind == "hard_sigmoid" else {}, []
