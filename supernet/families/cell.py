"""Cells whose edges choose their operations, as in NAS-Bench-201 (Dong & Yang 2020, arXiv 2001.00326), for normal and reduction cells.

Stem, stages of normal cells with a reduction cell between two stages, head. A cell is a graph of nodes: node 0 is its input, every
other node the sum of what its incoming edges make of earlier nodes, the last node its output. One choice of operations holds for
all normal cells, another for all reduction cells. Convolutions are relu, convolution, norm. What several edges would compute alike
(the relu of a node, its average pooling) is computed once. An edge that lies on no path from input to output has no effect, so it
counts as "none".

Where we decide: in a reduction cell the edges out of node 0 halve the map and double the width. Skip and average pooling keep pooling
first (2x2, and 3x3 with stride 2) and widen then, by a 1x1 convolution and norm without relu: on a quarter of the pixels, with the
same result as the other way round. The head is relu, 1x1 convolution, norm, relu, pooling, classifier; the norm copes with sums of
any number of edges. Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, StrictInt, model_validator

from supernet.arch import Choice
from supernet.config import Config
from supernet.families.cell_blocks import NO_PATH, OPERATIONS, CellSpec, HeadSpec, StemSpec, pairs
from supernet.family import BlockSpec, Choices, Codes, Dimension, Family, FamilyConfig, Positive, Slot

CELLS = ("normal", "reduction")
LEAST_MAP = 3
"""Pixels of a side of the last stage's map: those of the largest kernel."""


def _shallow(depths: tuple[int, ...]) -> tuple[int, ...]:
    if depths[-1] > 50:
        raise ValueError(f"a stage has at most 50 normal cells, but got {depths[-1]}: use smaller depths")
    return depths


class StemConfig(Config):
    """First convolution, 3x3."""

    width: Choices
    stride: Annotated[StrictInt, Field(ge=1, le=4)] = 1


class HeadConfig(Config):
    """1x1 convolution to `width`, pooling, classifier."""

    width: Positive


class CellConfig(FamilyConfig):
    """A space of this family, as its YAML has it."""

    family: Literal["cell"]
    resolution: Choices
    stem: StemConfig
    stages: Annotated[StrictInt, Field(ge=2, le=6)] = 3
    """Stages of normal cells; each has twice the width of the one before."""
    depth: Annotated[Choices, AfterValidator(_shallow)]
    """Normal cells of a stage, chosen for each stage."""
    nodes: Annotated[StrictInt, Field(ge=2, le=6)] = 4
    """Of a cell, input and output included."""
    head: HeadConfig

    @model_validator(mode="after")
    def _fits(self) -> Self:
        shrinks = self.stem.stride * 2 ** (self.stages - 1)
        for size in self.resolution:
            if size % shrinks:
                raise ValueError(
                    f"resolution must be multiples of {shrinks} (the stem's stride, and a half for each of "
                    f"{self.stages - 1} reduction cells), but got {size}: use {max(1, round(size / shrinks)) * shrinks}"
                )
        if self.resolution[0] < LEAST_MAP * shrinks:
            raise ValueError(
                f"the last stage's map must have at least {LEAST_MAP} pixels a side (its largest kernel), but resolution "
                f"{self.resolution[0]} leaves {self.resolution[0] // shrinks}: use at least {LEAST_MAP * shrinks}, or fewer stages"
            )
        return self


def on_a_path(nodes: int, present: Sequence[Any]) -> list[Any]:
    """Which edges lie on a path from node 0 to the last, of those that are `present`: a truth value for each of `pairs`.

    The values may be arrays, one entry for each of many cells.
    """
    edges = list(zip(pairs(nodes), present, strict=True))
    reached: list[Any] = [True] + [False] * (nodes - 1)
    for (source, target), there in edges:
        reached[target] = reached[target] | (reached[source] & there)
    leads: list[Any] = [False] * (nodes - 1) + [True]
    for (source, target), there in reversed(edges):
        leads[source] = leads[source] | (leads[target] & there)
    return [reached[source] & there & leads[target] for (source, target), there in edges]


@lru_cache(maxsize=100_000)
def _pruned(nodes: int, operations: tuple[str, ...]) -> tuple[str, ...]:
    useful = on_a_path(nodes, [name != "none" for name in operations])
    return tuple(name if use else "none" for name, use in zip(operations, useful, strict=True))


@lru_cache
def networks_of(nodes: int) -> int:
    """Number of different cells: of every set of edges that all lie on a path, the operations of each edge."""
    sets = np.array(list(itertools.product((False, True), repeat=len(pairs(nodes)))), dtype=np.bool_)
    useful = np.stack(on_a_path(nodes, list(sets.T)), axis=1)
    whole = sets[(sets == useful).all(axis=1) & sets.any(axis=1)]
    return sum((len(OPERATIONS) - 1) ** int(count) for count in whole.sum(axis=1))


@dataclass(frozen=True)
class CellFamily(Family):
    """Slots of a chain: stem, normal and reduction cells, head.

    Nothing starts at 0: the edges of a node are parallel, and a cell of convolutions alone would give nothing.
    """

    config: CellConfig

    invalid_because: ClassVar[str] = NO_PATH

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of a cell's edges, "0_1" and so on."""
        return tuple(f"{source}_{target}" for source, target in pairs(self.config.nodes))

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Resolution, stem width, depths, operations of the normal cells and of the reduction cells."""
        config = self.config
        return (
            Dimension("resolution", config.resolution),
            Dimension("stem.width", config.stem.width),
            *(Dimension(f"stage{number}.depth", config.depth) for number in range(1, config.stages + 1)),
            *(Dimension(f"{cell}.edge{edge}", OPERATIONS, ordered=False) for cell in CELLS for edge in self.edges),
        )

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """One for every cell of the deepest child, stem and head."""
        size = (("resolution", "resolution"), ("stem_width", "stem.width"))
        roles = {cell: (*size, *((edge, f"{cell}.edge{edge}") for edge in self.edges)) for cell in CELLS}
        slots = [Slot("stem", size)]
        for number in range(1, self.config.stages + 1):
            if number > 1:
                slots.append(Slot(f"reduction{number - 1}", roles["reduction"]))
            for index in range(self.config.depth[-1]):
                needs = (f"stage{number}.depth", index + 1) if index else None
                slots.append(Slot(f"stage{number}_{index}", roles["normal"], needs))
        return (*slots, Slot("head", size))

    def block(self, slot: Slot, choices: Mapping[str, Choice]) -> BlockSpec:
        """The block in `slot`; a cell without a path is one that costs nothing and cannot be built."""
        cast = slot.cast(choices)
        resolution, width = cast["resolution"], cast["stem_width"]
        if slot.name == "stem":
            return StemSpec(self.in_channels, width, self.config.stem.stride, in_size=resolution)
        if slot.name == "head":
            last = self.config.stages
            return HeadSpec(width << (last - 1), self.config.head.width, self.classes, in_size=self.size(resolution, last))
        reduction = slot.name.startswith("reduction")
        stage = int(slot.name.removeprefix("reduction" if reduction else "stage").partition("_")[0])
        edges = _pruned(self.config.nodes, tuple(cast[edge] for edge in self.edges))
        return CellSpec(width << (stage - 1), self.config.nodes, edges, reduction, in_size=self.size(resolution, stage))

    def size(self, resolution: int, stage: int) -> int:
        """Pixels of a side of the maps of a stage, counted from 1."""
        return resolution // (self.config.stem.stride << (stage - 1))

    def smallest(self) -> dict[str, Choice]:
        """The cheapest: input skips to output."""
        return super().smallest() | {f"{cell}.edge0_{self.config.nodes - 1}": "skip" for cell in CELLS}

    def teacher(self) -> dict[str, Choice]:
        """All edges 3x3 convolutions."""
        return super().teacher() | {f"{cell}.edge{edge}": "conv_3x3" for cell in CELLS for edge in self.edges}

    @property
    def bounded(self) -> tuple[str, ...]:
        """No network has more macs, parameters or weights than the teacher; with 5 nodes or more, some hold more memory.

        There a node that is also skipped or pooled stays alive beside its relu for longer. (Up to 4 nodes all cells were compared.)
        """
        return super().bounded if self.config.nodes <= 4 else ("macs", "params", "model_size_bytes")

    def _cells(self, codes: Codes) -> list[tuple[slice, list[NDArray[np.bool_]]]]:
        """For either kind of cell its columns, and which of its edges lie on a path, each of shape (archs,)."""
        first, count = len(self.dimensions) - len(CELLS) * len(self.edges), len(self.edges)
        columns = [slice(first + number * count, first + (number + 1) * count) for number in range(len(CELLS))]
        return [(each, on_a_path(self.config.nodes, list((codes[:, each] != 0).T))) for each in columns]

    def canonical(self, codes: Codes) -> Codes:
        """Edges on no path from input to output are "none". Cells that only name their nodes differently stay apart."""
        codes = codes.copy()
        for columns, useful in self._cells(codes):
            codes[:, columns] *= np.stack(useful, axis=1)
        return codes

    def valid(self, codes: Codes) -> NDArray[np.bool_]:
        """Both cells have a path from input to output, shape (archs,)."""
        whole: NDArray[np.bool_] = np.logical_and.reduce([np.logical_or.reduce(useful) for _, useful in self._cells(codes)])
        return whole

    def count(self, networks: int) -> int:
        """Networks whose cells differ in what has an effect."""
        for _ in CELLS:
            networks = networks // len(OPERATIONS) ** len(self.edges) * networks_of(self.config.nodes)
        return networks

    def cover(self, slot: Slot) -> Iterator[Mapping[str, Choice]]:
        """All edges the same operation, one operation after another: every edge is on a path then."""
        by_name = {dimension.name: dimension for dimension in self.dimensions}
        edges = [name for name in slot.dimensions if not by_name[name].ordered]
        others = [name for name in slot.dimensions if by_name[name].ordered]
        for operation in OPERATIONS[1:] if edges else OPERATIONS[:1]:
            for values in itertools.product(*(by_name[name].choices for name in others)):
                yield dict(zip(others, values, strict=True)) | dict.fromkeys(edges, operation)

    def rows(self, choices: Mapping[str, tuple[Choice, ...]]) -> list[dict[str, object]]:
        """Stem, stages and head with their sizes; then the operations of either kind of cell, edge by edge."""
        config, sizes = self.config, [int(size) for size in choices["resolution"]]
        widths = [int(width) for width in choices["stem.width"]]
        table: list[dict[str, object]] = [
            {"part": "stem", "block": "conv 3x3", "in_size": sizes, "width": widths, "stride": config.stem.stride}
        ]
        for number in range(1, config.stages + 1):
            maps = [self.size(size, number) for size in sizes]
            table.append({"part": f"stage{number}", "block": "normal cells", "in_size": maps, "stride": 1,
                          "width": [width << (number - 1) for width in widths], "depth": choices[f"stage{number}.depth"]})  # fmt: skip
            if number < config.stages:
                table.append({"part": f"reduction{number}", "block": "reduction cell", "in_size": maps, "stride": 2,
                              "width": [width << number for width in widths]})  # fmt: skip
        table.append({"part": "head", "block": "conv 1x1, pool, linear", "in_size": maps, "width": (config.head.width,)})
        return table + [
            {"part": f"{cell} cell", "block": f"edge {edge.replace('_', ' to ')}", "operation": choices[f"{cell}.edge{edge}"]}
            for cell in CELLS for edge in self.edges
        ]  # fmt: skip
