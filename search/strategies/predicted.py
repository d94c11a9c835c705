"""Predicted: score some archs, fit a predictor, search on the predictor, score what it likes best, and so on.

The loop of LINAS (Sarah et al. 2022, "A hardware-aware framework for accelerating neural architecture search across modalities",
arXiv 2205.10358, section 4). Its predictor only proposes, and only where the gate of `search.predictor` lets it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from search.feasible import Feasible
from search.predictor import MODELS, Gate, Predictor, Values
from search.strategies.pool import Pooled, in_order
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

GENERATIONS = 12
OFFSPRING = 1_024
"""Archs bred in a generation of the search on the predictor."""
KEPT = 8
"""Archs that breed for a proposal."""
EXPLORED = 8
"""One proposal in so many is random, so that the predictor also sees what it does not like."""
FREELY = 0.5
"""The share of proposals that may cost whatever the budgets allow; the others stay below ceilings along all costs."""


@dataclass(frozen=True)
class _Drawn:
    """Archs with their main cost, shape (archs,), and their scores as each of several drawn predictors foretells, (archs, draws)."""

    codes: Codes
    costs: Values
    values: Values

    def under(self, ceilings: Values) -> Values:
        """The values, -inf where the arch is dearer than the ceiling of the draw."""
        return np.where(self.costs[:, None] <= ceilings, self.values, -np.inf)

    def joined(self, other: _Drawn) -> _Drawn:
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("codes", "costs", "values"))
        return _Drawn(*(np.concatenate(pair) for pair in pairs))


class Predicted(Pooled):
    """Asks for random archs until `initial` are known, then each time for what a predictor fitted to all that was told likes best.

    Every proposal is the best arch of a predictor of its own, drawn from all that fit the scores well (Thompson 1933): what is
    uncertain is tried, what is not is used, and no margin has to be set. It is found by evolution on the drawn predictors; half of them
    under ceilings of the main cost, so that proposals lie along the whole front. They differ in at least two choices from one another
    where there are enough. While the gate is shut it asks for random archs, from which a predictor learns most.
    """

    name: ClassVar[str] = "predicted"

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, initial: int = 32,
        models: Sequence[str] = tuple(MODELS), gate: Gate | None = None,
    ) -> None:  # fmt: skip
        super().__init__(space, feasible, seed=seed)
        if initial < 1:
            raise InputError(f"predicted needs at least 1 initial arch, but got {initial}: give more")
        self.initial = initial
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
        verdict = self.predictor.fit(self.pool.codes[scored], self.pool.scores[scored], self.pool.images[scored])
        self.rounds, self.used, self.why = self.rounds + 1, self.used + verdict.used, verdict.why
        wanted = count - int(rng.random() < (count % EXPLORED) / EXPLORED) - count // EXPLORED
        liked = self._liked(wanted if verdict.used else 0, rng)
        both = self.pool.new(np.concatenate([liked, self.pool.fresh(count, rng)]))[:count]
        return both, ["predicted"] * len(liked) + ["spread"]

    def _liked(self, count: int, rng: np.random.Generator) -> Codes:
        """New archs, each liked best by one drawn predictor under its ceiling, apart from one another."""
        if count < 1:
            return self.pool.codes[:0]
        draws = self.predictor.drawn(count, rng)
        known = self.pool.codes[self.pool.ranked[: 4 * KEPT]]
        begin = np.unique(np.concatenate([known, self.feasible.sample(OFFSPRING, rng)]), axis=0)
        if not len(begin):  # nothing meets the budgets
            return begin
        found = self._drawn(begin, draws)
        ceilings = np.full(count, np.inf)
        low, high = np.log(np.maximum(found.costs, 1e-9))[[found.costs.argmin(), found.costs.argmax()]]
        bound = count - math.ceil(FREELY * count)
        ceilings[count - bound :] = np.exp(low + (high - low) * (np.arange(bound) + rng.random(bound)) / max(1, bound))
        for _ in range(GENERATIONS):
            bred = np.unique(self._bred(found, ceilings, rng), axis=0)
            seen = {code.tobytes() for code in found.codes}
            bred = bred[[code.tobytes() not in seen for code in bred]]
            bred = bred[self.feasible.mask(bred)] if len(bred) else bred
            if len(bred):
                found = found.joined(self._drawn(bred, draws))
        return self._apart(found, ceilings)

    def _drawn(self, codes: Codes, draws: Callable[[Codes], Values]) -> _Drawn:
        return _Drawn(codes, self.feasible.main_cost(codes), draws(codes))

    def _bred(self, found: _Drawn, ceilings: Values, rng: np.random.Generator) -> Codes:
        """Children of archs that the same draw likes, mutated, as canonical networks; draws have equal chances."""
        values = found.under(ceilings)
        best = np.argsort(-values, axis=0, kind="stable")[:KEPT]
        draw = rng.integers(len(ceilings), size=OFFSPRING)
        one, other = (best[rng.integers(len(best), size=OFFSPRING), draw] for _ in range(2))
        mixed = rng.random((OFFSPRING, len(self._counts))) < 0.5 * rng.integers(2, size=(OFFSPRING, 1))
        codes = np.where(mixed, found.codes[other], found.codes[one])
        changed = rng.random(codes.shape) < 1.5 / max(1, len(self._free))
        codes = np.where(changed, rng.integers(self._counts, size=codes.shape), codes)
        codes = self.space.canonical(codes)
        return codes[self.space.valid(codes)]

    def _apart(self, found: _Drawn, ceilings: Values) -> Codes:
        """The best new arch of each draw, one that differs in two choices or more from those chosen before if there is one."""
        new = {code.tobytes() for code in self.pool.new(found.codes)}
        rows = np.flatnonzero([code.tobytes() in new for code in found.codes])
        codes, values = found.codes[rows], found.under(ceilings)[rows]
        chosen: list[int] = []
        for draw in range(len(ceilings)):
            order = np.argsort(-values[:, draw], kind="stable")
            order = order[np.isfinite(values[order, draw])]
            for least in (2, 1):
                row = next(
                    (row for row in order if (codes[chosen] != codes[row]).sum(axis=1).min(initial=least) >= least), None
                )
                if row is not None:
                    chosen.append(int(row))
                    break
        return codes[chosen]

    def notes(self) -> list[str]:
        """Whether the predictor proposed, and on what figures."""
        if not self.rounds:
            return ["The predictor was not asked: there were too few children to learn from"]
        return [f"The predictor proposed in {self.used} of {self.rounds} rounds; last {self.why}"]

    def _own_state(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "used": self.used, "why": self.why}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        rounds, used, why = state.get("rounds"), state.get("used"), state.get("why")
        if not (type(rounds) is int and type(used) is int and 0 <= used <= rounds and isinstance(why, str)):
            raise InputError("the state of a search is damaged (its rounds do not fit together): search anew")
        self.rounds, self.used, self.why = rounds, used, why
        self.predictor.seed = int(state["seed"])
