"""Which archs meet the budgets, for many archs at once, and random archs that do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.latency import LatencyModel
from search.budget import MEASURED, Budget
from search.reach import Bools, Floats, Ways, every_code, excess, walk
from supernet.arch import Arch
from supernet.costs import METRICS, Costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

ROUNDS = 3
"""Of drawing ways across the budgets, while they find new archs."""
WALKERS, STEPS = 256, 24
"""Archs that wander within narrow budgets, where drawing found too few, and for how long."""


class Cost(NamedTuple):
    """A cost by its metric, and the target where it is measured (None: the default one)."""

    metric: str
    target: str | None = None

    @property
    def column(self) -> str:
        """Its name in `Feasible.table`."""
        return self.metric if self.target is None else f"{self.metric}@{self.target}"


@dataclass(frozen=True)
class Feasible:
    """Budgets over closed-form costs and, through latency models, latencies. A prediction counts with its worse end.

    `latency` holds the models by the names of their targets (None: the default one); a single model is that of the default one.
    """

    space: Space
    costs: Costs
    budgets: tuple[Budget, ...]
    latency: Mapping[str | None, LatencyModel] | LatencyModel | None = None

    @cached_property
    def models(self) -> Mapping[str | None, LatencyModel]:
        """Target -> its latency model."""
        return {None: self.latency} if isinstance(self.latency, LatencyModel) else self.latency or {}

    @property
    def main(self) -> Cost:
        """What "cheaper" means: the cost of the first upper bound, else of the first budget; macs without budgets."""
        first = next((budget for budget in self.budgets if not budget.lower), next(iter(self.budgets), None))
        return Cost(first.metric, first.target) if first else Cost("macs")

    def upper_factor(self, cost: Cost | Budget) -> float:
        """Most archs cost at most this times what the table says; 1 where the cost is exact."""
        return self._ends(cost)[1] if cost.metric in MEASURED else 1.0

    def table(self, codes: Codes) -> dict[str, Floats]:
        """Every cost of the archs, each of shape (archs,); latencies in ms are predicted, as `latency_ms` or `latency_ms@TARGET`."""
        predicted = [Cost("latency_ms", target) for target in self.models]
        return self._values(codes, [*(Cost(metric) for metric in METRICS), *predicted])

    def mask(self, codes: Codes) -> Bools:
        """Which archs are networks and meet every budget, shape (archs,)."""
        return self.space.valid(codes) & self._meet(self._values(codes, self.budgets), self.budgets, len(codes))

    def zones(self, codes: Codes, sets: Sequence[Sequence[Budget]]) -> Bools:
        """Which archs meet the budgets and also further ones, shape (archs, sets)."""
        every = [budget for budgets in (self.budgets, *sets) for budget in budgets]
        values, meets = self._values(codes, every), np.empty((len(codes), len(sets)), dtype=np.bool_)
        first = self.space.valid(codes) & self._meet(values, self.budgets, len(codes))
        for number, budgets in enumerate(sets):
            meets[:, number] = first & self._meet(values, budgets, len(codes))
        return meets

    def admits(self, arch: Arch) -> bool:
        """Whether one arch meets every budget."""
        return bool(self.mask(self.space.encode([arch]))[0])

    def main_cost(self, codes: Codes) -> Floats:
        """The `main` cost, shape (archs,)."""
        return self._values(codes, [self.main])[self.main.column]

    def outside(self, codes: Codes) -> Floats:
        """How far archs are outside of the budgets (`search.reach.excess`), shape (archs,); infinitely where they are no networks."""
        values = self._values(codes, self.budgets)
        far = excess((budget, values[budget.column] * self._factor(budget)) for budget in self.budgets)
        return np.where(self.space.valid(codes), far, np.inf)

    def sample(self, count: int, rng: np.random.Generator) -> Codes:
        """At most `count` different archs that meet the budgets, canonical, shape (archs, dimensions).

        Every choice uniform where that often meets the budgets, and of a small space all. Else spread over what the budgets leave: at
        random places of ways from the smallest arch to the largest (`Ways`), and, where these find too few, by wandering about from
        there. Fewer than `count` come where hardly any others exist; the work is bounded in any case.
        """
        found = _Distinct(self, count)
        if self._all is not None:
            return rng.permutation(self._all)[:count]
        found.add(self.space.sample_codes(2 * count, rng))
        starts = self.space.encode([self.space.smallest, self.space.largest])
        for _ in range(ROUNDS):
            if found.full:
                return found.codes
            before, codes = len(found.codes), self.near(Ways.draw(self.space, max(count, WALKERS), rng), rng)
            found.add(codes)
            starts = np.concatenate([starts, codes])
            if len(found.codes) == before:
                break
        starts = np.concatenate([found.codes, starts])
        nearest = starts[np.argsort(self.outside(starts), kind="stable")[:WALKERS]]
        for codes, outside in walk(self.space, self.outside, nearest, rng, STEPS):
            found.add(codes[outside == 0])
            if found.full:
                break
        return found.codes

    def near(self, ways: Ways, rng: np.random.Generator) -> Codes:
        """An arch of each way, shape (ways, dimensions), evenly spread over the part that meets the budgets.

        Where no part does, next to it; where choices have no order, it may miss the budgets or be no network.
        """
        many = ways.stops.shape[1]
        low, high = np.zeros(many), np.full(many, 2.0)
        uppers, lowers = ([b for b in self.budgets if b.lower == lower] for lower in (False, True))
        if uppers:
            high = ways.edge(lambda codes: self._meet(self._values(codes, uppers), uppers, many), 0.0, 2.0)
        if lowers:
            low = ways.edge(lambda codes: self._meet(self._values(codes, lowers), lowers, many), 2.0, 0.0)
        return ways.at(low + (high - low) * rng.permutation((np.arange(many) + rng.random(many)) / max(1, many)))

    def _model(self, cost: Cost | Budget) -> LatencyModel:
        if cost.target not in self.models:
            known = ", ".join(Cost("latency_ms", target).column for target in self.models) or "none"
            raise InputError(
                f"{cost.column} is known only with a latency model of its target, and there are models of {known}: measure one"
            )
        return self.models[cost.target]

    def _factor(self, budget: Budget) -> float:
        """What makes the worse end of a prediction."""
        if budget.metric not in MEASURED:
            return 1.0
        return self._ends(budget)[0 if budget.lower else 1]

    def _ends(self, cost: Cost | Budget) -> tuple[float, float]:
        """Of what is predicted, the ends of its interval; nothing is added where each candidate is measured (`search.direct`)."""
        model = self._model(cost)
        return (model.lower_factor, model.upper_factor) if model.trusted else (1.0, 1.0)

    def _meet(self, values: Mapping[str, Floats], budgets: Iterable[Budget], many: int) -> Bools:
        meets = np.ones(many, dtype=np.bool_)
        for budget in budgets:
            worse = values[budget.column] * self._factor(budget)
            meets &= worse >= budget.bound if budget.lower else worse <= budget.bound
        return meets

    def _values(self, codes: Codes, costs: Iterable[Cost | Budget]) -> dict[str, Floats]:
        """Columns of the table."""
        return {
            cost.column: self._latency(cost)(codes)
            if cost.metric in MEASURED
            else self.costs.of(cost.metric, codes).astype(np.float64)
            for cost in {cost.column: cost for cost in costs}.values()
        }

    def _latency(self, cost: Cost | Budget) -> Callable[[Codes], Floats]:
        if cost.target not in self._predictions:
            self._predictions[cost.target] = self._model(cost).on(self.costs)
        return self._predictions[cost.target]

    @cached_property
    def _all(self) -> Codes | None:
        """Of a small space all archs that meet the budgets."""
        codes = every_code(self.space)
        if codes is None:
            return None
        found = _Distinct(self, len(codes))
        found.add(codes)
        return found.codes

    @cached_property
    def _predictions(self) -> dict[str | None, Callable[[Codes], Floats]]:
        return {}


class _Distinct:
    """Different archs that meet the budgets, in the order in which they came."""

    def __init__(self, feasible: Feasible, most: int) -> None:
        self.feasible, self.most = feasible, most
        self._rows: dict[bytes, NDArray[np.int64]] = {}

    @property
    def full(self) -> bool:
        return len(self._rows) >= self.most

    @property
    def codes(self) -> Codes:
        rows = list(self._rows.values())[: self.most]
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.feasible.space.dimensions))

    def add(self, codes: Codes) -> None:
        """Those that are networks and meet the budgets."""
        for row in self.feasible.space.canonical(codes[self.feasible.mask(codes)]):
            self._rows.setdefault(row.tobytes(), row)
