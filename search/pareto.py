"""The Pareto front: the archs that no other arch beats in score and in every cost."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from supernet.errors import InputError


def front(scores: ArrayLike, costs: ArrayLike) -> NDArray[np.intp]:
    """Find the non-dominated archs: their indices, sorted by the first cost (then by the others, then the better score first).

    `scores` is (archs,), larger is better; `costs` is (archs, metrics), smaller is better. An arch is dominated when
    another one is at least as good in everything and better in something. Of exact duplicates the first is kept.
    Infinities are values like any other.

    O(n log n) for one cost (Kung, Luccio and Preparata 1975: sort, then a running best), O(n * front) for more.

    Raises `InputError` for NaN and for shapes that do not fit.
    """
    scores_a = np.asarray(scores, dtype=np.float64)
    costs_am = np.asarray(costs, dtype=np.float64)
    if scores_a.ndim != 1 or costs_am.ndim != 2 or len(costs_am) != len(scores_a):
        raise InputError(f"scores are (archs,) and costs (archs, metrics), but got {scores_a.shape} and {costs_am.shape}")
    if np.isnan(scores_a).any() or np.isnan(costs_am).any():
        raise InputError("a score or a cost is NaN, which has no place in an order: leave that arch out")
    losses = np.column_stack([costs_am, -scores_a])  # all of them smaller is better
    order = np.lexsort(losses.T[::-1])  # stable; nothing is dominated by what comes after it
    return _one_cost(losses, order) if costs_am.shape[1] == 1 else _many_costs(losses, order)


def _one_cost(losses: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Go up in cost and keep an arch when it scores better than every cheaper one."""
    loss = losses[order, 1]
    stays = np.ones(len(order), dtype=bool)
    stays[1:] = loss[1:] < np.minimum.accumulate(loss)[:-1]
    return order[stays]


def _many_costs(losses: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.intp]:
    """Keep the first of those left, which is never dominated, drop all that are nowhere better than it (itself too), repeat."""
    kept = []
    left = losses[order]
    while len(order):
        kept.append(order[0])
        better = (left < left[0]).any(axis=1)
        order, left = order[better], left[better]
    return np.array(kept, dtype=np.intp)
