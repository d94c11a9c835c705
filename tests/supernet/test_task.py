"""Scores, their intervals and their paired test, against values worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from supernet.errors import InputError
from supernet.losses import label_loss, mixed_loss, soft_targets
from supernet.task import TASKS, Classification

task = Classification()


def of(right: int, images: int) -> np.ndarray:
    return np.arange(images) < right


# --- scores ---


def test_an_image_scores_where_its_largest_logit_is_the_labels() -> None:
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [5.0, -5.0]])
    assert task.scores(logits, torch.tensor([1, 1, 0])).tolist() == [True, False, True]


@given(st.lists(st.booleans(), max_size=70))
def test_scores_survive_packing_a_bit_each(scores: list[bool]) -> None:
    packed = task.pack(np.array(scores, bool))
    assert len(packed) == math.ceil(len(scores) / 8)
    back = task.unpack(packed, len(scores))
    assert back.tolist() == scores
    assert back.dtype == bool


@pytest.mark.parametrize(("size", "images"), [(1, 9), (2, 8), (0, 1), (1, 0)])
def test_bytes_of_another_number_of_images_are_refused(size: int, images: int) -> None:
    with pytest.raises(ValueError, match=f"scores of {images} images take"):
        task.unpack(b"\xff" * size, images)


# --- intervals ---


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    [  # (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n), z = 1.959964
        (5, 10, 0.2366, 0.7634),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_wilsons(right: int, images: int, low: float, high: float) -> None:
    estimate = task.estimate(of(right, images))
    assert estimate.value == right / images
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)
    assert estimate.images == images


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_the_interval_holds_the_score_and_stays_a_fraction(scores: list[bool]) -> None:
    estimate = task.estimate(np.array(scores))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.low < estimate.high


def test_no_images_are_no_estimate() -> None:
    with pytest.raises(InputError, match="top1 needs at least one image, but the split is empty: give more images"):
        task.estimate(np.array([], bool))


# --- comparisons ---


def pair(both: int, wins: int, losses: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    one = np.array([True] * both + [True] * wins + [False] * losses + [False] * neither)
    other = np.array([True] * both + [False] * wins + [True] * losses + [False] * neither)
    return one, other


def exact(wins: int, losses: int) -> float:
    """Two-sided exact McNemar test: twice the tail of a fair coin (the distribution is symmetric)."""
    n, most = wins + losses, max(wins, losses)
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(most, n + 1))
    return float(min(Fraction(1), 2 * tail))


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 2, 0.109375), (3, 3, 1.0), (10, 1, 0.01171875)],
)
def test_the_p_value_is_the_exact_mcnemar_test(wins: int, losses: int, p: float) -> None:
    comparison = task.compare(*pair(20, wins, losses, 7))
    assert comparison.p_value == pytest.approx(p, abs=1e-12)
    assert comparison.p_value == pytest.approx(exact(wins, losses), abs=1e-12)
    assert comparison.difference == pytest.approx((wins - losses) / (27 + wins + losses))


def test_the_interval_of_a_difference_by_hand() -> None:
    """Wald: 20 and 10 of 100 differ, so the variance of the sum is 30 - 10**2 / 100 = 29."""
    comparison = task.compare(*pair(40, 20, 10, 30))
    assert comparison.difference == pytest.approx(0.1)
    assert (comparison.low, comparison.high) == pytest.approx(
        (0.1 - 1.96 * math.sqrt(29) / 100, 0.1 + 1.96 * math.sqrt(29) / 100)
    )


@settings(deadline=None)
@given(*(st.integers(0, 40) for _ in range(4)))
def test_comparing_the_other_way_round_is_the_mirror_image(both: int, wins: int, losses: int, neither: int) -> None:
    one, other = pair(both, wins, losses, neither + 1)
    there, back = task.compare(one, other), task.compare(other, one)
    assert there.difference == -back.difference
    assert (there.low, there.high) == (-back.high, -back.low)
    assert there.p_value == pytest.approx(back.p_value)
    assert there.low <= there.difference <= there.high
    assert 0 < there.p_value <= 1
    assert there.difference == pytest.approx(one.mean() - other.mean())


def test_a_child_does_not_differ_from_itself() -> None:
    comparison = task.compare(of(3, 9), of(3, 9))
    assert (comparison.difference, comparison.low, comparison.high, comparison.p_value) == (0, 0, 0, 1)


def test_scores_of_different_images_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"children are compared on the same images, but got \(3,\) and \(4,\)"):
        task.compare(of(1, 3), of(1, 4))


def test_comparing_does_not_change_the_scores() -> None:
    one, other = pair(3, 2, 1, 4)
    before = one.copy(), other.copy()
    task.compare(one, other)
    assert np.array_equal(one, before[0])
    assert np.array_equal(other, before[1])


# --- losses ---


def test_the_losses_are_those_of_the_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = torch.randn(2, 6, 4, generator=generator)
    targets = torch.randint(4, (6,), generator=generator)
    assert torch.equal(task.label_loss(outputs, targets, 0.1), label_loss(outputs, targets, 0.1))
    soft = task.soft_targets(teacher)
    assert torch.equal(soft, soft_targets(teacher))
    assert torch.equal(task.student_loss(outputs, targets, soft, 0.3), mixed_loss(outputs, targets, soft, 0.3))


def test_a_run_names_its_task() -> None:
    assert {name: kind().name for name, kind in TASKS.items()} == {"classification": "classification"}
