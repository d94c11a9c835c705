"""Residual networks with elastic depth, width and expansion: bottlenecks as ResNet-50-D's, basic blocks for small images.

Details are ResNet-D's (He et al. 2019, arXiv 1812.01187): a stem of 3x3 convolutions, the stride in a 3x3 convolution, shortcuts that
average before their 1x1 convolution. What is elastic follows Once-for-All's ResNet50 (Cai et al. 2020, arXiv 1908.09791): resolution,
width and depth of the stem, width and depth of each stage, expansion of each block.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StrictBool, StrictInt, model_validator
from torch import Tensor

from supernet.arch import Choice
from supernet.blocks import divisible
from supernet.config import Config, Number
from supernet.errors import InputError
from supernet.families.chosen import Level, dimension_name, shared
from supernet.families.mbconv_config import Activation, offers
from supernet.families.resnet_blocks import HeadSpec, Kind, ResidualSpec, ResidualStemSpec, StemSpec
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Slot

__all__ = ["HeadSpec", "ResNetConfig", "ResNetFamily", "ResidualSpec", "ResidualStemSpec", "StemSpec"]

PARTS = ("expand_ratio", "activation")
"""What every block has; the width and depth are always chosen per stage."""
STEM = "stem"
MID = "stem_mid.width"


def _ascending(choices: tuple[float, ...]) -> tuple[float, ...]:
    if not choices or any(b <= a for a, b in itertools.pairwise(choices)):
        raise ValueError("choices must be listed smallest first, each once, and at least one: reorder the list")
    return choices


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 100:
        raise ValueError("a stage has at most 100 blocks: use smaller depths")
    return depths


Ratios = Annotated[tuple[Annotated[Number, Field(gt=0, le=100)], ...], AfterValidator(_ascending)]
Counts = Annotated[tuple[Annotated[StrictInt, Field(ge=0, le=10)], ...], AfterValidator(_ascending)]


def mid_width(width: int, expand_ratio: float) -> int:
    """Channels within a block of `width` (Once-for-All rounds twice)."""
    return divisible(round(width * expand_ratio))


class ChosenPer(Config):
    """How far one choice reaches. A list of one choice is fixed and no dimension."""

    expand_ratio: Level = "stage"
    activation: Level = "network"


class StemConfig(Config):
    """What stands before the stages.

    `deep`: 3x3 convolution of stride 2 to `mid_width`, `depth` more of these (added to what they read where `residual`), one to
    `width`, max pooling of stride 2. `plain`: one 3x3 convolution of `stride`, for small images.
    """

    kind: Literal["deep", "plain"]
    width: Choices
    mid_width: Choices | None = None
    depth: Counts = (1,)
    residual: StrictBool = False
    stride: Annotated[StrictInt, Field(ge=1, le=2)] = 1

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        strange = {"deep": ("stride",), "plain": ("mid_width", "depth", "residual")}[self.kind]
        given = [name for name in strange if name in self.model_fields_set]
        if given:
            raise ValueError(f"a {self.kind} stem has no {given[0]}: remove it")
        if self.kind == "deep" and self.mid_width is None:
            raise ValueError("a deep stem needs mid_width, the channels of all its convolutions but the last: add it")
        return self


class StageConfig(Config):
    """A stage of residual blocks; its first one strides."""

    width: Choices
    depth: Annotated[Choices, AfterValidator(_shallow)]
    expand_ratio: Ratios
    stride: Annotated[StrictInt, Field(ge=1, le=4)]


class ResNetConfig(FamilyConfig):
    """A space of this family, as its YAML has it. `expand_ratio` times a stage's width are the channels within its blocks."""

    family: Literal["resnet"]
    resolution: Choices
    block: Kind
    activation: Activation = "relu"
    """One for stem and blocks, or a list to choose from."""
    chosen_per: ChosenPer = ChosenPer()
    stem: StemConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=20)]

    def map_size(self, resolution: int, stages: int) -> int:
        """Pixels of a side of the map after the stem and the first `stages` stages."""
        stem = [2, 2] if self.stem.kind == "deep" else [self.stem.stride]
        strides = [*stem, *(stage.stride for stage in self.stages[:stages])]
        return reduce(lambda size, stride: math.ceil(size / stride), strides, resolution)

    def offered(self, part: str, number: int) -> tuple[Choice, ...]:
        """Choices of `part` in stage `number`, counted from 1."""
        return self.stages[number - 1].expand_ratio if part == "expand_ratio" else offers(self.activation)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        least = min(self.resolution)
        for number, stage in enumerate(self.stages):
            if self.map_size(least, number + 1) < 2:
                raise ValueError(f"stages.{number}.stride: this stage makes maps of 1 x 1 pixels at resolution {least}, of which a 3x3 "
                                 "convolution sees little but padding: use fewer strides or a larger resolution")  # fmt: skip
            for width in stage.width:
                mids = [mid_width(width, ratio) for ratio in stage.expand_ratio]
                if len(set(mids)) < len(mids):
                    raise ValueError(
                        f"stages.{number}.expand_ratio: must make different channels within the blocks, but at width {width} it makes "
                        f"{mids}: spread the ratios, or offer fewer"
                    )
        if self.chosen_per.expand_ratio == "network":
            shared("expand_ratio", [stage.expand_ratio for stage in self.stages])
        return self


@dataclass(frozen=True)
class ResNetFamily(Family):
    """Slots of a chain: one or more for the stem, stages of residual blocks, head."""

    config: ResNetConfig
    zero_init: ClassVar[tuple[str, ...]] = ("last.norm.weight",)

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, then those of stem and stages; what is chosen for the network stands where it is met first."""
        config, stem = self.config, self.config.stem
        found: dict[str, tuple[Choice, ...]] = {"resolution": config.resolution}
        if stem.mid_width is not None:
            found |= {MID: stem.mid_width, "stem.depth": stem.depth}
        found["stem.width"] = stem.width
        if self._stem_activation is not None:
            found[self._stem_activation] = offers(config.activation)
        for number, stage in enumerate(config.stages, start=1):
            found |= {f"stage{number}.width": stage.width, f"stage{number}.depth": stage.depth}
            for part, index in itertools.product(PARTS, range(max(stage.depth))):
                name = self._chooses(part, number, index)
                if name is not None:
                    found.setdefault(name, config.offered(part, number))
        return tuple(Dimension(name, choices, ordered=not name.endswith("activation")) for name, choices in found.items())

    @property
    def _stem_activation(self) -> str | None:
        if len(offers(self.config.activation)) == 1:
            return None
        return "activation" if self.config.chosen_per.activation == "network" else "stem.activation"

    def _chooses(self, part: str, number: int, index: int) -> str | None:
        """Name of the dimension that chooses `part` of block `index` of stage `number` (from 1); None where it is fixed."""
        if len(self.config.offered(part, number)) == 1:
            return None
        return dimension_name(part, getattr(self.config.chosen_per, part), number, index)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every convolution of the stem and every block of the deepest child."""
        slots, before = [*self._stem_slots()], "stem.width"
        for number, stage in enumerate(self.config.stages, start=1):
            width, depth = f"stage{number}.width", f"stage{number}.depth"
            for index in range(max(stage.depth)):
                sizes = [("resolution", "resolution"), ("in_width", width if index else before), ("width", width)]
                named = [(part, self._chooses(part, number, index)) for part in PARTS]
                roles = [(part, name) for part, name in named if name is not None]
                needs = (depth, index + 1) if index >= min(stage.depth) else None
                slots.append(Slot(f"stage{number}_{index}", (*sizes, *roles), needs))
            before = width
        return (*slots, Slot("head", (("resolution", "resolution"), ("in_width", before))))

    def _stem_slots(self) -> list[Slot]:
        stem, name = self.config.stem, self._stem_activation
        always = (("resolution", "resolution"), *([("activation", name)] if name else []))
        if stem.kind == "plain":
            return [Slot(STEM, (*always, ("width", "stem.width")))]
        mid = (*always, ("width", MID))
        more = [
            Slot(f"stem_{number}", mid, ("stem.depth", number) if number > min(stem.depth) else None)
            for number in range(1, max(stem.depth) + 1)
        ]
        return [Slot("stem_0", mid), *more, Slot("stem_end", (*always, ("in_width", MID), ("width", "stem.width")))]

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`."""
        cast, config = slot.cast(choices), self.config
        if slot.name.startswith(STEM):
            return self._stem_block(slot.name, cast)
        if slot.name == "head":
            size = config.map_size(cast["resolution"], len(config.stages))
            return HeadSpec(cast["in_width"], self.classes, in_size=size)
        number, index = (int(part) for part in slot.name.removeprefix("stage").split("_"))
        stage = config.stages[number - 1]
        ratio, activation = (cast.get(part, config.offered(part, number)[0]) for part in PARTS)
        return ResidualSpec(
            config.block, cast["in_width"], mid_width(cast["width"], ratio), cast["width"], ratio,
            stride=1 if index else stage.stride,
            projected=not index and self._projects(number),
            activation=activation,
            in_size=config.map_size(cast["resolution"], number if index else number - 1),
        )  # fmt: skip

    def _projects(self, number: int) -> bool:
        """Whether a stage's first shortcut has a convolution. For all widths or for none: else a wider network could be cheaper."""
        stages, stage = self.config.stages, self.config.stages[number - 1]
        before = self.config.stem.width if number == 1 else stages[number - 2].width
        return stage.stride > 1 or len({*before, *stage.width}) > 1

    def _stem_block(self, name: str, cast: Mapping[str, Any]) -> BlockSpec:
        stem, resolution = self.config.stem, cast["resolution"]
        activation, width = cast.get("activation", offers(self.config.activation)[0]), cast["width"]
        if name in {STEM, "stem_0"}:
            stride = 2 if stem.kind == "deep" else stem.stride
            return StemSpec(self.in_channels, width, stride, activation, in_size=resolution)
        size = math.ceil(resolution / 2)
        if name == "stem_end":
            return StemSpec(cast["in_width"], width, 1, activation, max_pool=True, in_size=size)
        if stem.residual:
            return ResidualStemSpec(width, activation, in_size=size)
        return StemSpec(width, width, 1, activation, in_size=size)

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from Once-for-All's form.

        `d`: 0 or 2 for the stem, then the blocks added to each stage's fewest; `e`: for every block of the deepest network, those that
        do not stand included; `w`: positions in the lists of widths, within the stem, of the stem, of the stages; `image_size` or `r`:
        a number, or a list of one.
        """
        stem, stages = self.config.stem, self.config.stages
        if stem.mid_width is None or self.config.chosen_per.expand_ratio != "block":
            raise InputError(f"the space {self.config.name} has no deep stem with expansions chosen per block, which lists d, e, w are "
                             "about: give an arch as dimension: choice")  # fmt: skip
        blocks = [(number, index) for number, stage in enumerate(stages, start=1) for index in range(max(stage.depth))]
        d = _numbers(entry, "d", len(stages) + 1, (0, 100))
        e = _numbers(entry, "e", len(blocks), (0, 100))
        w = _numbers(entry, "w", len(stages) + 2, (0, min(map(len, (stem.width, *(stage.width for stage in stages)))) - 1))
        size = entry.get("image_size", entry.get("r"))
        size = size[0] if isinstance(size, list) and len(size) == 1 else size
        if not isinstance(size, int):
            raise InputError(f"'image_size' (or 'r') must be a whole number of pixels, but got {size!r}: add or change it")
        if d[0] not in {0, 2}:
            raise InputError(f"'d' must begin with 0 or 2, the stem's, but got {d[0]!r}: change it")
        choices: dict[str, Choice] = {
            "resolution": size, "stem.depth": stem.depth[-1 if d[0] else 0], MID: divisible(stem.width[int(w[0])] // 2),
            "stem.width": stem.width[int(w[1])],
        }  # fmt: skip
        for number, stage in enumerate(stages, start=1):
            choices[f"stage{number}.width"] = stage.width[int(w[number + 1])]
            choices[f"stage{number}.depth"] = stage.depth[0] + int(d[number])
        for (number, index), ratio in zip(blocks, e, strict=True):
            if index >= int(choices[f"stage{number}.depth"]):
                continue  # the block does not stand
            name = self._chooses("expand_ratio", number, index)
            if name is not None:
                choices[name] = float(ratio)
            elif (ratio,) != self.config.offered("expand_ratio", number):
                raise InputError(
                    f"'e': the blocks of stage {number} have one expand_ratio only, but got {ratio!r}: use that one"
                )
        return choices

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's `resnet*d` (deep stem, average-pool shortcuts). See `Family.from_timm`.

        Its stem does not add, so the middle of a `residual` one takes nothing from it.
        """
        modules = dict.fromkeys(name.rpartition(".")[0] for name in state)
        missing = [name for name in _STEM_NAMES if name not in modules]
        if missing or "layer1.0.conv1" not in modules:
            raise InputError(f"timm's weights must be those of a residual network with a deep stem, but {(*missing, 'layer1')[0]!r} is "
                             "missing: name a resnet*d, such as resnet50d")  # fmt: skip
        ours, blocks = {**_STEM_NAMES, "fc": "head.classifier"}, dict[str, set[str]]()
        for found in filter(None, map(_BLOCK.fullmatch, modules)):
            blocks.setdefault(found[1], set()).add(found[2])
        names = _BLOCK_NAMES[self.config.block]
        for place, parts in blocks.items():
            if parts - set(_SHORTCUT_NAMES) != set(names) or _grouped(state, place):
                odd = sorted((parts ^ set(names)) - set(_SHORTCUT_NAMES)) or ["a grouped conv2"]
                raise InputError(f"timm's {place} is no {self.config.block} block with an average-pool shortcut (see {odd[0]}): name a "
                                 "resnet*d whose blocks are the space's")  # fmt: skip
            stage, _, index = place.removeprefix("layer").partition(".")
            slot = f"stage{stage}_{index}"
            ours |= {f"{place}.{part}": f"{slot}.{own}" for part, own in (names | _SHORTCUT_NAMES).items()}
        split = {name: name.rpartition(".") for name in state}
        return {f"{ours[module]}.{leaf}": state[name] for name, (module, _, leaf) in split.items() if module in ours}

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row for the stem, each stage and the head: input pixels, width, depth, expansion, stride, activation."""
        config, stem, sizes = self.config, self.config.stem, [int(size) for size in choices["resolution"]]
        row: dict[str, object] = {"stage": STEM, "block": "conv 3x3", "in_size": sizes, "width": choices["stem.width"]}
        if stem.kind == "deep":
            row |= {"block": f"conv 3x3 to {_listed(choices[MID])}, {_listed(choices['stem.depth'])} more"
                             f"{' (residual)' if stem.residual else ''}, conv 3x3, max pool"}  # fmt: skip
        name = self._stem_activation
        table = [
            {
                **row,
                "stride": 4 if stem.kind == "deep" else stem.stride,
                "activation": self._shown(name, "activation", 1, choices),
            }
        ]
        for number, stage in enumerate(config.stages, start=1):
            deepest = range(int(choices[f"stage{number}.depth"][-1]))
            shown = {}
            for part in PARTS:
                each = [self._shown(self._chooses(part, number, index), part, number, choices) for index in deepest]
                flat = tuple(itertools.chain(*each))
                shown[part] = flat if len(set(flat)) > 1 and max(map(len, each)) == 1 else tuple(dict.fromkeys(flat))
            table.append({
                "stage": f"stage{number}", "block": config.block, "in_size": [config.map_size(size, number - 1) for size in sizes],
                "width": choices[f"stage{number}.width"], "depth": choices[f"stage{number}.depth"], **shown, "stride": stage.stride,
            })  # fmt: skip
        last = [config.map_size(size, len(config.stages)) for size in sizes]
        return [*table, {"stage": "head", "block": "pool, linear", "in_size": last}]

    def _shown(self, name: str | None, part: str, number: int, choices: Mapping[str, tuple[Choice, ...]]) -> tuple[Choice, ...]:
        return choices[name] if name is not None else self.config.offered(part, number)


def _listed(choices: tuple[Choice, ...]) -> str:
    return " or ".join(map(str, choices))


def _numbers(entry: Mapping[str, object], key: str, length: int, between: tuple[int, int]) -> list[float]:
    """A list of an entry; whole numbers but for expansions."""
    value, kinds = entry.get(key), int | float if key == "e" else int
    if not isinstance(value, list) or len(value) != length:
        raise InputError(f"{key!r} must be a list of {length} numbers, but got {value!r}: add or change it")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, kinds) or not between[0] <= number <= between[1]:
            raise InputError(f"{key!r} must hold numbers from {between[0]} to {between[1]}, but holds {number!r}: change it")
    return value


def _grouped(state: Mapping[str, Tensor], place: str) -> bool:
    first, second = state[f"{place}.conv1.weight"], state[f"{place}.conv2.weight"]
    return first.shape[0] != second.shape[1]


_BLOCK = re.compile(r"(layer\d{1,2}\.\d{1,3})\.(.+)")
_STEM_NAMES = {"conv1.0": "stem_0.conv", "conv1.1": "stem_0.norm", "conv1.3": "stem_1.conv", "conv1.4": "stem_1.norm",
               "conv1.6": "stem_end.conv", "bn1": "stem_end.norm"}  # fmt: skip
_BLOCK_NAMES = {
    "bottleneck": {"conv1": "first.conv", "bn1": "first.norm", "conv2": "middle.conv", "bn2": "middle.norm", "conv3": "last.conv",
                   "bn3": "last.norm"},
    "basic": {"conv1": "first.conv", "bn1": "first.norm", "conv2": "last.conv", "bn2": "last.norm"},
}  # fmt: skip
_SHORTCUT_NAMES = {"downsample.1": "shortcut.conv", "downsample.2": "shortcut.norm"}
