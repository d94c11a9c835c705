"""The strategies by name. A module is imported when its strategy is wanted, since some need packages that are extras."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from search.feasible import Feasible
from search.strategies import Strategy
from supernet.config import nearest
from supernet.errors import InputError
from supernet.space import Space

SAMPLERS = ("tpe", "gp", "nsgaii", "cmaes", "qmc")
"""Of Optuna."""

STRATEGIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "random": ("random", "Random", {}),
    "coarse_to_fine": ("coarse_to_fine", "CoarseToFine", {}),
    "evolution": ("evolution", "Evolution", {}),
    "local": ("local", "Local", {}),
    "predicted": ("predicted", "Predicted", {}),
    **{f"optuna:{sampler}": ("optuna", "Optuna", {"sampler": sampler}) for sampler in SAMPLERS},
    "reinforce": ("reinforce", "Reinforce", {}),
    "mcts": ("mcts", "Mcts", {}),
    "relax": ("relax", "Relax", {}),
}
"""Name -> module of this package, class, and the settings that the name stands for."""


def strategy_named(name: str) -> Callable[..., Strategy]:
    """The constructor `(space, feasible, *, seed, **settings)` of a strategy. Raises `InputError` with the nearest name."""
    if name not in STRATEGIES:
        raise InputError(
            f"a strategy is one of {', '.join(STRATEGIES)}, but got {name[:100]!r}{nearest(name, list(STRATEGIES))}"
        )
    module, cls, settings = STRATEGIES[name]
    found = getattr(importlib.import_module(f"search.strategies.{module}"), cls)
    return cast("Callable[..., Strategy]", functools.partial(found, **settings) if settings else found)


def make(name: str, space: Space, feasible: Feasible, *, seed: int, **settings: Any) -> Strategy:
    """A strategy over the archs of `feasible`. Raises `InputError` for an unknown name or setting, or a value that cannot be."""
    constructor, fixed = strategy_named(name), STRATEGIES[name][2]
    known = [each for each in inspect.signature(constructor).parameters if each not in {"space", "feasible", "seed", *fixed}]
    for setting in settings:
        if setting not in known:
            offered = f"is set by {', '.join(known)}" if known else "has no settings"
            raise InputError(f"the strategy {name} {offered}, but got {setting!r}{nearest(setting, known)}")
    try:
        return constructor(space, feasible, seed=seed, **settings)
    except (TypeError, ValueError, AttributeError) as error:
        if not settings:
            raise
        raise InputError(
            f"the strategy {name} cannot be made with {str(settings)[:200]} ({error}): give values of the right type"
        ) from error
