"""What the children of a step learn from: labels for the largest, its soft targets for the others. All in fp32 and log space.

Axes: N batch, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def label_loss(logits_nk: Tensor, labels_n: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in nats to the labels, smoothed by `smoothing` (0..1); a scalar (Szegedy et al. 2016)."""
    return F.cross_entropy(logits_nk.float(), labels_n, label_smoothing=smoothing)


def soft_targets(teacher_nk: Tensor) -> Tensor:
    """The teacher's probabilities, shape (N, K), detached and in fp32: computed once a step, used by every student."""
    return teacher_nk.detach().float().softmax(-1)


def soft_loss(logits_nk: Tensor, targets_nk: Tensor) -> Tensor:
    """Mean cross entropy in nats to soft targets; a scalar.

    In-place distillation at temperature 1 (Yu & Huang 2019, "Universally slimmable networks", used unchanged by BigNAS).
    """
    return -(targets_nk * logits_nk.float().log_softmax(-1)).sum(-1).mean()


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


def mixed_loss(logits_nk: Tensor, labels_n: Tensor, targets_nk: Tensor, weight: float) -> Tensor:
    """(1 - weight) x cross entropy to labels + weight x cross entropy to soft targets; a scalar, in nats."""
    if weight >= 1:
        return soft_loss(logits_nk, targets_nk)
    if weight <= 0:
        return label_loss(logits_nk, labels_n)
    return torch.lerp(label_loss(logits_nk, labels_n), soft_loss(logits_nk, targets_nk), weight)
