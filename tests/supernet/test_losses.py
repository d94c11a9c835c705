"""What the children learn from: labels, soft targets, and the way from one to the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from supernet.errors import InputError
from supernet.losses import Distillation, alpha_divergence, label_loss, log_probabilities, ramp, soft_loss, student_loss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS = st.integers(0, 2**32).map(lambda seed: 3 * random(5, 4, seed=seed))
LABELS = torch.tensor([0, 1, 2, 3, 1])


ALPHA = Distillation("alpha")


def gradient_of(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(leaf), leaf)
    return found


# --- labels ---


def test_the_label_loss_by_hand() -> None:
    even, labels = torch.zeros(2, 4), torch.tensor([0, 3])
    assert float(label_loss(even, labels)) == pytest.approx(math.log(4))
    sure = torch.tensor([[math.log(9), 0.0]])  # probabilities 0.9 and 0.1
    assert float(label_loss(sure, torch.tensor([0]))) == pytest.approx(-math.log(0.9))
    smoothed = 0.9 * -math.log(0.9) + 0.1 * (-math.log(0.9) - math.log(0.1)) / 2
    assert float(label_loss(sure, torch.tensor([0]), 0.1)) == pytest.approx(smoothed)


@settings(deadline=None, max_examples=30)
@given(LOGITS, st.sampled_from([0.0, 0.1, 0.9]), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_labels_may_be_probabilities(student: Tensor, smoothing: float, dtype: torch.dtype) -> None:
    certain = F.one_hot(LABELS, 4).to(dtype)
    torch.testing.assert_close(label_loss(student, certain, smoothing), label_loss(student, LABELS, smoothing))
    other = LABELS.roll(1)
    mixed = 0.75 * certain + 0.25 * F.one_hot(other, 4).to(dtype)
    expected = 0.75 * label_loss(student, LABELS, smoothing) + 0.25 * label_loss(student, other, smoothing)
    torch.testing.assert_close(label_loss(student, mixed, smoothing), expected)
    assert label_loss(student.to(dtype), mixed).dtype == torch.float32


# --- soft targets ---


@settings(deadline=None, max_examples=30)
@given(LOGITS, LOGITS)
def test_the_soft_loss_is_divergence_plus_entropy(student: Tensor, teacher: Tensor) -> None:
    targets = log_probabilities(teacher)
    divergence = F.kl_div(student.log_softmax(-1), targets, reduction="batchmean", log_target=True)
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    torch.testing.assert_close(soft_loss(student, targets), divergence + entropy)


@settings(deadline=None, max_examples=30)
@given(LOGITS)
def test_certain_soft_targets_are_labels(student: Tensor) -> None:
    certain = log_probabilities(1e4 * F.one_hot(LABELS, 4).float())
    torch.testing.assert_close(soft_loss(student, certain), label_loss(student, LABELS))


@settings(deadline=None, max_examples=30)
@given(LOGITS, LOGITS)
def test_no_student_does_better_than_the_teacher_itself(student: Tensor, teacher: Tensor) -> None:
    targets = log_probabilities(teacher)
    assert soft_loss(teacher, targets) <= soft_loss(student, targets) + 1e-6


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_a_temperature_softens_both_and_keeps_the_gradients_size(temperature: float) -> None:
    student, teacher = 3 * random(5, 4), 3 * random(5, 4, seed=1)
    softer = log_probabilities(teacher, temperature)
    torch.testing.assert_close(softer, (teacher / temperature).log_softmax(-1))
    expected = soft_loss(student / temperature, log_probabilities(teacher / temperature)) * temperature**2
    torch.testing.assert_close(soft_loss(student, softer, temperature), expected)
    hot = Distillation("alpha", temperature=temperature)
    expected = alpha_divergence(student / temperature, softer, ALPHA) * temperature**2
    torch.testing.assert_close(alpha_divergence(student, softer, hot), expected)


def test_no_gradient_flows_into_the_soft_targets() -> None:
    teacher = random(3, 4).requires_grad_()
    assert not log_probabilities(teacher).requires_grad
    assert log_probabilities(teacher.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(log_probabilities(teacher).exp().sum(-1), torch.ones(3))


# --- alpha-divergence ---


def exact(student: Tensor, teacher: Tensor, alpha: float, clip: float = math.inf) -> Tensor:
    """D_alpha(p || q) of each image by its definition, in float64; its limits at 0 and 1."""
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    if alpha == 1:
        return (p * (p / q).log()).sum(-1)
    if alpha == 0:
        return (q * (q / p).log()).sum(-1)
    weights = (p / q) ** alpha
    return (q * ((weights.clamp_max(clip) if alpha < 0 else weights) - 1)).sum(-1) / (alpha * (alpha - 1))


@settings(deadline=None, max_examples=50)
@given(
    LOGITS, LOGITS, st.sampled_from([(-1.0, 1.0), (-2.0, 0.5), (-0.5, 0.0), (0.0, 1.0), (-1.0, -1.0), (1.0, 1.0), (0.5, 1.0)])
)
def test_the_value_is_the_larger_divergence_of_each_image(
    student: Tensor, teacher: Tensor, orders: tuple[float, float]
) -> None:
    for clip in (5.0, 1e6):
        found = alpha_divergence(student, log_probabilities(teacher), Distillation("alpha", 1.0, *orders, clip))
        expected = torch.maximum(*(exact(student, teacher, alpha, clip) for alpha in orders)).mean().float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-6)


@settings(deadline=None, max_examples=50)
@given(LOGITS, LOGITS, st.sampled_from([-2.0, -1.0, -0.3, 0.0, 0.4, 1.0]))
def test_where_nothing_is_clipped_the_gradient_is_that_of_the_divergence(
    student: Tensor, teacher: Tensor, alpha: float
) -> None:
    """Weights of logits within 3 x 5 reach e^60: differences to float64 stay small against the largest number of the gradient."""
    distillation = Distillation("alpha", alpha_low=alpha, alpha_high=alpha, clip=1e30)
    found = gradient_of(lambda logits: alpha_divergence(logits, log_probabilities(teacher), distillation), student)
    expected = gradient_of(lambda logits: exact(logits, teacher, alpha).mean(), student.double()).float()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max())))


def test_each_image_follows_its_own_larger_divergence() -> None:
    student, teacher = 3 * random(20, 4), 3 * random(20, 4, seed=1)
    loose = Distillation("alpha", clip=1e30)
    found = gradient_of(lambda logits: alpha_divergence(logits, log_probabilities(teacher), loose), student)
    low, high = (exact(student, teacher, alpha) for alpha in (-1.0, 1.0))
    assert (low > 1.01 * high).any() and (1.01 * low < high).any()
    for row in range(len(student)):
        order = -1.0 if low[row] > high[row] else 1.0
        expected = gradient_of(lambda logits, order=order: exact(logits, teacher, order).mean(), student.double())[row].float()
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-5 * max(1.0, float(expected.abs().max())))


@settings(deadline=None, max_examples=30)
@given(LOGITS, LOGITS)
def test_the_estimator_uses_clipped_weights_as_constants(student: Tensor, teacher: Tensor) -> None:
    distillation = Distillation("alpha", alpha_low=-1.0, alpha_high=-1.0, clip=5.0)
    found = gradient_of(lambda logits: alpha_divergence(logits, log_probabilities(teacher), distillation), student)
    weights = (student.double().softmax(-1) / teacher.double().softmax(-1)).clamp_max(5.0)

    def surrogate(logits: Tensor) -> Tensor:
        q = logits.softmax(-1)
        return (weights * q.detach() * q.log()).sum(-1).mean()

    torch.testing.assert_close(found, gradient_of(surrogate, student.double()).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("order", "limit"), [(1.0, 1.0), (0.9995, 1.0), (0.99, 1.0), (0.0, 0.0), (-0.0005, 0.0), (0.01, 0.0), (-0.01, 0.0)]
)
def test_the_limits_are_the_two_kullback_leibler_divergences(order: float, limit: float) -> None:
    student, teacher = random(8, 10), random(8, 10, seed=1)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    expected = (
        F.kl_div(q, p, reduction="batchmean", log_target=True)
        if limit
        else F.kl_div(p, q, reduction="batchmean", log_target=True)
    )
    near = Distillation("alpha", alpha_low=order, alpha_high=order)
    torch.testing.assert_close(alpha_divergence(student, p, near), expected, rtol=0.03, atol=0)


def test_the_order_of_one_is_the_soft_loss_without_the_teachers_entropy() -> None:
    student, targets = 3 * random(6, 5), log_probabilities(3 * random(6, 5, seed=1))
    one = Distillation("alpha", alpha_low=1.0, alpha_high=1.0)
    divergence = soft_loss(student, targets) - soft_loss(targets, targets)
    torch.testing.assert_close(alpha_divergence(student, targets, one), divergence)
    ours = gradient_of(lambda logits: alpha_divergence(logits, targets, one), student)
    torch.testing.assert_close(ours, gradient_of(lambda logits: soft_loss(logits, targets), student))


@settings(deadline=None, max_examples=100)
@given(LOGITS, LOGITS, st.floats(-4, 1), st.floats(0, 3), st.sampled_from([1.0, 30.0, 1e4]))
def test_the_divergence_is_never_negative_however_it_is_clipped(
    student: Tensor, teacher: Tensor, alpha: float, more: float, scale: float
) -> None:
    """As long as the clip is at least 1 - alpha; below it, it could be: see the test of what is refused."""
    clip = 1 - alpha + more
    weighted = (
        exact(scale * student, scale * teacher, alpha, clip) if abs(alpha) > 1e-3 and abs(alpha - 1) > 1e-3 else torch.zeros(1)
    )
    assert weighted.nan_to_num(nan=0.0).min() >= -1e-6 / max(
        1e-3, abs(alpha * (alpha - 1))
    )  # by the definition, without our clamp
    distillation = Distillation("alpha", alpha_low=alpha, alpha_high=alpha, clip=clip)
    assert alpha_divergence(scale * student, log_probabilities(scale * teacher), distillation) >= 0


@pytest.mark.parametrize("distillation", [ALPHA, Distillation("alpha", clip=2.0), Distillation("alpha", alpha_low=0.0)])
def test_a_student_that_equals_its_teacher_is_at_rest(distillation: Distillation) -> None:
    logits = 3 * random(5, 7)
    torch.testing.assert_close(
        alpha_divergence(logits, log_probabilities(logits), distillation), torch.tensor(0.0), rtol=0, atol=1e-6
    )
    found = gradient_of(lambda own: alpha_divergence(own, log_probabilities(logits), distillation), logits)
    torch.testing.assert_close(found, torch.zeros_like(logits), rtol=0, atol=1e-7)


def test_both_faults_of_a_student_are_punished() -> None:
    """One class too many weighs more at -1, one too few at +1."""
    teacher = torch.tensor([[0.9, 0.099, 0.001]]).log()
    spreads = torch.tensor([[0.4, 0.3, 0.3]]).log()  # gives the third class what the teacher does not
    misses = torch.tensor([[0.999, 0.0005, 0.0005]]).log()  # leaves out the second
    low, high = (Distillation("alpha", alpha_low=order, alpha_high=order, clip=1e6) for order in (-1.0, 1.0))
    assert alpha_divergence(spreads, teacher, low) > alpha_divergence(spreads, teacher, high)
    assert alpha_divergence(misses, teacher, high) > alpha_divergence(misses, teacher, low)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hard"}, "distillation.kind is one of"),
        ({"temperature": 0.0}, "distillation.temperature is a number above 0, not 0.0"),
        ({"temperature": math.inf}, "distillation.temperature"),
        ({"alpha_low": 1.0, "alpha_high": -1.0}, "distillation.alpha_low is at most alpha_high"),
        ({"alpha_high": 1.5}, "this at most 1, not -1.0 and 1.5"),
        ({"alpha_low": -math.inf}, "distillation.alpha_low"),
        ({"alpha_low": math.nan}, "distillation.alpha_low"),
        ({"clip": 1.9}, r"distillation.clip is at least 1 - alpha_low = 2, not 1.9"),
        ({"clip": math.nan}, r"distillation.clip is at least"),
    ],
)
def test_numbers_that_make_no_divergence_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Distillation(**change)


# --- all of them ---


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "label": lambda student, labels, targets: label_loss(student, labels, 0.1),
    "probabilities": lambda student, labels, targets: label_loss(student, F.one_hot(labels, 3).float(), 0.1),
    "soft": lambda student, labels, targets: soft_loss(student, targets),
    "hot": lambda student, labels, targets: soft_loss(student, targets, 4.0),
    "alpha": lambda student, labels, targets: alpha_divergence(student, targets, ALPHA),
    "low": lambda student, labels, targets: alpha_divergence(student, targets, Distillation("alpha", 1.0, -3.0, -3.0)),
    "half": lambda student, labels, targets: alpha_divergence(student, targets, Distillation("alpha", 1.0, 0.0, 0.5)),
    "mixed": lambda student, labels, targets: student_loss(student, labels, targets, 0.5),
    "mixed alpha": lambda student, labels, targets: student_loss(student, labels, targets, 0.5, ALPHA),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [30.0, 110.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_losses_and_gradients(name: str, size: float, dtype: torch.dtype) -> None:
    """Rows where the student, the teacher, both or neither underflow, on the same and on other classes; 110 underflows in exp alone."""
    values = [[size, -size, 0.0], [-size, -size, size], [0.0, 0.0, 0.0], [size, size, -size], [1.0, -size, 2.0]]
    rows = torch.tensor(values, dtype=dtype)
    student = rows.repeat_interleave(5, 0).requires_grad_()
    targets = log_probabilities(rows.repeat(5, 1))
    assert targets.isfinite().all()
    loss = LOSSES[name](student, torch.arange(25) % 3, targets)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and loss >= 0
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("teacher", [[0.0, -1e4, 0.0], [0.0, -90.0, 0.0], [0.0, 1e4, 0.0]])
def test_a_student_that_contradicts_a_certain_teacher_learns_from_it(teacher: list[float]) -> None:
    student, targets = torch.tensor([[0.0, 50.0, 0.0]]), log_probabilities(torch.tensor([teacher]))
    found = gradient_of(lambda logits: alpha_divergence(logits, targets, ALPHA), student)
    before = alpha_divergence(student, targets, Distillation("alpha", alpha_low=1.0))
    if teacher[1] < 0:
        assert found[0, 0] < 0, "classes of the teacher rise"
        assert alpha_divergence(student - 10 * found, targets, Distillation("alpha", alpha_low=1.0)) < before
    else:
        assert before == 0
        torch.testing.assert_close(found, torch.zeros(1, 3))


@pytest.mark.parametrize("distillation", [Distillation(), Distillation(temperature=2.0), ALPHA])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_the_students_loss_lies_between_labels_and_teacher_in_proportion(weight: float, distillation: Distillation) -> None:
    student, targets = random(5, 4), log_probabilities(random(5, 4, seed=1), distillation.temperature)
    taught = (
        alpha_divergence(student, targets, ALPHA)
        if distillation.kind == "alpha"
        else soft_loss(student, targets, distillation.temperature)
    )
    expected = (1 - weight) * label_loss(student, LABELS) + weight * taught
    torch.testing.assert_close(student_loss(student, LABELS, targets, weight, distillation), expected)
    probabilities = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(student_loss(student, probabilities, targets, weight, distillation), expected)


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
