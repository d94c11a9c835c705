"""Coarse to fine (BigNAS, section 3.4): a grid over network-wide settings, then stage-wise mutation of the best.

Coarse: every kind of dimension (resolution, width, depth, kernel size, ...) is set to one level throughout the network, so the grid
is small; of those that meet the budgets some lie next to each budget, some are spread over all costs. Fine: the best of several
*zones* (the paper: the single best) are mutated, one stage at a time. All mutants of a group agree but in one stage, so that they
share the computation of all before it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies.pool import Pooled, in_order
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

LEVELS = 3
MOST_GRID = 20_000
MOST_SKELETONS = 500
"""Of the grid, those whose costs are counted; in some spaces (operations on edges) that is slow."""
MOST_VARIANTS = 256
"""Of the settings of one stage, those that are looked at for one group."""

_GROUPS = 64  # groups tried for one ask
_BEST = 0.75  # the share of groups whose parent is the best of its zone
_SHIFTED = 0.8  # the share of groups in which a dimension outside of the stage makes up for it
_SMALL = 4.0  # a step through the whole range of a dimension makes a mutant e^-4 times as likely
_APART = 0.2  # two zones differ by so much of the range in at least one kind of setting


Zone = tuple[float, NDArray[np.intp]]
"""The ceiling on the main cost, and the rows of the pool under it that are of the zone, the best first."""


class CoarseToFine(Pooled):
    """Asks for the ends of the space and `coarse` skeletons, then for groups of at most `group` mutants without end.

    There are `bands` ceilings on the main cost: the budgets themselves, and lower ones at even steps of its logarithm, so that the
    whole front grows. Under each ceiling the best skeletons that differ in network-wide settings found `zones` zones; an arch belongs
    to the zone whose skeleton is nearest. Every second group is of the zones next to the budgets. The parent of a group is one of
    the `parents` best of its zone.
    """

    name: ClassVar[str] = "coarse_to_fine"

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, coarse: int = 24, zones: int = 3, bands: int = 6, parents: int = 2,
        group: int = 8,
    ) -> None:  # fmt: skip
        super().__init__(space, feasible, seed=seed)
        for name, value in (("coarse", coarse), ("zones", zones), ("bands", bands), ("parents", parents), ("group", group)):
            if value < 1:
                raise InputError(f"coarse_to_fine needs {name} of at least 1, but got {value}: give more")
        self.coarse, self.zones, self.bands, self.parents, self.group = coarse, zones, bands, parents, group
        self.turn = 0
        self._counts = np.array([len(dimension.choices) for dimension in space.dimensions])

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        ends, skeletons = self._plan
        found = self.pool.new(ends)[:count]
        stages = ["extremes"] * len(found)
        found = self.pool.new(np.concatenate([found, skeletons]))[:count]
        stages += ["coarse"] * (len(found) - len(stages))
        parents = self._parents() if len(found) < count else []
        for _ in range(_GROUPS if parents else 0):
            if len(found) >= count:
                break
            mutants = self._group(parents, min(self.group, count - len(found)), rng)
            found = self.pool.new(np.concatenate([found, mutants]))
        stages += ["fine"] * (len(found) - len(stages))
        if len(found) < count:
            found = self.pool.new(np.concatenate([found, self.pool.fresh(count, rng)]))[:count]
            stages += ["random"] * (len(found) - len(stages))
        return found, stages

    # --- coarse ---

    @cached_property
    def _plan(self) -> tuple[Codes, Codes]:
        """The two ends of the space, and the skeletons: half of them next to the budgets, half spread over all costs."""
        rng = np.random.default_rng([self.seed, 5])
        ends = self.space.encode([self.space.smallest, self.space.largest])
        grid = network_wide(self.space, rng)
        grid = grid[np.sort(rng.permutation(len(grid))[:MOST_SKELETONS])]
        grid = grid[self.feasible.mask(grid)]
        if not len(grid):
            return ends, grid
        near = self._next_to_budgets(grid)[: self.coarse // 2]
        rest = np.setdiff1d(np.arange(len(grid)), near)
        rest = rest[np.argsort(-self.feasible.main_cost(grid[rest]), kind="stable")]
        count = min(self.coarse - len(near), len(rest))
        spread = rest[np.linspace(0, len(rest) - 1, count).round().astype(int)]
        parts = [grid[near], grid[spread]]
        return ends, np.concatenate([part[in_order(part)] for part in parts])

    def _next_to_budgets(self, grid: Codes) -> NDArray[np.intp]:
        """Positions of the grid, those that use up a budget most first, the budgets in turn; without a budget the dearest first."""
        table = self.feasible.table(grid)
        columns = [table[budget.column] for budget in self.feasible.budgets if not budget.lower] or [
            self.feasible.main_cost(grid)
        ]
        orders = np.stack([np.argsort(-column, kind="stable") for column in columns], axis=1).ravel()
        return orders[np.sort(np.unique(orders, return_index=True)[1])]

    # --- zones ---

    @cached_property
    def _kinds(self) -> NDArray[np.float64]:
        """Matrix that averages the heights of the dimensions of each kind, (dimensions, kinds)."""
        kinds = [kind_of(dimension.name) for dimension in self.space.dimensions]
        matrix = np.array([[kind == other for other in dict.fromkeys(kinds)] for kind in kinds]) * (self._counts > 1)[:, None]
        means: NDArray[np.float64] = matrix / np.maximum(1, matrix.sum(axis=0))
        return means

    def _settings(self, codes: Codes) -> NDArray[np.float64]:
        """Mean height of each kind of dimension, from 0 to 1, (archs, kinds)."""
        heights: NDArray[np.float64] = (codes / np.maximum(1, self._counts - 1)) @ self._kinds
        return heights

    def _ceilings(self) -> list[float]:
        """Of the main cost: none but the budgets first, then lower ones, the dearest first."""
        costs = self.feasible.main_cost(self._plan[1]) if len(self._plan[1]) else np.ones(1)
        low, high = math.log(max(costs.min(), 1e-9)), math.log(max(costs.max(), 1e-9))
        return [math.inf, *(math.exp(low + (high - low) * step / self.bands) for step in range(self.bands - 1, 0, -1))]

    def _parents(self) -> list[list[Zone]]:
        """The zones under each ceiling, the highest ceiling first."""
        ranked = self.pool.ranked
        if not len(ranked):
            return []
        settings = self._settings(self.pool.codes[ranked])
        skeletons = {code.tobytes() for code in np.concatenate(self._plan)}
        coarse = np.array([self.pool.codes[row].tobytes() in skeletons for row in ranked])
        found = []
        for ceiling in self._ceilings():
            within = np.flatnonzero(self.pool.costs[ranked] <= ceiling)
            if not len(within):
                continue
            seeds = self._seeds(settings, within[coarse[within]] if coarse[within].any() else within)
            nearest = np.abs(settings[within, None] - settings[None, seeds]).sum(axis=2).argmin(axis=1)
            best_first = np.sort(np.unique(nearest, return_index=True)[1])  # `within` is sorted, the best first
            found.append([(ceiling, ranked[within[nearest == nearest[first]]]) for first in best_first])
        return found

    def _seeds(self, settings: NDArray[np.float64], candidates: NDArray[np.intp]) -> list[int]:
        """The best candidate, and the next best ones that differ from those already taken."""
        seeds: list[int] = []
        for candidate in candidates.tolist():
            if len(seeds) == self.zones:
                break
            if all(np.abs(settings[candidate] - settings[seed]).max() >= _APART for seed in seeds):
                seeds.append(candidate)
        return seeds

    # --- fine ---

    def _group(self, bands: list[list[Zone]], count: int, rng: np.random.Generator) -> Codes:
        """At most `count` new archs that agree with one parent, but for one stage and, maybe, one dimension that makes up for it."""
        ceiling, rows = self._zone(bands)
        self.turn += 1
        place = min(int(rng.geometric(_BEST)) - 1, self.parents - 1, len(rows) - 1)
        parent = self.pool.codes[rows[place]]
        later = np.arange(1, len(self._stages) + 1)  # the later a stage, the more its variants share: the more often it comes
        stage = self._stages[int(rng.choice(len(later), p=later / later.sum()))]
        if rng.random() < _SHIFTED:
            parent = self._shifted(parent, stage, rng)
        mutants = self.pool.new(self._variants(parent, stage, rng))
        mutants = mutants[self.feasible.main_cost(mutants) <= ceiling] if len(mutants) else mutants
        return self._chosen(parent, mutants, count, rng)

    def _zone(self, bands: list[list[Zone]]) -> Zone:
        """Whose turn it is: every second time a zone next to the budgets, else one under the lower ceilings in turn.

        Under a ceiling every second time the best zone, every fourth the next best, and so on.
        """
        number, lower = self.turn // 2, bands[1:]
        zones = bands[0]
        if lower and self.turn % 2:
            number, zones = number // len(lower), lower[number % len(lower)]
        halvings = ((number + 1) & -(number + 1)).bit_length() - 1
        return zones[halvings % len(zones)]

    @cached_property
    def _stages(self) -> list[NDArray[np.intp]]:
        """Columns of the dimensions of each stage that offer a choice."""
        names = [dimension.name.rpartition(".")[0] for dimension in self.space.dimensions]
        stages = [np.flatnonzero([name == other for name in names] & (self._counts > 1)) for other in dict.fromkeys(names)]
        return [stage for stage in stages if len(stage)] or [np.arange(0)]

    def _shifted(self, parent: NDArray[np.int64], stage: NDArray[np.intp], rng: np.random.Generator) -> NDArray[np.int64]:
        """`parent` with one dimension outside of the stage one step up or down: what the stage then gains or must save."""
        others = np.setdiff1d(np.flatnonzero(self._counts > 1), stage)
        if not len(others):
            return parent
        column = int(rng.choice(others))
        shifted = parent.copy()
        step = 1 if parent[column] == 0 else -1 if parent[column] == self._counts[column] - 1 else int(rng.choice([-1, 1]))
        shifted[column] += step
        return shifted

    def _variants(self, parent: NDArray[np.int64], stage: NDArray[np.intp], rng: np.random.Generator) -> Codes:
        """`parent` under the settings of one stage, (archs, dimensions): all, or where there are many, random ones."""
        counts = self._counts[stage]
        if not len(stage):
            return parent[None]
        if math.prod(counts.tolist()) <= MOST_VARIANTS:
            settings = np.indices(counts.tolist()).reshape(len(counts), -1).T
        else:
            fresh = rng.integers(counts, size=(MOST_VARIANTS, len(counts)))
            settings = np.where(rng.random(fresh.shape) < max(0.25, 1 / len(counts)), fresh, parent[stage])
        variants = np.repeat(parent[None], len(settings), axis=0)
        variants[:, stage] = settings
        return variants

    def _chosen(self, parent: NDArray[np.int64], mutants: Codes, count: int, rng: np.random.Generator) -> Codes:
        """`count` of the mutants, small changes more often."""
        if len(mutants) <= count:
            return mutants
        steps = (np.abs(mutants - parent) / np.maximum(1, self._counts - 1)).sum(axis=1)
        weights = np.exp(-_SMALL * steps)
        taken = rng.choice(len(mutants), size=count, replace=False, p=weights / weights.sum())
        return mutants[np.sort(taken)]

    def _own_state(self) -> dict[str, Any]:
        return {"turn": self.turn}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        if type(state.get("turn")) is not int or state["turn"] < 0:
            raise InputError("the state of a search is damaged (no turn): search anew")
        self.turn = state["turn"]
        self.__dict__.pop("_plan", None)  # it follows from the seed


def kind_of(name: str) -> str:
    """What a dimension sets: the kind of "stage3.width" is "width"."""
    return name.rpartition(".")[2]


def network_wide(space: Space, rng: np.random.Generator) -> Codes:
    """Archs in which all dimensions of a kind stand at the same level (first, middle, last choice), shape (archs, dimensions).

    The kind of "stage3.width" is "width"; choices without order are all taken. A grid beyond `MOST_GRID` is sampled.
    """
    kinds = [kind_of(dimension.name) for dimension in space.dimensions]
    counts = np.array([len(dimension.choices) for dimension in space.dimensions])
    levels: dict[str, int] = {}
    for kind, dimension in zip(kinds, space.dimensions, strict=True):
        level = len(dimension.choices) if not dimension.ordered else min(LEVELS, len(dimension.choices))
        levels[kind] = max(level, levels.get(kind, 1))
    size = int(np.prod([float(level) for level in levels.values()]))
    if size <= MOST_GRID:
        settings = list(itertools.product(*(np.linspace(0, 1, level) if level > 1 else [0.0] for level in levels.values())))
    else:
        draws = np.stack([rng.integers(level, size=MOST_GRID) / max(1, level - 1) for level in levels.values()], axis=1)
        settings = [tuple(row) for row in draws]
    columns = [list(levels).index(kind) for kind in kinds]
    heights: NDArray[np.float64] = np.array(settings)[:, columns]
    return np.unique(space.canonical((heights * (counts - 1)).round().astype(np.int64)), axis=0)
