"""What a child normalises by while it is trained: its whole batch, groups of it, or the batches of all processes.

With groups a step does not depend on how its batch is divided: gradients of one process, of several, and of micro-batches one
after another are the same. Axes: N batch, C channels, then space.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from supernet.distributed import gathered, processes, summed_


@dataclass(frozen=True, slots=True)
class Statistics:
    """Which images a batch norm takes its mean and variance over. By default, all that a process has at once.

    `group`: each run of `group` consecutive images by its own (ghost batches, Hoffer et al. 2017). `synchronised`: the images of all
    processes together. Raises `ValueError` for a group below 1, or both.
    """

    group: int | None = None
    synchronised: bool = False

    def __post_init__(self) -> None:
        if self.group is not None and self.group < 1:
            raise ValueError(f"a group of batch statistics has at least 1 image, but got {self.group}")
        if self.group is not None and self.synchronised:
            raise ValueError(f"batch statistics are of groups or synchronised, but got both (group {self.group}): choose one")


OF_BATCH = Statistics()


def normalising_by(statistics: Statistics, module: nn.Module) -> nn.Module:
    """`module` with its batch norms, at whatever depth, normalising by `statistics`; changed in place unless it is one itself."""
    if statistics == OF_BATCH:
        return module
    if isinstance(module, _BatchNorm):
        return BatchNorm(module, statistics)
    for name, child in module.named_children():
        module.add_module(name, normalising_by(statistics, child))
    return module


class BatchNorm(_BatchNorm):
    """A batch norm for training, over the scale and shift of `norm`; it keeps no running statistics."""

    def __init__(self, norm: _BatchNorm, statistics: Statistics) -> None:
        super().__init__(norm.num_features, norm.eps, affine=False, track_running_stats=False)
        self.weight, self.bias, self.statistics = norm.weight, norm.bias, statistics

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, C, ...) as it came. Raises `ValueError` where N is no multiple of the group."""
        if self.statistics.group is not None:
            return grouped_batch_norm(x, self.weight, self.bias, self.eps, self.statistics.group)
        if processes() > 1:
            normalised: Tensor = _Synchronised.apply(x, self.weight, self.bias, self.eps)
            return normalised
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)


def grouped_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: int) -> Tensor:
    """Each run of `group` images normalised by its own mean and variance. Raises `ValueError` where N is no multiple of `group`."""
    if len(x) % group:
        raise ValueError(f"a batch is divided into groups of {group} images for batch statistics, but has {len(x)}")
    parts = [F.batch_norm(part, None, None, weight, bias, training=True, eps=eps) for part in torch.split(x, group)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class _Synchronised(torch.autograd.Function):
    """Batch norm over the images of all processes (Ioffe & Szegedy 2015: algorithm 1, and its gradients).

    Means and variances are merged by Chan et al. (1979) after one gathering of 2C + 1 numbers; the backward pass sums 2C. These are
    in fp32 at least. Scale and shift get the gradients of this process's images, like every parameter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        axes, channels, shape = _all_but_channels(x), x.shape[1], (1, -1, *[1] * (x.ndim - 2))
        wide = _wide(x)
        mean = wide.mean(axes)
        var = (wide - mean.view(shape)).square_().mean(axes)  # torch.var_mean takes 6 times as long on a CPU
        of_all = gathered(torch.cat([mean, var, mean.new_tensor([x.numel() / channels])]))
        means, variances, counts = torch.split(of_all, [channels, channels, 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, count = ctx.saved_tensors
        axes, shape = _all_but_channels(x), (1, -1, *[1] * (x.ndim - 2))
        wide = _wide(grad)
        centred = _wide(x) - mean.view(shape)
        own = torch.stack([wide.sum(axes), (wide * centred).sum(axes) * rstd])
        shift, scale = summed_(own.clone()) / count
        x_grad = (wide - shift.view(shape)).sub_(centred.mul_((scale * rstd).view(shape)))
        x_grad *= (rstd if weight is None else rstd * weight).view(shape)
        of_scale, of_shift = (None, None) if weight is None else (own[1].to(weight.dtype), own[0].to(weight.dtype))
        return x_grad.to(x.dtype), of_scale, of_shift, None


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
