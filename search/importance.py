"""Which dimensions matter for the score among children of equal cost, and whether the children evaluated allow to say so.

What the cost explains is taken away first: a dimension counts for what it does at equal cost, be it that it helps more than its macs
would elsewhere, or that it wastes them. The rest is regressed on the archs, and each dimension's choices are shuffled among children
that the regressor was not fitted to (permutation importance: Breiman 2001, section 10). For effects that add up, the squared error
grows by twice the variance of the effect (Gregorutti, Michel and Saint-Pierre 2017, proposition 1), so half of that growth, over the
variance of the rest, is the dimension's share of it.

It tells of the children that a search evaluated, which are no random sample of the space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search.table import Child
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

Values = NDArray[np.float64]
"""One number a child, shape (children,)."""

FEWEST = 80
"""Children below which nothing is said: among fewer, noise too often looks like an effect."""
MOST = 1_000
"""Children that are looked at; of more, so many are drawn."""
LEAST_R2 = 0.1
"""Part of the variance left by the cost that the regressor must explain, out of fold."""
ALPHA = 0.001
"""Level at which its predictions must be correlated with the truth, one-sided."""
FOLDS = 10
SHUFFLES = 5
TREES = 100


@dataclass(frozen=True, slots=True)
class Importance:
    """A dimension's share of the variance of scores at equal cost, with its 95 % interval over the folds."""

    dimension: str
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Importances:
    """What can be said of the dimensions. `rows` is empty where nothing can; `why` is a sentence in both cases."""

    rows: tuple[Importance, ...]
    """The largest share first."""
    constant: tuple[str, ...]
    """Dimensions of which all children had the same choice among several, so that nothing is known of them."""
    children: int
    """Children that this rests on."""
    r2: float | None
    """Part of the variance left by the cost that is explained, out of fold; None where nothing was fitted."""
    why: str


def importance_of(space: Space, table: Sequence[Child], cost: str = "macs") -> Importances:
    """`importance` for rows of `search.table.children`: of those scored on the most images, for others are not comparable."""
    most = max((child["images"] for child in table), default=0)
    whole = [child for child in table if child["images"] == most and child.get(cost) is not None]
    prefix = "arch."
    archs = [
        space.arch({name.removeprefix(prefix): value for name, value in child.items() if name.startswith(prefix) and value is not None})
        for child in whole
    ]  # fmt: skip
    scores, costs = (np.array([float(child[name]) for child in whole]) for name in ("score", cost))
    return importance(space, space.encode(archs), scores, costs, cost_name=cost)


def importance(
    space: Space, codes: Codes, scores: Values, costs: Values, *, cost_name: str = "macs", seed: int = 0
) -> Importances:
    """Importance of every dimension for `scores` at equal `costs` (both of shape (children,), costs above 0).

    Codes are of shape (children, dimensions). The same input gives the same result. Raises `InputError` for shapes that do not fit and
    for numbers that are not finite.
    """
    codes, scores, costs = space.canonical(codes), np.asarray(scores, np.float64), np.asarray(costs, np.float64)
    _check(codes, scores, costs)
    if len(codes) > MOST:
        drawn = np.sort(np.random.default_rng([seed, 2]).permutation(len(codes))[:MOST])
        codes, scores, costs = codes[drawn], scores[drawn], costs[drawn]
    free = [column for column in range(codes.shape[1]) if len(np.unique(codes[:, column])) > 1]
    names = [dimension.name for dimension in space.dimensions]
    constant = tuple(each.name for column, each in enumerate(space.dimensions) if len(each.choices) > 1 and column not in free)

    def nothing(why: str, r2: float | None = None) -> Importances:
        return Importances((), constant, len(codes), r2, f"Nothing can be said of the dimensions: {why}.")

    if len(codes) < FEWEST:
        return nothing(f"{len(codes)} children were scored on the same images, at least {FEWEST} are needed")
    if not free:
        return nothing("all children have the same choices")
    if np.ptp(scores) == 0:
        return nothing("all children have the same score")
    folds = list(_folds(codes, scores, costs, seed))
    fits = {name: [_Fit(space, fold, make) for fold in folds] for name, make in _MODELS.items()}
    truth = np.concatenate([fold.test_rest for fold in folds])
    model = min(fits, key=lambda name: sum(fit.error_sum for fit in fits[name]))
    r2 = 1 - sum(fit.error_sum for fit in fits[model]) / float(truth @ truth) if truth.any() else 0.0
    p_value = _p_value(np.concatenate([fit.predicted for fit in fits[model]]), truth)
    explained = (
        f"{model} explains {max(r2, 0):.0%} of what the {cost_name} leave of the variance of {len(codes)} children's scores"
    )
    if r2 < LEAST_R2 or p_value > ALPHA:
        return nothing(f"{explained} (out of fold), and {LEAST_R2:.0%} are asked for at least: the rest may be noise", r2)
    variance = float(np.mean(truth**2))
    rng = np.random.default_rng([seed, 1])
    grown = np.array([fit.grown(free, rng) for fit in fits[model]]) / (2 * variance)  # (folds, free dimensions)
    rows = [_row(names[column], grown[:, place]) for place, column in enumerate(free)]
    why = f"{explained[0].upper()}{explained[1:]} (out of fold)."
    return Importances(tuple(sorted(rows, key=lambda row: -row.share)), constant, len(codes), r2, why)


def _check(codes: Codes, scores: Values, costs: Values) -> None:
    if scores.shape != (len(codes),) or costs.shape != (len(codes),):
        raise InputError(
            f"scores and costs are one number a child, but of {len(codes)} children got {scores.shape} and {costs.shape}"
        )
    if not (np.isfinite(scores).all() and np.isfinite(costs).all() and (costs > 0).all()):
        raise InputError("a score or a cost is not finite, or a cost not above 0: leave that child out")


@dataclass(frozen=True)
class _Fold:
    """Children to fit to and others to judge by; `rest` is what the cost, as fitted to the first, does not explain of the scores."""

    train: Codes
    train_rest: Values
    test: Codes
    test_rest: Values


def _folds(codes: Codes, scores: Values, costs: Values, seed: int) -> Iterator[_Fold]:
    order = np.random.default_rng([seed, 0]).permutation(len(codes))
    logs = np.log(costs)
    for test in np.array_split(order, FOLDS):
        train = np.setdiff1d(order, test)
        inside = np.clip(logs, logs[train].min(), logs[train].max())  # a polynomial leads astray beyond what it was fitted to
        degree = min(3, len(np.unique(logs[train])) - 1)
        curve = np.polynomial.Polynomial.fit(inside[train], scores[train], degree)
        rest = scores - curve(inside)
        yield _Fold(codes[train], rest[train], codes[test], rest[test])


class _Fit:
    """A regressor fitted to a fold, and its squared errors on the children left out."""

    def __init__(self, space: Space, fold: _Fold, make: Callable[[], Any]) -> None:
        self._space, self._fold, self._model = space, fold, make()
        self._model.fit(_one_hot(space, fold.train), fold.train_rest)
        self.predicted: Values = self._model.predict(_one_hot(space, fold.test))
        self.error_sum = float(((self.predicted - fold.test_rest) ** 2).sum())

    def grown(self, columns: Sequence[int], rng: np.random.Generator) -> Values:
        """Growth of the mean squared error when a column is shuffled, shape (columns,); the mean of `SHUFFLES` shuffles."""
        test = self._fold.test
        shuffled = np.tile(test, (len(columns), SHUFFLES, 1, 1))
        for place, column in enumerate(columns):
            for shuffle in range(SHUFFLES):
                shuffled[place, shuffle, :, column] = rng.permutation(test[:, column])
        codes = self._space.canonical(shuffled.reshape(-1, test.shape[1]))  # blocks that now stand, or do not
        predicted = self._model.predict(_one_hot(self._space, codes)).reshape(len(columns), SHUFFLES, len(test))
        errors = ((predicted - self._fold.test_rest) ** 2).mean((1, 2))
        return np.asarray(errors - self.error_sum / len(test), np.float64)


def _one_hot(space: Space, codes: Codes) -> Values:
    """A column for every choice of every dimension, shape (children, choices)."""
    parts = [codes[:, [column]] == np.arange(len(each.choices)) for column, each in enumerate(space.dimensions)]
    return np.concatenate(parts, axis=1).astype(np.float64)


def _ridge() -> Any:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(alphas=np.logspace(-1, 3, 9))


def _forest() -> Any:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(TREES, min_samples_leaf=2, max_features=1 / 3, random_state=0, n_jobs=1)


_MODELS: Mapping[str, Callable[[], Any]] = {"ridge regression": _ridge, "a random forest": _forest}
"""Effects that add up, and effects that depend on one another; the better one, out of fold, is taken."""


def _p_value(predicted: Values, truth: Values) -> float:
    """One-sided p of "not correlated"."""
    if np.ptp(predicted) == 0 or np.ptp(truth) == 0:
        return 1.0
    return float(stats.pearsonr(predicted, truth, alternative="greater").pvalue)


def _row(name: str, shares: Values) -> Importance:
    """Mean over folds; the interval minds that these are fitted to much the same children (Nadeau and Bengio 2003, section 3)."""
    folds = len(shares)
    mean, spread = float(shares.mean()), float(shares.std(ddof=1))
    reach = float(stats.t.ppf(0.975, folds - 1)) * spread * np.sqrt(1 / folds + 1 / (folds - 1))
    return Importance(name, mean, mean - float(reach), mean + float(reach))
