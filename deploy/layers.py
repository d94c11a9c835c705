"""Which operator of an exported graph is which layer of the network, and which layer is the first that differs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import Tensor, nn

from deploy.simulate import weighted

OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def weighted_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The operators with stored weights, in the order in which they run: the network's weighted layers."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in OPERATORS and node.input[1] in stored]


def node_of_layer(network: nn.Module, model: onnx.ModelProto, images: Tensor) -> dict[str, str]:
    """Layer -> name of its operator, of a network that calls every layer once, and of its export.

    Raises `ValueError` where they have different numbers of layers.
    """
    names, nodes = list(_outputs(network, images)), weighted_nodes(model)
    if len(names) != len(nodes):
        raise ValueError(f"the network runs {len(names)} weighted layers, the graph has {len(nodes)}")
    return {name: node.name for name, node in zip(names, nodes, strict=True)}


def first_difference(network: nn.Module, model: onnx.ModelProto, images: Tensor, tolerance: float) -> str:
    """In words, the first weighted layer (in the order in which they run) whose outputs differ by more than `tolerance`.

    `network` is folded, in evaluation mode; differences count relative to the layer's largest output, at least to 1. `images` are
    normalised, shape (N, C, H, W).
    """
    expected, nodes = _outputs(network, images), weighted_nodes(model)
    if len(expected) != len(nodes):
        return f"the network runs {len(expected)} weighted layers, the graph has {len(nodes)}"
    found = _values(model, [_whole(model, node) for node in nodes], images.numpy())
    for (name, one), other in zip(expected.items(), found, strict=True):
        if one.size != other.size:
            return f"the first layer that differs is {name}: it makes {one.shape}, in the graph {other.shape}"
        difference = float(np.abs(one.ravel() - other.ravel()).max()) if one.shape == other.shape else _unordered(one, other)
        if not difference <= tolerance * max(1.0, float(np.abs(one).max())):
            return (
                f"the first layer that differs is {name}, by {difference:.3g} where it reaches {float(np.abs(one).max()):.3g}"
            )
    return "no weighted layer differs: what differs comes after the last of them"


def _whole(model: onnx.ModelProto, node: onnx.NodeProto) -> str:
    """The output of a layer: that of a product without bias comes before its sum with one."""
    stored = {tensor.name for tensor in model.graph.initializer}
    after = [each for each in model.graph.node if node.output[0] in each.input]
    if node.op_type == "MatMul" and len(after) == 1 and after[0].op_type == "Add" and set(after[0].input) & stored:
        return str(after[0].output[0])
    return str(node.output[0])


def _unordered(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest difference where the graph keeps the numbers in another order, each in its place."""
    return float(np.abs(np.sort(one.ravel()) - np.sort(other.ravel())).max())


def _outputs(network: nn.Module, images: Tensor) -> dict[str, NDArray[Any]]:
    """What every weighted layer makes of the images, in the order in which they run."""
    own = copy.deepcopy(network)
    made: dict[str, NDArray[Any]] = {}

    def keeping(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            made[name] = output.numpy().copy()

        return keep

    for name, layer in weighted(own).items():
        layer.register_forward_hook(keeping(name))
    with torch.no_grad():
        own(images)
    return made


def _values(model: onnx.ModelProto, names: Sequence[str], images: NDArray[Any]) -> list[NDArray[Any]]:
    """What ONNX Runtime computes for inner values of a graph."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    there = {value.name for value in opened.graph.output}
    opened.graph.output.extend(
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in dict.fromkeys(names) if name not in there
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(list(names), {session.get_inputs()[0].name: images})
    return found
