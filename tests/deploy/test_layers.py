"""The first layer that differs is found, whichever it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from deploy.export import to_onnx
from deploy.fold import folded
from deploy.layers import first_difference, node_of_layer, weighted_nodes
from supernet.arch import Arch
from supernet.space import Space, load_space

Networks = Callable[[Space, Arch], nn.Module]
FAMILIES = ["digits", "mlp", "cell", "autoencoder", pytest.param("cifar-vit", marks=pytest.mark.slow),
            pytest.param("cifar-resnet", marks=pytest.mark.slow)]  # fmt: skip


def export_of(networks: Networks, name: str) -> tuple[nn.Module, onnx.ModelProto, torch.Tensor]:
    space = load_space(name)
    arch = space.smallest
    network, side = networks(space, arch), space.resolution(arch)
    images = torch.randn(4, space.family.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    return folded(network), to_onnx(network, channels=space.family.in_channels, resolution=side), images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_weight_is_traced_to_its_layer(networks: Networks, name: str) -> None:
    network, model, images = export_of(networks, name)
    assert first_difference(network, model, images, 1e-4).startswith("no weighted layer differs")
    layers = node_of_layer(network, model, images)
    nodes, stored = {node.name: node for node in weighted_nodes(model)}, {each.name: each for each in model.graph.initializer}
    assert len(layers) == len(nodes) == len(set(layers.values()))
    for layer in list(layers)[:: max(1, len(layers) // 4)]:
        tensor = stored[nodes[layers[layer]].input[1]]
        before, kept = numpy_helper.to_array(tensor), onnx.TensorProto()
        kept.CopyFrom(tensor)
        tensor.CopyFrom(numpy_helper.from_array((before * 1.5 + 0.01).astype(np.float32), tensor.name))
        assert first_difference(network, model, images, 1e-4).startswith(f"the first layer that differs is {layer}")
        tensor.CopyFrom(kept)


def test_a_layer_too_few_is_said(networks: Networks) -> None:
    network, model, images = export_of(networks, "mlp")
    other = export_of(networks, "digits")[1]
    assert "weighted layers, the graph has" in first_difference(network, other, images, 1e-4)
    with pytest.raises(ValueError, match="weighted layers, the graph has"):
        node_of_layer(network, other, images)
    del model
