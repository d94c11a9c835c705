"""What the YAML of an inverted-residual space says, and the checks that no impossible network gets past."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PlainValidator, StrictBool, StrictInt, model_validator

from supernet.arch import Choice
from supernet.blocks import divisible
from supernet.config import Config
from supernet.families.chosen import Level, shared
from supernet.families.mbconv_blocks import Gate, Shortcut, multiple
from supernet.family import Choices, FamilyConfig, Positive

ACTIVATION_ORDER = ("relu", "hard_swish", "swish")
"""In the order of the memory that they hold."""
MOST_RATIO = 100_000
LEAST_RATIO = 1.2
"""Of a real expansion: what it is rounded to stays above the input's channels."""


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 100:
        raise ValueError("a stage has at most 100 blocks: use smaller depths")
    return depths


def _ascending(choices: Sequence[Any], whole: bool) -> tuple[Any, ...]:
    kind = "whole number" if whole else "number"
    for choice in choices:
        if isinstance(choice, bool) or not isinstance(choice, int if whole else int | float) or not 1 <= choice <= MOST_RATIO:
            raise ValueError(f"every choice must be a {kind} from 1 to {MOST_RATIO}")
    if not choices or any(b <= a for a, b in itertools.pairwise(choices)):
        raise ValueError("choices must be listed smallest first, each once, and at least one: reorder the list")
    return tuple(int(choice) if int(choice) == choice else choice for choice in choices)


def _kernels(value: Any) -> tuple[Any, ...]:
    kernels = _ascending(_a_list(value), whole=True)
    if any(kernel % 2 == 0 or kernel > 15 for kernel in kernels):
        raise ValueError(
            "kernel sizes must be odd (a small kernel is the centre of a large one) and at most 15: use 1, 3, 5 or 7"
        )
    return kernels


def _ratios(value: Any) -> tuple[Any, ...]:
    ratios = _ascending(_a_list(value), whole=False)
    if any(1 < ratio < LEAST_RATIO for ratio in ratios):
        raise ValueError(f"an expand_ratio is 1 (no expansion) or at least {LEAST_RATIO}: use 1 or a larger one")
    return ratios


def _activations(value: Any) -> Any:
    names = value if isinstance(value, list | tuple) else [value]
    wrong = next((name for name in names if not isinstance(name, str) or name not in ACTIVATION_ORDER), None)
    if wrong is not None or not names:
        raise ValueError(f"activations are {', '.join(ACTIVATION_ORDER)}: use one of them or a list")
    if list(names) != [name for name in ACTIVATION_ORDER if name in names]:
        raise ValueError(f"activations are listed in the order {', '.join(ACTIVATION_ORDER)}, each once: reorder the list")
    return value if isinstance(value, str) else tuple(names)


def _switch(value: Any) -> Any:
    if isinstance(value, list | tuple):
        if not value or any(not isinstance(each, bool) for each in value) or list(value) != sorted(set(value)):
            raise ValueError("a choice of squeeze_excite is written [false, true]: use this, true or false")
        return tuple(value)
    if not isinstance(value, bool):
        raise ValueError("Input should be a valid boolean")
    return value


def _divisors(value: Any) -> Any:
    if value is None:
        return None
    choices = _ascending(value if isinstance(value, list | tuple) else [value], whole=True)
    if any(b % a for a, b in itertools.pairwise(choices)):
        raise ValueError("each channel_divisor must divide the next, else channels could fall as it grows: use 8, 16, 32")
    if choices[-1] > 256:
        raise ValueError("a channel_divisor is at most 256: use 8, 16 or 32")
    return choices if isinstance(value, list | tuple) else choices[0]


def _a_list(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list of choices")
    return value


def _or_by_block(check: Callable[[Any], Any]) -> PlainValidator:
    """Choices, or a list of choices for each block of the stage."""

    def validate(value: Any) -> Any:
        if isinstance(value, list | tuple) and value and all(isinstance(each, list | tuple) for each in value):
            return tuple(check(each) for each in value)
        return check(value)

    return PlainValidator(validate)


Offer = Any
"""One fixed choice, a tuple of choices, or a tuple of those, one for each block. `offers` reads it."""

Stride = Annotated[StrictInt, Field(ge=1, le=4)]
Activation = Annotated[Offer, PlainValidator(_activations)]


def offers(offer: Offer, block: int = 0) -> tuple[Choice, ...]:
    """The choices for a block."""
    if not isinstance(offer, tuple):
        return (offer,)
    return offer[block] if isinstance(offer[0], tuple) else offer


class ChosenPer(Config):
    """How far one choice reaches. A list of one choice per block or network is fixed and no dimension."""

    kernel_size: Level = "stage"
    expand_ratio: Level = "stage"
    activation: Level = "stage"
    squeeze_excite: Level = "stage"


PARTS = tuple(ChosenPer.model_fields)
"""What every block of a stage has; width and depth are always chosen per stage."""


class StemConfig(Config):
    """First convolution."""

    width: Choices
    stride: Stride = 2
    activation: Activation = "swish"


class StageConfig(Config):
    """A stage of blocks; its first block strides. Entries of `PARTS` may hold a list for each block (of the deepest stage)."""

    width: Choices
    depth: Annotated[Choices, AfterValidator(_shallow)]
    kernel_size: Annotated[Offer, _or_by_block(_kernels)]
    expand_ratio: Annotated[Offer, _or_by_block(_ratios)]
    stride: Stride
    squeeze_excite: Annotated[Offer, _or_by_block(_switch)] = False
    activation: Annotated[Offer, _or_by_block(_activations)] = "swish"


class HeadConfig(Config):
    """What follows the stages.

    `mobilenetv3`: 1x1 convolution to `expand_width`, or `expand_ratio` times the last width; pooling; 1x1 convolution without norm to
    `width`, with or without `bias`; classifier. `efficientnet`: 1x1 convolution to `width`, pooling, classifier.
    """

    kind: Literal["mobilenetv3", "efficientnet"] = "mobilenetv3"
    expand_ratio: Positive = 6
    expand_width: Annotated[StrictInt, Field(ge=1, le=100_000)] | None = None
    width: Choices
    bias: StrictBool = False
    activation: Activation = "swish"

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        given = [name for name in ("expand_ratio", "expand_width", "bias") if name in self.model_fields_set]
        if self.kind == "efficientnet" and given:
            raise ValueError(f"an efficientnet head has width and activation only: remove {given[0]}")
        if {"expand_ratio", "expand_width"} <= set(given) and self.expand_width is not None:
            raise ValueError("a head has expand_ratio or expand_width, not both: remove one")
        return self


class MBConvConfig(FamilyConfig):
    """A space of this family, as its YAML has it.

    `channel_divisor`: every width, and what it expands to, is rounded up to a multiple of it, after the usual rounding of
    expanded channels to 8; the few channels within a gate are not. A list is a dimension of the whole network; None: no rounding.
    """

    family: Literal["mbconv"]
    resolution: Choices
    channel_divisor: Annotated[Any, PlainValidator(_divisors)] = None
    gate: Gate = "mobilenetv3"
    shortcut: Shortcut = "projected"
    chosen_per: ChosenPer = ChosenPer()
    stem: StemConfig
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1, max_length=20)]
    head: HeadConfig

    @property
    def divisors(self) -> tuple[int | None, ...]:
        """Channel divisors that are offered; (None,): there is no rounding."""
        return self.channel_divisor if isinstance(self.channel_divisor, tuple) else (self.channel_divisor,)

    def level(self, part: str) -> Level:
        """How far one choice of `part` reaches."""
        level: Level = getattr(self.chosen_per, part)
        return level

    def map_size(self, resolution: int, stages: int) -> int:
        """Pixels of a side of the map after the stem and the first `stages` stages."""
        strides = [self.stem.stride, *(stage.stride for stage in self.stages[:stages])]
        return reduce(lambda size, stride: math.ceil(size / stride), strides, resolution)

    def everywhere(self, part: str) -> tuple[Choice, ...]:
        """What a part that is chosen per network offers; empty where every place has a fixed one. Raises `ValueError`."""
        places = [self.stem.activation, self.head.activation] if part == "activation" else []
        places += [offers(getattr(stage, part), block) for stage in self.stages for block in range(max(stage.depth))]
        return shared(part, [offers(place) for place in places])

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        for number, stage in enumerate(self.stages):
            for part in PARTS:
                self._check_offer(f"stages.{number}.{part}", getattr(stage, part), part, max(stage.depth))
            self._check_map(number)
            self._check_ratios(number)
            self._check_shortcut(number)
        if min(self.resolution) < self.stem.stride or min(self.resolution) < 2:
            raise ValueError(
                f"resolution: the stem's 3x3 convolution of stride {self.stem.stride} sees nothing of images of "
                f"{min(self.resolution)} pixels: use a larger resolution"
            )
        for part in PARTS:
            if self.level(part) == "network":
                self.everywhere(part)
        return self

    def _check_offer(self, where: str, offer: Offer, part: str, depth: int) -> None:
        if isinstance(offer, tuple) and isinstance(offer[0], tuple):
            if self.level(part) != "block":
                raise ValueError(f"{where}: a list for each block needs chosen_per: {{{part}: block}}: add it or give one list")
            if len(offer) != depth:
                raise ValueError(
                    f"{where}: must hold a list for each of the {depth} blocks of the deepest stage, but got {len(offer)}"
                )

    def _check_ratios(self, number: int) -> None:
        """Two ratios that give the same channels would be two names of one network; divisors above 8 may still make them equal."""
        stage, before = self.stages[number], (self.stages[number - 1] if number else self.stem).width
        for block in range(max(stage.depth)):
            ratios = offers(stage.expand_ratio, block)
            for width in before if block == 0 else stage.width:
                expanded = [width if ratio == 1 else divisible(width * float(ratio)) for ratio in ratios]
                twice = next((at for at in range(1, len(ratios)) if expanded[at] in expanded[:at]), None)
                if twice is not None:
                    pair = f"{ratios[twice - 1]} and {ratios[twice]} both give {expanded[twice]} channels at width {width}"
                    raise ValueError(f"stages.{number}.expand_ratio: {pair}: leave one out, or use ratios further apart")

    def _check_map(self, number: int) -> None:
        """Over the map that enters the stage, at the smallest resolution."""
        stage, resolution = self.stages[number], min(self.resolution)
        size = self.map_size(resolution, number)
        at = f"the map that enters this stage has {size} x {size} pixels at resolution {resolution}"
        if stage.stride > size:
            raise ValueError(f"stages.{number}.stride: {at}, too small for a stride of {stage.stride}: "
                             "use fewer strides or a larger resolution")  # fmt: skip
        kernel = max(int(each) for block in range(max(stage.depth)) for each in offers(stage.kernel_size, block))
        if kernel > 2 * size:
            raise ValueError(f"stages.{number}.kernel_size: {at}, and a kernel larger than twice that, {kernel}, sees mostly padding: "
                             "use smaller kernels or a larger resolution")  # fmt: skip

    def _check_shortcut(self, number: int) -> None:
        """An identity that comes and goes with the widths would make wider networks cheaper."""
        before, here = (self.stages[number - 1] if number else self.stem).width, self.stages[number].width
        if self.shortcut == "projected" or self.stages[number].stride > 1:
            return
        for by in self.divisors:
            if len({multiple(one, by) == multiple(other, by) for one in before for other in here}) > 1:
                raise ValueError(
                    f"stages.{number}.width: with shortcut: identity, the first block of a stage of stride 1 has a shortcut for all "
                    f"widths or for none, but {list(before)} come in and {list(here)} go out: offer one width, or shortcut: projected"
                )
