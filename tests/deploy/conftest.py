"""A network as training leaves it, without the training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from supernet.arch import Arch
from supernet.model import plain
from supernet.space import Space

Networks = Callable[[Space, Arch], nn.Sequential]


def as_trained(space: Space, arch: Arch, seed: int = 0) -> nn.Sequential:
    """A network in evaluation mode whose biases are not 0 and whose norms have statistics far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    network = plain(space, arch)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 2, generator=generator)
            module.running_mean = torch.empty(module.num_features).normal_(0, 1, generator=generator)
            module.running_var = torch.empty(module.num_features).uniform_(0.2, 3, generator=generator)
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.data.normal_(0, 1, generator=generator)
    return network.eval()


@pytest.fixture(scope="session")
def networks() -> Networks:
    """The function `as_trained`."""
    return as_trained
