"""Multilayer perceptrons: flattened images, hidden layers of linear, norm and activation, a classifier. Depth and widths are chosen.

A flattened image of one size is no slice of another, so a space has one resolution; it is a dimension of one choice all the same.
There are no shortcuts. Axes: N batch, C channels, H W space, D width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StrictInt, model_validator
from torch import nn

from supernet.arch import Choice
from supernet.blocks import ACTIVATIONS, Classifier, LinearNorm
from supernet.config import Config
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Slot
from supernet.operations import Operations

OFFERED = ("relu", "hard_swish", "swish")
"""Activations in the order of the memory that they hold: the first of a list is the cheapest, the last the teacher's."""
MOST_LAYERS = 50
MOST_WEIGHTS = 1_000_000_000
"""Of a layer, 4 GB; a larger one is a mistake."""


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > MOST_LAYERS:
        raise ValueError(f"there are at most {MOST_LAYERS} hidden layers, but got {depths[-1]}: use smaller depths")
    return depths


def _in_order(names: tuple[str, ...]) -> tuple[str, ...]:
    expected = tuple(name for name in OFFERED if name in names)
    if names != expected:
        raise ValueError(f"activations must be listed once each, in the order {list(OFFERED)}: write {list(expected)}")
    return names


Activations = Annotated[
    tuple[Literal["relu", "hard_swish", "swish"], ...], Field(min_length=1), AfterValidator(_in_order)
]  # fmt: skip


class ChosenPer(Config):
    """Whether widths are chosen layer by layer ("block") or once ("network")."""

    width: Literal["block", "network"] = "network"


class MLPConfig(FamilyConfig):
    """A space of this family, as its YAML has it."""

    family: Literal["mlp"]
    resolution: Annotated[StrictInt, Field(ge=1, le=1024)]
    """Pixels of a side of the images; one number."""
    depth: Annotated[Choices, AfterValidator(_shallow)]
    """Hidden layers."""
    width: Choices
    """Numbers out of a hidden layer."""
    activation: Activations = ("relu",)
    chosen_per: ChosenPer = ChosenPer()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        inputs, widest = self.in_channels * self.resolution**2, self.width[-1]
        if widest * max(inputs, widest) > MOST_WEIGHTS:
            raise ValueError(
                f"a layer must have at most {MOST_WEIGHTS:,} weights, but width {widest} after "
                f"{max(inputs, widest)} numbers makes {widest * max(inputs, widest):,}: lower resolution or width"
            )
        return self


@dataclass(frozen=True, slots=True)
class LayerSpec(BlockSpec):
    """Linear layer, norm, activation; the first one flattens the image."""

    in_width: int
    """Numbers in; of the first layer channels times pixels."""
    width: int
    activation: str
    image: tuple[int, int] | None = None
    """(channels, pixels of a side) where the input is an image."""

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain layer; there is nothing to drop."""
        layer = LinearNorm(self.in_width, self.width, act=ACTIVATIONS[self.activation]())
        return nn.Sequential(OrderedDict(flatten=nn.Flatten() if self.image else nn.Identity(), layer=layer))

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(*self.image) if self.image else Operations(self.in_width)
        x = ops.flatten(ops.input) if self.image else ops.input
        ops.activation(self.activation, ops.linear(x, self.width, bias=False, norm=True))
        return ops


@dataclass(frozen=True, slots=True)
class HeadSpec(BlockSpec):
    """The classifier."""

    in_width: int
    classes: int

    regulariser: ClassVar[str | None] = "dropout"

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain head; `drop` is the dropout rate before the classifier."""
        dropout = nn.Dropout(drop) if drop else nn.Identity()
        return nn.Sequential(OrderedDict(drop=dropout, classifier=Classifier(self.in_width, self.classes)))

    def operations(self) -> Operations:
        """What it does, in order."""
        ops = Operations(self.in_width)
        ops.linear(ops.input, self.classes)
        return ops


@dataclass(frozen=True)
class MLPFamily(Family):
    """Slots of a chain: hidden layers, classifier.

    With widths chosen layer by layer, another layer between a wide one and the classifier can be a bottleneck that saves macs
    (only where there are more classes than the smallest width); smallest and teacher are the ends of all costs in any case.
    """

    config: MLPConfig

    @property
    def free(self) -> bool:
        """Whether every layer has a width of its own."""
        return self.config.chosen_per.width == "block"

    def width_of(self, layer: int) -> str:
        """Name of the dimension that is the width of the hidden layer `layer`, counted from 1."""
        return f"layer{layer}.width" if self.free else "width"

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution (one choice), depth, widths, activation."""
        config = self.config
        widths = dict.fromkeys(self.width_of(layer) for layer in range(1, config.depth[-1] + 1))
        return (
            Dimension("resolution", (config.resolution,)),
            Dimension("depth", config.depth),
            *(Dimension(name, config.width) for name in widths),
            Dimension("activation", config.activation, ordered=False),
        )

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every hidden layer of the deepest child, and the head, whose input is the last layer that stands."""
        act, slots = ("activation", "activation"), list[Slot]()
        for layer in range(1, self.config.depth[-1] + 1):
            here, size = ("width", self.width_of(layer)), ("resolution", "resolution")
            roles = (here, act, ("in_width", self.width_of(layer - 1))) if layer > 1 else (size, here, act)
            slots.append(Slot(f"layer{layer}", roles, ("depth", layer) if layer > 1 else None))
        widths = [(self.width_of(layer), self.width_of(layer)) for layer in range(1, self.config.depth[-1] + 1)]
        where = tuple((name, ("depth", layer)) for layer, (name, _) in enumerate(widths, start=1)) if self.free else ()
        return (*slots, Slot("head", tuple(dict.fromkeys([("depth", "depth"), *widths])), where=where))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`. Vectors have no pixels: `in_size` is 0 behind the first layer."""
        cast = slot.cast(choices)
        if slot.name == "head":
            return HeadSpec(cast[self.width_of(cast["depth"])], self.classes, in_size=0)
        width, activation = cast["width"], cast["activation"]
        if slot.name != "layer1":
            return LayerSpec(cast["in_width"], width, activation, in_size=0)
        size = cast["resolution"]
        return LayerSpec(self.in_channels * size**2, width, activation, (self.in_channels, size), in_size=size)

    @property
    def layout(self) -> Mapping[str, object]:
        """Pixels of the images."""
        return {"resolution": self.config.resolution}

    def cover(self, slot: Slot) -> Iterator[Mapping[str, Choice]]:
        """All combinations; of the head, whose input may have any layer's width, every width at the greatest depth."""
        if slot.name != "head":
            yield from super().cover(slot)
            return
        for width in self.config.width:
            yield {"depth": self.config.depth[-1]} | dict.fromkeys(slot.dimensions[1:], width)

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row a hidden layer, and the head."""
        depth = max(int(value) for value in choices["depth"])
        table: list[dict[str, object]] = [
            {"layer": f"layer{layer}", "block": "linear, norm, activation", "width": choices[self.width_of(layer)],
             "activation": choices["activation"], "optional": layer > min(int(value) for value in choices["depth"])}
            for layer in range(1, depth + 1)
        ]  # fmt: skip
        table[0]["block"] = (
            f"flatten {self.in_channels} x {self.config.resolution} x {self.config.resolution}, {table[0]['block']}"
        )
        return [*table, {"layer": "head", "block": "linear", "width": (self.classes,)}]
