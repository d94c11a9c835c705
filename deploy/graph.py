"""What is done to an exported graph: means that phones can run, a fixed batch, preprocessing inside, half precision.

Each makes a new model of a model; the numbers stay those of the network (half precision: to rounding).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from supernet.preprocess import Preprocessing

PIXELS = "pixels"
"""Input of a graph that does its own preprocessing: uint8, (batch, height, width, channels)."""
PROBABILITIES = "probabilities"
"""Its output of a classifier, (batch, classes)."""


def pool_whole_maps(graph: onnx.GraphProto) -> None:
    """Write a mean over all pixels of a map as what it is, in place: phones' accelerators take GlobalAveragePool, and no ReduceMean."""
    axes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.INT64}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in axes or ranks.get(node.input[0]) != 4:
            continue
        keeps = all(each.i for each in node.attribute if each.name == "keepdims")
        if keeps and sorted(axis % 4 for axis in axes[node.input[1]].tolist()) == [2, 3]:
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]
    read = {name for node in graph.node for name in node.input}
    left = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(left)


def forget_shapes(model: onnx.ModelProto) -> None:
    """Leave out, in place, what the graph says of the shapes of inner values: ONNX Runtime finds them itself.

    Where it is told them with a free batch it lays out memory otherwise, and ViT-Ti took 4 to 6 % longer.
    """
    del model.graph.value_info[:]


def fixed(model: onnx.ModelProto, batch: int = 1) -> onnx.ModelProto:
    """The model for `batch` images and no other number, with every shape known: what NNAPI and CoreML need."""
    from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_input_shape_fixed

    found = _copy(model)
    (given,) = found.graph.input
    shape = [batch, *[dim.dim_value for dim in given.type.tensor_type.shape.dim[1:]]]
    with quiet():
        make_input_shape_fixed(found.graph, given.name, shape)
        fix_output_shapes(found)
    forget_shapes(found)
    onnx.checker.check_model(found, full_check=True)
    return found


def from_pixels(model: onnx.ModelProto, preprocessing: Preprocessing, *, probabilities: bool) -> onnx.ModelProto:
    """The model with preprocessing inside: `pixels` in, uint8 (batch, H, W, C), cropped and resized already; normalised in the graph.

    With `probabilities`, a classifier's output is softmax of its logits; without, of a regression, pixels in 0..1, (batch, H, W, C).
    """
    found = _copy(model)
    graph = found.graph
    (given,), (made,) = graph.input, graph.output
    inner, outer = given.name, made.name
    first = given.type.tensor_type.shape.dim[0]
    batch = first.dim_value if first.HasField("dim_value") else first.dim_param
    side, channels = preprocessing.resolution, preprocessing.channels
    std, mean = np.array(preprocessing.std, np.float32), np.array(preprocessing.mean, np.float32)
    # (pixels / 255 - mean) / std, as one product and one sum a channel
    numbers = {
        "input_scale": (1 / (255 * std.astype(np.float64))).astype(np.float32),
        "input_shift": (-mean.astype(np.float64) / std).astype(np.float32),
    }
    before = [
        helper.make_node("Cast", [PIXELS], ["pixels_float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["pixels_float", "input_scale"], ["pixels_scaled"]),
        helper.make_node("Add", ["pixels_scaled", "input_shift"], ["pixels_normalised"]),
        helper.make_node("Transpose", ["pixels_normalised"], [inner], perm=[0, 3, 1, 2]),
    ]
    if probabilities:
        after = [helper.make_node("Softmax", [outer], [PROBABILITIES], axis=1)]
        shape: list[str | int] = [batch, made.type.tensor_type.shape.dim[1].dim_value]
        name = PROBABILITIES
    else:
        name, shape = "images", [batch, side, side, channels]
        numbers |= {
            "output_scale": std,
            "output_shift": mean,
            "black": np.zeros((), np.float32),
            "white": np.ones((), np.float32),
        }
        after = [
            helper.make_node("Transpose", [outer], ["made_nhwc"], perm=[0, 2, 3, 1]),
            helper.make_node("Mul", ["made_nhwc", "output_scale"], ["made_scaled"]),
            helper.make_node("Add", ["made_scaled", "output_shift"], ["made_shifted"]),
            helper.make_node("Clip", ["made_shifted", "black", "white"], [name]),
        ]
        if inner == name:  # the graph's own input has that name
            inner = _renamed(graph, inner)
            before[-1].output[0] = inner
    nodes = [*before, *graph.node, *after]
    for number, node in enumerate([*before, *after]):
        node.name = f"preprocessing_{number}"
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in numbers.items())
    graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, [batch, side, side, channels]))
    graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.checker.check_model(found, full_check=True)
    return found


def halved(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with weights in fp16, input and output in fp32: half the size; CPUs compute it in fp32 all the same."""
    with quiet():
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        found: onnx.ModelProto = convert_float_to_float16(_copy(model), keep_io_types=True)
        OnnxModel(found).topological_sort()  # the casts of input and output stand at the end
    forget_shapes(found)
    onnx.checker.check_model(found)
    return found


def _renamed(graph: onnx.GraphProto, name: str) -> str:
    """Give a value of the graph another name, wherever it is read."""
    other = f"{name}_normalised"
    for node in graph.node:
        for at, read in enumerate(node.input):
            if read == name:
                node.input[at] = other
    return other


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    found = onnx.ModelProto()
    found.CopyFrom(model)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tools of ONNX Runtime warn and log about their own internals, which their users can do nothing about."""
    level = logging.root.level
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(None):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        logging.root.setLevel(level)
