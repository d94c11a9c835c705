"""Statistics of children against tables, other libraries and simulated children with a common difficulty of images."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from search.statistics import (
    compare,
    confidence_set,
    holm,
    paired_bootstrap,
    shrunk,
    significantly_worse,
    smallest_detectable,
)
from supernet.errors import InputError

SEEDS = 100


def bits(accuracies: list[float] | np.ndarray, images: int, shared: float, rng: np.random.Generator) -> np.ndarray:
    """Right or wrong of children with these true accuracies; `shared` of the variance is the images' difficulty, which all share."""
    difficulty = rng.standard_normal(images)
    noise = rng.standard_normal((len(accuracies), images))
    ease = stats.norm.ppf(np.asarray(accuracies))[:, None]
    return ease + math.sqrt(shared) * difficulty + math.sqrt(1 - shared) * noise > 0


def discordance(accuracy: float, shared: float) -> float:
    pair = bits([accuracy, accuracy], 200_000, shared, np.random.default_rng(9))
    return float(np.mean(pair[0] != pair[1]))


# -- pairs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (6, 0), (7, 2), (30, 12), (5, 5)])
def test_bools_are_compared_by_the_exact_mcnemar_test(wins: int, losses: int) -> None:
    one = np.array([True] * wins + [False] * losses + [True] * 40)
    other = np.array([False] * wins + [True] * losses + [True] * 40)
    found = compare(one, other)
    assert found.difference == pytest.approx((wins - losses) / len(one))
    expected = stats.binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert found.p_value == pytest.approx(expected)
    less = stats.binomtest(wins, wins + losses, alternative="less").pvalue if wins + losses else 1.0
    for alpha in (0.01, 0.05, 0.2, 0.6):
        assert significantly_worse(one, other, alpha) == (less < alpha)


def test_floats_are_compared_by_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(24, 3, 50), rng.normal(24.5, 3, 50)
    assert compare(one, other).p_value == pytest.approx(stats.ttest_rel(one, other).pvalue)
    p_value = stats.ttest_rel(one, other, alternative="less").pvalue
    assert significantly_worse(one, other, p_value * 1.01)
    assert not significantly_worse(one, other, p_value * 0.99)
    assert not significantly_worse(other, one, 0.5)


def test_constant_differences_and_single_images() -> None:
    dark = np.zeros(4)
    assert significantly_worse(dark, dark + 1)
    assert not significantly_worse(dark + 1, dark)
    assert not significantly_worse(dark, dark)
    assert not significantly_worse(np.zeros(1), np.ones(1))
    assert not significantly_worse(np.array([False]), np.array([True]))
    assert compare(np.array([False]), np.array([True])).p_value == 1.0
    assert compare(dark, dark + 1).p_value == 0.0


def test_floats_and_bools_mix() -> None:
    right, weights = np.array([True, False] * 20), np.linspace(0.5, 1.5, 40)
    assert compare(right, weights).difference == pytest.approx(right.mean() - weights.mean())


def test_the_bootstrap_interval_covers_the_true_difference() -> None:
    covered, p_values = 0, []
    for seed in range(300):
        rng = np.random.default_rng([seed, 1])
        one, other = bits([0.72, 0.70], 800, 0.9, rng)
        found = paired_bootstrap(one, other, rng, 600)
        covered += found.low <= 0.02 <= found.high
        p_values.append(paired_bootstrap(*bits([0.7, 0.7], 800, 0.9, rng), rng, 600).p_value)
    assert 0.92 <= covered / 300 <= 0.98
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.08


def test_the_bootstrap_agrees_with_the_t_test_on_floats() -> None:
    rng = np.random.default_rng(3)
    one = rng.normal(24, 3, 400)
    other = one + rng.normal(0.1, 1, 400)
    drawn, exact = paired_bootstrap(one, other, rng, 4000), compare(one, other)
    assert drawn.difference == pytest.approx(exact.difference)
    assert drawn.low == pytest.approx(exact.low, abs=0.01)
    assert drawn.high == pytest.approx(exact.high, abs=0.01)
    assert drawn.p_value == pytest.approx(exact.p_value, abs=0.03)
    assert paired_bootstrap(one, one, rng).p_value == 1.0
    assert paired_bootstrap(one, one - 0.1, rng, 99).p_value == pytest.approx(0.02)


# -- several tests -----------------------------------------------------------------------------------------------------------


def test_holm_against_a_table_worked_by_hand() -> None:
    # sorted .005 .01 .03 .04 -> x4 .02, x3 .03, x2 .06, x1 .04 raised to .06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.5))
def test_holm_rejects_what_its_step_down_definition_rejects(p_values: list[float], alpha: float) -> None:
    rejected = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] * (len(p_values) - rank) > alpha:
            break
        rejected.add(index)
    assert set(np.flatnonzero(holm(p_values) <= alpha)) == rejected


@pytest.mark.parametrize("wrong", [[1.1], [-0.1], [math.nan], [[0.1]]])
def test_holm_refuses_what_is_no_probability(wrong: list[float]) -> None:
    with pytest.raises(InputError, match="p values are a list of numbers"):
        holm(wrong)


# -- the best of several -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finalists", [2, 5, 10])
@pytest.mark.parametrize(
    ("accuracy", "shared", "images"), [(0.7, 0.9, 1000), (0.7, 0.99, 1000), (0.95, 0.9, 1000), (0.5, 0.6, 300)]
)
def test_noise_gives_no_significant_difference(finalists: int, accuracy: float, shared: float, images: int) -> None:
    whole = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, finalists])
        whole += confidence_set(bits([accuracy] * finalists, images, shared, rng), rng, resamples=200).all()
    assert whole >= 90


@pytest.mark.parametrize("finalists", [2, 5, 10])
@pytest.mark.parametrize(("accuracy", "shared"), [(0.7, 0.9), (0.7, 0.99), (0.9, 0.9), (0.5, 0.6)])
def test_a_winner_by_twice_the_smallest_detectable_difference_is_alone(finalists: int, accuracy: float, shared: float) -> None:
    ahead = 2 * smallest_detectable(discordance(accuracy, shared), images=1000)
    found = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, finalists, 7])
        values = bits([accuracy] * (finalists - 1) + [accuracy + ahead], 1000, shared, rng)
        kept = confidence_set(values, rng, resamples=200)
        found += kept[-1] and kept.sum() == 1
    assert found >= 95


def test_noise_in_floats_gives_no_significant_difference() -> None:
    whole = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 3])
        values = rng.normal(25, 4, 400) + rng.standard_t(5, (5, 400))
        whole += confidence_set(values, rng, resamples=200).all()
    assert whole >= 90


@pytest.mark.slow
def test_holm_against_the_observed_best_would_be_too_liberal() -> None:
    """The reason for the confidence set, and the figure of the module's docstring (there of 2,000 runs)."""
    wrong, wrong_set = 0, 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 11])
        values = bits([0.7] * 10, 2000, 0.959, rng)
        best = int(values.mean(1).argmax())
        p_values = [compare(values[best], values[other]).p_value for other in range(10) if other != best]
        wrong += bool((holm(p_values) < 0.05).any())
        wrong_set += not confidence_set(values, rng, resamples=100).all()
    assert wrong > 10
    assert wrong_set <= 10


def test_the_worse_half_leaves_and_the_equal_best_stay() -> None:
    stayed = 0
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 5])
        kept = confidence_set(bits([0.75, 0.75, 0.75, 0.65, 0.60], 2000, 0.9, rng), rng, resamples=200)
        assert not kept[3:].any()
        stayed += kept[:3].all()
    assert stayed >= 90


def test_the_set_is_the_same_from_the_same_seed_and_in_any_order() -> None:
    values = bits(np.linspace(0.6, 0.7, 8), 1000, 0.9, np.random.default_rng(0))
    one = confidence_set(values, np.random.default_rng(4))
    assert 0 < one.sum() < 8
    assert (confidence_set(values, np.random.default_rng(4)) == one).all()
    turned = np.random.default_rng(1).permutation(8)
    assert (confidence_set(values[turned], np.random.default_rng(5)) == one[turned]).all()


@pytest.mark.parametrize(
    "values",
    [
        np.ones((3, 5), bool), np.zeros((2, 1), bool), np.ones((1, 1), bool), np.array([[True], [False]]),
        np.repeat(np.arange(10)[None] % 2 == 0, 4, axis=0), np.array([[True] * 3 + [False] * 97, [False] * 100]),
        np.full((2, 4), 25.0),
    ],
)  # fmt: skip
def test_a_handful_of_differing_images_decides_nothing(values: np.ndarray) -> None:
    assert confidence_set(values, np.random.default_rng(0)).all()


def test_identical_children_share_their_fate() -> None:
    values = bits([0.8, 0.6], 500, 0.9, np.random.default_rng(0))[[0, 1, 0, 1]]
    assert confidence_set(values, np.random.default_rng(0)).tolist() == [True, False, True, False]


# -- the smallest detectable difference --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "discordant", "points"), [(10_000, 0.04, 0.56), (10_000, 0.08, 0.79), (10_000, 0.15, 1.08), (50_000, 0.08, 0.35)]
)
def test_detectable_differences_of_a_published_table(images: int, discordant: float, points: float) -> None:
    assert 100 * smallest_detectable(discordant, images=images) == pytest.approx(points, abs=0.01)


@pytest.mark.parametrize(("discordant", "images"), [(0.1, 1000), (0.3, 300), (0.02, 3000)])
def test_it_is_detected_with_the_power_promised(discordant: float, images: int) -> None:
    ahead = smallest_detectable(discordant, images=images)
    rng = np.random.default_rng(0)
    parts = [(discordant + ahead) / 2, (discordant - ahead) / 2]
    wins, losses, _ = rng.multinomial(images, [*parts, 1 - sum(parts)], size=4000).T
    p_values = np.minimum(1, 2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5))
    assert 0.72 <= np.mean(p_values < 0.05) <= 0.86  # the exact test is a little conservative


def test_detectable_differences_of_children() -> None:
    one, other = bits([0.7, 0.7], 1000, 0.9, np.random.default_rng(0))
    fraction = float(np.mean(one != other))
    assert smallest_detectable(one, other) == smallest_detectable(fraction, images=1000)
    assert smallest_detectable(one, other, 4000) < smallest_detectable(one, other)
    assert smallest_detectable(one, one) == 6 / 1000  # McNemar's test needs six images
    assert smallest_detectable(one[:5], other[:5]) == math.inf
    rng = np.random.default_rng(1)
    first, second = rng.normal(25, 3, 400), rng.normal(25, 3, 400)
    expected = (1.959964 + 0.841621) * np.std(first - second, ddof=1) / 20
    assert smallest_detectable(first, second) == pytest.approx(expected)


# -- what to report ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spread", "least_raw"), [(0.0, 0.009), (0.003, 0.007), (0.02, 0.001)])
def test_the_shrunken_maximum_is_not_optimistic(spread: float, least_raw: float) -> None:
    raw, kept = [], []
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 13])
        true = 0.7 + spread * rng.standard_normal(20)
        values = bits(true, 1000, 0.9, rng)
        common = np.mean(values) - true.mean()  # luck that all share makes no child look better than another
        estimates = [one.value for one in shrunk(values)]
        best = int(np.argmax(estimates))
        raw.append(values.mean(1).max() - true[values.mean(1).argmax()] - common)
        kept.append(estimates[best] - true[best] - common)
    assert np.mean(raw) > least_raw
    assert abs(np.mean(kept)) < max(0.0015, 0.35 * np.mean(raw))


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_shrunken_intervals_cover(spread: float) -> None:
    covered = []
    for seed in range(SEEDS):
        rng = np.random.default_rng([seed, 17])
        true = 0.7 + spread * rng.standard_normal(10)
        estimates = shrunk(bits(true, 1000, 0.9, rng))
        covered += [one.low <= value <= one.high for one, value in zip(estimates, true, strict=True)]
    assert 0.92 <= np.mean(covered) <= 0.985


def test_children_that_do_not_differ_get_the_common_mean() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.permutation(np.arange(100) < 10) for _ in range(8)])
    values[0, np.flatnonzero(~values[0])[0]] = True
    estimates = shrunk(values)
    assert {round(one.value, 12) for one in estimates} == {round(float(values.mean()), 12)}
    assert all(one.low < 0.1 < one.high and one.images == 100 for one in estimates)


def test_children_that_differ_much_keep_their_means() -> None:
    values = bits([0.2, 0.5, 0.8, 0.9], 5000, 0.9, np.random.default_rng(0))
    assert [one.value for one in shrunk(values)] == pytest.approx(values.mean(1), abs=0.001)


def test_shrunk_of_odd_inputs() -> None:
    alone = shrunk(np.array([[True, True, False, True]]))[0]
    assert (alone.value, alone.images) == (0.75, 4)
    for certain in (np.ones((3, 8), bool), np.ones((1, 8), bool)):
        best = shrunk(certain)[0]
        assert (best.value, best.high) == (1.0, pytest.approx(1.0))
        assert 0.6 < best.low < 0.7  # Wilson: eight of eight
    one_image = shrunk(np.array([[True], [False], [True]]))
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in one_image)
    floats = shrunk(np.random.default_rng(0).normal(25, 3, (4, 50)))
    assert all(one.low < one.value < one.high for one in floats)


# -- mistakes ----------------------------------------------------------------------------------------------------------------

GOOD = np.array([True, False])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: compare(GOOD, GOOD[:1]), "the same images"),
        (lambda: compare(GOOD[:0], GOOD[:0]), "at least one image"),
        (lambda: compare(np.array([1.0, math.nan]), np.array([1.0, 2.0])), "must be finite"),
        (lambda: compare(np.array([1.0]), np.array([2.0])), "at least two images"),
        (lambda: paired_bootstrap(GOOD[:0], GOOD[:0], np.random.default_rng(0)), "at least one image"),
        (lambda: paired_bootstrap(GOOD, ~GOOD, np.random.default_rng(0), 0), "at least 1 resample"),
        (lambda: significantly_worse(GOOD, GOOD[:1]), "the same images"),
        (lambda: confidence_set(GOOD, np.random.default_rng(0)), r"\(children, images\)"),
        (lambda: confidence_set(GOOD[None, :0], np.random.default_rng(0)), r"\(children, images\)"),
        (lambda: confidence_set(np.array([[math.inf]]), np.random.default_rng(0)), "must be finite"),
        (lambda: shrunk(np.zeros((0, 4))), r"\(children, images\)"),
        (lambda: shrunk(np.array([[1.0], [2.0]])), "at least two images"),
        (lambda: smallest_detectable(0.1), "needs images"),
        (lambda: smallest_detectable(1.5, images=100), "fraction"),
        (lambda: smallest_detectable(GOOD), "only one was given"),
    ],
)
def test_mistakes_are_told_in_one_line(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        call()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
