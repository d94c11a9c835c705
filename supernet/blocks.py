"""Parts that the blocks of every family are made of: plain modules, no elasticity anywhere.

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU, "hard_swish": nn.Hardswish, "gelu": nn.GELU, "swish": nn.SiLU
}  # fmt: skip
"""By name, in the order of the memory that they hold (swish is two operators when exported)."""


def divisible(channels: float, by: int = 8) -> int:
    """Nearest multiple of `by`, but never more than 10 % below `channels` (MobileNetV2's rule for channel counts)."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class ConvNorm(nn.Sequential):
    """Convolution without bias, batch norm and an optional activation, under the names `conv`, `norm`, `act`."""

    def __init__(
        self, in_: int, out: int, kernel_size: int = 1, *, stride: int = 1, groups: int = 1, act: nn.Module | None = None
    ) -> None:
        conv = nn.Conv2d(in_, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        parts: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(out))]
        super().__init__(OrderedDict([*parts, ("act", act)] if act is not None else parts))


class LinearNorm(nn.Sequential):
    """Linear layer without bias, batch norm and an optional activation, under the names `linear`, `norm`, `act`."""

    def __init__(self, in_: int, out: int, *, act: nn.Module | None = None) -> None:
        parts: list[tuple[str, nn.Module]] = [("linear", nn.Linear(in_, out, bias=False)), ("norm", nn.BatchNorm1d(out))]
        super().__init__(OrderedDict([*parts, ("act", act)] if act is not None else parts))


class Classifier(nn.Linear):
    """The last layer: begins small, so that the first gradients of the summed children stay near 1 in norm."""

    counts = "classes"
    """What its outputs are; a part of them is never taken from another network."""

    def initial(self, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal, 0.01."""
        return torch.empty(shape).normal_(0, 0.01, generator=generator)


class SqueezeExcite(nn.Module):
    """Channel gate: mean over the map, two 1x1 convolutions, hard sigmoid (Hu et al. 2018; hard as in MobileNetV3)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Scale the channels of `x_nchw`."""
        gate = self.expand(self.reduce(x_nchw.mean((2, 3), keepdim=True)).relu())
        return x_nchw * nn.functional.hardsigmoid(gate)


class Downsample(nn.AvgPool2d):
    """Average pooling that keeps a last partial window, averaging what is there: ceil(size / stride) pixels, as a convolution."""

    def __init__(self, stride: int) -> None:
        super().__init__(stride, ceil_mode=True, count_include_pad=False)


def initial(module: nn.Module, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """First value of a stored parameter, by the kind of module that owns it.

    Norms: scale 1. Every bias and shift: 0. Then as the module's own `initial(parameter, shape, generator)` says, where it has
    one. Convolutions: normal, variance 2 / fan-out (He et al. 2015; EfficientNet's choice). Linear layers: normal, variance
    2 / fan-in. Raises `TypeError` for parameters of other modules without an `initial`.
    """
    if isinstance(module, _BatchNorm | nn.LayerNorm) and parameter == "weight":
        return torch.ones(shape)
    if parameter == "bias":
        return torch.zeros(shape)
    own: Callable[[str, torch.Size, torch.Generator], Tensor] | None = getattr(module, "initial", None)
    if own is not None:
        return own(parameter, shape, generator)
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        transposed = isinstance(module, nn.ConvTranspose2d)
        fan_out = shape[1 if transposed else 0] * math.prod(shape[2:]) // (shape[0] if module.groups > 1 else 1)
        return torch.empty(shape).normal_(0, math.sqrt(2 / max(1, fan_out)), generator=generator)
    if isinstance(module, nn.Linear):
        return torch.empty(shape).normal_(0, math.sqrt(2 / shape[1]), generator=generator)
    raise TypeError(f"no rule to initialise {parameter!r} of {type(module).__name__}: give it a method `initial`")
