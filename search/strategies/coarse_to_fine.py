"""Coarse to fine (BigNAS, section 3.4): a grid over network-wide settings, then mutation of the best.

Coarse: every kind of dimension (resolution, width, depth, kernel size, ...) is set to one level throughout the network, so the grid
is small; those that meet the budgets are the skeletons. Fine: the best few are mutated dimension by dimension within the budgets.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from supernet.arch import Arch
from supernet.family import Codes
from supernet.space import Space

LEVELS = 3
MOST_GRID = 20_000
DRAWS = 2_000
"""Mutants drawn at most for one round; beyond it the neighbourhood is exhausted."""


class CoarseToFine:
    """Asks for `coarse` skeletons, then for `fine` mutants of the `parents` best in rounds of `batch`."""

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, coarse: int = 24, fine: int = 24, parents: int = 4, batch: int = 8,
        mutation_rate: float = 0.15,
    ) -> None:  # fmt: skip
        self.space, self.feasible, self.rng = space, feasible, np.random.default_rng([seed, 5])
        self.coarse, self.left, self.parents, self.batch, self.rate = coarse, fine, parents, batch, mutation_rate
        self.scores: dict[Arch, float] = {}
        self.stage = 0

    def ask(self) -> list[tuple[str, Arch]]:
        """First the two ends of the space, then the skeletons, then rounds of mutants."""
        self.stage += 1
        if self.stage == 1:
            return [("extremes", arch) for arch in dict.fromkeys([self.space.smallest, self.space.largest])]
        if self.stage == 2:
            skeletons = [arch for arch in self._skeletons() if arch not in self.scores]
            if skeletons:
                return [("coarse", arch) for arch in skeletons]
        mutants = self._mutants(min(self.batch, self.left))
        self.left -= len(mutants)
        return [("fine", arch) for arch in mutants]

    def tell(self, results: Sequence[tuple[Arch, float]]) -> None:
        """Remember the scores."""
        self.scores.update(results)

    def _skeletons(self) -> list[Arch]:
        """Half of them next to the budget, where the best children are; half spread over all costs, for the front."""
        grid = network_wide(self.space, self.rng)
        grid = grid[self.feasible.mask(grid)]
        order = np.argsort(-self.feasible.main_cost(grid), kind="stable")
        near = order[: self.coarse // 2]
        rest = order[self.coarse // 2 :]
        count = min(self.coarse - len(near), len(rest))
        spread = rest[np.linspace(0, len(rest) - 1, count).round().astype(int)] if count else rest[:0]
        return self.space.decode(grid[np.concatenate([near, spread])])

    def _mutants(self, count: int) -> list[Arch]:
        best = sorted((arch for arch in self.scores if self.feasible.admits(arch)), key=lambda arch: -self.scores[arch])[
            : self.parents
        ]
        found: dict[Arch, None] = {}
        for _ in range(DRAWS if best else 0):
            if len(found) >= count:
                break
            mutant = self.space.mutate(best[self.rng.integers(len(best))], self.rng, self.rate)
            if mutant not in self.scores and mutant not in found and self.feasible.admits(mutant):
                found[mutant] = None
        return list(found)


def network_wide(space: Space, rng: np.random.Generator) -> Codes:
    """Archs in which all dimensions of a kind stand at the same level (first, middle, last choice), shape (archs, dimensions).

    The kind of "stage3.width" is "width"; choices without order are all taken. A grid beyond `MOST_GRID` is sampled.
    """
    kinds = [dimension.name.rpartition(".")[2] for dimension in space.dimensions]
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
