"""Predicted: score some archs, fit a predictor, search on the predictor, score what it likes best, and so on.

The loop of LINAS (Sarah et al. 2022, "A hardware-aware framework for accelerating neural architecture search across modalities",
arXiv 2205.10358, section 4). Its predictor only proposes, and only where the gate of `search.predictor` lets it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from search.feasible import Feasible
from search.predictor import MODELS, Gate, Predictor, Values
from search.strategies.pool import Pooled, in_order
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

ZONES = 12
"""Parts of the range of costs, of equal width in logarithms, in each of which the best are sought."""
GENERATIONS = 12
OFFSPRING = 1_024
"""Archs bred in a generation of the search on the predictor."""
KEPT = 24
"""Archs of a zone that breed."""
EXPLORED = 8
"""One proposal in so many is random, so that the predictor also sees what it does not like."""


@dataclass(frozen=True)
class _Guessed:
    """Archs with their foretold value (mean and a part of the spread), main cost and zone, each of shape (archs,)."""

    codes: Codes
    values: Values
    costs: Values
    zones: NDArray[np.int64]

    def best(self, count: int) -> _Guessed:
        """At most `count` of each zone, the best first."""
        order = np.lexsort((-self.values, self.zones))
        zones = self.zones[order]
        place = np.arange(len(order)) - np.searchsorted(zones, zones, side="left")
        return self.of(order[place < count])

    def of(self, rows: NDArray[np.intp]) -> _Guessed:
        return _Guessed(self.codes[rows], self.values[rows], self.costs[rows], self.zones[rows])

    def joined(self, other: _Guessed) -> _Guessed:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("codes", "values", "costs", "zones"))
        return _Guessed(*(np.concatenate(pair) for pair in pairs))


class Predicted(Pooled):
    """Asks for `initial` archs spread over the costs, then each time for what a predictor fitted to all that was told likes best.

    That is found by evolution on the predictor, in zones of the main cost, so that proposals lie along the whole front; they differ in
    at least two choices from one another where there are enough. While the gate is shut it asks for mutants of the best of each zone.
    `optimism` adds so many spreads to a foretold mean.
    """

    name: ClassVar[str] = "predicted"

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, initial: int = 50, optimism: float = 0.5,
        models: Sequence[str] = tuple(MODELS), gate: Gate | None = None,
    ) -> None:  # fmt: skip
        super().__init__(space, feasible, seed=seed)
        if initial < 1 or not optimism >= 0:
            raise InputError(
                f"predicted needs at least 1 initial arch and an optimism of 0 or more, but got {initial} and {optimism}"
            )
        self.initial, self.optimism = initial, optimism
        self.predictor = Predictor(space, feasible, seed=seed, models=models, gate=gate)
        self.rounds = self.used = 0
        self.why = "not used: nothing was scored yet"
        self._free = np.array([column for column, each in enumerate(space.dimensions) if len(each.choices) > 1], dtype=np.intp)
        self._counts = np.array([len(each.choices) for each in space.dimensions])

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        if len(self.pool) < self.initial:
            codes, stages = self.pool.fresh(min(count, self.initial - len(self.pool)), rng), ["spread"]
        else:
            codes, stages = self._next(count, rng)
        stages = stages[: len(codes)] + stages[-1:] * (len(codes) - len(stages))
        order = in_order(codes)
        return codes[order], [stages[position] for position in order]

    def _next(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        """Codes and their stages, the last of which holds for all that follow."""
        scored = ~np.isnan(self.pool.scores)
        verdict = self.predictor.fit(self.pool.codes[scored], self.pool.scores[scored])
        self.rounds, self.used, self.why = self.rounds + 1, self.used + verdict.used, verdict.why
        wanted = count - int(rng.random() < (count % EXPLORED) / EXPLORED) - count // EXPLORED
        stage = "predicted" if verdict.used else "mutants"
        chosen = self._liked(wanted, rng) if verdict.used else self._mutants(wanted, rng)
        spare = self.pool.fresh(count, rng)
        both = self.pool.new(np.concatenate([chosen, spare]))[:count]
        return both, [stage] * len(chosen) + ["spread"]

    def _mutants(self, count: int, rng: np.random.Generator) -> Codes:
        """New mutants of the best of each zone, which take turns."""
        ranked = self.pool.ranked
        if not len(ranked) or count < 1:
            return self.pool.codes[:0]
        costs = self.pool.costs[ranked]
        zones = _zones(costs, _edges(costs))
        elites = self.space.decode(self.pool.codes[ranked[np.sort(np.unique(zones, return_index=True)[1])]])
        rate = 1.5 / max(1, len(self._free))
        drawn = [self.space.mutate(elites[draw % len(elites)], rng, rate) for draw in range(4 * count)]
        return self.pool.new(self.space.encode(drawn))[:count]

    def _liked(self, count: int, rng: np.random.Generator) -> Codes:
        """New archs that the predictor likes best, from all zones, apart from one another."""
        ranked = self.pool.ranked
        known = self.pool.codes[ranked[: 2 * KEPT * ZONES]]
        start = np.unique(np.concatenate([known, self.feasible.sample(OFFSPRING, rng)]), axis=0)
        edges = _edges(self.feasible.main_cost(start))
        found = self._guessed(start, edges)
        for _ in range(GENERATIONS):
            bred = np.unique(self._bred(found.best(KEPT), rng), axis=0)
            seen = {code.tobytes() for code in found.codes}
            bred = bred[[code.tobytes() not in seen for code in bred]]
            bred = bred[self.feasible.mask(bred)] if len(bred) else bred
            if len(bred):
                found = found.joined(self._guessed(bred, edges))
        new = {code.tobytes() for code in self.pool.new(found.codes)}
        fresh = found.of(np.array([row for row, code in enumerate(found.codes) if code.tobytes() in new], dtype=np.intp))
        return self._apart(fresh.best(4 * count), count)

    def _guessed(self, codes: Codes, edges: Values) -> _Guessed:
        mean, spread = self.predictor.predict(codes)
        costs = self.feasible.main_cost(codes)
        return _Guessed(codes, mean + self.optimism * spread, costs, _zones(costs, edges))

    def _bred(self, parents: _Guessed, rng: np.random.Generator) -> Codes:
        """Children of parents of the same zone, mutated, as canonical networks; zones have equal chances."""
        zones, starts, sizes = np.unique(parents.zones, return_index=True, return_counts=True)
        zone = rng.integers(len(zones), size=OFFSPRING)
        one, other = (starts[zone] + rng.integers(sizes[zone]) for _ in range(2))
        mixed = rng.random((OFFSPRING, len(self._counts))) < 0.5 * rng.integers(2, size=(OFFSPRING, 1))
        codes = np.where(mixed, parents.codes[other], parents.codes[one])
        changed = rng.random(codes.shape) < 1.5 / max(1, len(self._free))
        codes = np.where(changed, rng.integers(self._counts, size=codes.shape), codes)
        codes = self.space.canonical(codes)
        return codes[self.space.valid(codes)]

    def _apart(self, ranked: _Guessed, count: int) -> Codes:
        """`count` of them, zone after zone; first those that differ in two choices or more from what is chosen, then any.

        The zone goes first whose best gains most on the best that was told and costs no more.
        """
        told = self.pool.ranked
        by_cost = told[np.argsort(self.pool.costs[told], kind="stable")]
        front = np.maximum.accumulate(np.concatenate([[-np.inf], self.pool.scores[by_cost]]))
        gains = ranked.values - front[np.searchsorted(self.pool.costs[by_cost], ranked.costs, side="right")]
        places = [np.flatnonzero(ranked.zones == zone) for zone in np.unique(ranked.zones)]
        places = [rows[np.argsort(-gains[rows], kind="stable")] for rows in places]
        places.sort(key=lambda rows: -gains[rows[0]])
        turns = [rows[turn] for turn in range(max(map(len, places), default=0)) for rows in places if turn < len(rows)]
        chosen: list[int] = []
        for least in (2, 1):
            for row in turns:
                if len(chosen) < count and row not in chosen:
                    differing = (ranked.codes[chosen] != ranked.codes[row]).sum(axis=1)
                    if (differing >= least).all():
                        chosen.append(int(row))
        return ranked.codes[chosen]

    def notes(self) -> list[str]:
        """Whether the predictor proposed, and on what figures."""
        return [f"The predictor proposed in {self.used} of {self.rounds} rounds; last {self.why}"]

    def _own_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "used": self.used, "why": self.why}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        rounds, used, why = state.get("rounds"), state.get("used"), state.get("why")
        if not (type(rounds) is int and type(used) is int and 0 <= used <= rounds and isinstance(why, str)):
            raise InputError("the state of a search is damaged (its rounds do not fit together): search anew")
        self.rounds, self.used, self.why = rounds, used, why


def _edges(costs: Values) -> Values:
    """Inner borders of the zones, shape (zones - 1,)."""
    logs = np.log(np.maximum(costs, 1e-9))
    return np.linspace(logs.min(), logs.max(), ZONES + 1)[1:-1]


def _zones(costs: Values, edges: Values) -> NDArray[np.int64]:
    return np.searchsorted(edges, np.log(np.maximum(costs, 1e-9))).astype(np.int64)
