"""A family of one's own in one file: plain 3x3 convolutions (VGG) with elastic resolution, width and depth. See docs/new_family.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import nn

from supernet.arch import Choice
from supernet.blocks import Classifier, ConvNorm
from supernet.config import Config
from supernet.families import FAMILIES, FamilyKind
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Slot
from supernet.operations import Operations


class StageConfig(Config):
    """Convolutions of one width; the first halves the map."""

    width: Choices
    depth: Choices


class VGGConfig(FamilyConfig):
    """What the YAML says, checked: `name`, `classes` and `in_channels` come with every family."""

    family: Literal["vgg"]
    resolution: Choices
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=6)]

    @model_validator(mode="after")
    def _large_enough(self) -> VGGConfig:
        if self.resolution[0] < 2 ** len(self.stages):
            raise ValueError(f"resolution must be at least {2 ** len(self.stages)} for {len(self.stages)} stages, but offers "
                             f"{self.resolution[0]}: leave out stages or small resolutions")  # fmt: skip
        return self


@dataclass(frozen=True, slots=True)
class ConvSpec(BlockSpec):
    """3x3 convolution, norm, relu."""

    in_width: int
    width: int
    stride: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """Ordinary modules; batch norm stands within a `ConvNorm`, so that export can fold it."""
        return ConvNorm(self.in_width, self.width, 3, stride=self.stride, act=nn.ReLU())

    def operations(self) -> Operations:
        """The same, operator by operator."""
        ops = Operations(self.in_width, self.in_size)
        ops.pointwise("relu", ops.conv(ops.input, self.width, 3, stride=self.stride, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """Average over the map, classifier."""

    in_width: int
    classes: int

    def build(self, drop: float = 0.0) -> nn.Module:
        """Logits, shape (N, classes)."""
        return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Classifier(self.in_width, self.classes))

    def operations(self) -> Operations:
        """The same, operator by operator."""
        ops = Operations(self.in_width, self.in_size)
        ops.linear(ops.flatten(ops.mean(ops.input)), self.classes)
        return ops


@dataclass(frozen=True)
class VGGFamily(Family):
    """Stages of convolutions, and a head."""

    config: VGGConfig

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Everything that can be chosen."""
        stages = enumerate(self.config.stages, start=1)
        each = [Dimension(f"stage{n}.{what}", getattr(stage, what)) for n, stage in stages for what in ("width", "depth")]
        return (Dimension("resolution", self.config.resolution), *each)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Where blocks can stand: `needs` says from which depth on, `roles` what else each depends on."""
        slots, before = [], None
        for number, stage in enumerate(self.config.stages, start=1):
            width = f"stage{number}.width"
            for index in range(max(stage.depth)):
                inputs = [("in_width", before)] if before else []
                needs = (f"stage{number}.depth", index + 1) if index else None
                slots.append(Slot(f"stage{number}_{index}", (("resolution", "resolution"), *inputs, ("width", width)), needs))
                before = width
        return (*slots, Slot("head", (("resolution", "resolution"), ("in_width", f"stage{len(self.config.stages)}.width"))))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The one place that knows sizes: building, slicing, costs and export all ask here."""
        chosen = slot.cast(choices)
        if slot.name == "head":
            return HeadSpec(chosen["in_width"], self.classes, in_size=self.size(chosen["resolution"], len(self.config.stages)))
        number, index = (int(part) for part in slot.name.removeprefix("stage").split("_"))
        size = self.size(chosen["resolution"], number - 1 if index == 0 else number)
        return ConvSpec(chosen.get("in_width", self.in_channels), chosen["width"], 2 if index == 0 else 1, in_size=size)

    @staticmethod
    def size(resolution: int, stages: int) -> int:
        """Pixels of a side after `stages` stages."""
        for _ in range(stages):
            resolution = -(-resolution // 2)
        return resolution


KIND = FamilyKind(VGGConfig, VGGFamily)
# In an installed package an entry point instead: [project.entry-points."nestling.families"] vgg = "vgg:KIND"
FAMILIES["vgg"] = KIND
