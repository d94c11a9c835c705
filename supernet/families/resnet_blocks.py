"""The blocks of residual networks: convolutions of the stem, bottleneck and basic blocks, head.

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

from timm.layers import DropPath
from torch import Tensor, nn

from supernet.blocks import ACTIVATIONS, Classifier, ConvNorm, Downsample
from supernet.family import BlockSpec
from supernet.operations import Operations, Value

Kind = Literal["bottleneck", "basic"]
"""`bottleneck`: 1x1, 3x3 with the stride, 1x1. `basic`: 3x3 with the stride, 3x3."""


@dataclass(frozen=True, slots=True)
class StemSpec(BlockSpec):
    """3x3 convolution, norm, activation; then 3x3 max pooling of stride 2 where `max_pool`."""

    in_width: int
    width: int
    stride: int
    activation: str
    max_pool: bool = False

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain piece of the stem; there is nothing to drop."""
        block = ConvNorm(self.in_width, self.width, 3, stride=self.stride, act=ACTIVATIONS[self.activation]())
        if self.max_pool:
            block.add_module("pool", nn.MaxPool2d(3, stride=2, padding=1))
        return block

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = ops.activation(self.activation, ops.conv(ops.input, self.width, 3, stride=self.stride, norm=True))
        if self.max_pool:
            size = (x.size - 1) // 2 + 1
            ops.apply(
                "MaxPool", (x,), (self.width, size, size), kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1),
                dilations=(1, 1), auto_pad="NOTSET", ceil_mode=0, storage_order=0,
            )  # fmt: skip
        return ops


@dataclass(frozen=True, slots=True)
class ResidualStemSpec(BlockSpec):
    """3x3 convolution, norm and activation, added to what they read: the optional part of Once-for-All's stem."""

    width: int
    activation: str

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain piece of the stem; there is nothing to drop."""
        return ResidualStem(self)

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.width, self.in_size)
        ops.add(ops.activation(self.activation, ops.conv(ops.input, self.width, 3, norm=True)), ops.input)
        return ops


class ResidualStem(nn.Module):
    """The block of a `ResidualStemSpec`. Its weights do not bear the names of a stem's other pieces, which do not add."""

    def __init__(self, spec: ResidualStemSpec) -> None:
        super().__init__()
        self.branch = ConvNorm(spec.width, spec.width, 3, act=ACTIVATIONS[spec.activation]())

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Branch plus input."""
        output: Tensor = self.branch(x_nchw) + x_nchw
        return output


@dataclass(frozen=True, slots=True)
class ResidualSpec(BlockSpec):
    """Residual block: two or three convolutions with `mid` channels within, plus the shortcut, then the activation.

    Where it is `projected`, the shortcut averages (where `stride` > 1), then changes the width by a 1x1 convolution with norm.
    `expand_ratio` is what made `mid`.
    """

    kind: Kind
    in_width: int
    mid: int
    width: int
    expand_ratio: float
    stride: int
    projected: bool
    activation: str

    regulariser: ClassVar[str | None] = "drop_path"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain block; `drop` is the rate at which its residual branch is dropped per image."""
        return Residual(self, drop)

    def operations(self) -> Operations:
        """What `Residual.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        y = shortcut = ops.input
        if self.kind == "bottleneck":
            y = self._within(ops, y, 1, 1)
            y = self._within(ops, y, 3, self.stride)
            y = ops.conv(y, self.width, norm=True)
        else:
            y = self._within(ops, y, 3, self.stride)
            y = ops.conv(y, self.width, 3, norm=True)
        if self.projected:
            shortcut = ops.pool(shortcut, self.stride) if self.stride > 1 else shortcut
            shortcut = ops.conv(shortcut, self.width, norm=True)
        ops.activation(self.activation, ops.add(y, shortcut))
        return ops

    def _within(self, ops: Operations, x: Value, kernel_size: int, stride: int) -> Value:
        return ops.activation(self.activation, ops.conv(x, self.mid, kernel_size, stride=stride, norm=True))


class Residual(nn.Module):
    """The block of a `ResidualSpec`."""

    def __init__(self, spec: ResidualSpec, drop: float) -> None:
        super().__init__()
        act, mid, stride = ACTIVATIONS[spec.activation], spec.mid, spec.stride
        self.middle: nn.Module = nn.Identity()
        if spec.kind == "bottleneck":
            self.first = ConvNorm(spec.in_width, mid, act=act())
            self.middle = ConvNorm(mid, mid, 3, stride=stride, act=act())
            self.last = ConvNorm(mid, spec.width)
        else:
            self.first = ConvNorm(spec.in_width, mid, 3, stride=stride, act=act())
            self.last = ConvNorm(mid, spec.width, 3)
        self.drop = DropPath(drop) if drop else nn.Identity()
        self.pool = Downsample(stride) if stride > 1 else nn.Identity()
        self.shortcut = ConvNorm(spec.in_width, spec.width) if spec.projected else nn.Identity()
        self.act = act()

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Residual branch plus shortcut, activated."""
        branch = self.drop(self.last(self.middle(self.first(x_nchw))))
        output: Tensor = self.act(branch + self.shortcut(self.pool(x_nchw)))
        return output


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """Pooling over the map, classifier."""

    in_width: int
    classes: int

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        parts: list[tuple[str, nn.Module]] = [
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("drop", nn.Dropout(drop) if drop else nn.Identity()),
            ("classifier", Classifier(self.in_width, self.classes)),
        ]
        return nn.Sequential(OrderedDict(parts))

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        ops.linear(ops.flatten(ops.mean(ops.input)), self.classes)
        return ops
