"""Reinforce: a policy that draws every choice on its own, and is moved towards choices of better archs. Experimental."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from search.feasible import Feasible
from search.predictor import effective
from search.strategies import Result
from search.strategies.pool import Pooled, in_order
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

DRAWS = 4
"""Times that the policy draws for one ask; what is still lacking is drawn at random within the budgets."""


class Reinforce(Pooled):
    """REINFORCE (Williams 1992) with the absolute reward of TuNAS (Bender et al. 2020, arXiv 2008.06120, equation 3).

    The reward is score - `beta` |cost / target - 1|, where the target is the first upper bound (without one there is no cost term)
    and `beta` has the unit of the score. The baseline is a moving average of rewards, and the advantage is divided by that of its
    size. An arch over the budgets that the policy draws is not evaluated; it counts as one usual advantage below the baseline.
    Results of archs that it did not ask for count alike, although the policy did not draw them.

    Expect little more than of random search from a few hundred evaluations: every result is used once, and choices learn one by one.
    """

    name: ClassVar[str] = "reinforce"
    experimental: ClassVar[bool] = True

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, beta: float = 0.1, rate: float = 0.15, momentum: float = 0.9
    ) -> None:
        super().__init__(space, feasible, seed=seed)
        if not (beta >= 0 and rate > 0 and 0 <= momentum < 1):
            raise InputError(
                f"reinforce needs beta >= 0, rate > 0 and momentum in [0, 1), but got {beta}, {rate} and {momentum}"
            )
        self.beta, self.rate, self.momentum = beta, rate, momentum
        self.target = next((budget.bound for budget in feasible.budgets if not budget.lower), None)
        self.logits = [np.zeros(len(each.choices)) for each in space.dimensions]
        self.baseline, self.size = 0.0, 0.0
        self.learned = 0

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        found = self.pool.codes[:0]
        for _ in range(DRAWS):
            if len(found) < count:
                drawn = self._drawn(2 * count, rng)
                outside = drawn[~self.feasible.mask(drawn)][:count]
                for code, lives in zip(outside, effective(self.space, outside), strict=True):
                    self._move(code, lives, -self.rate)
                found = self.pool.new(np.concatenate([found, drawn]))[:count]
        codes = self.pool.new(np.concatenate([found, self.pool.fresh(count, rng)]))[:count] if len(found) < count else found
        order = in_order(codes)
        return codes[order], ["policy" if position < len(found) else "random" for position in order]

    def _drawn(self, count: int, rng: np.random.Generator) -> Codes:
        """What the policy draws, canonical, shape (archs, dimensions); what is no network is left out."""
        codes = np.stack([rng.choice(len(logits), size=count, p=softmax(logits)) for logits in self.logits], axis=1)
        codes = self.space.canonical(codes)
        return codes[self.space.valid(codes)]

    def tell(self, results: Sequence[Result]) -> None:
        """Remember them, and learn from those that were scored and not told before."""
        before = len(self.pool)
        rows = self.pool.tell(results)
        rows = rows[(rows >= before) & ~np.isnan(self.pool.scores[rows])]
        if not len(rows):
            return
        off = np.abs(self.pool.costs[rows] / self.target - 1) if self.target else np.zeros(len(rows))
        live = effective(self.space, self.pool.codes[rows])
        for code, lives, reward in zip(self.pool.codes[rows], live, self.pool.scores[rows] - self.beta * off, strict=True):
            self._learn(code, lives, float(reward))

    def _learn(self, code: Any, lives: Any, reward: float) -> None:
        keep = self.momentum if self.learned else 0.0
        advantage = reward - self.baseline if self.learned else 0.0
        self.baseline = keep * self.baseline + (1 - keep) * reward
        self.size = keep * self.size + (1 - keep) * abs(advantage)
        self.learned += 1
        step = self.rate * float(np.clip(advantage / self.size, -3, 3)) if self.size else 0.0
        self._move(code, lives, step)

    def _move(self, code: Any, lives: Any, step: float) -> None:
        """`step` along the gradient of the arch's log probability."""
        for column in np.flatnonzero(lives):
            slope = -softmax(self.logits[column])
            slope[code[column]] += 1
            self.logits[column] = self.logits[column] + step * slope

    def _own_state(self) -> dict[str, Any]:
        return {
            "logits": [logits.tolist() for logits in self.logits],
            "baseline": self.baseline,
            "size": self.size,
            "learned": self.learned,
        }

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self.logits = loaded_logits(self.space, state.get("logits"))
        try:
            self.baseline, self.size, self.learned = float(state["baseline"]), float(state["size"]), int(state["learned"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"the state of a search is damaged ({error}): search anew") from error


def softmax(logits: Any) -> Any:
    """Probabilities of the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return raised / raised.sum(axis=-1, keepdims=True)


def loaded_logits(space: Space, value: Any) -> list[Any]:
    """One array a dimension. Raises `InputError` where they do not fit."""
    try:
        logits = [np.array(row, dtype=np.float64) for row in value]
        fits = len(logits) == len(space.dimensions) and all(
            row.shape == (len(each.choices),) and all(map(math.isfinite, row))
            for row, each in zip(logits, space.dimensions, strict=True)
        )
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise InputError("the state of a search is damaged (its logits are not of this space): search anew")
    return logits
