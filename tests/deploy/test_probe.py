"""The probe is the real export in all that takes time: operators, attributes, shapes; only its weights mean nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from deploy.export import INPUT, OUTPUT
from deploy.probe import probe
from deploy.runtimes.onnxruntime import OnnxRuntime
from supernet.arch import Arch
from supernet.space import Space, load_space

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
WHICH = ["smallest", "largest", 0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
Exported = Callable[[str, str | int], tuple[Space, Arch, onnx.ModelProto]]

DEFAULTS: dict[str, dict[str, Any]] = {
    "Conv": {"auto_pad": b"NOTSET", "dilations": [1, 1]},
    "ConvTranspose": {"auto_pad": b"NOTSET", "dilations": [1, 1], "output_padding": [0, 0]},
    "AveragePool": {"auto_pad": b"NOTSET", "dilations": [1, 1], "pads": [0, 0, 0, 0], "count_include_pad": 0},
    "Gemm": {"alpha": 1.0, "beta": 1.0, "transA": 0},
    "ReduceMean": {"noop_with_empty_axes": 0},
    "Reshape": {"allowzero": 0},
    "HardSigmoid": {"beta": 0.5},
    "LayerNormalization": {"stash_type": 1},
    "Gelu": {"approximate": b"none"},
}
"""What ONNX assumes where an attribute is left out (operators of opset 20)."""


def described(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> list[tuple[Any, ...]]:
    """For each node in order: operator, attributes, shapes of inputs (integer constants by value) and of the output."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    rows = []
    for node in model.graph.node:
        attributes = DEFAULTS.get(node.op_type, {}) | {item.name: helper.get_attribute_value(item) for item in node.attribute}
        rounded = {key: round(value, 6) if isinstance(value, float) else value for key, value in attributes.items()}
        inputs = [
            numpy_helper.to_array(constants[name]).tolist()
            if name in constants and constants[name].data_type == onnx.TensorProto.INT64
            else shapes[name]
            for name in node.input
        ]
        if node.op_type == "ReduceMean":  # axes counted from the back, or in another order, are the same axes
            inputs[1] = sorted(axis % 4 for axis in inputs[1])
        rows.append((node.op_type, rounded, inputs, [shapes[name] for name in node.output]))
    return rows


def assert_probe_is_the_export(space: Space, arch: Arch, exported: onnx.ModelProto, graph_shapes: Shapes) -> None:
    probed = onnx.load_model_from_string(probe(space, arch))
    onnx.checker.check_model(probed, full_check=True)
    found, expected = described(probed, graph_shapes(probed)), described(exported, graph_shapes(exported))
    for position, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"node {position} of {arch.as_dict()}"
    assert [(entry.domain, entry.version) for entry in probed.opset_import] == [
        (entry.domain, entry.version) for entry in exported.opset_import
    ]
    assert wires(probed) == wires(exported)


def wires(model: onnx.ModelProto) -> list[tuple[int, ...]]:
    """For each node, which nodes (by position; -1 the graph's input) its activations come from."""
    made = {model.graph.input[0].name: -1} | {node.output[0]: at for at, node in enumerate(model.graph.node)}
    return [tuple(made[name] for name in node.input if name in made) for node in model.graph.node]


@pytest.mark.parametrize(
    "which", ["smallest", "largest", 0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_a_probe_is_the_export_node_by_node(which: str | int, exported: Exported, graph_shapes: Shapes) -> None:
    assert_probe_is_the_export(*exported("digits", which), graph_shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attentivenas", "photo-mbconv", "cifar-mbconv"])
def test_a_probe_of_a_large_space_is_the_export(name: str, exported: Exported, graph_shapes: Shapes) -> None:
    assert_probe_is_the_export(*exported(name, 0), graph_shapes)


def test_a_probe_runs_and_its_numbers_stay_ordinary() -> None:
    space, rng = load_space("digits"), np.random.default_rng(3)
    for arch in [space.smallest, space.largest, *(space.sample(rng) for _ in range(5))]:
        size = space.resolution(arch)
        session = OnnxRuntime().load(probe(space, arch))
        logits = session(rng.standard_normal((2, 1, size, size)).astype(np.float32))
        assert logits.shape == (2, 10)
        assert np.isfinite(logits).all()
        assert np.abs(logits[logits != 0]).min() > 1e-30  # denormal numbers would take longer


def test_a_probe_has_the_names_of_an_export() -> None:
    space = load_space("digits")
    model = onnx.load_model_from_string(probe(space, space.smallest))
    assert [value.name for value in model.graph.input] == [INPUT]
    assert [value.name for value in model.graph.output] == [OUTPUT]


def test_a_probe_is_the_same_each_time() -> None:
    space = load_space("digits")
    assert probe(space, space.largest) == probe(space, space.largest)
