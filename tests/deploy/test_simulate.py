"""int8 in torch rounds as ONNX Runtime does, and leaves the network as it was."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from deploy.formats import session
from deploy.simulate import STEPS, Simulation, rounded, rounded_weight, sensitivities


@pytest.fixture
def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(288, 5)
    ).eval()


IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ends", [(-1.0, 2.0), (0.5, 3.0), (-3.0, -1.0), (0.0, 0.0), (-1e-3, 1e3)])
def test_numbers_are_rounded_as_quantizelinear_does(ends: tuple[float, float]) -> None:
    """uint8 with a zero point, by the operators of ONNX themselves."""
    low, high = min(ends[0], 0), max(ends[1], 0)
    scale = np.float32(max(high - low, 1e-30) / STEPS)
    zero = np.uint8(round(-low / float(scale)))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "qdq", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [200])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [200])],
        [onnx.numpy_helper.from_array(np.asarray(scale), "s"), onnx.numpy_helper.from_array(np.asarray(zero), "z")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    x = np.random.default_rng(0).uniform(low - 1, high + 1, 200).astype(np.float32)
    expected = session(model.SerializeToString())(x)
    found = rounded(torch.from_numpy(x), *ends).numpy()
    assert (np.abs(found - expected) < 1e-6 * max(1.0, high - low)).mean() > 0.98  # halves may go to either side
    assert np.abs(found - expected).max() <= 1.01 * scale + 1e-12


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose2d(4, 6, 2), nn.Linear(9, 5)]
)
def test_weights_have_255_steps_by_output_channel(layer: nn.Module) -> None:
    weight = rounded_weight(layer)
    exact = layer.weight.detach()
    by_channel = (1, 0) if isinstance(layer, nn.ConvTranspose2d) else (0, 1)
    for one, other in zip(weight.transpose(0, by_channel[0]), exact.transpose(0, by_channel[0]), strict=True):
        step = float(other.abs().max()) / 127
        assert float((one - other).abs().max()) <= step / 2 * 1.001
        assert len(torch.unique((one / step).round())) <= 255
        assert float(one.abs().max()) == pytest.approx(float(other.abs().max()))


def test_a_scale_behind_a_layer_changes_nothing_so_norms_may_be_folded_or_not() -> None:
    layer = nn.Conv2d(4, 6, 3)
    scale = torch.rand(6, 1, 1, 1) + 0.1
    expected = rounded_weight(layer) * scale
    layer.weight.data *= scale
    torch.testing.assert_close(rounded_weight(layer), expected)


def test_it_rounds_while_it_is_asked_to_and_not_after(network: nn.Sequential) -> None:
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        exact = network(IMAGES)
        simulation = Simulation(network)
        with simulation.observing():
            torch.testing.assert_close(network(IMAGES), exact)
        with simulation.rounding():
            every = network(IMAGES)
        with simulation.rounding([]):
            torch.testing.assert_close(network(IMAGES), exact)
        torch.testing.assert_close(network(IMAGES), exact)
    assert 0 < float((every - exact).abs().max()) < 0.1
    assert all(torch.equal(weights[name], value) for name, value in network.state_dict().items())


def test_the_layer_that_rounding_hurts_most_comes_first(network: nn.Sequential) -> None:
    with torch.no_grad():
        network[2].weight[0] *= 1e-3  # by channel: harmless
        network[0].weight[0, 0, 0, 0] = 60.0  # one number spoils the steps of a channel, and its outputs' range
    names = [name for name, error in sensitivities(network, IMAGES)]
    assert sorted(names) == ["0", "2", "4"]
    assert names[0] in {"0", "2"}
    errors = [error for _, error in sensitivities(network, IMAGES)]
    assert errors == sorted(errors, reverse=True) and errors[-1] > 0
