"""The learning rate as a function of the step."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supernet.schedule import Schedule, learning_rate

KINDS: list[Schedule] = ["cosine", "exponential"]


def rates(steps: int, **options: Any) -> list[float]:
    options = {"peak": 1.0, "warmup": 0, "schedule": "cosine", "floor": 0.0} | options
    return [learning_rate(step, steps, **options) for step in range(steps)]


@given(
    st.integers(1, 300), st.integers(0, 400), st.floats(1e-6, 10), st.floats(0, 1), st.sampled_from(KINDS)
)  # fmt: skip
def test_the_rate_rises_to_the_peak_then_never_rises_again(
    steps: int, warmup: int, peak: float, floor: float, schedule: Schedule
) -> None:
    found = rates(steps, peak=peak, warmup=warmup, floor=floor, schedule=schedule)
    up, down = found[:warmup], found[warmup:]
    assert all(a < b for a, b in itertools.pairwise(up))
    assert all(a >= b for a, b in itertools.pairwise(down))
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in found)
    assert all(rate >= floor * peak * (1 - 1e-9) for rate in down)
    assert not down or down[0] == pytest.approx(peak)


def test_the_warm_up_is_linear_from_the_first_step() -> None:
    assert rates(10, warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_passes_the_middle_and_ends_at_the_floor() -> None:
    found = rates(101, floor=0.2, peak=2.0)
    assert found[0] == 2.0
    assert found[25] == pytest.approx(2 * (0.2 + 0.8 * (0.5 + math.sqrt(0.5) / 2)))
    assert found[50] == pytest.approx(2 * 0.6)
    assert found[100] == pytest.approx(2 * 0.2)


def test_exponential_falls_by_equal_factors_and_rests_at_the_floor_from_three_quarters_on() -> None:
    found = rates(101, schedule="exponential", floor=0.01)
    factors = [b / a for a, b in itertools.pairwise(found[:76])]
    assert factors == pytest.approx([0.01 ** (1 / 75)] * 75)
    assert found[75:] == pytest.approx([0.01] * 26)


def test_exponential_without_a_floor_ends_at_a_thousandth() -> None:
    assert rates(10, schedule="exponential")[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize("schedule", KINDS)
def test_runs_of_one_step_and_warm_ups_longer_than_the_run_are_no_trouble(schedule: Schedule) -> None:
    assert rates(1, schedule=schedule) == [1.0]
    assert rates(2, warmup=5, schedule=schedule) == [0.2, 0.4]
    assert rates(3, warmup=2, schedule=schedule) == [0.5, 1.0, 1.0]
