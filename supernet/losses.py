"""What the children of a step learn from: labels for the largest, its soft targets for the others. All in fp32, classes in log space.

Axes: N batch, K classes, C channels, H W space.
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
