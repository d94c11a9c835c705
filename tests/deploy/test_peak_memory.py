"""Peak memory from the closed form is what the exported graph really holds alive, counted from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from torch import nn

from deploy.export import to_onnx
from supernet.arch import Arch
from supernet.costs import arch_costs
from supernet.space import Space, load_space

Shapes = Callable[[onnx.ModelProto], dict[str, tuple[int, ...]]]
Networks = Callable[[Space, Arch], nn.Sequential]


def peak_bytes(model: onnx.ModelProto, shapes: dict[str, tuple[int, ...]]) -> int:
    """Largest sum of activations, fp32, that are alive while some node runs: made (or given) before and still to be read."""
    nodes, weights = list(model.graph.node), {tensor.name for tensor in model.graph.initializer}
    born = {model.graph.input[0].name: 0} | {name: at for at, node in enumerate(nodes) for name in node.output}
    dies = dict(born)
    for at, node in enumerate(nodes):
        dies |= {name: at for name in node.input if name not in weights}
    alive = [sum(math.prod(shapes[name]) for name in born if born[name] <= at <= dies[name]) for at in range(len(nodes))]
    return 4 * max(alive)


def assert_peak_is_that_of_the_graph(space: Space, arch: Arch, networks: Networks, graph_shapes: Shapes) -> None:
    model = to_onnx(networks(space, arch), channels=space.family.in_channels, resolution=space.resolution(arch))
    assert arch_costs(space, arch)["peak_memory_bytes"] == peak_bytes(model, graph_shapes(model)), arch.as_dict()


@pytest.mark.parametrize("which", ["smallest", "largest", 10, 11])
def test_peak_memory_is_that_of_the_exported_graph(which: str | int, networks: Networks, graph_shapes: Shapes) -> None:
    space = load_space("digits")
    arch = space.sample(np.random.default_rng(which)) if isinstance(which, int) else getattr(space, which)
    assert_peak_is_that_of_the_graph(space, arch, networks, graph_shapes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attentivenas", "photo-mbconv", "cifar-mbconv"])
def test_peak_memory_of_a_large_space_is_that_of_the_exported_graph(
    name: str, networks: Networks, graph_shapes: Shapes
) -> None:
    space = load_space(name)
    for arch in (space.smallest, space.sample(np.random.default_rng(1))):
        assert_peak_is_that_of_the_graph(space, arch, networks, graph_shapes)
