"""Local search: hill climbing by neighbours in one dimension; from given archs also the polish at the end of a search.

Simple, and the best there is on small spaces (White, Nolen and Savani 2021, "Exploring the loss landscape in neural architecture
search", arXiv 2005.02960); on large ones it depends on where it starts, hence the polish.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies.pool import Pooled, in_order, neighbours
from supernet.arch import Arch
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

COMPENSATIONS = 3
"""How many ways of paying for a move over the budget are tried, those that give up least first."""


class Local(Pooled):
    """Asks for the unknown neighbours of the best arch, the last stages first, and moves on as soon as one of them is better.

    An arch that lost its race is never better than one that did not, so a move stands its paired test. Where the best arch has no
    unknown neighbour, its exchanges follow, then the next best arch; it ends when none of the `elites` best has any. `starts` are
    asked for first (those that meet the budgets); without any, `initial` random archs are.
    """

    name: ClassVar[str] = "local"

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, starts: Sequence[Arch] = (), initial: int = 16, elites: int = 8
    ) -> None:
        super().__init__(space, feasible, seed=seed)
        if initial < 1 or elites < 1:
            raise InputError(
                f"local search needs at least 1 initial arch and 1 elite, but got {initial} and {elites}: give more"
            )
        self.starts, self.initial, self.elites = space.encode(starts), initial, elites

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        found = self.pool.new(self.starts)[:count]
        if not len(self.starts) and (missing := self.initial - self.pool.size) > 0:
            found = self.pool.fresh(min(count, missing), rng)
            found = found[in_order(found)]
        stages = ["start"] * len(found)
        for stage, codes in self._moves():
            if len(found) >= count:
                break
            found = self.pool.new(np.concatenate([found, codes]))[:count]
            stages += [stage] * (len(found) - len(stages))
        return found, stages

    def _moves(self) -> Iterator[tuple[str, Codes]]:
        for row in self.pool.ranked[: self.elites]:
            near = neighbours(self.space, self.pool.codes[row])
            yield "neighbour", near
            yield "exchange", self._exchanges(self.pool.codes[row], near)

    def _exchanges(self, codes: NDArray[np.int64], near: Codes) -> Codes:
        """Moves that miss a budget, together with a second one that makes up for it, shape (moves, dimensions)."""
        over = near[self.space.valid(near) & ~self.feasible.mask(near)]
        if not len(over):
            return over
        move, payment = np.array(list(itertools.product(range(len(over)), range(len(near))))).T
        pairs = np.where(near[payment] != codes, near[payment], over[move])
        kept = self.feasible.mask(pairs) & ((pairs != codes).sum(axis=1) == 2)
        pairs, move = pairs[kept], move[kept]
        order = np.lexsort((-self.feasible.main_cost(pairs), move)) if len(pairs) else move
        pairs, move = pairs[order], move[order]
        place = np.arange(len(move)) - np.searchsorted(move, move)
        cheapest: Codes = pairs[place < COMPENSATIONS]
        return cheapest
