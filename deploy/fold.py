"""Batch norm folded into the convolution or linear layer before it: the network that is exported."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from supernet.blocks import ConvNorm, LinearNorm

Network = TypeVar("Network", bound=nn.Module)


def folded(network: Network) -> Network:
    """A copy without batch norm, equal to `network` in evaluation mode up to rounding.

    Raises `ValueError` where a part of the network is in training mode or a norm stands alone.
    """
    if any(module.training for module in network.modules()):
        raise ValueError("folding needs calibrated statistics in evaluation mode: calibrate the network first")
    result = copy.deepcopy(network)
    for module in result.modules():
        if isinstance(module, ConvNorm):
            conv, norm = module.conv, module.norm
            assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            module.conv = fuse_conv_bn_eval(conv, norm)
            del module.norm
        elif isinstance(module, LinearNorm):
            linear, norm = module.linear, module.norm
            assert isinstance(linear, nn.Linear) and isinstance(norm, nn.BatchNorm1d)
            module.linear = fuse_linear_bn_eval(linear, norm)
            del module.norm
    alone = [name for name, module in result.named_modules() if isinstance(module, _BatchNorm)]
    if alone:
        raise ValueError(f"every batch norm must follow its layer within a ConvNorm or LinearNorm, but {alone[0]} does not")
    return result
