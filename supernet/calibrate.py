"""Batch-norm statistics of one child, measured on training images: an extracted child is worthless without them.

Statistics belong to an (arch, weights, images) triple. They are measured on a copy (`Supernet.extract`), so that one child's
never touch another's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Network = TypeVar("Network", bound=nn.Module)


def calibrate(network: Network, batches: Iterable[Tensor]) -> Network:
    """Set every batch norm's statistics to their mean over `batches` and switch the network to evaluation; returns it.

    `batches` are normalised images at the child's own resolution, shape (N, C, H, W), of equal N: the mean over batches is
    cumulative (`momentum=None`), each batch weighs the same (BigNAS section 3.3; US-Nets). Raises `ValueError` without batches.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    seen = 0
    try:
        with torch.no_grad():
            for images in batches:
                network(images)
                seen += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if not seen:
        raise ValueError("calibration needs at least one batch of training images, but got none")
    return network.eval()
