"""Mcts: a tree over the stages of a network, grown where archs are good. Experimental."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies.pool import Pooled, in_order
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

DESCENTS = 4
"""Walks down the tree for each arch asked for; what is still lacking is drawn at random within the budgets."""
COMPLETIONS = 64
"""Ways to complete an arch from a node that are tried at once."""
SPARE = 256
"""Archs within the budgets whose last stages complete others."""


class Mcts(Pooled):
    """UCT (Kocsis and Szepesvari 2006): each level of the tree decides the dimensions of one stage, in the order in which data flows.

    A node's worth is the mean rank of the scores below it, in 0..1; a failure is worth 0. A node visited n times has at most
    `widening` n^0.5 children (progressive widening: stages have many settings). What is below the chosen node is completed at random,
    or by the last stages of archs that are known to meet the budgets. All of the tree follows from what was told.

    Expect proposals that share their first stages, and results between random search and evolution: a mean over completions says
    little of a first stage while few were tried.
    """

    name: ClassVar[str] = "mcts"
    experimental: ClassVar[bool] = True

    def __init__(
        self,
        space: Space,
        feasible: Feasible,
        *,
        seed: int,
        exploration: float = 0.15,
        widening: float = 1.0,
        initial: int = 16,
    ) -> None:
        super().__init__(space, feasible, seed=seed)
        if not (exploration >= 0 and widening >= 1) or initial < 1:
            raise InputError(
                "mcts needs exploration >= 0, widening >= 1 and at least 1 initial arch, but got "
                f"{exploration}, {widening} and {initial}: give more"
            )
        self.exploration, self.widening, self.initial = exploration, widening, initial
        stages = [len(list(group)) for _, group in itertools.groupby(each.name.partition(".")[0] for each in space.dimensions)]
        self.ends = list(itertools.accumulate(stages))
        """The column after the last one of each stage."""
        self._counts = np.array([len(each.choices) for each in space.dimensions])

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        found = self.pool.codes[:0]
        if len(self.pool) >= self.initial:
            tree, spare = Tree(self.ends), self.feasible.sample(SPARE, rng)
            for code, worth in zip(self.pool.codes, self._worths(), strict=True):
                tree.add(code, worth)
            for _ in range(DESCENTS * count):
                if len(found) < count:
                    found = self._descent(tree, found, spare, rng)
        codes = self.pool.new(np.concatenate([found, self.pool.fresh(count, rng)]))[:count] if len(found) < count else found
        order = in_order(codes)
        return codes[order], ["tree" if position < len(found) else "random" for position in order]

    def _worths(self) -> NDArray[np.float64]:
        """Rank of every arch told, 0..1, shape (archs,); 0 for failures."""
        from scipy.stats import rankdata

        worths, scored = np.zeros(len(self.pool)), ~np.isnan(self.pool.scores)
        worths[scored] = rankdata(self.pool.scores[scored]) / max(1, scored.sum())
        return worths

    def _descent(self, tree: Tree, found: Codes, spare: Codes, rng: np.random.Generator) -> Codes:
        """`found` with one arch more, unless the walk ends where there is no new one; either way the tree counts a mediocre visit."""
        prefix = np.zeros(0, dtype=np.int64)
        for start, end in zip([0, *self.ends], self.ends, strict=False):
            children = tree.children.get(prefix.tobytes(), [])
            visits = tree.visits.get(prefix.tobytes(), 0)
            settings = math.prod(self._counts[start:end].tolist())
            if len(children) < min(settings, self.widening * math.sqrt(visits + 1)):
                prefix = np.concatenate([prefix, rng.integers(self._counts[start:end])])
            else:
                prefix = max(children, key=lambda child: tree.bound(child, visits, self.exploration))
            if prefix.tobytes() not in tree.visits:
                break
        rest = np.concatenate(
            [rng.integers(self._counts, size=(COMPLETIONS, len(self._counts))), rng.permutation(spare)[:COMPLETIONS]]
        )
        rest[:, : len(prefix)] = prefix
        rest = self.space.canonical(rng.permutation(rest))
        more = self.pool.new(np.concatenate([found, rest[self.space.valid(rest)]]))[: len(found) + 1]
        tree.add(more[-1] if len(more) > len(found) else np.concatenate([prefix, rest[0, len(prefix) :]]), 0.5)
        return more


class Tree:
    """Visits and worth of every first part of an arch that ends with a stage, by the bytes of its codes."""

    def __init__(self, ends: list[int]) -> None:
        self.ends = ends
        self.visits: dict[bytes, int] = {}
        self.worth: dict[bytes, float] = {}
        self.children: dict[bytes, list[NDArray[np.int64]]] = {}

    def add(self, code: NDArray[np.int64], worth: float) -> None:
        """Count a visit to all first parts of `code`."""
        for start, end in zip([0, 0, *self.ends], [0, *self.ends], strict=False):
            key = code[:end].tobytes()
            if end and key not in self.visits:
                self.children.setdefault(code[:start].tobytes(), []).append(code[:end])
            self.visits[key] = self.visits.get(key, 0) + 1
            self.worth[key] = self.worth.get(key, 0.0) + worth

    def bound(self, child: NDArray[np.int64], visits: int, exploration: float) -> float:
        """Upper confidence bound of a child of a node with `visits`."""
        key = child.tobytes()
        mine = self.visits[key]
        return self.worth[key] / mine + exploration * math.sqrt(math.log(visits + 1) / mine)
