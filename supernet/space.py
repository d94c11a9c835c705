"""A search space: ordered dimensions with their choices, the archs in it, and the family that turns an arch into a network."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet import config
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.families import FAMILIES
from supernet.family import BlockSpec, Dimension, Family

Codes = NDArray[np.int64]
"""Archs as integers, shape (archs, dimensions): the position of each choice."""

MOST_BLOCKS = 2_000_000
"""Blocks counted over all slots and choices; the largest published spaces have some ten thousands. More would take minutes to cost."""


@dataclass(frozen=True)
class Space:
    """The archs of a family. Make one with `load_space` or `Space.from_definition`.

    `definition` is the checked content of its file, with the data's classes and channels; it travels in every file that we write.
    """

    name: str
    definition: Mapping[str, Any]
    family: Family

    @classmethod
    def from_definition(cls, value: Mapping[str, Any], where: str = "space") -> Space:
        """Check a definition (the content of a space's YAML). Raises `InputError` with the key and the remedy."""
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: must be a mapping of keys to values, but got {type(value).__name__}")
        family = value.get("family")
        if not isinstance(family, str) or family not in FAMILIES:
            hint = config.nearest(str(family), sorted(FAMILIES))
            raise InputError(f"{where}: family: must be one of {sorted(FAMILIES)}, but got {family!r}{hint}")
        checked = config.parse(FAMILIES[family].config, value, where)
        space = cls(checked.name, checked.model_dump(mode="json"), FAMILIES[family].make(checked))
        names = [dimension.name for dimension in space.dimensions]
        blocks = sum(math.prod(len(space.by_name[name].choices) for name in slot.dimensions) for slot in space.family.slots)
        if blocks > MOST_BLOCKS:
            raise InputError(
                f"{where}: a space has at most {MOST_BLOCKS:,} different blocks, this one {blocks:,}: offer fewer choices"
            )
        if len(set(names)) != len(names):
            raise InputError(f"{where}: dimensions must have different names, but got {names}")
        return space

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """What can be chosen, in order."""
        return self.family.dimensions

    @cached_property
    def by_name(self) -> dict[str, Dimension]:
        """Dimension name -> dimension."""
        return {dimension.name: dimension for dimension in self.dimensions}

    @property
    def key(self) -> str:
        """12 hexadecimal digits that name this very space, classes and channels included."""
        text = json.dumps(dict(self.definition), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def size(self) -> int:
        """Number of archs."""
        return math.prod(len(dimension.choices) for dimension in self.dimensions)

    @property
    def smallest(self) -> Arch:
        """The first choice everywhere: the cheapest arch."""
        return self.decode(np.zeros((1, len(self.dimensions)), dtype=np.int64))[0]

    @property
    def largest(self) -> Arch:
        """The last choice everywhere: the dearest arch, and the teacher."""
        return self.decode(np.array([[len(dimension.choices) - 1 for dimension in self.dimensions]]))[0]

    def arch(self, choices: Mapping[str, object], where: str = "arch") -> Arch:
        """The arch with these choices. Raises `InputError` where one is missing, unknown or not offered."""
        unknown = [name for name in choices if name not in self.by_name]
        if unknown:
            hint = config.nearest(str(unknown[0]), list(self.by_name))
            raise InputError(
                f"{where}: {unknown[0]!r} is no dimension of the space {self.name}{hint or f'; it has {list(self.by_name)}'}"
            )
        for dimension in self.dimensions:
            if dimension.name not in choices:
                raise InputError(f"{where}: a choice for {dimension.name!r} is missing: add one of {list(dimension.choices)}")
            _position(dimension, choices[dimension.name], where)
        return self.decode(np.array([[_position(d, choices[d.name], where) for d in self.dimensions]], dtype=np.int64))[0]

    def contains(self, arch: Arch) -> bool:
        """Whether `arch` is one of this space."""
        try:
            return self.arch(arch.as_dict()) == arch
        except InputError:
            return False

    def encode(self, archs: Sequence[Arch]) -> Codes:
        """Archs as integers, shape (archs, dimensions)."""
        positions = [{choice: code for code, choice in enumerate(dimension.choices)} for dimension in self.dimensions]
        rows = [[place[choice] for place, (_, choice) in zip(positions, arch.choices, strict=True)] for arch in archs]
        return np.array(rows, dtype=np.int64).reshape(len(archs), len(self.dimensions))

    def decode(self, codes: Codes) -> list[Arch]:
        """Integers, shape (archs, dimensions), as archs."""
        return [
            Arch(tuple((dimension.name, dimension.choices[code]) for dimension, code in zip(self.dimensions, row, strict=True)))
            for row in np.asarray(codes).tolist()
        ]

    def sample_codes(self, count: int, rng: np.random.Generator) -> Codes:
        """`count` uniform archs as integers, shape (count, dimensions)."""
        return np.stack([rng.integers(len(dimension.choices), size=count) for dimension in self.dimensions], axis=1)

    def sample(self, rng: np.random.Generator) -> Arch:
        """A uniform arch."""
        return self.decode(self.sample_codes(1, rng))[0]

    def mutate(self, arch: Arch, rng: np.random.Generator, rate: float = 0.1) -> Arch:
        """Another arch: each dimension is drawn anew with probability `rate`, at least one really changes."""
        counts = np.array([len(dimension.choices) for dimension in self.dimensions])
        free = np.flatnonzero(counts > 1)
        if not len(free):
            return arch
        codes = self.encode([arch])[0]
        chosen = free[rng.random(len(free)) < rate]
        if not len(chosen):
            chosen = rng.choice(free, size=1)
        codes[chosen] = (codes[chosen] + rng.integers(1, counts[chosen])) % counts[chosen]  # any but the present choice
        return self.decode(codes[None])[0]

    def crossover(self, one: Arch, other: Arch, rng: np.random.Generator) -> Arch:
        """An arch that takes each choice from either parent with equal probability."""
        parents = self.encode([one, other])
        return self.decode(parents[rng.integers(2, size=parents.shape[1]), np.arange(parents.shape[1])][None])[0]

    def plan(self, arch: Arch) -> dict[str, BlockSpec]:
        """Slot name -> block, in the order in which data flows."""
        choices = arch.as_dict()
        blocks = {slot.name: self.family.block(slot, choices) for slot in self.family.slots}
        return {name: spec for name, spec in blocks.items() if spec is not None}

    def resolution(self, arch: Arch) -> int:
        """Pixels of a side of the images that `arch` takes."""
        return next(iter(self.plan(arch).values())).in_size

    @property
    def largest_resolution(self) -> int:
        """Pixels of a side of the largest images of the space."""
        return self.resolution(self.largest)


def _position(dimension: Dimension, choice: object, where: str) -> int:
    for position, offered in enumerate(dimension.choices):
        if type(offered) is type(choice) and offered == choice:  # 1, 1.0 and True differ
            return position
    raise InputError(f"{where}: {dimension.name} must be one of {list(dimension.choices)}, but got {choice!r}")


def load_space(name: str, *, classes: int | None = None, in_channels: int | None = None) -> Space:
    """The space of a shipped configuration's name or of a YAML file; `classes` and `in_channels` as the data has them.

    Raises `InputError` naming file, key and remedy.
    """
    path = config.find("spaces", name)
    given = config.read(path)
    chosen = {key: value for key, value in (("classes", classes), ("in_channels", in_channels)) if value is not None}
    return Space.from_definition({**given, **chosen}, str(path) if path.stem != name else f"space {name}")


def read_arch(space: Space, text: str) -> Arch:
    """The arch that `text` names: "smallest", "largest" or a JSON file.

    The file holds our own form (dimension -> choice, alone or under the key "arch") or an entry as the papers' tables are written
    (`resolution, width, depth, kernel_size, expand_ratio`).
    """
    if text in {"smallest", "largest"}:
        return space.smallest if text == "smallest" else space.largest
    path = Path(text)
    if not config.is_file(path):
        raise InputError(f"an arch is 'smallest', 'largest' or the path of a JSON file, but got {text[:200]!r}")
    value = config.read(path)
    if isinstance(value.get("arch"), dict):
        value = value["arch"]
    choices = space.family.from_table(value) if "kernel_size" in value or "width" in value else value
    return space.arch(choices, str(path))
