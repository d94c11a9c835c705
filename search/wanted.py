"""The children that a search is to find: each is the best that meets a set of budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.budget import Budget, parse_all, parse_set
from search.feasible import Feasible
from supernet.errors import InputError

DRAWN = 2_000
"""Archs drawn to see how far the costs within the budgets reach."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A child by name, and the budgets that it must meet (beside those of the whole search)."""

    name: str
    budgets: tuple[Budget, ...]


def wanted(children: Sequence[str]) -> tuple[Wanted, ...]:
    """The best child, and one for each text such as "macs<=50M, params<=2M", named by it.

    Raises `InputError` for a text that is no set of budgets, or one given twice.
    """
    found = {"best": Wanted("best", ())}
    for text in children:
        budgets = parse_set(text)
        name = ", ".join(map(str, budgets))
        if name in found:
            raise InputError(f"every --child is another one, but {name!r} was given twice: leave one out")
        found[name] = Wanted(name, budgets)
    return tuple(found.values())


def caps(feasible: Feasible, count: int, rng: np.random.Generator) -> tuple[Budget, ...]:
    """`count` upper bounds of the main cost, cheapest first, in equal ratios over what the children within the budgets cost.

    The last holds for all of them; the first for about a part in `count` of the range (in logarithms).
    """
    if count == 0:
        return ()
    space, main = feasible.space, feasible.main
    codes = np.concatenate([feasible.sample(DRAWN, rng), space.encode([space.smallest, space.largest])])
    costs = feasible.main_cost(codes[feasible.mask(codes)])
    if not len(costs):
        return ()
    least, most = float(costs.min()), float(costs.max())
    bounds = np.geomspace(least, most, count + 1)[1:] if least > 0 else np.linspace(least, most, count + 1)[1:]
    bounds[-1] = most
    rounded = [float(f"{bound:.4g}") if bound < most else most for bound in bounds]
    upper = feasible.upper_factor(main)
    return tuple(Budget(main.metric, bound * upper, main.target) for bound in dict.fromkeys(rounded) if bound > 0)


def parse_budgets(texts: Sequence[str]) -> tuple[Budget, ...]:
    """The budgets of the whole search."""
    return parse_all(list(texts))
