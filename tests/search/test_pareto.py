"""The Pareto front against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from search.pareto import front
from supernet.errors import InputError

few_values = st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0, math.inf, -math.inf])
values = few_values | st.floats(allow_nan=False)


@st.composite
def archs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count, metrics = draw(st.integers(0, 25)), draw(st.integers(0, 4))
    elements = draw(st.sampled_from([few_values, values]))  # few values make ties and duplicates
    return draw(arrays(np.float64, count, elements=elements)), draw(arrays(np.float64, (count, metrics), elements=elements))


def dominates(scores: np.ndarray, costs: np.ndarray, one: int, other: int) -> bool:
    no_worse = scores[one] >= scores[other] and bool((costs[one] <= costs[other]).all())
    better = scores[one] > scores[other] or bool((costs[one] < costs[other]).any())
    return no_worse and better


@given(archs())
def test_the_front_is_what_no_other_arch_dominates_with_duplicates_once(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, costs = drawn
    points = [(scores[i], *costs[i]) for i in range(len(scores))]
    expected = [
        i
        for i in range(len(scores))
        if not any(dominates(scores, costs, j, i) for j in range(len(scores))) and points[i] not in points[:i]
    ]
    assert sorted(front(scores, costs)) == expected


@given(archs())
def test_the_front_is_sorted_by_the_first_cost(drawn: tuple[np.ndarray, np.ndarray]) -> None:
    scores, costs = drawn
    if costs.shape[1]:
        first = costs[front(scores, costs), 0]
        assert list(first) == sorted(first)


@given(archs(), st.integers(0, 2**32 - 1))
def test_the_order_of_the_archs_does_not_change_the_points_of_the_front(
    drawn: tuple[np.ndarray, np.ndarray], seed: int
) -> None:
    scores, costs = drawn
    shuffled = np.random.default_rng(seed).permutation(len(scores))
    there, here = front(scores[shuffled], costs[shuffled]), front(scores, costs)
    np.testing.assert_array_equal(scores[shuffled][there], scores[here])
    np.testing.assert_array_equal(costs[shuffled][there], costs[here])


def test_one_cost_agrees_with_the_general_method_on_many_points() -> None:
    rng = np.random.default_rng(0)
    scores, cost = rng.integers(0, 1000, 100_000) / 1000, rng.integers(1, 50_000, 100_000)
    one = front(scores, cost[:, None])
    np.testing.assert_array_equal(one, front(scores, np.column_stack([cost, cost])))
    assert 1 < len(one) < 1000


def test_a_front_that_holds_every_point_is_found_whole() -> None:
    count = 100_000
    np.testing.assert_array_equal(front(np.arange(count), np.arange(count)[:, None]), np.arange(count))


def test_integers_and_lists_are_taken() -> None:
    assert list(front([0.5, 0.7, 0.6, 0.7], [[10], [30], [40], [20]])) == [0, 3]


@pytest.mark.parametrize(("scores", "costs"), [([math.nan], [[1.0]]), ([1.0, 1.0], [[1.0], [math.nan]])])
def test_nan_is_refused(scores: list[float], costs: list[list[float]]) -> None:
    with pytest.raises(InputError, match="NaN"):
        front(scores, costs)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (3, 1, 1)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="archs, metrics"):
        front(np.zeros(3), np.zeros(shape))
