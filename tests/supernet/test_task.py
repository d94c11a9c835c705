"""Scores, their intervals and their paired test, against values worked out by hand and by SciPy; and what every task must hold."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from deploy.predict import MOST_PSNR_DB as SHIPPED_MOST
from deploy.predict import psnr_db
from supernet.errors import InputError
from supernet.losses import Distillation, label_loss, log_probabilities, student_loss
from supernet.task import MOST_PSNR_DB, TASKS, Classification, Regression, Task, task_named

task = Classification()


def of(right: int, images: int) -> np.ndarray:
    return np.arange(images) < right


# --- scores ---


def test_an_image_scores_where_its_largest_logit_is_the_labels() -> None:
    logits = torch.tensor([[1.0, 2.0], [2.0, 1.0], [5.0, -5.0]])
    assert task.scores(logits, torch.tensor([1, 1, 0])).tolist() == [True, False, True]


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


@pytest.mark.parametrize("distillation", [Distillation(), Distillation(temperature=3.0), Distillation("alpha")])
def test_the_losses_are_those_of_the_rule(distillation: Distillation) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, teacher = torch.randn(2, 6, 4, generator=generator)
    targets = torch.randint(4, (6,), generator=generator)
    assert torch.equal(task.label_loss(outputs, targets, 0.1), label_loss(outputs, targets, 0.1))
    soft = task.soft_targets(teacher, distillation)
    assert torch.equal(soft, log_probabilities(teacher, distillation.temperature))
    found = task.student_loss(outputs, targets, soft, 0.3, distillation)
    assert torch.equal(found, student_loss(outputs, targets, soft, 0.3, distillation))


def test_what_is_not_said_is_the_plain_rule() -> None:
    outputs, targets, plain = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 4, Distillation()
    soft = task.soft_targets(outputs.roll(1, 0))
    assert torch.equal(soft, task.soft_targets(outputs.roll(1, 0), plain))
    assert torch.equal(task.student_loss(outputs, targets, soft, 0.3), task.student_loss(outputs, targets, soft, 0.3, plain))


def test_probabilities_are_targets_too() -> None:
    """Mixed images: learnt from in proportion, scored by the likelier class."""
    outputs = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    targets = torch.tensor([[0.6, 0.4, 0.0], [0.4, 0.6, 0.0], [0.0, 0.0, 1.0]])
    assert task.scores(outputs, targets).tolist() == [True, False, True]
    assert task.targets(torch.zeros(3, 1, 2, 2), targets) is targets
    expected = -(targets * outputs.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(task.label_loss(outputs, targets), expected)
    torch.testing.assert_close(task.student_loss(outputs, targets, task.soft_targets(outputs), 0.0), expected)


@pytest.mark.parametrize("distillation", [Distillation("alpha"), Distillation(temperature=2.0)])
def test_regression_refuses_what_is_of_classes(distillation: Distillation) -> None:
    with pytest.raises(InputError, match="kind and temperature are of class probabilities, but this task is regression"):
        Regression().soft_targets(torch.zeros(2, 3, 4, 4), distillation)


@pytest.mark.parametrize("counts", [[1, 1], [1] * 1000, [9, 1], [5, 0, 3]])
def test_chance_is_the_loss_of_one_who_knows_the_frequencies_alone(counts: list[int]) -> None:
    frequencies = np.array(counts) / sum(counts)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ignorant = torch.tensor(frequencies).clamp_min(1e-30).log().expand(len(labels), -1)
    chance = task.chance_loss(frequencies)
    assert float(task.label_loss(ignorant, labels)) == pytest.approx(chance, rel=1e-6)
    assert chance <= math.log(len(counts)) + 1e-12


def test_chance_of_regression_is_the_mean_pixel() -> None:
    spread = torch.tensor([0.1, 0.5, 1.0]).view(1, 3, 1, 1)
    images = torch.rand(64, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * spread
    std, mean = torch.std_mean(images, (0, 2, 3), correction=0, keepdim=True)
    normalised = (images - mean) / std
    found = Regression().label_loss(torch.zeros_like(normalised), normalised)
    assert float(found) == pytest.approx(Regression().chance_loss(np.array([0.5, 0.5])), rel=1e-5)


def test_a_run_names_its_task() -> None:
    assert {name: kind.name for name, kind in TASKS.items()} == {"classification": "classification", "regression": "regression"}
    assert task_named("regression") is Regression
    with pytest.raises(InputError, match=r"task must be one of \['classification', 'regression'\], but got 'x'"):
        task_named("x")


# --- what every task holds ---


class TaskSuite:
    """Properties of a task, over outputs of a network for images of 6 pixels a side."""

    task: Task
    images = torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12) % 4

    def outputs(self, seed: int, size: int = 6) -> Tensor:
        """What some network gives for the images at `size` pixels."""
        raise NotImplementedError

    def exact(self) -> Tensor:
        """Outputs that are right on every image."""
        raise NotImplementedError

    @property
    def targets(self) -> Tensor:
        return self.task.targets(self.images, self.labels)

    def scores(self, seed: int) -> Any:
        return self.task.scores(self.outputs(seed), self.targets).numpy()

    def test_there_is_a_target_and_a_score_for_each_image(self) -> None:
        scores = self.task.scores(self.outputs(0), self.targets)
        assert len(self.targets) == len(self.images)
        assert scores.shape == (len(self.images),)
        assert torch.isfinite(scores.double()).all()

    def test_the_estimate_is_the_mean_of_the_scores_within_its_interval_and_their_range(self) -> None:
        scores = self.scores(0)
        estimate = self.task.estimate(scores)
        assert estimate.value == pytest.approx(float(scores.astype(np.float64).mean()), rel=1e-12)
        assert estimate.low < estimate.value < estimate.high
        assert scores.min() <= estimate.value <= scores.max()
        assert estimate.images == len(scores)
        with pytest.raises(InputError, match="needs at least"):
            self.task.estimate(scores[:0])

    def test_a_comparison_the_other_way_round_is_its_mirror_image(self) -> None:
        one, other = self.scores(0), self.scores(1)
        there, back = self.task.compare(one, other), self.task.compare(other, one)
        assert (there.difference, there.low, there.high) == (-back.difference, -back.high, -back.low)
        assert there.p_value == pytest.approx(back.p_value)
        assert there.low < there.difference < there.high
        same = self.task.compare(one, one)
        assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
        with pytest.raises(ValueError, match="on the same images"):
            self.task.compare(one, other[:-1])

    def test_losses_are_finite_and_can_be_learnt_from(self) -> None:
        soft = self.task.soft_targets(self.outputs(1))
        assert not soft.requires_grad
        outputs = self.outputs(0).requires_grad_()
        for loss in (
            self.task.label_loss(outputs, self.targets, 0.1),
            *(self.task.student_loss(outputs, self.targets, soft, weight) for weight in (0.0, 0.4, 1.0)),
        ):
            assert loss.shape == () and torch.isfinite(loss)
            (gradient,) = torch.autograd.grad(loss, outputs)
            assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0

    def test_a_step_down_the_gradient_lowers_each_loss(self) -> None:
        soft, before = self.task.soft_targets(self.outputs(1)), self.outputs(0).requires_grad_()
        for weight in (0.0, 0.5, 1.0):
            loss = self.task.student_loss(before, self.targets, soft, weight)
            (gradient,) = torch.autograd.grad(loss, before)
            assert self.task.student_loss(before - 0.1 * gradient, self.targets, soft, weight) < loss

    def test_exact_outputs_have_the_best_score_and_nearly_the_least_loss(self) -> None:
        best, other = self.task.scores(self.exact(), self.targets), self.task.scores(self.outputs(0), self.targets)
        assert (best >= other).all() and (best > other).any()
        assert self.task.label_loss(self.exact(), self.targets) < self.task.label_loss(self.outputs(0), self.targets)

    def test_half_precision_outputs_are_scored_and_learnt_from_in_fp32(self) -> None:
        outputs = self.outputs(0).bfloat16()
        assert self.task.label_loss(outputs, self.targets).dtype == torch.float32
        assert torch.isfinite(self.task.scores(outputs, self.targets).double()).all()

    def test_a_score_is_shown_with_its_unit(self) -> None:
        assert self.task.show(0.5).endswith(self.task.unit)


class TestClassification(TaskSuite):
    task = Classification.of((0.5, 0.2, 0.3))

    def outputs(self, seed: int, size: int = 6) -> Tensor:
        return torch.randn(12, 4, generator=torch.Generator().manual_seed(seed))

    def exact(self) -> Tensor:
        return 20 * torch.nn.functional.one_hot(self.labels, 4).float()


class TestRegression(TaskSuite):
    std = (0.5, 0.2, 0.3)
    task = Regression.of(std)

    def outputs(self, seed: int, size: int = 6) -> Tensor:
        images = torch.nn.functional.interpolate(self.images, size=size, mode="nearest")
        noise = torch.rand(12, 1, 1, 1, generator=torch.Generator().manual_seed(seed + 100))
        return images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))

    def exact(self) -> Tensor:
        return self.images.clone()

    def test_the_target_is_the_image_itself_so_its_shape_is_the_outputs(self) -> None:
        assert torch.equal(self.targets, self.images)
        small = torch.zeros(12, 3, 4, 4)
        assert self.task.targets(small, self.labels).shape == small.shape

    def test_psnr_by_hand(self) -> None:
        """An error of 0.1 in every pixel (0..1) is 20 dB, of 0.01 40 dB; normalised, it is 0.1 / std."""
        scale = torch.tensor(self.std).view(1, 3, 1, 1)
        for error, decibel in ((1.0, 0.0), (0.1, 20.0), (0.01, 40.0)):
            found = self.task.scores(self.images + error / scale, self.images)
            torch.testing.assert_close(found, torch.full((12,), decibel), rtol=0, atol=1e-3)
        one_channel = self.images.clone()
        one_channel[:, 0] += 0.1 / self.std[0]
        expected = 20 + 10 * math.log10(3)  # a third of the pixels
        torch.testing.assert_close(self.task.scores(one_channel, self.images), torch.full((12,), expected), rtol=0, atol=1e-3)

    def test_an_exact_image_has_a_finite_score(self) -> None:
        assert self.task.scores(self.exact(), self.images).tolist() == [MOST_PSNR_DB] * 12

    def test_bundles_score_as_we_do(self) -> None:
        outputs = self.outputs(0)
        expected = self.task.scores(outputs, self.images).numpy()
        np.testing.assert_allclose(psnr_db(outputs.numpy(), self.images.numpy(), self.std), expected, rtol=1e-6)
        assert SHIPPED_MOST == MOST_PSNR_DB

    def test_the_interval_is_students_and_the_test_the_paired_t_test(self) -> None:
        rng = np.random.default_rng(0)
        one = rng.normal(25, 3, 40).astype(np.float32)
        other = (one + rng.normal(0.4, 1, 40)).astype(np.float32)
        estimate = self.task.estimate(one)
        wide = one.astype(np.float64)
        low, high = stats.t.interval(0.95, 39, loc=wide.mean(), scale=stats.sem(wide))
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((wide.mean(), low, high), rel=1e-12)
        found, expected = self.task.compare(one, other), stats.ttest_rel(wide, other.astype(np.float64))
        interval = expected.confidence_interval()
        assert (found.low, found.high, found.p_value) == pytest.approx((interval.low, interval.high, expected.pvalue), rel=1e-9)
        assert found.p_value < 0.05

    def test_the_same_difference_on_every_image_is_certain(self) -> None:
        one = np.array([20.0, 25.0, 31.0], np.float32)
        found = self.task.compare(one + 1, one)
        assert (found.difference, found.low, found.high, found.p_value) == (1, 1, 1, 0)
        alike = self.task.estimate(np.array([21.5, 21.5], np.float32))
        assert (alike.value, alike.low, alike.high) == (21.5, 21.5, 21.5)

    def test_one_image_has_no_interval(self) -> None:
        with pytest.raises(InputError, match="at least two images, but there are 1"):
            self.task.estimate(np.array([20.0], np.float32))

    @pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
    def test_a_student_of_the_teachers_resolution_learns_from_a_blend(self, weight: float) -> None:
        """The gradient is that of the blend of both squared errors."""
        soft, outputs = self.task.soft_targets(self.outputs(1)), self.outputs(0).requires_grad_()
        (found,) = torch.autograd.grad(self.task.student_loss(outputs, self.targets, soft, weight), outputs)
        both = (1 - weight) * (outputs - self.targets).square().mean() + weight * (outputs - soft).square().mean()
        (expected,) = torch.autograd.grad(both, outputs)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)

    def test_soft_targets_are_resized_to_the_students_resolution(self) -> None:
        """Antialiased: a chessboard becomes grey where it is halved, and a plain image stays as it is."""
        board = (torch.arange(12)[:, None] + torch.arange(12)[None]).remainder(2).float().expand(2, 3, 12, 12)
        grey, small = torch.full((2, 3, 6, 6), 0.5), torch.zeros(2, 3, 6, 6)
        assert self.task.student_loss(grey, small, self.task.soft_targets(board), 1.0) < 0.01
        plain = torch.full((2, 3, 12, 12), 0.7)
        assert self.task.student_loss(torch.full((2, 3, 6, 6), 0.7), small, self.task.soft_targets(plain), 1.0) < 1e-10
