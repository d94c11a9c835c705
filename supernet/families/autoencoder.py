"""Convolutional encoder and decoder for image-to-image regression: a chain that narrows to a bottleneck and widens again.

Encoder: stem, then stages of a strided convolution and residual blocks (two convolutions, He et al. 2016). Bottleneck: 1x1
convolutions to few channels and back. The decoder mirrors the encoder: transposed convolutions (kernel and stride 2, so no pixel is
written twice) and residual blocks, last a 3x3 convolution to the image's channels. There are no shortcuts from encoder to decoder:
all that the decoder knows goes through the bottleneck. Output: shape (N, channels of the image, resolution, resolution).

Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import AfterValidator, Field, field_validator, model_validator
from timm.layers import DropPath
from torch import Tensor, nn

from supernet.arch import Choice
from supernet.blocks import ConvNorm
from supernet.config import Config
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Slot
from supernet.operations import Operations


def _odd(kernels: tuple[int, ...]) -> tuple[int, ...]:
    if any(kernel % 2 == 0 or kernel > 15 for kernel in kernels):
        raise ValueError("kernel sizes must be odd (a small kernel is the centre of a large one) and at most 15: use 3, 5 or 7")
    return kernels


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 100:
        raise ValueError("a stage has at most 100 blocks: use smaller depths")
    return depths


Depths = Annotated[Choices, AfterValidator(_shallow)]


class StemConfig(Config):
    """First convolution; the decoder ends with maps of the same width."""

    width: Choices


class StageConfig(Config):
    """A halving of the map in the encoder, and the doubling in the decoder that mirrors it.

    `width` is that of the smaller maps, in both. Depths count the strided or transposed convolution and the residual blocks after it.
    """

    width: Choices
    depth: Depths
    decoder_depth: Depths
    kernel_size: Annotated[Choices, AfterValidator(_odd)]


class BottleneckConfig(Config):
    """Channels of the smallest maps, through which all passes."""

    width: Choices


class AutoencoderConfig(FamilyConfig):
    """A space of this family, as its YAML has it. `classes` has no meaning here: what the data has is left out."""

    family: Literal["autoencoder"]
    resolution: Choices
    stem: StemConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=8)]
    bottleneck: BottleneckConfig

    @field_validator("classes")
    @classmethod
    def _no_classes(cls, _: int) -> int:
        default: int = FamilyConfig.model_fields["classes"].default
        return default  # the networks, and so the key of the space, are the same whatever classes the data has

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        total = 2 ** len(self.stages)
        odd = next((size for size in self.resolution if size % total), None)
        if odd is not None:
            raise ValueError(
                f"resolution must be a multiple of {total} ({len(self.stages)} stages halve the map), but got {odd}: "
                f"use {max(1, round(odd / total)) * total}, or fewer stages"
            )
        for number, stage in enumerate(self.stages, start=1):
            size, kernel = self.resolution[0] // 2**number, stage.kernel_size[-1]
            if kernel > 2 * size - 1 and kernel > 1:
                raise ValueError(
                    f"stages.{number - 1}.kernel_size: at resolution {self.resolution[0]} the map of stage {number} has {size} px, "
                    f"where the border of a kernel of {kernel} sees padding only: use {2 * size - 1} at most, or fewer stages"
                )
        return self


@dataclass(frozen=True, slots=True)
class ConvSpec(BlockSpec):
    """Convolution, norm, relu: the stem (stride 1) and the first of an encoder's stage (stride 2)."""

    in_width: int
    width: int
    kernel_size: int
    stride: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain convolution; there is nothing to drop."""
        return ConvNorm(self.in_width, self.width, self.kernel_size, stride=self.stride, act=nn.ReLU())

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        ops.pointwise("relu", ops.conv(ops.input, self.width, self.kernel_size, stride=self.stride, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class ResidualSpec(BlockSpec):
    """Two convolutions of the same width, plus the input, relu."""

    width: int
    kernel_size: int

    regulariser: ClassVar[str | None] = "drop_path"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain block; `drop` is the rate at which its residual branch is dropped per image."""
        return Residual(self, drop)

    def operations(self) -> Operations:
        """What `Residual.forward` does, in order."""
        ops = Operations(self.width, self.in_size)
        y = ops.pointwise("relu", ops.conv(ops.input, self.width, self.kernel_size, norm=True))
        y = ops.conv(y, self.width, self.kernel_size, norm=True)
        ops.pointwise("relu", ops.add(y, ops.input))
        return ops


class Residual(nn.Module):
    """The block of a `ResidualSpec`."""

    def __init__(self, spec: ResidualSpec, drop: float) -> None:
        super().__init__()
        self.first = ConvNorm(spec.width, spec.width, spec.kernel_size, act=nn.ReLU())
        self.second = ConvNorm(spec.width, spec.width, spec.kernel_size)
        self.drop = DropPath(drop) if drop else nn.Identity()

    def forward(self, x_nchw: Tensor) -> Tensor:
        """Residual branch plus input."""
        branch: Tensor = self.drop(self.second(self.first(x_nchw)))
        return (branch + x_nchw).relu()


@dataclass(frozen=True, slots=True)
class BottleneckSpec(BlockSpec):
    """1x1 convolution and norm to few channels, 1x1 convolution, norm and relu back."""

    in_width: int
    width: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """Plain convolutions; there is nothing to drop."""
        return nn.Sequential(ConvNorm(self.in_width, self.width), ConvNorm(self.width, self.in_width, act=nn.ReLU()))

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        y = ops.conv(ops.input, self.width, norm=True)
        ops.pointwise("relu", ops.conv(y, self.in_width, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class UpSpec(BlockSpec):
    """Transposed convolution that doubles the map, relu."""

    in_width: int
    width: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain transposed convolution; there is nothing to drop."""
        return nn.Sequential(nn.ConvTranspose2d(self.in_width, self.width, 2, stride=2), nn.ReLU())

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        ops.pointwise("relu", ops.conv_transpose(ops.input, self.width, 2, bias=True))
        return ops


@dataclass(frozen=True, slots=True)
class ImageSpec(BlockSpec):
    """3x3 convolution with bias to the image's channels, no norm."""

    in_width: int
    channels: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain convolution; there is nothing to drop."""
        return ImageConv(self.in_width, self.channels, 3, padding=1)

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width, self.in_size)
        ops.conv(ops.input, self.channels, 3, bias=True)
        return ops


class ImageConv(nn.Conv2d):
    """The last convolution: begins small, so that an untrained network gives the mean image (0, where images are normalised)."""

    counts = "image channels"
    """What its outputs are; a part of them is never taken from another network."""

    def initial(self, parameter: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Normal, 0.01."""
        return torch.empty(shape).normal_(0, 0.01, generator=generator)


@dataclass(frozen=True)
class AutoencoderFamily(Family):
    """Slots of a chain: stem, encoder, bottleneck, decoder, image."""

    config: AutoencoderConfig

    zero_init: ClassVar[tuple[str, ...]] = ("second.norm.weight",)
    task: ClassVar[str] = "regression"

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, then stem, stages and bottleneck."""
        stages = [
            Dimension(f"stage{number}.{name}", getattr(stage, name))
            for number, stage in enumerate(self.config.stages, start=1)
            for name in ("width", "depth", "decoder_depth", "kernel_size")
        ]
        first = (Dimension("resolution", self.config.resolution), Dimension("stem.width", self.config.stem.width))
        return (*first, *stages, Dimension("bottleneck.width", self.config.bottleneck.width))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every block of the deepest child: `stem`, `down1_0` ..., `bottleneck`, ... `up1_0` ..., `image`."""
        size, count = ("resolution", "resolution"), len(self.config.stages)
        widths = ["stem.width", *(f"stage{number}.width" for number in range(1, count + 1))]
        slots = [Slot("stem", (size, ("width", "stem.width")))]
        for number in range(1, count + 1):
            inner, kernel = ("width", widths[number]), ("kernel_size", f"stage{number}.kernel_size")
            slots.append(Slot(f"down{number}_0", (size, ("in_width", widths[number - 1]), inner, kernel)))
            slots += self._residual(f"down{number}", f"stage{number}.depth", (size, inner, kernel))
        slots.append(Slot("bottleneck", (size, ("in_width", widths[count]), ("width", "bottleneck.width"))))
        for number in range(count, 0, -1):
            outer, kernel = ("width", widths[number - 1]), ("kernel_size", f"stage{number}.kernel_size")
            slots.append(Slot(f"up{number}_0", (size, ("in_width", widths[number]), outer)))
            slots += self._residual(f"up{number}", f"stage{number}.decoder_depth", (size, outer, kernel))
        return (*slots, Slot("image", (size, ("in_width", "stem.width"))))

    def _residual(self, name: str, depth: str, roles: tuple[tuple[str, str], ...]) -> list[Slot]:
        most = next(dimension.choices[-1] for dimension in self.dimensions if dimension.name == depth)
        return [Slot(f"{name}_{index}", roles, (depth, index + 1)) for index in range(1, int(most))]

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`."""
        cast = slot.cast(choices)
        size, count = cast["resolution"], len(self.config.stages)
        if slot.name == "stem":
            return ConvSpec(self.in_channels, cast["width"], 3, 1, in_size=size)
        if slot.name == "image":
            return ImageSpec(cast["in_width"], self.in_channels, in_size=size)
        if slot.name == "bottleneck":
            return BottleneckSpec(cast["in_width"], cast["width"], in_size=size // 2**count)
        part, index = slot.name.split("_")
        down, number = part.startswith("down"), int(part.lstrip("downup"))
        if index != "0":
            at = number if down else number - 1
            return ResidualSpec(cast["width"], cast["kernel_size"], in_size=size // 2**at)
        if down:
            return ConvSpec(cast["in_width"], cast["width"], cast["kernel_size"], 2, in_size=size // 2 ** (number - 1))
        return UpSpec(cast["in_width"], cast["width"], in_size=size // 2**number)

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row a stage: input pixels, width, depth, kernel."""
        sizes, count = [int(resolution) for resolution in choices["resolution"]], len(self.config.stages)
        widths = [choices["stem.width"], *(choices[f"stage{number}.width"] for number in range(1, count + 1))]
        table: list[dict[str, object]] = [{"stage": "stem", "block": "conv 3x3", "in_size": sizes, "width": widths[0]}]
        table += [
            {
                "stage": f"stage{number}", "block": "strided conv, residual", "in_size": [size >> (number - 1) for size in sizes],
                "width": widths[number], "depth": choices[f"stage{number}.depth"],
                "kernel_size": choices[f"stage{number}.kernel_size"],
            }
            for number in range(1, count + 1)
        ]  # fmt: skip
        table.append({
            "stage": "bottleneck", "block": "conv 1x1, conv 1x1", "in_size": [size >> count for size in sizes],
            "width": choices["bottleneck.width"],
        })  # fmt: skip
        table += [
            {
                "stage": f"stage{number} (decoder)", "block": "transposed conv 2x2, residual",
                "in_size": [size >> number for size in sizes], "width": widths[number - 1],
                "depth": choices[f"stage{number}.decoder_depth"], "kernel_size": choices[f"stage{number}.kernel_size"],
            }
            for number in range(count, 0, -1)
        ]  # fmt: skip
        return [*table, {"stage": "image", "block": "conv 3x3", "in_size": sizes, "width": (self.in_channels,)}]
