"""What a family of networks is: slots, and the one function that says which block stands in a slot."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Protocol

from pydantic import AfterValidator, Field, StrictInt
from torch import nn

from supernet.arch import Choice
from supernet.config import Config
from supernet.operations import Operations


def _ascending(choices: tuple[int, ...]) -> tuple[int, ...]:
    if not choices or any(b <= a for a, b in itertools.pairwise(choices)):
        raise ValueError("choices must be listed smallest first, each once, and at least one: reorder the list")
    return choices


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
    """A named choice, offered smallest first."""

    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the network where a block can stand.

    `roles` pairs the part that a choice plays in this block with the dimension that makes it, e.g. ("in_width", "stem.width").
    """

    name: str
    roles: tuple[tuple[str, str], ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The few dimensions that decide which block stands here."""
        return tuple(dict.fromkeys(dimension for _, dimension in self.roles))

    def cast(self, choices: Mapping[str, Choice]) -> dict[str, int]:
        """Role -> chosen value."""
        return {role: int(choices[dimension]) for role, dimension in self.roles}


class BlockSpec(Protocol):
    """Geometry of one block, a frozen and hashable value. All else about the block follows from it."""

    regulariser: ClassVar[str | None]
    """What `drop` means in `build`: "drop_path", "dropout", or None where the block takes neither."""

    def __hash__(self) -> int: ...

    @property
    def in_size(self) -> int:
        """Pixels of a side of the input."""
        ...

    @property
    def geometry(self) -> BlockSpec:
        """The same block whatever its input size: blocks of equal geometry share modules and weights."""
        ...

    def build(self, drop: float = 0.0) -> nn.Module:
        """A plain module, freshly initialised; `drop` is the rate of its regulariser."""
        ...

    def operations(self) -> Operations:
        """What it does in the exported graph, in order."""
        ...


class Family(Protocol):
    """A family of networks. Two equal families describe the same networks."""

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Everything that can be chosen, in a fixed order."""
        ...

    @property
    def slots(self) -> tuple[Slot, ...]:
        """Where blocks can stand, in the order in which data flows."""
        ...

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        ...

    @property
    def classes(self) -> int:
        """Outputs of the network."""
        ...

    @property
    def zero_init(self) -> tuple[str, ...]:
        """Endings of parameter names that start at 0 (the last norm of residual blocks)."""
        ...

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec | None:
        """The block in `slot` under `choices`, which need hold only the slot's dimensions; None where the stage is shallower."""
        ...

    def from_table(self, entry: Mapping[str, object]) -> dict[str, Choice]:
        """Choices from an entry written as the papers' tables are."""
        ...

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """A table for people, a row a stage; a space offers several choices, an arch one."""
        ...


def variants(
    slot: Slot, dimensions: Mapping[str, Dimension], family: Family
) -> Iterator[tuple[tuple[int, ...], BlockSpec | None]]:
    """Every combination of the slot's choices, as integer codes of `slot.dimensions`, with the block that it gives."""
    offered = [dimensions[name].choices for name in slot.dimensions]
    for codes in itertools.product(*(range(len(choices)) for choices in offered)):
        chosen = {name: choices[code] for name, choices, code in zip(slot.dimensions, offered, codes, strict=True)}
        yield codes, family.block(slot, chosen)
