"""What the children of a step learn from: labels for the largest, its soft targets for the others. All in fp32, classes in log space.

Axes: N batch, K classes, C channels, H W space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from supernet.errors import InputError

Kind = Literal["soft", "alpha"]
NEAR = 1e-3
"""Orders so near to 0 or 1 are taken for these: the general formula divides by alpha (alpha - 1)."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """How the largest child teaches.

    `kind` "soft": cross entropy to its probabilities (BigNAS); "alpha": adaptive alpha-divergence to them (AlphaNet), the larger of
    those of orders `alpha_low` and `alpha_high` for each image, with importance weights of at most `clip`. Both compare
    probabilities at `temperature`. Raises `InputError` for numbers that make no divergence.
    """

    kind: Kind = "soft"
    temperature: float = 1.0
    alpha_low: float = -1.0
    alpha_high: float = 1.0
    clip: float = 5.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"distillation.kind is one of {list(get_args(Kind))}, not {self.kind!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(f"distillation.temperature is a number above 0, not {self.temperature}")
        if not (math.isfinite(self.alpha_low) and self.alpha_low <= self.alpha_high <= 1):
            given = f"{self.alpha_low} and {self.alpha_high}"
            raise InputError(f"distillation.alpha_low is at most alpha_high, and this at most 1, not {given}")
        if not (1 - self.alpha_low <= self.clip < math.inf):  # below it a clipped divergence could be negative
            raise InputError(f"distillation.clip is at least 1 - alpha_low = {1 - self.alpha_low:g}, not {self.clip}")


SOFT = Distillation()
"""The rule of BigNAS."""


def label_loss(logits_nk: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in nats to labels, int64 (N,), or probabilities, (N, K); a scalar.

    `smoothing` (0..1) mixes the targets with the uniform distribution (Szegedy et al. 2016).
    """
    return F.cross_entropy(logits_nk.float(), _as_float(targets), label_smoothing=smoothing)


def _as_float(targets: Tensor) -> Tensor:
    """Probabilities in fp32; labels as they are."""
    return targets.float() if targets.is_floating_point() else targets


def log_probabilities(teacher_nk: Tensor, temperature: float = 1.0) -> Tensor:
    """The teacher's log probabilities, (N, K), detached and in fp32: computed once a step, used by every student."""
    return (teacher_nk.detach().float() / temperature).log_softmax(-1)


def soft_loss(logits_nk: Tensor, teacher_log_nk: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean cross entropy in nats to the teacher's probabilities, times temperature squared; a scalar.

    In-place distillation at temperature 1 (Yu & Huang 2019, "Universally slimmable networks", used unchanged by BigNAS). The factor
    keeps the gradient's size where the temperature changes (Hinton et al. 2015, section 2).
    """
    student_log_nk = (logits_nk.float() / temperature).log_softmax(-1)
    return -(teacher_log_nk.exp() * student_log_nk).sum(-1).mean() * temperature**2


def alpha_divergence(logits_nk: Tensor, teacher_log_nk: Tensor, distillation: Distillation) -> Tensor:
    """Mean over images of the larger of two alpha-divergences of the student q from the teacher p, times temperature squared.

    AlphaNet's adaptive rule (Wang et al. 2021, arXiv 2102.07954, section 3): a negative order punishes a student that gives classes
    more than the teacher does, a positive one less. The value is the divergence itself, in nats, never negative; its gradient is
    the paper's estimator, in which the importance weights are constants. A scalar.
    """
    student_log_nk = (logits_nk.float() / distillation.temperature).log_softmax(-1)
    low, high = (
        _divergence(student_log_nk, teacher_log_nk, alpha, distillation.clip)
        for alpha in (distillation.alpha_low, distillation.alpha_high)
    )
    return torch.where(low > high, low, high).mean() * distillation.temperature**2


def _divergence(student_log_nk: Tensor, teacher_log_nk: Tensor, alpha: float, clip: float) -> Tensor:
    """D(p || q) = (E_q[(p / q)^alpha] - 1) / (alpha (alpha - 1)) of each image, (N,); KL(p || q) at 1 and KL(q || p) at 0.

    Its gradient is -E_q[(p / q)^alpha grad log q] / alpha. Weights (p / q)^alpha are clipped at `clip` where alpha is negative;
    elsewhere q (p / q)^alpha = p^alpha q^(1 - alpha) is at most 1 and needs none.
    """
    p_log, q_log = teacher_log_nk, student_log_nk.detach()
    log_weighted = alpha * p_log + (1 - alpha) * q_log  # log q (p / q)^alpha
    weighted = (torch.minimum(log_weighted, q_log + math.log(clip)) if alpha < 0 else log_weighted).exp()
    if abs(alpha - 1) < NEAR:
        value, coefficients = (weighted * (p_log - q_log)).sum(-1), weighted
    elif abs(alpha) < NEAR:
        value, coefficients = (weighted * (q_log - p_log)).sum(-1), weighted * (p_log - q_log)
    else:
        value, coefficients = (weighted.sum(-1) - 1) / (alpha * (alpha - 1)), weighted / alpha
    surrogate = -(coefficients * student_log_nk).sum(-1)
    return value.clamp_min(0) + (surrogate - surrogate.detach())


def student_loss(
    logits_nk: Tensor, targets: Tensor, teacher_log_nk: Tensor, weight: float, distillation: Distillation = SOFT
) -> Tensor:
    """(1 - weight) x loss to labels or probabilities + weight x loss to the teacher; a scalar, in nats."""
    if weight <= 0:
        return label_loss(logits_nk, targets)
    if distillation.kind == "alpha":
        taught = alpha_divergence(logits_nk, teacher_log_nk, distillation)
    else:
        taught = soft_loss(logits_nk, teacher_log_nk, distillation.temperature)
    return taught if weight >= 1 else torch.lerp(label_loss(logits_nk, targets), taught, weight)


def ramp(progress: float, start: float, end: float) -> float:
    """Weight of the soft targets, 0..1, at `progress` (0..1) of the run: 0 until `start`, 1 from `end`, linear between.

    A teacher that knows nothing yet has nearly uniform soft targets, which hold every student back: on short runs students
    begin with labels. `start = end = 0` is the rule of the paper (soft targets from the first step).
    """
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return (progress - start) / (end - start)


def resized(images_nchw: Tensor, size: int) -> Tensor:
    """Images at `size` pixels a side: bicubic with antialiasing, as a step resizes its crops; themselves where they have it."""
    if images_nchw.shape[-1] == size:
        return images_nchw
    return F.interpolate(images_nchw, size=size, mode="bicubic", antialias=True)


def squared_error(outputs_nchw: Tensor, targets_nchw: Tensor) -> Tensor:
    """Mean squared error over all numbers, in units of the targets squared; a scalar."""
    return F.mse_loss(outputs_nchw.float(), targets_nchw.float())


def blend(targets_nchw: Tensor, soft_nchw: Tensor, weight: float) -> Tensor:
    """(1 - weight) x targets + weight x soft targets, these resized to the targets' resolution; shape of the targets.

    The squared error to this blend has the gradient of the same blend of the two squared errors, and is smaller by a constant.
    """
    if weight <= 0:
        return targets_nchw
    return torch.lerp(targets_nchw.float(), resized(soft_nchw, targets_nchw.shape[-1]), weight)
