"""What the children learn from: labels, soft targets, and the way from one to the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from supernet.losses import label_loss, mixed_loss, ramp, soft_loss, soft_targets


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


logits = st.integers(0, 2**32).map(lambda seed: 3 * random(5, 4, seed=seed))
LABELS = torch.tensor([0, 1, 2, 3, 1])


@settings(deadline=None, max_examples=30)
@given(logits, logits)
def test_the_soft_loss_is_divergence_plus_entropy(student: Tensor, teacher: Tensor) -> None:
    targets = soft_targets(teacher)
    divergence = F.kl_div(student.log_softmax(-1), targets, reduction="batchmean")
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(soft_loss(student, targets), divergence + entropy)


@settings(deadline=None, max_examples=30)
@given(logits)
def test_certain_soft_targets_are_labels(student: Tensor) -> None:
    torch.testing.assert_close(soft_loss(student, F.one_hot(LABELS, 4).float()), label_loss(student, LABELS))


@settings(deadline=None, max_examples=30)
@given(logits, logits)
def test_no_student_does_better_than_the_teacher_itself(student: Tensor, teacher: Tensor) -> None:
    targets = soft_targets(teacher)
    assert soft_loss(teacher, targets) <= soft_loss(student, targets) + 1e-6


def test_the_label_loss_by_hand() -> None:
    even, labels = torch.zeros(2, 4), torch.tensor([0, 3])
    assert float(label_loss(even, labels)) == pytest.approx(math.log(4))
    sure = torch.tensor([[math.log(9), 0.0]])  # probabilities 0.9 and 0.1
    assert float(label_loss(sure, torch.tensor([0]))) == pytest.approx(-math.log(0.9))
    smoothed = 0.9 * -math.log(0.9) + 0.1 * (-math.log(0.9) - math.log(0.1)) / 2
    assert float(label_loss(sure, torch.tensor([0]), 0.1)) == pytest.approx(smoothed)


@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(size: float, dtype: torch.dtype) -> None:
    student = torch.tensor([[size, -size, 0.0], [-size, -size, size], [0.0, 0.0, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-size, size, 0.0], [size, -size, -size], [size, size, size]], dtype=dtype)
    labels = torch.tensor([1, 0, 2])
    targets = soft_targets(teacher)
    assert targets.isfinite().all()
    for loss in (label_loss(student, labels, 0.1), soft_loss(student, targets), mixed_loss(student, labels, targets, 0.5)):
        student.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert loss.dtype == torch.float32
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_no_gradient_flows_into_the_soft_targets() -> None:
    teacher = random(3, 4).requires_grad_()
    assert not soft_targets(teacher).requires_grad
    torch.testing.assert_close(soft_targets(teacher).sum(-1), torch.ones(3))


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_the_mixed_loss_lies_between_labels_and_soft_targets_in_proportion(weight: float) -> None:
    student, targets = random(5, 4), soft_targets(random(5, 4, seed=1))
    expected = (1 - weight) * label_loss(student, LABELS) + weight * soft_loss(student, targets)
    torch.testing.assert_close(mixed_loss(student, LABELS, targets, weight), expected)


# --- the ramp ---


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_ramp_rises_from_nought_to_one(a: float, b: float, first: float, second: float) -> None:
    start, end = sorted((a, b))
    early, late = sorted((first, second))
    assert 0 <= ramp(early, start, end) <= ramp(late, start, end) <= 1
    assert ramp(end, start, end) == 1
    assert start == end or ramp(start, start, end) == 0


def test_the_ramp_by_hand() -> None:
    assert [ramp(x, 0.2, 0.6) for x in (0, 0.2, 0.3, 0.5, 0.6, 1)] == pytest.approx([0, 0, 0.25, 0.75, 1, 1])


def test_the_rule_of_the_paper_is_soft_targets_from_the_first_step() -> None:
    assert ramp(0.0, 0.0, 0.0) == 1.0


def test_a_start_at_the_end_of_the_run_is_labels_throughout() -> None:
    assert [ramp(x, 1.0, 1.0) for x in (0, 0.5, 0.999)] == [0, 0, 0]
