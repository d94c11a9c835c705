"""The blocks of inverted-residual networks: stem, MBConv, and the two heads of MobileNetV3 and EfficientNet.

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar, Literal

from timm.layers import DropPath
from torch import Tensor, nn

from supernet.blocks import ACTIVATIONS, Classifier, ConvNorm, Downsample, SqueezeExcite, divisible
from supernet.family import BlockSpec
from supernet.operations import Operations, Value

Gate = Literal["mobilenetv3", "efficientnet"]
"""Squeeze-excite. `mobilenetv3`: a quarter of the expanded channels, relu, hard sigmoid (Howard et al. 2019). `efficientnet`:
a quarter of the block's input channels, the block's activation, sigmoid (Tan & Le 2019)."""

Shortcut = Literal["projected", "identity"]
"""`projected`: kept at every change of size (average pool) and width (1x1 convolution without norm). `identity`: only where the
block changes neither, else there is none (Sandler et al. 2018)."""


def multiple(channels: int, of: int | None) -> int:
    """`channels` rounded up to a multiple of `of`; as they are where it is None."""
    return channels if of is None else -(-channels // of) * of


@dataclass(frozen=True, slots=True)
class StemSpec(BlockSpec):
    """3x3 convolution, norm, activation."""

    in_channels: int
    width: int
    stride: int
    activation: str = "swish"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain stem; there is nothing to drop."""
        return ConvNorm(self.in_channels, self.width, 3, stride=self.stride, act=ACTIVATIONS[self.activation]())

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_channels, self.in_size)
        ops.activation(self.activation, ops.conv(ops.input, self.width, 3, stride=self.stride, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class MBConvSpec(BlockSpec):
    """Expand (1x1), depthwise, gate, project (1x1), plus the shortcut.

    The widths are as they stand in the network; `channel_divisor` rounds the expanded channels up (None: it does not).
    """

    in_width: int
    width: int
    kernel_size: int
    stride: int
    expand_ratio: float
    squeeze_excite: bool
    activation: str = "swish"
    gate: Gate = "mobilenetv3"
    shortcut: Shortcut = "projected"
    channel_divisor: int | None = None

    regulariser: ClassVar[str | None] = "drop_path"

    @property
    def expanded(self) -> int:
        """Channels of the depthwise convolution; without an expansion they are the input's, whatever these are divisible by."""
        if self.expand_ratio == 1:
            return self.in_width
        return multiple(divisible(self.in_width * self.expand_ratio), self.channel_divisor)

    @property
    def squeezed(self) -> int:
        """Channels within the gate, which no divisor rounds: they are few, and of one pixel."""
        return divisible(self.expanded // 4) if self.gate == "mobilenetv3" else max(1, int(self.in_width * 0.25))

    @property
    def adds(self) -> bool:
        """Whether there is a shortcut."""
        return self.shortcut == "projected" or (self.stride == 1 and self.in_width == self.width)

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain block; `drop` is the rate at which its residual branch is dropped per image."""
        return MBConv(self, drop)

    def operations(self) -> Operations:
        """What `MBConv.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = y = ops.input
        if self.expand_ratio != 1:
            y = ops.activation(self.activation, ops.conv(y, self.expanded, norm=True))
        y = ops.conv(y, self.expanded, self.kernel_size, stride=self.stride, groups=self.expanded, norm=True)
        y = ops.activation(self.activation, y)
        if self.squeeze_excite:
            y = ops.mul(y, self._gate(ops, y))
        y = ops.conv(y, self.width, norm=True)
        if self.adds:
            shortcut = ops.pool(x, self.stride) if self.stride > 1 else x
            if self.in_width != self.width:
                shortcut = ops.conv(shortcut, self.width)
            ops.add(y, shortcut)
        return ops

    def _gate(self, ops: Operations, y: Value) -> Value:
        hard = self.gate == "mobilenetv3"
        squeezed = ops.activation("relu" if hard else self.activation, ops.conv(ops.mean(y), self.squeezed, bias=True))
        return ops.pointwise("hard_sigmoid" if hard else "sigmoid", ops.conv(squeezed, self.expanded, bias=True))


class MBConv(nn.Module):
    """The block of an `MBConvSpec`."""

    def __init__(self, spec: MBConvSpec, drop: float) -> None:
        super().__init__()
        wide, act = spec.expanded, ACTIVATIONS[spec.activation]
        self.expand = ConvNorm(spec.in_width, wide, act=act()) if spec.expand_ratio != 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, spec.kernel_size, stride=spec.stride, groups=wide, act=act())
        self.gate = _gate(spec)
        self.project = ConvNorm(wide, spec.width)
        self.adds = spec.adds
        self.drop = DropPath(drop) if drop and spec.adds else nn.Identity()  # without a shortcut nothing would be left
        self.pool = Downsample(spec.stride) if spec.stride > 1 and spec.adds else nn.Identity()
        same = spec.in_width == spec.width or not spec.adds
        self.shortcut = nn.Identity() if same else nn.Conv2d(spec.in_width, spec.width, 1, bias=False)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Residual branch, plus the shortcut where there is one."""
        branch: Tensor = self.project(self.gate(self.depthwise(self.expand(x_nchw))))
        if not self.adds:
            return branch
        shortcut: Tensor = self.shortcut(self.pool(x_nchw))
        output: Tensor = self.drop(branch) + shortcut
        return output


def _gate(spec: MBConvSpec) -> nn.Module:
    if not spec.squeeze_excite:
        return nn.Identity()
    if spec.gate == "mobilenetv3":
        return SqueezeExcite(spec.expanded, spec.squeezed)
    return SoftGate(spec.expanded, spec.squeezed, ACTIVATIONS[spec.activation]())


class SoftGate(SqueezeExcite):
    """EfficientNet's channel gate: the block's own activation, and a sigmoid."""

    def __init__(self, channels: int, squeezed: int, act: nn.Module) -> None:
        super().__init__(channels, squeezed)
        self.act = act

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Scale the channels of `x_nchw`."""
        gate: Tensor = self.expand(self.act(self.reduce(x_nchw.mean((2, 3), keepdim=True))))
        return x_nchw * gate.sigmoid()


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """MobileNetV3's: 1x1 convolution with norm, pooling, 1x1 convolution without norm, classifier.

    The first has `expand_width` channels; where that is None, `expand_ratio` times `in_width`, rounded up by `channel_divisor`.
    """

    in_width: int
    expand_ratio: int
    width: int
    classes: int
    expand_width: int | None = None
    bias: bool = False
    activation: str = "swish"
    channel_divisor: int | None = None

    regulariser: ClassVar[str | None] = "dropout"

    @property
    def expanded(self) -> int:
        """Channels that are pooled."""
        wide = self.expand_ratio * self.in_width if self.expand_width is None else self.expand_width
        return multiple(wide, self.channel_divisor)

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        return Head(self, drop)

    def operations(self) -> Operations:
        """What `Head.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = ops.activation(self.activation, ops.conv(ops.input, self.expanded, norm=True))
        x = ops.activation(self.activation, ops.conv(ops.mean(x), self.width, bias=self.bias))
        ops.linear(ops.flatten(x), self.classes)
        return ops


class Head(nn.Module):
    """The block of a `HeadSpec`."""

    def __init__(self, spec: HeadSpec, drop: float) -> None:
        super().__init__()
        act = ACTIVATIONS[spec.activation]
        self.expand = ConvNorm(spec.in_width, spec.expanded, act=act())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.widen = nn.Sequential(nn.Conv2d(spec.expanded, spec.width, 1, bias=spec.bias), act())
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.classifier = Classifier(spec.width, spec.classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Logits, shape (N, classes)."""
        features: Tensor = self.widen(self.pool(self.expand(x_nchw))).flatten(1)
        logits: Tensor = self.classifier(self.drop(features))
        return logits


@dataclass(frozen=True, slots=True)
class ShortHeadSpec(BlockSpec):
    """EfficientNet's head: 1x1 convolution with norm to `width`, pooling, classifier."""

    in_width: int
    width: int
    classes: int
    activation: str = "swish"

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        parts: list[tuple[str, nn.Module]] = [
            ("expand", ConvNorm(self.in_width, self.width, act=ACTIVATIONS[self.activation]())),
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("drop", nn.Dropout(drop) if drop else nn.Identity()),
            ("classifier", Classifier(self.width, self.classes)),
        ]
        return nn.Sequential(OrderedDict(parts))

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = ops.activation(self.activation, ops.conv(ops.input, self.width, norm=True))
        ops.linear(ops.flatten(ops.mean(x)), self.classes)
        return ops
