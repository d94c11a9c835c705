"""Scores of archs foretold from their choices: regressors on encoded archs, and the gate that says whether they may propose.

Over all costs any predictor looks good, since what is larger is better; so what counts here is the order of archs that cost nearly the
same, of archs that the regressor was not fitted on, against the order by macs alone. A predictor proposes and never decides.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search.feasible import Feasible
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space

Values = NDArray[np.float64]
"""One number an arch, shape (archs,), or a row of them, shape (archs, features)."""

FOLDS = 5
SIZE, JUDGED_SIZE = 5, 2
"""Size of the ensemble that foretells, and of those that are fitted to the folds: these are many, and a little worse."""
TREES = 8
"""Trees of a forest whose mean is a predictor of its own."""
SUREST = 2_000
"""Images beyond which a score tells hardly more of what a predictor can know."""
FEWEST = 20
"""Scored archs below which nothing is fitted."""


@dataclass(frozen=True, slots=True)
class Tau:
    """A Kendall tau-b (or a difference of two) with the ends of its interval, over `pairs` pairs of archs."""

    value: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        """Two decimals, such as "0.12 (0.02 to 0.22)"."""
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the gate let a predictor propose, and the figures for it: out of fold and, but `overall`, within the cost band."""

    used: bool
    model: str
    archs: int
    tau: Tau
    baseline: Tau
    """Of the order by macs alone."""
    gain: Tau
    """`tau` less `baseline`, paired."""
    overall: float
    """Tau-b over all costs, which flatters: there the cost alone tells most of the order."""
    why: str
    """In words, with the figures."""


@dataclass(frozen=True, slots=True)
class Gate:
    """When a predictor may propose.

    Its out-of-fold tau-b among archs whose main costs are at most `band` apart, after the trend of the scores with the cost (a
    parabola in its logarithm) was taken out, must be significantly above 0 and above that of the order by macs alone, and at least
    `minimum`. Intervals have level 1 - `alpha`, divided among the models of which the best was taken.

    Noise bounds what any predictor can reach: scores of 1,000 images differ by chance as much as children of one cost do, and then the
    truth itself has a tau of 0.3 to 0.4. So `minimum` is far below the 0.6 that is asked for on noiseless benchmarks.
    """

    minimum: float = 0.1
    alpha: float = 0.4
    band: float = 0.25

    def judge(
        self, scores: Values, predicted: Values, costs: Values, macs: Values, *, model: str = "the predictor", tried: int = 1,
        cost_name: str = "macs",
    ) -> Verdict:  # fmt: skip
        """What to think of `predicted`, out of fold, as the order of `scores`; all (archs,). `costs` are the main ones, above 0.

        `tried` is the number of models of which this is the best.
        """
        counts = _Pairs(_level(scores, costs), np.stack([_level(predicted, costs), macs]), costs, self.band)
        level = 1 - self.alpha / tried
        tau, baseline, gain = counts.tau(0, level), counts.tau(1, level), counts.gain(level)
        overall = _Pairs(scores, predicted[None], costs, np.inf).value(0)
        where = f"within ±{100 * self.band:g} % {cost_name}"
        figures = f"tau {where} is {tau}, macs alone {baseline.value:.2f}"
        lacks = [
            words for holds, words in (
                (tau.low > 0, "it is not significantly above 0"),
                (gain.low > 0, f"it is not significantly above macs alone (ahead by {gain})"),
                (tau.value >= self.minimum, f"at least {self.minimum:g} is asked for"),
            ) if not holds
        ]  # fmt: skip
        if not tau.pairs:
            figures, lacks = f"no two archs are {where} of each other", ["their order cannot be foretold"]
        head = "not used: " if lacks else "used: "
        tail = f" ({model}, {len(scores)} archs; over all costs {overall:.2f}, which flatters)"
        why = head + figures + "".join(f"; {words}" for words in lacks[:1]) + tail
        return Verdict(not lacks, model, len(scores), tau, baseline, gain, overall, why)


@dataclass(frozen=True)
class _Pairs:
    """Kendall's tau-b of several `orders`, shape (orders, archs), against `scores`, over the pairs of archs within the cost band.

    Intervals are by the jackknife over archs: a pair counts for both of its archs, so every leave-one-out value follows from sums.
    """

    scores: Values
    orders: Values
    costs: Values
    band: float
    sums: Values = field(init=False)
    """Per order (concordant less discordant pairs, pairs not tied in the order, pairs not tied in the scores) of each arch."""
    partners: NDArray[np.int64] = field(init=False)
    """Of each arch, how many are within the band."""

    def __post_init__(self) -> None:
        by_cost = np.argsort(self.costs, kind="stable")
        costs, scores, orders = self.costs[by_cost], self.scores[by_cost], self.orders[:, by_cost]
        sums, partners = np.zeros((len(orders), 3, len(costs))), np.zeros(len(costs), dtype=np.int64)
        ends = (
            np.searchsorted(costs, costs * (1 + self.band), side="right")
            if np.isfinite(self.band)
            else [len(costs)] * len(costs)
        )
        for first, end in enumerate(ends):
            window = slice(first + 1, int(end))
            truth, order = np.sign(scores[window] - scores[first]), np.sign(orders[:, window] - orders[:, first, None])
            parts = np.stack([truth * order, np.abs(order), np.broadcast_to(np.abs(truth), order.shape)], axis=1)
            sums[:, :, window] += parts
            sums[:, :, first] += parts.sum(axis=-1)
            partners[window] += 1
            partners[first] += int(end) - first - 1
        object.__setattr__(self, "sums", sums)
        object.__setattr__(self, "partners", partners)

    def value(self, order: int) -> float:
        """Tau-b; 0 where no pair is untied."""
        return float(_ratio(self.sums[order].sum(axis=-1) / 2))

    def _without_each(self, order: int) -> Values:
        sums = self.sums[order]
        return _ratio(sums.sum(axis=-1, keepdims=True) / 2 - sums)[self.partners > 0]

    def tau(self, order: int, level: float) -> Tau:
        return self._with_interval(self.value(order), self._without_each(order), level)

    def gain(self, level: float) -> Tau:
        """The first order's tau less the second's, paired."""
        return self._with_interval(self.value(0) - self.value(1), self._without_each(0) - self._without_each(1), level)

    def _with_interval(self, value: float, without: Values, level: float) -> Tau:
        count = len(without)
        if count < 3:
            return Tau(value, -1.0, 1.0, int(self.partners.sum()) // 2)
        error = np.sqrt((count - 1) / count * np.sum((without - without.mean()) ** 2))
        reach = float(stats.t.ppf((1 + level) / 2, count - 1) * error)
        return Tau(value, value - reach, value + reach, int(self.partners.sum()) // 2)


def _ratio(sums: Values) -> Values:
    """Tau-b of sums (concordant less discordant, untied, untied), shape (3, ...)."""
    below = np.sqrt(np.maximum(sums[1] * sums[2], 0))
    return np.asarray(np.divide(sums[0], below, out=np.zeros_like(below), where=below > 0))


def _level(values: Values, costs: Values) -> Values:
    """Values without their trend with the cost, a parabola in its logarithm."""
    logs = np.log(np.maximum(costs, 1e-9))
    if np.ptp(logs) == 0:
        return np.asarray(values - values.mean())
    place = (logs - logs.mean()) / logs.std()
    powers = np.vander(place, 3)
    return np.asarray(values - powers @ np.linalg.lstsq(powers, values, rcond=None)[0])


def effective(space: Space, codes: Codes) -> NDArray[np.bool_]:
    """Which choices have an effect, shape (archs, dimensions): none for blocks that do not stand, and none without alternative."""
    codes = space.canonical(codes)
    found = np.zeros(codes.shape, dtype=np.bool_)
    for column, dimension in enumerate(space.dimensions):
        if len(dimension.choices) > 1:
            other = codes.copy()
            other[:, column] = (codes[:, column] + 1) % len(dimension.choices)
            found[:, column] = (space.canonical(other) != codes).any(axis=1)
    return found


def encoded(space: Space, feasible: Feasible, codes: Codes) -> Values:
    """Archs for a regressor, shape (archs, features): one-hot choices, levels of ordered ones in 0..1, logarithms of all costs.

    A choice without effect is zeros in all of its features.
    """
    codes = space.canonical(codes)
    live = effective(space, codes)
    columns: list[Values] = []
    for column, dimension in enumerate(space.dimensions):
        count = len(dimension.choices)
        if count > 1:
            columns.extend((live[:, column] & (codes[:, column] == code)).astype(np.float64) for code in range(count))
        if count > 2 and dimension.ordered:
            columns.append(live[:, column] * codes[:, column] / (count - 1))
    columns.extend(np.log(np.maximum(values, 1e-9)) for values in feasible.table(codes).values())
    return np.stack(columns, axis=1)


Foretell = Callable[[Values], Values]
"""Features, shape (archs, features), -> scores, shape (archs,) of one predictor, or (archs, draws) of several."""


@dataclass(frozen=True)
class Fitted:
    """A fitted model: the scores that it foretells, and `drawn(count, rng)`: those of predictors that fit nearly as well."""

    foretell: Foretell
    drawn: Callable[[int, np.random.Generator], Foretell]


def _ridge(features: Values, scores: Values, weights: Values, seed: int, size: int) -> Fitted:
    """Linear with a Gaussian prior whose strength is fitted too: main effects, which tell most of the accuracy of such spaces."""
    from sklearn.linear_model import BayesianRidge

    model = BayesianRidge().fit(features, scores, sample_weight=weights)

    def drawn(count: int, rng: np.random.Generator) -> Foretell:
        slopes = rng.multivariate_normal(model.coef_, model.sigma_, count, method="eigh")
        return lambda wanted: wanted @ slopes.T + model.intercept_

    return Fitted(model.predict, drawn)


def _forest(features: Values, scores: Values, weights: Values, seed: int, size: int) -> Fitted:
    """A random forest of 16 `size` trees; a draw is the mean of `TREES` of them."""
    from sklearn.ensemble import RandomForestRegressor

    model = RandomForestRegressor(16 * size, max_features=0.4, min_samples_leaf=2, random_state=seed, n_jobs=1)
    model.fit(features, scores, sample_weight=weights)
    return _ensemble([partial(_of_tree, tree) for tree in model.estimators_], TREES)


def _of_tree(tree: Any, wanted: Values) -> Values:
    values: Values = tree.predict(wanted.astype(np.float32))
    return values


def _mlp(features: Values, scores: Values, weights: Values, seed: int, size: int) -> Fitted:
    """`size` small networks with one hidden layer, each from its own start; a draw is one of them. Takes no weights."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor

    models = [
        MLPRegressor(hidden_layer_sizes=(32,), solver="lbfgs", alpha=3.0, max_iter=100, random_state=seed + member)
        for member in range(size)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is wanted
        for model in models:
            model.fit(features, scores)

    return _ensemble([model.predict for model in models], 1)


def _ensemble(members: Sequence[Foretell], together: int) -> Fitted:
    """The mean of the members; a draw is the mean of `together` of them."""

    def each(wanted: Values) -> Values:
        return np.stack([member(wanted) for member in members])

    def drawn(count: int, rng: np.random.Generator) -> Foretell:
        taken = rng.integers(len(members), size=(count, together))
        return lambda wanted: np.asarray(each(wanted)[taken].mean(axis=1).T)

    return Fitted(lambda wanted: np.asarray(each(wanted).mean(axis=0)), drawn)


MODELS: Mapping[str, Callable[[Values, Values, Values, int, int], Fitted]] = {"ridge": _ridge, "forest": _forest, "mlp": _mlp}
"""Name -> what fits it to features and scores (standardised) with weights, a seed and a size."""


class Predictor:
    """Foretells scores. `fit` takes the model that best orders archs of like cost out of fold; `verdict` says if it may propose.

    `costs` of the band are the main cost of `feasible`. Everything random follows from `seed`.
    """

    def __init__(
        self, space: Space, feasible: Feasible, *, seed: int, models: Sequence[str] = tuple(MODELS), gate: Gate | None = None
    ) -> None:
        unknown = [name for name in models if name not in MODELS]
        if unknown or not models:
            raise InputError(
                f"a predictor's models are some of {', '.join(MODELS)}, but got {list(models)}: name at least one of them"
            )
        self.space, self.feasible, self.seed, self.models, self.gate = space, feasible, seed, tuple(models), gate or Gate()
        self.verdict: Verdict | None = None
        self._fitted: Fitted | None = None
        self._scale: tuple[Values, Values, float, float] | None = None

    def fit(self, codes: Codes, scores: Values, images: NDArray[np.int64] | None = None) -> Verdict:
        """Fit to archs, shape (archs, dimensions), and scores, shape (archs,); `images` is on how many each score rests.

        A score counts as much as it is sure, but one of very many images not more than `SUREST` would. Raises `InputError` where a
        score is not finite.
        """
        scores = np.asarray(scores, dtype=np.float64)
        if scores.shape != (len(codes),) or not np.isfinite(scores).all():
            raise InputError(
                f"a predictor is fitted to one finite score an arch, but got {len(codes)} archs and scores {scores[:5]}"
            )
        self._fitted = None
        if len(scores) < FEWEST or np.std(scores) == 0:
            lack = (
                f"{len(scores)} archs are scored, at least {FEWEST} are needed"
                if len(scores) < FEWEST
                else "all scores are equal"
            )
            nothing = Tau(0.0, -1.0, 1.0, 0)
            self.verdict = Verdict(False, "", len(scores), nothing, nothing, nothing, 0.0, f"not used: {lack}")
            return self.verdict
        features = encoded(self.space, self.feasible, codes)
        spread = features.std(axis=0)
        self._scale = features.mean(axis=0), np.where(spread > 0, spread, 1.0), float(scores.mean()), float(scores.std())
        inputs, targets = self._scaled(features), (scores - self._scale[2]) / self._scale[3]
        sure = np.ones(len(scores)) if images is None else 1 / (1 / np.maximum(images, 1) + 1 / SUREST)
        weights = sure / sure.mean()
        guesses = {name: self._out_of_fold(name, inputs, targets, weights) for name in self.models}
        costs, macs = self.feasible.main_cost(codes), self.feasible.table(codes)["macs"]
        best = self._best(_level(scores, costs), {name: _level(guess, costs) for name, guess in guesses.items()}, costs)
        self._fitted = MODELS[best](inputs, targets, weights, self.seed, SIZE)
        self.verdict = self.gate.judge(
            scores, guesses[best], costs, macs, model=best, tried=len(self.models), cost_name=self.feasible.main.column
        )
        return self.verdict

    def predict(self, codes: Codes) -> Values:
        """Scores of archs, shape (archs,). Raises `InputError` before a fit."""
        return self._scores(self._of_fit().foretell, codes)

    def drawn(self, count: int, rng: np.random.Generator) -> Callable[[Codes], Values]:
        """Codes -> scores, shape (archs, count), of `count` predictors drawn from those that fit. Raises `InputError` before a fit."""
        draws = self._of_fit().drawn(count, rng)
        return lambda codes: self._scores(draws, codes)

    def _of_fit(self) -> Fitted:
        if self._fitted is None:
            raise InputError(
                f"the predictor is not fitted ({self.verdict.why if self.verdict else 'no scores yet'}): fit it first"
            )
        return self._fitted

    def _scores(self, foretell: Foretell, codes: Codes) -> Values:
        assert self._scale is not None
        return self._scale[2] + self._scale[3] * foretell(self._scaled(encoded(self.space, self.feasible, codes)))

    def _scaled(self, features: Values) -> Values:
        assert self._scale is not None
        return (features - self._scale[0]) / self._scale[1]

    def _best(self, scores: Values, guesses: Mapping[str, Values], costs: Values) -> str:
        """The first model, unless a later one orders archs of like cost better by more than chance may well do."""
        best, *others = guesses
        for name in others:
            if _Pairs(scores, np.stack([guesses[name], guesses[best]]), costs, self.gate.band).gain(2 / 3).low > 0:
                best = name
        return best

    def _out_of_fold(self, name: str, inputs: Values, targets: Values, weights: Values) -> Values:
        """Every arch's score as foretold by a model that was fitted without it, shape (archs,)."""
        fold = np.random.default_rng([self.seed, 11]).permutation(len(targets)) % FOLDS
        guesses = np.empty(len(targets))
        for each in range(FOLDS):
            held = fold == each
            kept = weights[~held] / weights[~held].mean()
            fitted = MODELS[name](inputs[~held], targets[~held], kept, self.seed, JUDGED_SIZE)
            guesses[held] = fitted.foretell(inputs[held])
        return guesses
