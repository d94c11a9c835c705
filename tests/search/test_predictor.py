"""The predictor and its gate: on planted truth, on noise, and on the scores of a trained supernet's children."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from search.feasible import Feasible
from search.predictor import FEWEST, MODELS, Gate, Predictor, Values, _Pairs, effective, encoded
from supernet.costs import Costs
from supernet.errors import InputError
from supernet.family import Codes
from supernet.space import Space, load_space

SPACE = load_space("digits")
FEASIBLE = Feasible(SPACE, Costs(SPACE), ())
TABLE = Path(__file__).parents[2] / "benchmarks/results/cifar_table.npz"


def drawn(count: int, seed: int = 0, space: Space = SPACE) -> Codes:
    return np.unique(space.sample_codes(3 * count, np.random.default_rng(seed)), axis=0)[::2][:count]


def planted(codes: Codes, noise: float = 0.0, seed: int = 0) -> Values:
    """A score that mostly grows with the cost, and beside it adds up over the choices; in standard deviations of the latter."""
    rng = np.random.default_rng([seed, 1])
    counts = np.array([max(1, len(dimension.choices) - 1) for dimension in SPACE.dimensions])
    effects = rng.normal(size=len(counts))
    added = (codes / counts) @ effects
    cost = np.log(FEASIBLE.costs.macs(codes))
    return 3 * (cost - cost.mean()) + added / added.std() + noise * rng.normal(size=len(codes))


def slow_tau(scores: Values, order: Values, costs: Values, band: float) -> float:
    """Tau-b by its definition."""
    sums = np.zeros(3)
    for i in range(len(scores)):
        for j in range(i):
            if max(costs[i], costs[j]) <= min(costs[i], costs[j]) * (1 + band):
                a, b = np.sign(scores[i] - scores[j]), np.sign(order[i] - order[j])
                sums += [a * b, b != 0, a != 0]
    return float(sums[0] / np.sqrt(sums[1] * sums[2])) if sums[1] * sums[2] else 0.0


# --- tau within bands ---


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(2, 25),
    levels=st.integers(1, 30),
    band=st.sampled_from([0.0, 0.05, 0.4, 10.0]),
)
def test_tau_within_bands_and_without_each_arch_is_as_defined(seed: int, count: int, levels: int, band: float) -> None:
    rng = np.random.default_rng(seed)
    scores, order = (rng.integers(levels, size=count).astype(float) for _ in range(2))
    costs = np.round(np.exp(rng.uniform(0, 1, count)), 1)
    pairs = _Pairs(scores, order[None], costs, band)
    assert pairs.value(0) == pytest.approx(slow_tau(scores, order, costs, band), abs=1e-12)
    if count > 2:
        by_cost = np.argsort(costs, kind="stable")
        one, others = by_cost[0], by_cost[1:]
        if pairs.partners[0]:
            expected = slow_tau(scores[others], order[others], costs[others], band)
            assert pairs._without_each(0)[0] == pytest.approx(expected, abs=1e-12), one


def test_over_all_costs_it_is_the_tau_b_of_scipy() -> None:
    rng = np.random.default_rng(0)
    scores, order, costs = rng.integers(5, size=80).astype(float), rng.normal(size=80), rng.uniform(1, 9, 80)
    assert _Pairs(scores, order[None], costs, np.inf).value(0) == pytest.approx(kendalltau(scores, order).statistic)


def test_the_interval_covers() -> None:
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        truth, costs = rng.normal(size=80), rng.uniform(100, 110, 80)
        order = 0.6 * truth + 0.8 * rng.normal(size=80)
        tau = _Pairs(truth, order[None], costs, 0.2).tau(0, 0.9)
        covered += tau.low <= 2 / np.pi * np.arcsin(0.6) <= tau.high
    assert 165 <= covered <= 195


# --- the gate ---


@pytest.mark.slow
def test_the_gate_stays_shut_on_noise() -> None:
    """A gate that asks for no minimum opens as often as its level says."""
    codes, opened = drawn(120), 0
    for seed in range(100):
        scores = np.random.default_rng([seed, 2]).normal(size=len(codes))
        opened += (
            Predictor(SPACE, FEASIBLE, seed=seed, models=["ridge"], gate=Gate(minimum=-1, alpha=0.1)).fit(codes, scores).used
        )
    assert opened <= 8


@pytest.mark.slow
def test_the_usual_gate_seldom_opens_on_noise() -> None:
    codes, opened = drawn(120), 0
    for seed in range(100):
        scores = np.random.default_rng([seed, 4]).normal(size=len(codes))
        opened += Predictor(SPACE, FEASIBLE, seed=seed, models=["ridge"]).fit(codes, scores).used
    assert opened <= 15


@pytest.mark.nightly
def test_the_gate_of_all_models_stays_shut_on_noise() -> None:
    codes, opened = drawn(80), 0
    for seed in range(30):
        scores = np.random.default_rng([seed, 3]).normal(size=len(codes))
        opened += Predictor(SPACE, FEASIBLE, seed=seed, gate=Gate(minimum=-1, alpha=0.1)).fit(codes, scores).used
    assert opened <= 3


def test_the_gate_stays_shut_where_the_cost_alone_tells_the_order() -> None:
    """All models find out that larger is better, and look good over all costs; that is no reason to use one."""
    codes = drawn(200)
    macs = np.log(FEASIBLE.costs.macs(codes))
    scores = macs + 0.02 * np.random.default_rng(0).normal(size=len(codes))
    verdict = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge", "forest"]).fit(codes, scores)
    assert not verdict.used
    assert verdict.overall > 0.8
    assert "not significantly above" in verdict.why


@pytest.mark.parametrize("model", MODELS)
def test_the_gate_opens_on_planted_truth(model: str) -> None:
    codes = drawn(200)
    verdict = Predictor(SPACE, FEASIBLE, seed=0, models=[model]).fit(codes, planted(codes, noise=0.3))
    assert verdict.used, verdict.why
    assert verdict.model == model
    assert verdict.tau.low > 0.2 > verdict.baseline.value
    assert verdict.gain.low > 0


def test_out_of_fold_means_out_of_fold() -> None:
    """A model that remembers what it saw, noise included, knows nothing of what it did not see."""
    codes = drawn(150)
    verdict = Predictor(SPACE, FEASIBLE, seed=0, models=["forest"]).fit(codes, np.random.default_rng(0).normal(size=len(codes)))
    assert abs(verdict.tau.value) < 0.25
    assert abs(verdict.overall) < 0.25


def test_the_verdict_gives_its_figures_in_words() -> None:
    codes = drawn(150)
    noise = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge"]).fit(codes, np.random.default_rng(0).normal(size=len(codes)))
    assert noise.why.startswith("not used: tau within ±25 % macs is ")
    assert f"macs alone {noise.baseline.value:.2f}" in noise.why and "which flatters" in noise.why
    good = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge"]).fit(codes, planted(codes))
    assert good.why.startswith(f"used: tau within ±25 % macs is {good.tau}")
    barred = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge"], gate=Gate(minimum=0.999)).fit(
        codes, planted(codes, noise=0.5)
    )
    assert "at least 0.999 is asked for" in barred.why


def test_where_no_two_archs_cost_alike_nothing_is_claimed() -> None:
    values = np.arange(30.0)
    verdict = Gate().judge(values, values, 2.0**values, 2.0**values)
    assert not verdict.used
    assert "no two archs" in verdict.why


@pytest.mark.parametrize("scores", [np.zeros(50), np.arange(FEWEST - 1.0)])
def test_too_little_to_learn_from_is_said(scores: Values) -> None:
    predictor = Predictor(SPACE, FEASIBLE, seed=0)
    verdict = predictor.fit(drawn(len(scores)), scores)
    assert not verdict.used and verdict.why.startswith("not used: ")
    with pytest.raises(InputError, match="not fitted"):
        predictor.predict(drawn(3))


# --- the encoding ---


@pytest.mark.parametrize("name", ["mlp", "cell"])
def test_choices_without_effect_are_zeros_and_equal_networks_are_encoded_equally(name: str) -> None:
    space = load_space(name)
    feasible = Feasible(space, Costs(space), ())
    codes = space._uniform(200, np.random.default_rng(0))
    codes = codes[space.valid(codes)]
    canonical = space.canonical(codes)
    assert (codes != canonical).any()
    assert np.array_equal(encoded(space, feasible, codes), encoded(space, feasible, canonical))
    live = effective(space, canonical)
    assert (canonical[~live] == 0).all() or name == "cell"
    if name == "mlp":
        free = np.array([len(dimension.choices) > 1 for dimension in space.dimensions])
        assert np.array_equal(live, space._live(canonical) & free)
        assert not live.all()


def test_different_networks_are_encoded_differently() -> None:
    codes = drawn(300)
    assert len(np.unique(encoded(SPACE, FEASIBLE, codes).round(9), axis=0)) == len(codes)


# --- predicting ---


@pytest.mark.parametrize("model", MODELS)
def test_predictions_and_draws_are_near_the_truth(model: str) -> None:
    codes = drawn(400)
    truth = 0.7 + 0.01 * planted(codes)  # in the unit of a top1
    predictor = Predictor(SPACE, FEASIBLE, seed=0, models=[model])
    predictor.fit(codes[:250], truth[:250])
    mean, draws = predictor.predict(codes[250:]), predictor.drawn(9, np.random.default_rng(0))(codes[250:])
    assert mean.shape == (150,) and draws.shape == (150, 9)
    assert np.corrcoef(mean, truth[250:])[0, 1] > 0.85
    assert abs(mean.mean() - truth[250:].mean()) < 0.005
    assert 0 < np.abs(draws - mean[:, None]).mean() < 0.02
    assert min(np.corrcoef(draw, truth[250:])[0, 1] for draw in draws.T) > 0.6


def test_draws_differ_most_where_least_is_known() -> None:
    codes = drawn(400)
    small = np.argsort(FEASIBLE.costs.macs(codes))
    known, other = codes[small[:60]], codes[small[-60:]]
    predictor = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge"])
    predictor.fit(known, planted(known, 0.5))
    draws = predictor.drawn(200, np.random.default_rng(0))
    assert draws(other).std(axis=1).mean() > 1.2 * draws(known).std(axis=1).mean()


def test_a_score_counts_as_much_as_it_is_sure() -> None:
    """Of two halves of the archs one is nothing but noise, and known to be."""
    codes = drawn(300)
    rng = np.random.default_rng(0)
    scores, images = planted(codes), np.full(len(codes), 4000)
    scores[::2], images[::2] = scores[::2] + 8 * rng.normal(size=len(scores[::2])), 20
    found = []
    for told in (images, None):
        predictor = Predictor(SPACE, FEASIBLE, seed=0, models=["ridge"])
        predictor.fit(codes, scores, told)
        found.append(np.corrcoef(predictor.predict(codes), planted(codes))[0, 1])
    assert found[0] > found[1]


@pytest.mark.slow
def test_it_follows_from_the_seed_and_moves_no_global_state() -> None:
    codes, before = drawn(60), np.random.get_state()[1].copy()  # noqa: NPY002
    found = []
    for seed in (1, 1, 2):
        predictor = Predictor(SPACE, FEASIBLE, seed=seed, models=["forest", "mlp"])
        predictor.fit(codes, planted(codes))
        found.append(predictor.predict(codes))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("models", [[], ["xgboost"]])
def test_unknown_models_are_refused(models: list[str]) -> None:
    with pytest.raises(InputError, match="ridge, forest, mlp"):
        Predictor(SPACE, FEASIBLE, seed=0, models=models)


@pytest.mark.parametrize("scores", [np.full(30, np.nan), np.zeros(29)])
def test_scores_that_are_none_are_refused(scores: Values) -> None:
    with pytest.raises(InputError, match="one finite score an arch"):
        Predictor(SPACE, FEASIBLE, seed=0).fit(drawn(30), scores)


# --- a trained supernet ---


def test_on_a_trained_supernet_a_hundred_children_open_the_gate() -> None:
    """2,048 children on 4,000 images. Two halves of the images agree by a tau of 0.44 within the band: so much is noise."""
    with np.load(TABLE) as table:
        space = Space.from_definition(json.loads(str(table["space"])))
        codes, macs = table["codes"].astype(np.int64), table["macs"].astype(np.float64)
        scores = np.unpackbits(table["packed"], axis=1)[:, : int(table["images"])].mean(axis=1)
    feasible = Feasible(space, Costs(space), ())
    order = np.random.default_rng(0).permutation(len(codes))
    known, other = order[:150], order[150:]
    predictor = Predictor(space, feasible, seed=0)
    verdict = predictor.fit(codes[known], scores[known])
    assert verdict.used, verdict.why
    assert verdict.overall > verdict.tau.value + 0.1  # which flatters
    really = Gate().judge(scores[other], predictor.predict(codes[other]), macs[other], macs[other])
    assert really.tau.value > 0.5
    assert really.baseline.value < 0.15
    assert verdict.tau.low - 0.1 < really.tau.value < verdict.tau.high + 0.1
