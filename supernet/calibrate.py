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

from supernet.distributed import ALONE, World

Network = TypeVar("Network", bound=nn.Module)


def calibrate(network: Network, batches: Iterable[Tensor], world: World = ALONE) -> Network:
    """Set every batch norm's statistics to their mean over `batches` and switch the network to evaluation; returns it.

    `batches` are normalised images at the child's own resolution, shape (N, C, H, W), of equal N: the mean over batches is
    cumulative (`momentum=None`), each batch weighs the same (BigNAS section 3.3; US-Nets). In a job of several
    processes each brings batches of its own, any number of them, for the same weights, and gets the mean over all. Raises
    `ValueError` without batches.
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
    if not _combined(norms, seen, world):
        raise ValueError("calibration needs at least one batch of training images, but got none")
    return network.eval()


def _combined(norms: list[_BatchNorm], seen: int, world: World) -> int:
    """Make the statistics over `seen` batches those over the batches of all processes; returns how many these are."""
    if world.size == 1:
        return seen
    statistics = [value for norm in norms for value in (norm.running_mean, norm.running_var) if value is not None]
    sums = [value.double() * seen for value in statistics]  # of none, 0 times what they were reset to
    flat = world.sum_(torch.cat([*sums, torch.tensor([seen], dtype=torch.float64, device=world.device)]))
    count = round(float(flat[-1]))
    for value, total in zip(statistics, torch.split(flat[:-1], [len(value) for value in statistics]), strict=True):
        value.copy_(total / max(1, count))
    for norm in norms:
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.fill_(count)
    return count
