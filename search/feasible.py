"""Which archs meet the budgets, for many archs at once; and whether any arch can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.latency import LatencyModel
from search.budget import Budget
from supernet.arch import Arch
from supernet.costs import Costs, arch_costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space


@dataclass(frozen=True)
class Feasible:
    """Budgets over closed-form costs and, through a latency model, latency. A predicted latency counts with its upper end."""

    space: Space
    costs: Costs
    budgets: tuple[Budget, ...]
    latency: LatencyModel | None = None

    def table(self, codes: Codes) -> dict[str, NDArray[np.float64]]:
        """Every cost of the archs, each of shape (archs,); `latency_ms` is predicted, where there is a model."""
        found = {name: values.astype(np.float64) for name, values in self.costs.all(codes).items()}
        if self.latency is not None:
            found["latency_ms"] = self.latency.predict(self.costs.features(codes))
        return found

    def mask(self, codes: Codes) -> NDArray[np.bool_]:
        """Which archs are networks and meet every budget, shape (archs,)."""
        costs, meets = self.table(codes), self.space.valid(codes)
        for budget in self.budgets:
            upper = self.latency.upper_factor if self.latency is not None and budget.metric == "latency_ms" else 1.0
            meets &= costs[budget.metric] * upper <= budget.bound
        return meets

    def admits(self, arch: Arch) -> bool:
        """Whether one arch meets every budget."""
        return bool(self.mask(self.space.encode([arch]))[0])

    def main_cost(self, codes: Codes) -> NDArray[np.float64]:
        """The cost that the first budget is about (macs without budgets), shape (archs,): what "cheaper" means."""
        metric = self.budgets[0].metric if self.budgets else "macs"
        return self.table(codes)[metric]


def refuse_impossible(space: Space, budgets: Sequence[Budget], smallest_latency_ms: float | None) -> None:
    """Raise `InputError` with the smallest reachable value where even the smallest arch misses a budget.

    No arch costs less than the smallest (a test holds this for every family), so it decides. Its latency is the
    measured one, upper end.
    """
    reachable: dict[str, float] = {**arch_costs(space, space.smallest)}
    if smallest_latency_ms is not None:
        reachable["latency_ms"] = smallest_latency_ms
    for budget in budgets:
        least = reachable.get(budget.metric)
        if least is not None and not budget.holds(least):
            shown = f"{least:.4g}" if budget.metric == "latency_ms" else f"{least:.0f}"
            raise InputError(f"no child of the space {space.name} meets {budget}: the smallest reachable {budget.metric} is {shown}: "
                             "raise the budget or choose a smaller space")  # fmt: skip
