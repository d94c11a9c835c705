"""A search space: ordered dimensions with their choices, the archs in it, and the family that turns an arch into a network."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet import config
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.families import families
from supernet.family import BlockSpec, Codes, Dimension, Family, block_cost

MOST_DRAWS = 1_000
"""Rounds of drawing archs anew where some are no networks; beyond it hardly any is."""

MOST = (10**15, 10**10, 10**11, 4 * 10**10)
"""macs, params, bytes of live activations and bytes of weights of the largest network; no machine trains more with this program."""

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
        family, known = value.get("family"), families()
        if not isinstance(family, str) or family not in known:
            hint = config.nearest(str(family), sorted(known))
            raise InputError(f"{where}: family: must be one of {sorted(known)}, but got {family!r}{hint}")
        checked = config.parse(known[family].config, value, where)
        definition = {"format": 1, **checked.model_dump(mode="json", exclude_defaults=True)}
        try:
            space = cls(checked.name, definition, known[family].make(checked))
            space._check()
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return space

    def _check(self) -> None:
        """Raise `InputError` where the family's dimensions and slots make no space."""
        names = [dimension.name for dimension in self.dimensions]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise InputError(f"dimensions must have different names, but two are named {twice!r}: rename one")
        if type(self.family).cover is Family.cover:
            blocks = sum(math.prod(len(self.by_name[name].choices) for name in slot.dimensions) for slot in self.family.slots)
            if blocks > MOST_BLOCKS:
                raise InputError(
                    f"a space has at most {MOST_BLOCKS:,} different blocks, this one {blocks:,}: offer fewer choices"
                )
        bounded = ("macs", "params", "bytes of activations at batch 1", "bytes of weights")
        for name, value, bound in zip(bounded, self.costs(self.largest), MOST, strict=True):
            if value > bound:
                raise InputError(
                    f"the largest network has at most {bound:.0e} {name}, this one {value:.1e}: offer smaller choices"
                )
        least, codes = self.costs(self.smallest), self.encode([self.smallest])[0]
        for column, dimension in enumerate(self.dimensions):
            for code in range(len(dimension.choices)):
                other = np.where(np.arange(len(codes)) == column, code, codes)[None]
                here = self.costs(self.decode(other)[0]) if self.valid(other)[0] else least
                if any(a < b for a, b in zip(here, least, strict=True)):
                    raise InputError(
                        f"{dimension.name}: {dimension.choices[code]!r} costs less than {self.smallest[dimension.name]!r}, so there is "
                        "no smallest network (a shortcut convolution that only some widths have can do this): offer other widths"
                    )

    def costs(self, arch: Arch) -> tuple[int, int, int, int]:
        """The `METRICS` of `supernet.costs` of one arch at batch 1, in order; there many are counted at once."""
        blocks = [block_cost(spec) for spec in self.plan(arch).values()]
        return (
            sum(block.macs for block in blocks), sum(block.params for block in blocks),
            max(block.peak_memory_bytes for block in blocks), sum(block.model_size_bytes for block in blocks),
        )  # fmt: skip

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

    @cached_property
    def size(self) -> int:
        """Number of different networks."""
        optional = [column for column, conditions in self._conditions.items() if conditions]
        deciding = sorted({column for each in optional for column, _ in self._conditions[each]})
        counts = [len(dimension.choices) for dimension in self.dimensions]
        total = math.prod(count for column, count in enumerate(counts) if column not in {*optional, *deciding})
        for group in _joined([{each, *(column for column, _ in self._conditions[each])} for each in optional]):
            deciders = [column for column in deciding if column in group]
            part = 0
            for codes in itertools.product(*(range(counts[column]) for column in deciders)):
                standing = dict(zip(deciders, codes, strict=True))
                live = [each for each in optional if each in group
                        and any(standing[column] >= least for column, least in self._conditions[each])]  # fmt: skip
                part += math.prod(counts[column] for column in live)
            total *= part
        return self.family.count(total)

    @cached_property
    def smallest(self) -> Arch:
        """The cheapest arch."""
        return self.arch(self.family.smallest(), "the smallest arch")

    @cached_property
    def largest(self) -> Arch:
        """The dearest arch, and the teacher."""
        return self.arch(self.family.teacher(), "the teacher")

    def arch(self, choices: Mapping[str, object], where: str = "arch") -> Arch:
        """The arch with these choices; those for blocks that do not stand may be left out and have no meaning.

        Raises `InputError` where a choice is missing, unknown or not offered, or the arch is no network.
        """
        unknown = [name for name in choices if name not in self.by_name]
        if unknown:
            hint = config.nearest(str(unknown[0]), list(self.by_name))
            raise InputError(
                f"{where}: {unknown[0]!r} is no dimension of the space {self.name}{hint or f'; it has {list(self.by_name)}'}"
            )
        codes = np.array([[_position(d, choices[d.name], where) if d.name in choices else -1 for d in self.dimensions]])
        live = self._live(np.maximum(codes, 0))[0]
        for dimension, code, lives in zip(self.dimensions, codes[0], live, strict=True):
            if code < 0 and lives:
                raise InputError(f"{where}: a choice for {dimension.name!r} is missing: add one of {list(dimension.choices)}")
        codes = np.maximum(codes, 0)
        if not self.valid(codes)[0]:
            raise InputError(f"{where}: {self.family.invalid_because}")
        return self.decode(codes)[0]

    def contains(self, arch: Arch) -> bool:
        """Whether `arch` is one of this space, in its canonical form."""
        try:
            found = self.arch(arch.as_dict())
            return found == arch and found.to_json() == arch.to_json()  # 8.0 equals 8, but is written otherwise
        except InputError:
            return False

    def encode(self, archs: Sequence[Arch]) -> Codes:
        """Archs as integers, shape (archs, dimensions)."""
        positions = [{choice: code for code, choice in enumerate(dimension.choices)} for dimension in self.dimensions]
        rows = [[place[choice] for place, (_, choice) in zip(positions, arch.choices, strict=True)] for arch in archs]
        return np.array(rows, dtype=np.int64).reshape(len(archs), len(self.dimensions))

    def decode(self, codes: Codes) -> list[Arch]:
        """Integers, shape (archs, dimensions), as archs in their canonical form: equal networks are equal archs."""
        return [
            Arch(tuple((dimension.name, dimension.choices[code]) for dimension, code in zip(self.dimensions, row, strict=True)))
            for row in self.canonical(codes).tolist()
        ]

    def canonical(self, codes: Codes) -> Codes:
        """The same networks, shape (archs, dimensions), with the first choice wherever a choice has no effect."""
        codes = np.asarray(codes, dtype=np.int64).reshape(-1, len(self.dimensions))
        codes = np.where(self._live(codes), codes, 0)
        return self.family.canonical(codes)

    def valid(self, codes: Codes) -> NDArray[np.bool_]:
        """Which codes are networks at all (in some families a choice can cut the input off), shape (archs,)."""
        return self.family.valid(codes)

    def _live(self, codes: Codes) -> NDArray[np.bool_]:
        """Which choices belong to a block that stands, shape (archs, dimensions)."""
        live = np.ones(codes.shape, dtype=np.bool_)
        for column, conditions in self._conditions.items():
            if conditions:
                live[:, column] = np.any([codes[:, other] >= least for other, least in conditions], axis=0)
        return live

    @cached_property
    def _conditions(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """Column -> (column, least code), one of which must hold for the choice to have an effect; none: it always has."""
        column = {dimension.name: position for position, dimension in enumerate(self.dimensions)}
        found: dict[int, set[tuple[int, int]] | None] = {}
        for slot in self.family.slots:
            for name in {name for _, name in slot.roles}:
                before, needs = found.setdefault(column[name], set()), dict(slot.where).get(name, slot.needs)
                if needs is None or before is None:
                    found[column[name]] = None
                else:
                    choices = self.by_name[needs[0]].choices
                    before.add((column[needs[0]], sum(float(choice) < needs[1] for choice in choices)))
        return {where: tuple(sorted(conditions)) if conditions else () for where, conditions in found.items()}

    def sample_codes(self, count: int, rng: np.random.Generator) -> Codes:
        """`count` archs as canonical integers, shape (count, dimensions): every choice uniform, among what is a network."""
        return self._drawn(count, lambda many: self._uniform(many, rng))

    def _uniform(self, count: int, rng: np.random.Generator) -> Codes:
        return np.stack([rng.integers(len(dimension.choices), size=count) for dimension in self.dimensions], axis=1)

    def _drawn(self, count: int, draw: Callable[[int], Codes]) -> Codes:
        codes = draw(count)
        for _ in range(MOST_DRAWS):
            bad = np.flatnonzero(~self.valid(codes))
            if not len(bad):
                return self.canonical(codes)
            codes[bad] = draw(len(bad))
        raise InputError(f"hardly any arch of the space {self.name} is a network: {self.family.invalid_because}")

    def sample(self, rng: np.random.Generator) -> Arch:
        """A random arch: every choice uniform."""
        return self.decode(self.sample_codes(1, rng))[0]

    def sample_apart(self, count: int, rng: np.random.Generator) -> list[Arch]:
        """`count` random archs for one training step: where choices have no order, they take turns.

        Of such a dimension with n choices every n archs of the step, counted from its first, are dealt n different ones (after strict
        fairness, Chu et al. 2021, arXiv 1907.01845); other choices are uniform and independent. Each step deals anew. A turn is lost
        where the choice has no effect in its arch.
        """

        def draw(many: int) -> Codes:
            codes = self._uniform(many, rng)
            for column, dimension in enumerate(self.dimensions):
                if not dimension.ordered:
                    rounds = -(-many // len(dimension.choices))
                    deck = np.concatenate([rng.permutation(len(dimension.choices)) for _ in range(rounds)])
                    codes[:, column] = deck[:many]
            return codes

        for _ in range(MOST_DRAWS):
            codes = draw(count)
            if self.valid(codes).all():
                return self.decode(codes)
        return self.decode(self.sample_codes(count, rng))

    def mutate(self, arch: Arch, rng: np.random.Generator, rate: float = 0.1) -> Arch:
        """Another arch: each dimension is drawn anew with probability `rate`, at least one really changes.

        Blocks that come to stand get random choices. `arch` itself where there is no other.
        """
        counts = np.array([len(dimension.choices) for dimension in self.dimensions])
        free = np.flatnonzero(counts > 1)
        before = self.encode([arch])
        for _ in range(MOST_DRAWS if len(free) else 0):
            codes = np.where(self._live(before), before, self._uniform(1, rng))[0]
            chosen = free[rng.random(len(free)) < rate]
            if not len(chosen):
                chosen = rng.choice(free, size=1)
            codes[chosen] = (codes[chosen] + rng.integers(1, counts[chosen])) % counts[chosen]  # any but the present choice
            after = self.canonical(codes[None])
            if self.valid(after)[0] and (after != before).any():
                return self.decode(after)[0]
        return arch

    def crossover(self, one: Arch, other: Arch, rng: np.random.Generator) -> Arch:
        """An arch that takes each choice from either parent with equal probability; `one` where no such mix is a network."""
        parents = self.encode([one, other])
        for _ in range(MOST_DRAWS):
            codes = parents[rng.integers(2, size=parents.shape[1]), np.arange(parents.shape[1])][None]
            if self.valid(codes)[0]:
                return self.decode(codes)[0]
        return one

    def plan(self, arch: Arch) -> dict[str, BlockSpec]:
        """Slot name -> block, in the order in which data flows."""
        choices = arch.as_dict()
        return {slot.name: self.family.block(slot, choices) for slot in self.family.slots if slot.stands(choices)}

    def resolution(self, arch: Arch) -> int:
        """Pixels of a side of the images that `arch` takes."""
        return next(iter(self.plan(arch).values())).in_size

    @property
    def largest_resolution(self) -> int:
        """Pixels of a side of the largest images of the space."""
        return self.resolution(self.largest)


def _joined(groups: list[set[int]]) -> list[set[int]]:
    """Groups that share a member become one."""
    joined: list[set[int]] = []
    for group in groups:
        apart = [other for other in joined if not other & group]
        joined = [*apart, group.union(*(other for other in joined if other & group))]
    return joined


def _position(dimension: Dimension, choice: object, where: str) -> int:
    for position, offered in enumerate(dimension.choices):
        if offered == choice and isinstance(offered, bool) == isinstance(choice, bool):  # 1 is 1.0, but True is not 1
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


def read_arch(space: Space, text: str, names: str = "'smallest', 'largest'") -> Arch:
    """The arch that `text` names: "smallest", "largest" or a JSON file; `names` are those that an error tells of.

    The file holds our own form (dimension -> choice, alone or under the key "arch") or an entry as the papers' tables are written
    (lists of `width, depth, kernel_size, expand_ratio`, or of `ks, e, d`).
    """
    if text in {"smallest", "largest"}:
        return space.smallest if text == "smallest" else space.largest
    path = Path(text)
    if not config.is_file(path):
        raise InputError(f"an arch is {names} or the path of a JSON file, but got {text[:200]!r}")
    value = config.read(path)
    if isinstance(value.get("arch"), dict):
        value = value["arch"]
    tabular = any(isinstance(entry, list | dict) for entry in value.values())  # our own form is flat
    try:
        choices = space.family.from_table(value) if tabular else value
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return space.arch(choices, str(path))
