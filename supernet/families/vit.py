"""Vision transformers (Dosovitskiy et al. 2021, arXiv 2010.11929) with elastic width, depth, heads and MLP ratio.

The choices are AutoFormer's (Chen et al. 2021, arXiv 2107.00651): `embed_dim` and `depth` for the network, `heads` and `mlp_ratio`
for each layer or for the network. Heads have a fixed `head_dim`, so the width of attention is independent of `embed_dim`. Layers
normalise first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, Self

import torch
from pydantic import AfterValidator, Field, StrictBool, StrictInt, model_validator
from torch import Tensor
from torch.nn.functional import interpolate

from supernet.arch import Choice
from supernet.config import Config, Number
from supernet.errors import InputError
from supernet.families.vit_blocks import EmbedSpec, HeadSpec, LayerSpec
from supernet.family import BlockSpec, Choices, Dimension, Family, FamilyConfig, Positive, Slot


def _ascending(ratios: tuple[float, ...]) -> tuple[float, ...]:
    if not ratios or any(b <= a for a, b in itertools.pairwise(ratios)):
        raise ValueError("ratios must be listed smallest first, each once, and at least one: reorder the list")
    return ratios


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 100:
        raise ValueError("a network has at most 100 layers: use smaller depths")
    return depths


Ratio = Annotated[Number, Field(gt=0, le=100)]


class ChosenPer(Config):
    """Whether a choice is made for each layer ("block", AutoFormer's) or once for all of them ("network")."""

    heads: Literal["block", "network"] = "block"
    mlp_ratio: Literal["block", "network"] = "block"


class ViTConfig(FamilyConfig):
    """A space of this family, as its YAML has it."""

    family: Literal["vit"]
    resolution: Choices
    patch_size: Positive
    embed_dim: Choices
    depth: Annotated[Choices, AfterValidator(_shallow)]
    heads: Choices
    mlp_ratio: Annotated[tuple[Ratio, ...], AfterValidator(_ascending)]
    chosen_per: ChosenPer = ChosenPer()
    head_dim: Annotated[StrictInt, Field(ge=1, le=1024)] | None = None
    """Width of a head; None: `embed_dim / heads`, where both have one choice."""
    qkv_bias: StrictBool = True
    class_token: StrictBool = True
    pool: Literal["token", "mean"] = "token"
    """What the classifier sees: the class token, or the average of the patches."""

    @model_validator(mode="after")
    def _is_a_network(self) -> Self:
        uneven = [size for size in self.resolution if size % self.patch_size]
        if uneven:
            raise ValueError(
                f"resolution must be a multiple of patch_size {self.patch_size}, but got {uneven[0]}: change either"
            )
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool: token needs the class token: set class_token: true or pool: mean")
        if self.head_dim is None:
            if len(self.embed_dim) > 1 or len(self.heads) > 1:
                raise ValueError(
                    "head_dim must be given where embed_dim or heads offers several choices, so that smaller children"
                    " have the first whole heads of larger ones: add it, such as head_dim: 64"
                )
            if self.embed_dim[0] % self.heads[0]:
                raise ValueError(
                    f"heads must divide embed_dim where head_dim is not given, but {self.heads[0]} does not divide"
                    f" {self.embed_dim[0]}: change either or add head_dim"
                )
        for width in self.embed_dim:
            hidden = [_hidden(width, ratio) for ratio in self.mlp_ratio]
            if hidden[0] < 1 or len(set(hidden)) < len(hidden):
                raise ValueError(
                    f"mlp_ratio must make different hidden widths, but at embed_dim {width} it makes {hidden}: spread the ratios"
                )
        return self


def _hidden(embed_dim: int, mlp_ratio: float) -> int:
    return round(embed_dim * mlp_ratio)


@dataclass(frozen=True)
class ViTFamily(Family):
    """Slots of a chain: embed, layers, head."""

    config: ViTConfig

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, embed_dim, depth, then heads and mlp_ratio."""
        config = self.config
        found = [Dimension(name, getattr(config, name)) for name in ("resolution", "embed_dim", "depth")]
        for layer in range(1, max(config.depth) + 1):
            for name in ("heads", "mlp_ratio"):
                dimension = Dimension(self._named(name, layer), getattr(config, name))
                if dimension not in found:
                    found.append(dimension)
        return tuple(found)

    def _named(self, name: str, layer: int) -> str:
        return f"layer{layer}.{name}" if getattr(self.config.chosen_per, name) == "block" else name

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every layer of the deepest child, between embed and head."""
        shared = (("resolution", "resolution"), ("embed_dim", "embed_dim"))
        slots = [Slot("embed", shared)]
        for layer in range(1, max(self.config.depth) + 1):
            roles = [(name, self._named(name, layer)) for name in ("heads", "mlp_ratio")]
            slots.append(Slot(f"layer{layer}", (*shared, *roles), ("depth", layer) if layer > min(self.config.depth) else None))
        return (*slots, Slot("head", shared))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`."""
        cast, config = slot.cast(choices), self.config
        width, grid = cast["embed_dim"], cast["resolution"] // config.patch_size
        if slot.name == "embed":
            largest = max(config.resolution) // config.patch_size
            return EmbedSpec(
                self.in_channels, config.patch_size, width, largest, config.class_token, in_size=cast["resolution"]
            )
        if slot.name == "head":
            return HeadSpec(width, self.classes, config.class_token, config.pool, in_size=grid)
        return LayerSpec(
            embed_dim=width,
            heads=cast["heads"],
            head_dim=config.head_dim or width // cast["heads"],
            hidden=_hidden(width, cast["mlp_ratio"]),
            qkv_bias=config.qkv_bias,
            class_token=config.class_token,
            in_size=grid,
        )

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from `resolution` (where there is but one it may be left out), `embed_dim`, `depth`, `heads` and `mlp_ratio`.

        The last two are lists with a number for each layer, or numbers where the space chooses them for the network.
        """
        given = {**({"resolution": self.config.resolution[0]} if len(self.config.resolution) == 1 else {}), **_our_table(entry)}
        choices: dict[str, Choice] = {}
        for key in ("resolution", "embed_dim", "depth", "heads", "mlp_ratio"):
            if key not in given:
                raise InputError(
                    f"an entry of a table needs embed_dim, depth, heads, mlp_ratio, but {key!r} is missing: add it"
                )
            value, listed = given[key], key in ChosenPer.model_fields and self._named(key, 1) != key
            if not listed:
                choices[key] = self._number(key, value)
                continue
            if not isinstance(value, list) or len(value) != choices["depth"]:
                raise InputError(f"{key!r} must be a list of depth = {choices['depth']} numbers, but got {value!r}: change it")
            choices |= {self._named(key, layer): self._number(key, one) for layer, one in enumerate(value, start=1)}
        return choices

    def _number(self, key: str, value: object) -> Choice:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST_NUMBER:
            raise InputError(f"{key!r} must be a positive number here, but got {value!r}: change it")
        return float(value) if key == "mlp_ratio" else value

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A row a layer: side of the map, embed_dim, heads, MLP ratio."""
        sizes = [int(resolution) for resolution in choices["resolution"]]
        grids, width = [size // self.config.patch_size for size in sizes], choices["embed_dim"]
        embed = f"conv {self.config.patch_size}x{self.config.patch_size}" + (", class token" if self.config.class_token else "")
        table: list[dict[str, object]] = [{"block": "embed", "kind": embed, "in_size": sizes, "embed_dim": width}]
        deepest = max(int(depth) for depth in choices["depth"])
        for layer in range(1, deepest + 1):
            row = {name: choices[self._named(name, layer)] for name in ("heads", "mlp_ratio")}
            optional = layer > min(int(depth) for depth in choices["depth"])
            kind = "attention, MLP" + (" (optional)" if optional else "")
            table.append({"block": f"layer{layer}", "kind": kind, "in_size": grids, "embed_dim": width, **row})
        pooled = "class token" if self.config.pool == "token" else "mean of patches"
        return [*table, {"block": "head", "kind": f"norm, {pooled}, classifier", "in_size": grids, "embed_dim": width}]

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From timm's `vit_*` and `deit_*` (class token, no distillation token, no layer scale). See `Family.from_timm`."""
        _refuse_other_kinds(state)
        found = {_our_name(name): value for name, value in state.items() if _our_name(name)}
        found |= {name: self._head_major(value) for name, value in found.items() if ".qkv." in name}
        position = state["pos_embed"][0]
        side = round((len(position) - 1) ** 0.5)
        if side**2 != len(position) - 1:
            raise InputError(
                f"timm's pos_embed must be a square grid and a class token, but has {len(position)} rows: name another model"
            )
        found["embed.position"] = position[1:].T.reshape(-1, side, side)
        if self.config.class_token:
            found |= {"embed.class_token": state["cls_token"].flatten(), "embed.class_position": position[0]}
        return found

    @property
    def layout(self) -> Mapping[str, object]:
        """Patches and heads."""
        return {"patch_size": self.config.patch_size, "head_dim": self._head_dim}

    @property
    def _head_dim(self) -> int:
        return self.config.head_dim or self.config.embed_dim[0] // self.config.heads[0]

    def fitted(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        """Positions of another grid are interpolated to the grid of the largest resolution, as children do it."""
        if name != "embed.position" or value.ndim != 3 or value.shape[1:] == shape[1:]:
            return value
        return interpolate(value[None].float(), shape[1:], mode="bicubic", antialias=True)[0]

    def _head_major(self, qkv: Tensor) -> Tensor:
        """From timm's order of outputs, ({q, k, v}, head, head_dim), to ours, (head, {q, k, v}, head_dim)."""
        head_dim = self._head_dim
        if len(qkv) % (3 * head_dim):
            raise InputError(
                f"the weights must have heads of head_dim {head_dim}, but their attention is {len(qkv) // 3} wide: name another model"
            )
        return qkv.reshape(3, -1, head_dim, *qkv.shape[1:]).transpose(0, 1).flatten(0, 2)


def _our_table(entry: Mapping[str, object]) -> dict[str, object]:
    """AutoFormer's two forms (the keys of its code, and those of its files below RETRAIN) under our names."""
    inner = entry.get("RETRAIN", entry)
    if not isinstance(inner, Mapping):
        raise InputError(f"'RETRAIN' must hold MLP_RATIO, NUM_HEADS, DEPTH and EMBED_DIM, but got {inner!r}: give a mapping")
    names = {"layer_num": "depth", "num_heads": "heads"}
    found = {names.get(str(key).lower(), str(key).lower()): value for key, value in inner.items()}
    width = found.get("embed_dim")
    if isinstance(width, list) and width and all(value == width[0] for value in width):
        found["embed_dim"] = width[0]  # its code repeats the width for each layer
    return found


MOST_NUMBER = 1e9
"""Beyond all choices."""
_MODULES = {"patch_embed.proj": "embed.patches", "norm": "head.norm", "head": "head.classifier"}
_OF_A_LAYER = {
    "norm1": "norm1", "attn.qkv": "attention.qkv", "attn.proj": "attention.proj", "norm2": "norm2", "mlp.fc1": "expand",
    "mlp.fc2": "project",
}  # fmt: skip
"""timm's names of modules and ours."""


def _our_name(name: str) -> str:
    """Our name of a parameter of timm's; empty where it has none."""
    module, _, parameter = name.rpartition(".")
    if not module.startswith("blocks."):
        return f"{_MODULES[module]}.{parameter}" if module in _MODULES else ""
    _, number, path = module.split(".", 2)
    return f"layer{int(number) + 1}.{_OF_A_LAYER[path]}.{parameter}" if path in _OF_A_LAYER else ""


def _refuse_other_kinds(state: Mapping[str, Tensor]) -> None:
    """Raise `InputError` where these are no weights of a plain vision transformer."""
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    strange = ("dist_token", "reg_token", ".ls1.gamma", ".ls2.gamma", ".q_norm.weight", "norm_pre.weight")
    missing = next((f"{name!r} is missing" for name in needed if name not in state), None)
    found = missing or next((f"{name!r} has no counterpart" for name in state if name.endswith(strange)), None)
    if found:
        raise InputError(f"timm's weights must be those of a plain vision transformer, but {found}: name a vit_ or deit_ model")
