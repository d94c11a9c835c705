"""Folding batch norm: the same network, without the norms."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from deploy.fold import folded
from supernet.arch import Arch
from supernet.blocks import ConvNorm
from supernet.space import Space, load_space

Networks = Callable[[Space, Arch], nn.Sequential]


@pytest.fixture(scope="module")
def space() -> Space:
    return load_space("digits")


@pytest.mark.parametrize("seed", range(2))
def test_a_folded_child_computes_the_same(space: Space, networks: Networks, seed: int) -> None:
    archs = [space.smallest, space.largest, *(space.sample(np.random.default_rng(seed)) for _ in range(2))]
    for arch in archs:
        network = networks(space, arch)
        images = torch.randn(3, 1, space.resolution(arch), space.resolution(arch))
        with torch.no_grad():
            expected, found = network(images), folded(network)(images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_nothing_is_left_of_the_norms_and_the_original_keeps_its_own(space: Space, networks: Networks) -> None:
    network = networks(space, space.largest)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = folded(network)
    assert not [module for module in result.modules() if isinstance(module, _BatchNorm)]
    assert any(isinstance(module, _BatchNorm) for module in network.modules())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert not {p.data_ptr() for p in result.parameters()} & {p.data_ptr() for p in network.parameters()}


def test_a_network_in_training_mode_is_refused(space: Space, networks: Networks) -> None:
    with pytest.raises(ValueError, match="evaluation mode"):
        folded(networks(space, space.smallest).train())


def test_a_network_with_a_single_norm_in_training_mode_is_refused(space: Space, networks: Networks) -> None:
    network = networks(space, space.smallest)
    next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d)).train()
    with pytest.raises(ValueError, match="evaluation mode"):
        folded(network)


def test_a_norm_that_follows_no_convolution_is_named() -> None:
    network = nn.Sequential(ConvNorm(1, 4, 3), nn.BatchNorm2d(4)).eval()
    with pytest.raises(ValueError, match="but 1 does not"):
        folded(network)
