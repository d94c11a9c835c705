"""Random: archs that meet the budgets, spread over the costs, each once. The baseline that every other strategy must beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from search.strategies.pool import Pooled, in_order
from supernet.family import Codes


class Random(Pooled):
    """Asks for what `Feasible.sample` draws and learns nothing."""

    name: ClassVar[str] = "random"

    def _propose(self, count: int, rng: np.random.Generator) -> tuple[Codes, list[str]]:
        codes = self.pool.fresh(count, rng)
        return codes[in_order(codes)], ["random"] * len(codes)
