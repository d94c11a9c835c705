"""Networks as training leaves them, without the training; and what they become when exported."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from deploy.export import to_onnx
from supernet.arch import Arch
from supernet.model import plain
from supernet.space import Space, load_space

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


Exported = Callable[[str, str | int], tuple[Space, Arch, onnx.ModelProto]]


@pytest.fixture(scope="session")
def exported() -> Exported:
    """Gives space, arch and graph of "smallest", "largest" or the random arch of a seed; each is exported once."""

    @lru_cache
    def export(name: str, which: str | int) -> tuple[Space, Arch, onnx.ModelProto]:
        space = load_space(name)
        arch = space.sample(np.random.default_rng(which)) if isinstance(which, int) else getattr(space, which)
        model = to_onnx(as_trained(space, arch), channels=space.family.in_channels, resolution=space.resolution(arch))
        return space, arch, model

    return export
