"""Evolution over score and costs at once, after NSGA-II (Deb et al. 2002, section III).

It has no generations: every ask breeds from the present population, and whatever is told enters it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.strategies import Result
from search.strategies.pool import Pooled, in_order, rounded
from supernet.config import nearest
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

_DRAWS = 8  # rounds of breeding for one ask
_CHUNK = 256  # results that enter the population at a time, so that telling thousands stays linear


class Evolution(Pooled):
    """Keeps the `population` best by rank and crowding, and breeds: tournaments of 2, uniform crossover, mutation.

    Ranked are the score and `costs` (names of `Feasible.table`; none given: the main cost). Archs that lost their race come after all
    that did not; archs over a budget are no parents. A share `greed` of the tournaments is decided by the score alone: a search with
    a budget wants most of all the best child next to it.
    """

    name: ClassVar[str] = "evolution"

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, population: int = 16, costs: Sequence[str] = (),
        crossover: float = 0.5, mutation: float = 0.05, greed: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(space, feasible, seed=seed)
        if population < 2:
            raise InputError(f"a population has at least 2 archs, but got {population}: give more")
        for name, share in (("crossover", crossover), ("mutation", mutation), ("greed", greed)):
            if not 0 <= share <= 1:
                raise InputError(f"{name} is a fraction from 0 to 1, but got {share}: give another")
        columns = [*feasible.table(space.encode([space.smallest])), *(budget.column for budget in feasible.budgets)]
        offered = list(dict.fromkeys(columns))  # a budget's latency, though its model is made later
        for cost in costs:
            if cost not in offered:
                raise InputError(f"evolution compares {offered}, but got {cost!r}{nearest(cost, offered)}")
        self.most, self.costs = population, tuple(costs)
        self.crossover, self.mutation, self.greed = crossover, mutation, greed
        self.population: NDArray[np.intp] = np.zeros(0, dtype=np.intp)  # rows of the pool

    def tell(self, results: Sequence[Result]) -> None:
        """What became of archs; the population is chosen anew."""
        rows = self.pool.tell(results)
        for start in range(0, max(len(rows), 1), _CHUNK):
            self._survive(np.union1d(self.population, rows[start : start + _CHUNK]))

    def _survive(self, rows: NDArray[np.intp]) -> None:
        """The population is the best of `rows`, best first."""
        rows = rows[self.pool.admitted[rows] & ~np.isnan(self.pool.scores[rows])]
        losses = self._losses(rows)
        rank, crowding = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows))
        for lost in (False, True):
            group = np.flatnonzero(self.pool.decided[rows] != lost)
            rank[group] = fronts(losses[group]) + (rank.max(initial=-1) + 1 if lost else 0)
        for front in np.unique(rank):
            crowding[rank == front] = crowding_distances(losses[rank == front])
        self.population = rows[np.lexsort((rows, -crowding, rank))][: self.most]

    def _losses(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Score and costs of rows of the pool, all smaller is better, shape (archs, 1 + costs)."""
        columns = [-self.pool.scores[rows]]
        if self.costs and len(rows):
            table = self.feasible.table(self.pool.codes[rows])
            columns += [rounded(table[cost]) for cost in self.costs]
        else:
            columns.append(self.pool.costs[rows])
        return np.stack(columns, axis=1)

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        missing = min(count, self.most - self.pool.size) if len(self.population) < self.most else 0
        found = self.pool.fresh(missing, rng) if missing > 0 else self.pool.codes[:0]
        stages = ["first"] * len(found)
        for _ in range(_DRAWS if len(self.population) else 0):
            if len(found) >= count:
                break
            found = self.pool.new(np.concatenate([found, self._bred(2 * count, rng)]))[:count]
        stages += ["bred"] * (len(found) - len(stages))
        if len(found) < count:
            fresh = self.pool.fresh(count, rng)
            found = self.pool.new(np.concatenate([found, fresh]))[:count]
            stages += ["random"] * (len(found) - len(stages))
        order = in_order(found)
        return found[order], [stages[position] for position in order]

    def _bred(self, count: int, rng: np.random.Generator) -> Codes:
        """Children of the population, shape (count, dimensions); some may be no networks or miss a budget."""
        parents = self.pool.codes[self._winners(2 * count, rng)].reshape(count, 2, -1)
        mixes = (rng.random((count, 1)) < self.crossover) & (rng.random((count, parents.shape[2])) < 0.5)
        mixed = self.space.canonical(np.where(mixes, parents[:, 1], parents[:, 0]))
        return mutated(self.space, mixed, rng, self.mutation)

    def _winners(self, count: int, rng: np.random.Generator) -> NDArray[np.intp]:
        """Rows of the winners of tournaments of 2."""
        number = len(self.population)
        by_score = np.empty(number, dtype=np.int64)
        by_score[np.lexsort((-self.pool.scores[self.population], ~self.pool.decided[self.population]))] = np.arange(number)
        places = np.stack([np.arange(number), by_score])  # the population is sorted by rank and crowding
        pairs = rng.integers(number, size=(count, 2))
        judged = places[(rng.random(count) < self.greed).astype(int)[:, None], pairs]
        winners: NDArray[np.intp] = self.population[pairs[np.arange(count), judged.argmin(axis=1)]]
        return winners

    def _own_state(self) -> dict[str, Any]:
        return {"population": self.population.tolist()}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        rows = state.get("population")
        if not isinstance(rows, list) or any(type(row) is not int or not 0 <= row < len(self.pool) for row in rows):
            raise InputError("the state of a search is damaged (its population is not of its archs): search anew")
        self.population = np.array(rows, dtype=np.intp)


def mutated(space: Space, codes: Codes, rng: np.random.Generator, rate: float) -> Codes:
    """`Space.mutate` for many canonical codes at once, shape (archs, dimensions); some may be no networks, or unchanged ones.

    Each choice that has an effect is drawn anew with probability `rate`, at least one of them; those without get random choices, so
    that blocks which come to stand are random.
    """
    counts = np.array([len(dimension.choices) for dimension in space.dimensions])
    effective = has_effect(space, codes)
    chosen = rng.random(codes.shape) < rate
    chosen[np.arange(len(codes)), (rng.random(codes.shape) * effective).argmax(axis=1)] |= ~(chosen & effective).any(axis=1)
    moved = (codes + rng.integers(1, np.maximum(counts, 2), size=codes.shape)) % counts
    return np.where(effective, np.where(chosen, moved, codes), rng.integers(counts, size=codes.shape))


def has_effect(space: Space, codes: Codes) -> NDArray[np.bool_]:
    """Which of the choices of canonical codes make another network when changed, shape (archs, dimensions)."""
    counts = np.array([len(dimension.choices) for dimension in space.dimensions])
    changed = np.repeat(codes[:, None], codes.shape[1], axis=1)
    diagonal = np.arange(codes.shape[1])
    changed[:, diagonal, diagonal] = (codes + 1) % counts
    after = space.canonical(changed.reshape(-1, codes.shape[1])).reshape(changed.shape)
    effective: NDArray[np.bool_] = (after != codes[:, None]).any(axis=2)
    return effective


def fronts(losses: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number of each arch's front, from 0 for those that no other dominates, shape (archs,); losses are (archs, objectives)."""
    no_worse = (losses[:, None] <= losses[None]).all(axis=2)
    dominates: NDArray[np.bool_] = np.logical_and(no_worse, ~no_worse.T)
    rank, level = np.full(len(losses), -1, dtype=np.int64), 0
    while (left := rank < 0).any():
        rank[left & ~dominates[left].any(axis=0)] = level
        level += 1
    return rank


def crowding_distances(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far apart the neighbours of each arch of one front lie, summed over the objectives as fractions of their range, (archs,).

    The ends of the front are infinitely far apart.
    """
    distances = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distances[order[[0, -1]]] = np.inf
        if span > 0:
            distances[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distances
