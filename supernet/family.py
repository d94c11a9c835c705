"""What a family of networks is: slots, and the one function that says which block stands in a slot."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, StrictInt
from torch import Tensor, nn

from supernet.arch import Choice
from supernet.config import Config
from supernet.errors import InputError
from supernet.operations import BlockCost, Operations, cost_of


def _ascending(choices: tuple[int, ...]) -> tuple[int, ...]:
    if not choices or any(b <= a for a, b in itertools.pairwise(choices)):
        raise ValueError("choices must be listed smallest first, each once, and at least one: reorder the list")
    return choices


Codes = NDArray[np.int64]
"""Archs as integers, shape (archs, dimensions): the position of each choice."""

Positive = Annotated[StrictInt, Field(ge=1, le=100_000)]
Choices = Annotated[tuple[Positive, ...], AfterValidator(_ascending)]
"""What a dimension of whole numbers offers."""


class FamilyConfig(Config):
    """The keys that the YAML of every space has."""

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    family: str
    source: str = ""
    """Where the numbers are from."""
    classes: Positive = 1000
    in_channels: Annotated[StrictInt, Field(ge=1, le=4)] = 3


@dataclass(frozen=True, slots=True)
class Dimension:
    """A named choice, offered smallest first. `ordered` is False where no choice is larger than another (kinds of operations)."""

    name: str
    choices: tuple[Choice, ...]
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the network where a block can stand.

    `roles` pairs the part that a choice plays in this block with the dimension that makes it, e.g. ("in_width", "stem.width").
    `needs` names a dimension and its least choice at which a block stands here, e.g. ("stage2.depth", 3); None: always.
    """

    name: str
    roles: tuple[tuple[str, str], ...]
    needs: tuple[str, int] | None = None
    where: tuple[tuple[str, tuple[str, int]], ...] = ()
    """Dimensions that this block reads only from a choice of another on, e.g. ("layer3.width", ("depth", 3))."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The few dimensions that decide which block stands here."""
        return tuple(dict.fromkeys([*(dimension for _, dimension in self.roles), *([self.needs[0]] if self.needs else [])]))

    def stands(self, choices: Mapping[str, Choice]) -> bool:
        """Whether there is a block here."""
        return self.needs is None or float(choices[self.needs[0]]) >= self.needs[1]

    def cast(self, choices: Mapping[str, Choice]) -> dict[str, Any]:
        """Role -> chosen value."""
        return {role: choices[dimension] for role, dimension in self.roles}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSpec(ABC):
    """Geometry of one block, a frozen and hashable value. All else about the block follows from it."""

    in_size: int
    """Pixels of a side of the input (for blocks over tokens: of the map that the tokens are of)."""

    regulariser: ClassVar[str | None] = None
    """What `drop` means in `build`: "drop_path", "dropout", or None where the block takes neither."""

    @property
    def geometry(self) -> Self:
        """The same block whatever its input size: blocks of equal geometry share modules and weights."""
        return replace(self, in_size=0)

    @abstractmethod
    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain module, freshly initialised; `drop` is the rate of its regulariser. Nothing in it may depend on `in_size`."""

    @abstractmethod
    def operations(self) -> Operations:
        """What it does in the exported graph, in order; `params` are those of the block after `bake`."""

    def cost(self) -> BlockCost:
        """What it costs at batch 1. Override it only where very many blocks must be counted, and without another result."""
        return cost_of(self.operations())

    def bake(self, block: nn.Module) -> None:
        """Fit an extracted block to `in_size` for good, such as interpolating its position embedding. Most have nothing to do."""
        return None


@lru_cache(maxsize=100_000)
def block_cost(spec: BlockSpec) -> BlockCost:
    """Cost of one block at batch 1."""
    return spec.cost()


class Family(ABC):
    """A family of networks. Make it a frozen dataclass over its config: two equal families describe the same networks."""

    config: FamilyConfig
    zero_init: ClassVar[tuple[str, ...]] = ()
    """Endings of parameter names that start at 0 (the last norm of residual blocks)."""
    task: ClassVar[str] = "classification"
    """What its networks learn, by its name in `supernet.task.TASKS`."""
    invalid_because: ClassVar[str] = ""
    """Why an arch that `valid` refuses is no network, and what to do."""

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.config.in_channels

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        return self.config.classes

    @property
    @abstractmethod
    def dimensions(self) -> tuple[Dimension, ...]:
        """Everything that can be chosen, in a fixed order."""

    @property
    @abstractmethod
    def slots(self) -> tuple[Slot, ...]:
        """Where blocks can stand, in the order in which data flows. The first always stands, and says the resolution."""

    @abstractmethod
    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`, where one stands, under `choices`, which need hold only the slot's dimensions."""

    def smallest(self) -> dict[str, Choice]:
        """Choices of the cheapest network."""
        return {dimension.name: dimension.choices[0] for dimension in self.dimensions}

    def teacher(self) -> dict[str, Choice]:
        """Choices of the network that teaches the others: the dearest one."""
        return {dimension.name: dimension.choices[-1] for dimension in self.dimensions}

    @property
    def bounded(self) -> tuple[str, ...]:
        """Costs of which no network has more than the teacher. Less than the smallest has none, of any cost."""
        return ("macs", "params", "peak_memory_bytes", "model_size_bytes")

    def canonical(self, codes: Codes) -> Codes:
        """One form for all codes, shape (archs, dimensions), of the same network, beyond choices for blocks that do not stand."""
        return codes

    def valid(self, codes: Codes) -> NDArray[np.bool_]:
        """Which codes are networks at all, shape (archs,)."""
        return np.ones(len(codes), dtype=np.bool_)

    @property
    def layout(self) -> Mapping[str, object]:
        """What two spaces of this family must have in common for weights of one to mean the same in the other."""
        return {}

    def count(self, networks: int) -> int:
        """Number of different networks, where `networks` is what the choices alone make; a family with `canonical` knows better."""
        return networks

    def cover(self, slot: Slot) -> Iterator[Mapping[str, Choice]]:
        """Choices whose blocks have, together, every parameter that any block of the slot has, at its largest shape.

        All combinations; a family whose slots have very many (operations on many edges) names a few that suffice.
        """
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        for values in itertools.product(*(by_name[name].choices for name in slot.dimensions)):
            yield dict(zip(slot.dimensions, values, strict=True))

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from an entry written as the papers' tables are. Raises `InputError` where the family knows no such form."""
        raise InputError(f"archs of the family {self.config.family} are given as dimension: choice; it knows no other form")

    def from_timm(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of timm's network of this kind under a child's names (`slot.path`) and in its layout.

        Parameters and batch-norm statistics; block i of stage s goes to the slot of block i of stage s, whether or not its shapes
        are in the space. What has no counterpart is left out. Raises `InputError` where it is a network of another kind.
        """
        raise InputError(f"the family {self.config.family} has no map from timm's names: start from a file or run of its own")

    def fitted(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        """A donor's parameter for the stored one of `shape`, where that is no matter of slicing (positions of another grid)."""
        return value

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A table for people; a space offers several choices, an arch one."""
        return [{"dimension": name, "choices": offered} for name, offered in choices.items()]


def variants(
    slot: Slot, dimensions: Mapping[str, Dimension], family: Family
) -> Iterator[tuple[tuple[int, ...], BlockSpec | None]]:
    """Every combination of the slot's choices, as integer codes of `slot.dimensions`, with the block that it gives, if any."""
    offered = [dimensions[name].choices for name in slot.dimensions]
    for codes in itertools.product(*(range(len(choices)) for choices in offered)):
        chosen = {name: choices[code] for name, choices, code in zip(slot.dimensions, offered, codes, strict=True)}
        yield codes, family.block(slot, chosen) if slot.stands(chosen) else None
