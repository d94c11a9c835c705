"""Inverted residuals with squeeze-excite: MobileNetV2/V3, EfficientNet, BigNAS, AttentiveNAS. Choices are made per stage.

In-block details follow AttentiveNAS (Wang et al. 2021, arXiv 2011.09011): the shortcut is kept at every change of size (average
pool) and of width (1x1 convolution without norm); squeeze-excite is relu + hard sigmoid on a quarter of the expanded channels;
the head expands by `expand_ratio`, pools, and widens once more without norm (MobileNetV3).

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, StrictBool, StrictInt
from timm.layers import DropPath
from torch import Tensor, nn

from supernet.arch import Choice
from supernet.blocks import Classifier, ConvNorm, Downsample, SqueezeExcite, divisible
from supernet.config import Config
from supernet.errors import InputError
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Positive, Slot
from supernet.operations import Operations, Value


def _odd(kernels: tuple[int, ...]) -> tuple[int, ...]:
    if any(kernel % 2 == 0 or kernel > 15 for kernel in kernels):
        raise ValueError(
            "kernel sizes must be odd (a small kernel is the centre of a large one) and at most 15: use 1, 3, 5 or 7"
        )
    return kernels


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 100:
        raise ValueError("a stage has at most 100 blocks: use smaller depths")
    return depths


Stride = Annotated[StrictInt, Field(ge=1, le=4)]


class StemConfig(Config):
    """First convolution."""

    width: Choices
    stride: Stride = 2


class StageConfig(Config):
    """A stage of blocks that share width, kernel and expansion; its first block strides."""

    width: Choices
    depth: Annotated[Choices, AfterValidator(_shallow)]
    kernel_size: Annotated[Choices, AfterValidator(_odd)]
    expand_ratio: Choices
    stride: Stride
    squeeze_excite: StrictBool = False


class HeadConfig(Config):
    """1x1 convolution to `expand_ratio` times the last width, pooling, 1x1 convolution to `width`, classifier."""

    expand_ratio: Positive = 6
    width: Choices


class MBConvConfig(FamilyConfig):
    """A space of this family, as its YAML has it."""

    family: Literal["mbconv"]
    resolution: Choices
    stem: StemConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=20)]
    head: HeadConfig


@dataclass(frozen=True, slots=True)
class StemSpec(BlockSpec):
    """3x3 convolution, norm, swish."""

    in_channels: int
    width: int
    stride: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain stem; there is nothing to drop."""
        return ConvNorm(self.in_channels, self.width, 3, stride=self.stride, act=nn.SiLU())

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_channels, self.in_size)
        ops.swish(ops.conv(ops.input, self.width, 3, stride=self.stride, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class MBConvSpec(BlockSpec):
    """Expand (1x1), depthwise, gate, project (1x1), plus the shortcut."""

    in_width: int
    width: int
    kernel_size: int
    stride: int
    expand_ratio: int
    squeeze_excite: bool

    regulariser: ClassVar[str | None] = "drop_path"

    @property
    def expanded(self) -> int:
        """Channels of the depthwise convolution; without an expansion they are the input's, whatever these are divisible by."""
        return self.in_width if self.expand_ratio == 1 else divisible(self.in_width * self.expand_ratio)

    @property
    def squeezed(self) -> int:
        """Channels within the gate."""
        return divisible(self.expanded // 4)

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain block; `drop` is the rate at which its residual branch is dropped per image."""
        return MBConv(self, drop)

    def operations(self) -> Operations:
        """What `MBConv.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = y = ops.input
        if self.expand_ratio != 1:
            y = ops.swish(ops.conv(y, self.expanded, norm=True))
        y = ops.swish(ops.conv(y, self.expanded, self.kernel_size, stride=self.stride, groups=self.expanded, norm=True))
        if self.squeeze_excite:
            y = ops.mul(y, self._gate(ops, y))
        y = ops.conv(y, self.width, norm=True)
        shortcut = ops.pool(x, self.stride) if self.stride > 1 else x
        if self.in_width != self.width:
            shortcut = ops.conv(shortcut, self.width)
        ops.add(y, shortcut)
        return ops

    def _gate(self, ops: Operations, y: Value) -> Value:
        squeezed = ops.pointwise("relu", ops.conv(ops.mean(y), self.squeezed, bias=True))
        return ops.pointwise("hard_sigmoid", ops.conv(squeezed, self.expanded, bias=True))


class MBConv(nn.Module):
    """The block of an `MBConvSpec`."""

    def __init__(self, spec: MBConvSpec, drop: float) -> None:
        super().__init__()
        wide = spec.expanded
        self.expand = ConvNorm(spec.in_width, wide, act=nn.SiLU()) if spec.expand_ratio != 1 else nn.Identity()
        self.depthwise = ConvNorm(wide, wide, spec.kernel_size, stride=spec.stride, groups=wide, act=nn.SiLU())
        self.gate = SqueezeExcite(wide, spec.squeezed) if spec.squeeze_excite else nn.Identity()
        self.project = ConvNorm(wide, spec.width)
        self.drop = DropPath(drop) if drop else nn.Identity()
        self.pool = Downsample(spec.stride) if spec.stride > 1 else nn.Identity()
        same = spec.in_width == spec.width
        self.shortcut = nn.Identity() if same else nn.Conv2d(spec.in_width, spec.width, 1, bias=False)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Residual branch plus shortcut."""
        branch: Tensor = self.project(self.gate(self.depthwise(self.expand(x_nchw))))
        shortcut: Tensor = self.shortcut(self.pool(x_nchw))
        output: Tensor = self.drop(branch) + shortcut
        return output


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """1x1 convolution, pooling, 1x1 convolution without norm, classifier."""

    in_width: int
    expand_ratio: int
    width: int
    classes: int

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        return Head(self, drop)

    def operations(self) -> Operations:
        """What `Head.forward` does, in order."""
        ops = Operations(self.in_width, self.in_size)
        x = ops.swish(ops.conv(ops.input, self.expand_ratio * self.in_width, norm=True))
        x = ops.swish(ops.conv(ops.mean(x), self.width))
        ops.linear(ops.flatten(x), self.classes)
        return ops


class Head(nn.Module):
    """The block of a `HeadSpec`."""

    def __init__(self, spec: HeadSpec, drop: float) -> None:
        super().__init__()
        wide = spec.expand_ratio * spec.in_width
        self.expand = ConvNorm(spec.in_width, wide, act=nn.SiLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.widen = nn.Sequential(nn.Conv2d(wide, spec.width, 1, bias=False), nn.SiLU())
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.classifier = Classifier(spec.width, spec.classes)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Logits, shape (N, classes)."""
        features: Tensor = self.widen(self.pool(self.expand(x_nchw))).flatten(1)
        logits: Tensor = self.classifier(self.drop(features))
        return logits


STAGE_CHOICES = ("width", "depth", "kernel_size", "expand_ratio")


@dataclass(frozen=True)
class MBConvFamily(Family):
    """Slots of a chain: stem, stages of inverted residuals, head."""

    config: MBConvConfig

    zero_init: ClassVar[tuple[str, ...]] = ("project.norm.weight",)

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, then stem, stages and head."""
        stages = [
            Dimension(f"stage{number}.{name}", getattr(stage, name))
            for number, stage in enumerate(self.config.stages, start=1)
            for name in STAGE_CHOICES
        ]
        first = (Dimension("resolution", self.config.resolution), Dimension("stem.width", self.config.stem.width))
        return (*first, *stages, Dimension("head.width", self.config.head.width))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every block of the deepest child."""
        size = ("resolution", "resolution")
        slots, before = [Slot("stem", (size, ("width", "stem.width")))], "stem.width"
        for number, stage in enumerate(self.config.stages, start=1):
            here = {name: f"stage{number}.{name}" for name in STAGE_CHOICES}
            roles = [(name, dimension) for name, dimension in here.items() if name != "depth"]
            for index in range(max(stage.depth)):
                in_width = ("in_width", before if index == 0 else here["width"])
                needs = (here["depth"], index + 1) if index else None
                slots.append(Slot(f"stage{number}_{index}", (size, in_width, *roles), needs))
            before = here["width"]
        return (*slots, Slot("head", (size, ("in_width", before), ("width", "head.width"))))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`."""
        cast = slot.cast(choices)
        if slot.name == "stem":
            return StemSpec(self.in_channels, cast["width"], self.config.stem.stride, in_size=cast["resolution"])
        if slot.name == "head":
            size = self.size(cast["resolution"], len(self.config.stages))
            return HeadSpec(cast["in_width"], self.config.head.expand_ratio, cast["width"], self.classes, in_size=size)
        number, index = (int(part) for part in slot.name.removeprefix("stage").split("_"))
        stage = self.config.stages[number - 1]
        return MBConvSpec(
            in_width=cast["in_width"],
            width=cast["width"],
            kernel_size=cast["kernel_size"],
            stride=stage.stride if index == 0 else 1,
            expand_ratio=cast["expand_ratio"],
            squeeze_excite=stage.squeeze_excite,
            in_size=self.size(cast["resolution"], number - 1 if index == 0 else number),
        )

    def size(self, resolution: int, stages: int) -> int:
        """Pixels of a side of the map after the stem and the first `stages` stages."""
        strides = [self.config.stem.stride, *(stage.stride for stage in self.config.stages[:stages])]
        return reduce(lambda size, stride: math.ceil(size / stride), strides, resolution)

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from `resolution` and the lists `width` (stem, stages, head), `depth`, `kernel_size`, `expand_ratio` (stages)."""
        count = len(self.config.stages)
        lengths = {"width": count + 2, "depth": count, "kernel_size": count, "expand_ratio": count}
        missing = [key for key in ("resolution", *lengths) if key not in entry]
        if missing:
            raise InputError(
                f"an entry of a table needs resolution, {', '.join(lengths)}, but {missing[0]!r} is missing: add it"
            )
        lists: dict[str, list[Choice]] = {}
        for key, length in lengths.items():
            value = entry[key]
            if not isinstance(value, list) or len(value) != length:
                raise InputError(
                    f"{key!r} must be a list of {length} numbers for the space {self.config.name}, but got {value!r}"
                )
            lists[key] = value
        resolution = entry["resolution"]
        if not isinstance(resolution, int):
            raise InputError(f"'resolution' must be a whole number of pixels, but got {resolution!r}")
        choices: dict[str, Choice] = {
            "resolution": resolution,
            "stem.width": lists["width"][0],
            "head.width": lists["width"][-1],
        }
        for number in range(1, count + 1):
            choices[f"stage{number}.width"] = lists["width"][number]
            choices |= {f"stage{number}.{name}": lists[name][number - 1] for name in STAGE_CHOICES[1:]}
        return choices

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row a stage: input pixels, width, depth, kernel, expansion, stride, gate."""
        sizes = [int(resolution) for resolution in choices["resolution"]]
        stem, head = self.config.stem, self.config.head
        table: list[dict[str, object]] = [
            {"stage": "stem", "block": "conv 3x3", "in_size": sizes, "width": choices["stem.width"], "stride": stem.stride}
        ]
        for number, stage in enumerate(self.config.stages, start=1):
            table.append({
                "stage": f"stage{number}",
                "block": "MBConv + SE" if stage.squeeze_excite else "MBConv",
                "in_size": [self.size(size, number - 1) for size in sizes],
                **{name: choices[f"stage{number}.{name}"] for name in STAGE_CHOICES},
                "stride": stage.stride,
            })  # fmt: skip
        last = [self.size(size, len(self.config.stages)) for size in sizes]
        table.append({"stage": "head", "block": "conv 1x1, pool, conv 1x1, linear", "in_size": last,
                      "width": choices["head.width"], "expand_ratio": (head.expand_ratio,)})  # fmt: skip
        return table
