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
from deploy.int8_probe import quantised
from supernet.arch import Arch
from supernet.operations import Constant, Operation, Operations
from supernet.space import Space


def probe(space: Space, arch: Arch, precision: str = "fp32") -> bytes:
    """An ONNX file that takes as long as the exported child `arch` would."""
    return graph_of((spec.operations() for spec in space.plan(arch).values()), precision)


def graph_of(blocks: Iterable[Operations], precision: str = "fp32") -> bytes:
    """An ONNX file of a chain of blocks, with weights of no meaning. `precision` is fp32 or int8 (`deploy/int8_probe.py`)."""
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
    into: list[str | int | None] = ["batch", *first.shape]
    out: list[str | int | None] = ["batch", *last.shape]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes, "probe",
            [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, into)],
            [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, out)],
            graph.weights,
        ),
        opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="nestling",
    )  # fmt: skip
    return bytes((quantised(model) if precision == "int8" else model).SerializeToString())


PATTERN = 1_021
"""Weights are this many random numbers over and over (a prime: no channel repeats another): what goes to a device packs well."""


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._pattern = np.random.default_rng(0).standard_normal(PATTERN)

    def add(self, operation: Operation, inputs: list[str], prefix: str) -> str:
        output = f"{prefix}_{operation.output.index}"
        for number, constant in enumerate(operation.constants):
            name = f"{output}_c{number}"
            self.weights.append(numpy_helper.from_array(self._values(constant), name))
            inputs.append(name)
        attributes: dict[str, Any] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in operation.attributes
        }
        self.nodes.append(helper.make_node(operation.onnx, inputs, [output], name=output, **attributes))
        return output

    def _values(self, constant: Constant) -> NDArray[np.generic]:
        if constant.integers is not None:
            return np.array(constant.integers, np.int64)
        fan_in = math.prod(constant.shape[1:])  # keeps the numbers of a deep chain within range
        return np.resize(self._pattern / math.sqrt(fan_in), constant.shape).astype(np.float32)
