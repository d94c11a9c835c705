"""Inverted residuals with squeeze-excite: MobileNetV2/V3, EfficientNet, BigNAS, AttentiveNAS, Once-for-All.

Width and depth are chosen per stage; kernel size, expansion, activation and gate per network, stage or block.

By default, details within blocks follow AttentiveNAS (Wang et al. 2021, arXiv 2011.09011): the shortcut is kept at every change of
size and width; squeeze-excite is relu + hard sigmoid on a quarter of the expanded channels; the head expands by `expand_ratio`,
pools, and widens once more without norm (MobileNetV3).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from supernet.arch import Choice
from supernet.errors import InputError
from supernet.families.chosen import dimension_name
from supernet.families.mbconv_blocks import HeadSpec, MBConvSpec, ShortHeadSpec, StemSpec, multiple
from supernet.families.mbconv_config import PARTS, MBConvConfig, StageConfig, offers
from supernet.families.mbconv_timm import our_names
from supernet.family import BlockSpec, Codes, Dimension, Family, Slot

__all__ = ["HeadSpec", "MBConvConfig", "MBConvFamily", "MBConvSpec", "ShortHeadSpec", "StemSpec"]

OWN = ("width", "depth")
"""What is always chosen per stage."""
DIVISOR = "channel_divisor"


@dataclass(frozen=True)
class MBConvFamily(Family):
    """Slots of a chain: stem, stages of inverted residuals, head."""

    config: MBConvConfig

    @property
    def zero_init(self) -> tuple[str, ...]:  # type: ignore[override]
        """Residual branches start at 0, unless there are blocks without a shortcut, of which nothing would be left."""
        return ("project.norm.weight",) if self.config.shortcut == "projected" else ()

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, what is chosen for the whole network, then stem, stages and head."""
        config = self.config
        found: list[Dimension] = [Dimension("resolution", config.resolution)]
        if isinstance(config.channel_divisor, tuple):
            found.append(Dimension(DIVISOR, config.channel_divisor))
        shared = {part: config.everywhere(part) for part in PARTS if config.level(part) == "network"}
        found += [_dimension(part, choices, part) for part, choices in shared.items() if choices]
        found += [Dimension("stem.width", config.stem.width), *self._end("stem")]
        for number, stage in enumerate(config.stages, start=1):
            found += [Dimension(f"stage{number}.{name}", getattr(stage, name)) for name in OWN]
            for part in PARTS:
                level = config.level(part)
                for block in range({"network": 0, "stage": 1, "block": max(stage.depth)}[level]):
                    name = self._chooses(part, number, block)
                    if name is not None:
                        found.append(_dimension(name, offers(getattr(stage, part), block), part))
        return (*found, Dimension("head.width", config.head.width), *self._end("head"))

    def _end(self, place: str) -> list[Dimension]:
        name, offered = self._end_activation(place), offers(getattr(self.config, place).activation)
        own = name is not None and name != "activation"
        return [_dimension(f"{place}.activation", offered, "activation")] if own else []

    def _end_activation(self, place: str) -> str | None:
        """Name of the dimension that chooses the activation of stem or head; None where it is fixed."""
        if len(offers(getattr(self.config, place).activation)) == 1:
            return None
        return "activation" if self.config.level("activation") == "network" else f"{place}.activation"

    def _chooses(self, part: str, number: int, block: int) -> str | None:
        """Name of the dimension that chooses `part` of a block of stage `number` (from 1); None where it is fixed."""
        level, offer = self.config.level(part), getattr(self.config.stages[number - 1], part)
        listed = level == "stage" and part in {"kernel_size", "expand_ratio"}  # a list is a dimension, if of one choice
        if len(offers(offer, block)) == 1 and not listed:
            return None
        return dimension_name(part, level, number, block)

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every block of the deepest child."""
        always = [("resolution", "resolution")]
        if isinstance(self.config.channel_divisor, tuple):
            always.append((DIVISOR, DIVISOR))
        ends = {place: [("activation", name)] if (name := self._end_activation(place)) else [] for place in ("stem", "head")}
        slots, before = [Slot("stem", (*always, ("width", "stem.width"), *ends["stem"]))], "stem.width"
        for number, stage in enumerate(self.config.stages, start=1):
            width, depth = f"stage{number}.width", f"stage{number}.depth"
            for index in range(max(stage.depth)):
                in_width = ("in_width", before if index == 0 else width)
                named = [(part, self._chooses(part, number, index)) for part in PARTS]
                roles = [(part, name) for part, name in named if name is not None]
                needs = (depth, index + 1) if index else None
                slots.append(Slot(f"stage{number}_{index}", (*always, in_width, ("width", width), *roles), needs))
            before = width
        return (*slots, Slot("head", (*always, ("in_width", before), ("width", "head.width"), *ends["head"])))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`."""
        cast = slot.cast(choices)
        by = cast.get(DIVISOR, self.config.channel_divisor)
        widths: dict[str, Any] = {role: multiple(cast[role], by) for role in ("in_width", "width") if role in cast}
        if slot.name in {"stem", "head"}:
            return self._end_block(slot.name, cast, widths, by)
        number, index = (int(part) for part in slot.name.removeprefix("stage").split("_"))
        stage = self.config.stages[number - 1]
        parts = {part: cast.get(part, offers(getattr(stage, part), index)[0]) for part in PARTS}
        return MBConvSpec(
            **widths, **parts,
            stride=stage.stride if index == 0 else 1,
            gate=self.config.gate,
            shortcut=self.config.shortcut,
            channel_divisor=by,
            in_size=self.config.map_size(cast["resolution"], number - 1 if index == 0 else number),
        )  # fmt: skip

    def _end_block(self, place: str, cast: Mapping[str, Any], widths: Mapping[str, int], by: int | None) -> BlockSpec:
        config, head = self.config, self.config.head
        activation = cast.get("activation", offers(getattr(config, place).activation)[0])
        if place == "stem":
            return StemSpec(self.in_channels, widths["width"], config.stem.stride, activation, in_size=cast["resolution"])
        size = config.map_size(cast["resolution"], len(config.stages))
        if head.kind == "efficientnet":
            return ShortHeadSpec(**widths, classes=self.classes, activation=activation, in_size=size)
        return HeadSpec(
            **widths, expand_ratio=head.expand_ratio, classes=self.classes, expand_width=head.expand_width, bias=head.bias,
            activation=activation, channel_divisor=by, in_size=size,
        )  # fmt: skip

    @cached_property
    def _width_columns(self) -> dict[int, tuple[int, ...]]:
        """Column -> the widths that it offers."""
        names = {"stem.width", "head.width", *(f"stage{number}.width" for number in range(1, len(self.config.stages) + 1))}
        return {column: dimension.choices for column, dimension in enumerate(self.dimensions) if dimension.name in names}  # type: ignore[misc]

    def canonical(self, codes: Codes) -> Codes:
        """Widths that a channel divisor makes equal are the first of them.

        Networks of different divisors count as different, even where all their channels happen to be multiples of both.
        """
        if self.config.channel_divisor is None:
            return codes
        codes = codes.copy()
        names = [dimension.name for dimension in self.dimensions]
        by = codes[:, names.index(DIVISOR)] if DIVISOR in names else 0
        for column, offered in self._width_columns.items():
            rounded = [[multiple(width, divisor) for width in offered] for divisor in self.config.divisors]
            first = [[row.index(width) for width in row] for row in rounded]
            codes[:, column] = np.array(first)[by, codes[:, column]]
        return codes

    def count(self, networks: int) -> int:
        """Without the widths that a divisor makes equal."""
        divisors, widths = self.config.divisors, self._width_columns.values()
        different = sum(math.prod(len({multiple(width, by) for width in offered}) for offered in widths) for by in divisors)
        return networks // (len(divisors) * math.prod(len(offered) for offered in widths)) * different

    @property
    def layout(self) -> Mapping[str, object]:
        """What a gate is made of."""
        return {"gate": self.config.gate}

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of timm's mobilenetv3_* or efficientnet_* under our names; see `our_names`."""
        return our_names(state)

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from `resolution` and the lists `width` (stem, stages, head), `depth`, `kernel_size`, `expand_ratio` (stages).

        Where kernels and expansions are chosen per block, from Once-for-All's form: `ks`, `e` (entries for the blocks of every stage
        that offers several depths, those that do not stand included), `d` (those stages), `r` (a resolution, or a list of one).
        """
        by_block = all(self.config.level(part) == "block" for part in ("kernel_size", "expand_ratio"))
        if "ks" in entry or by_block:
            return self._from_blocks(entry, by_block)
        count = len(self.config.stages)
        lengths = {"width": count + 2, "depth": count, "kernel_size": count, "expand_ratio": count}
        lists = self._lists(entry, "resolution", lengths)
        if any(self.config.level(part) != "stage" for part in ("kernel_size", "expand_ratio")):
            raise InputError(f"the space {self.config.name} does not choose kernels and expansions per stage: give an arch as "
                             "dimension: choice")  # fmt: skip
        choices: dict[str, Choice] = {
            "resolution": _pixels("resolution", entry["resolution"]),
            "stem.width": lists["width"][0],
            "head.width": lists["width"][-1],
        }
        for number in range(1, count + 1):
            choices[f"stage{number}.width"] = lists["width"][number]
            choices |= {f"stage{number}.{name}": lists[name][number - 1] for name in ("depth", "kernel_size", "expand_ratio")}
        return choices

    def _from_blocks(self, entry: Mapping[str, object], by_block: bool) -> dict[str, Choice]:
        """Once-for-All's form."""
        if not by_block:
            raise InputError(f"the entry gives kernels and expansions per block (ks, e), but the space {self.config.name} does not "
                             "choose them so: use a space whose chosen_per says block for both")  # fmt: skip
        if entry.get("wid") is not None:
            raise InputError(f"'wid' must be null (widths are the space's own), but got {entry['wid']!r}: remove it")
        elastic = [(number, stage) for number, stage in enumerate(self.config.stages, start=1) if len(stage.depth) > 1]
        blocks = [(number, index) for number, stage in elastic for index in range(max(stage.depth))]
        lists = self._lists(entry, "r", {"ks": len(blocks), "e": len(blocks), "d": len(elastic)})
        choices: dict[str, Choice] = {each.name: each.choices[0] for each in self.dimensions if len(each.choices) == 1}
        r = entry["r"]
        choices["resolution"] = _pixels("r", r[0] if isinstance(r, list) and len(r) == 1 else r)
        depth = {number: chosen for (number, _), chosen in zip(elastic, lists["d"], strict=True)}
        choices |= {f"stage{number}.depth": chosen for number, chosen in depth.items()}
        for part, key in (("kernel_size", "ks"), ("expand_ratio", "e")):
            for (number, index), chosen in zip(blocks, lists[key], strict=True):
                name, least = self._chooses(part, number, index), depth[number]
                if not isinstance(least, int) or index >= least:
                    continue  # the block does not stand
                if name is not None:
                    choices[name] = chosen
                elif (chosen,) != offers(getattr(self.config.stages[number - 1], part), index):
                    raise InputError(
                        f"{key!r}: block {index} of stage {number} has one {part} only, but got {chosen!r}: use that one"
                    )
        return choices

    def _lists(self, entry: Mapping[str, object], first: str, lengths: Mapping[str, int]) -> dict[str, list[Choice]]:
        missing = [key for key in (first, *lengths) if key not in entry]
        if missing:
            raise InputError(f"an entry of a table needs {first}, {', '.join(lengths)}, but {missing[0]!r} is missing: add it")
        lists: dict[str, list[Choice]] = {}
        for key, length in lengths.items():
            value = entry[key]
            if not isinstance(value, list) or len(value) != length:
                raise InputError(
                    f"{key!r} must be a list of {length} numbers for the space {self.config.name}, but got {value!r}"
                )
            lists[key] = value
        return lists

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row a stage: input pixels, width, depth, stride, kernel, expansion, and what else there is to say."""
        config, sizes = self.config, [int(resolution) for resolution in choices["resolution"]]
        table: list[dict[str, object]] = [{
            "stage": "stem", "block": "conv 3x3", "in_size": sizes, "width": choices["stem.width"], "stride": config.stem.stride,
            "activation": self._shown_end("stem", choices),
        }]  # fmt: skip
        for number, stage in enumerate(config.stages, start=1):
            shown = {part: self._shown(part, number, stage, choices) for part in PARTS}
            gates = set(shown.pop("squeeze_excite"))
            table.append({
                "stage": f"stage{number}",
                "block": "MBConv" + (" + SE" if gates == {True} else " (+ SE)" if gates == {True, False} else ""),
                "in_size": [config.map_size(size, number - 1) for size in sizes],
                **{name: choices[f"stage{number}.{name}"] for name in OWN},
                **shown,
                "stride": stage.stride,
            })  # fmt: skip
        head = config.head
        short = head.kind == "efficientnet"
        table.append({
            "stage": "head", "block": "conv 1x1, pool, linear" if short else "conv 1x1, pool, conv 1x1, linear",
            "in_size": [config.map_size(size, len(config.stages)) for size in sizes], "width": choices["head.width"],
            **({} if short or head.expand_width else {"expand_ratio": (head.expand_ratio,)}),
            "activation": self._shown_end("head", choices),
        })  # fmt: skip
        if DIVISOR in choices:
            table.append({"stage": "all", "block": f"channels in multiples of {', '.join(map(str, choices[DIVISOR]))}"})
        return table

    def _shown(
        self, part: str, number: int, stage: StageConfig, choices: Mapping[str, tuple[Choice, ...]]
    ) -> tuple[Choice, ...]:
        """Of an arch, the choice of each block that stands where they differ; of a space, all that is offered."""
        depths = choices[f"stage{number}.depth"]
        found = []
        for block in range(int(depths[-1])):
            name = self._chooses(part, number, block)
            found.append(choices[name] if name is not None else offers(getattr(stage, part), block))
        each = [choice for offered in found for choice in offered]
        one_arch = all(len(offered) == 1 for offered in choices.values())
        return tuple(each if one_arch and len(set(each)) > 1 else dict.fromkeys(each))

    def _shown_end(self, place: str, choices: Mapping[str, tuple[Choice, ...]]) -> tuple[Choice, ...]:
        name = self._end_activation(place)
        return choices[name] if name else offers(getattr(self.config, place).activation)


def _dimension(name: str, choices: tuple[Choice, ...], part: str) -> Dimension:
    return Dimension(name, choices, ordered=part != "activation")


def _pixels(key: str, value: object) -> int:
    if not isinstance(value, int):
        raise InputError(f"{key!r} must be a whole number of pixels, but got {value!r}")
    return value
