"""Peak memory from the closed form is what the exported graph really holds alive, counted from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx
import pytest

from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.space import Space

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
WHICH = ["smallest", "largest", 0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
Exported = Callable[[str, str | int], tuple[Space, Arch, onnx.ModelProto]]


def peak_bytes(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Largest sum of activations, fp32, that are alive while some node runs: made (or given) before and still to be read."""
    nodes, weights = list(model.graph.node), {tensor.name for tensor in model.graph.initializer}
    born = {model.graph.input[0].name: 0} | {name: at for at, node in enumerate(nodes) for name in node.output}
    dies = dict(born)
    for at, node in enumerate(nodes):
        dies |= {name: at for name in node.input if name not in weights}
    alive = [sum(math.prod(shapes[name]) for name in born if born[name] <= at <= dies[name]) for at in range(len(nodes))]
    return 4 * max(alive)


@pytest.mark.parametrize(
    "which", ["smallest", "largest", 0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]
)
def test_peak_memory_is_that_of_the_exported_graph(which: str | int, exported: Exported, graph_shapes: Shapes) -> None:
    space, arch, model = exported("digits", which)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attentivenas", "photo-mbconv", "cifar-mbconv"])
@pytest.mark.parametrize("which", ["smallest", 0])
def test_peak_memory_of_a_large_space_is_that_of_the_exported_graph(
    name: str, which: str | int, exported: Exported, graph_shapes: Shapes
) -> None:
    space, arch, model = exported(name, which)
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model))


def test_a_value_that_is_read_late_stays_alive(graph_shapes: Shapes) -> None:
    """The count itself: x (4 numbers) is read again at the end, beside y (4) and z (4)."""
    text = '<ir_version: 10, opset_import: ["": 20]> g (float[1,4] x) => (float[1,4] out) {y = Relu(x) z = Sigmoid(y) out = Add(z, x)}'
    model = onnx.parser.parse_model(text)
    assert peak_bytes(model, graph_shapes(model)) == 4 * 12
