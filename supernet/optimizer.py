"""The optimizer of a run, and the limits on a step's gradient."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from supernet.model import Supernet
from supernet.recipe import TrainConfig

FUSED = ("sgd", "momentum", "nesterov", "adam", "adamw")
"""Optimizers that torch has in one kernel: two to four times as fast, on a CPU too (benchmarks/results/train_step.txt)."""


def make_optimizer(supernet: Supernet, recipe: TrainConfig) -> torch.optim.Optimizer:
    """Timm's optimizer of that name; no weight decay on biases and norms unless the recipe wants it (`decay_all`)."""
    fused: dict[str, Any] = {"fused": True} if recipe.optimizer in FUSED else {}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        supernet, opt=recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay or 1.0,  # 0 would make no groups
        momentum=recipe.momentum, filter_bias_and_bn=not recipe.decay_all, **fused,
    )  # fmt: skip
    for group in optimizer.param_groups:
        if group["weight_decay"]:
            group["weight_decay"] = recipe.weight_decay
    if isinstance(optimizer, torch.optim.SGD):
        _begin_momentum(optimizer)
    return optimizer


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Zeros, which give the same first step as none.

    Torch's fused SGD cannot step parameters with a buffer and others without one together, and a parameter may be touched for the first
    time long after others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())


def limit_gradient(supernet: Supernet, recipe: TrainConfig) -> Tensor:
    """Clip the gradient as the recipe says, by norm and then by value; returns its norm before, a scalar on the device."""
    parameters = [parameter for parameter in supernet.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, recipe.clip_norm, norm)
    if recipe.clip_value is not None:
        torch.nn.utils.clip_grad_value_(parameters, recipe.clip_value)
    return norm
