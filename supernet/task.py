"""What is learnt: targets, losses, a score for each image, and how two children are compared. Nothing else knows which task it is.

Axes: N images, K classes, C channels, H W space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from supernet import losses
from supernet.errors import InputError
from supernet.losses import SOFT, Distillation
from supernet.samples import Columns

Scores = NDArray[Any]
"""A score for every image, shape (N,), larger is better."""
MOST_SAMPLED_CLASSES = 2**16
"""Classes that a column of 16 bits can tell apart."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean score with its 95 % interval, over `images` images."""

    value: float
    low: float
    high: float
    images: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean score of one child less that of another on the same images: 95 % interval, and p of "no difference" (two-sided)."""

    difference: float
    low: float
    high: float
    p_value: float


class Task(Protocol):
    """What a kind of learning has to bring."""

    name: ClassVar[str]
    """Its name in `TASKS`, in runs and in bundles."""
    metric: ClassVar[str]
    """The mean score's name in every file; its unit is in it, where it is no fraction."""
    title: ClassVar[str]
    """The metric's name for people."""
    unit: ClassVar[str]
    """What stands behind a mean score: "%" (of a fraction, written times 100) or a unit."""
    loss_title: ClassVar[str]
    """What the loss is, with its unit."""
    own_images: ClassVar[bool]
    """Whether targets, and so scores, are of the image at the child's own resolution."""
    columns: ClassVar[Columns]
    """What its samples keep of every image. A search makes `metric` large: an objective of that name, or else the column."""

    @classmethod
    def of(cls, std: tuple[float, ...]) -> Self:
        """The task on images whose pixels (0..1) have this standard deviation, a number a channel."""
        ...

    @staticmethod
    def show(value: float) -> str:
        """A mean score as text, with its unit."""
        ...

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """What a child should give for its `images` (normalised, at its own resolution) and their labels."""
        ...

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Loss of the largest child; a scalar."""
        ...

    def soft_targets(self, outputs: Tensor, distillation: Distillation = SOFT) -> Tensor:
        """What the largest child's outputs teach the others (at whatever resolution), detached.

        Raises `InputError` where the task knows no such `distillation`.
        """
        ...

    def student_loss(
        self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float, distillation: Distillation = SOFT
    ) -> Tensor:
        """Loss of the other children; `weight` 0..1 leads from targets to soft targets."""
        ...

    def chance_loss(self, frequencies: NDArray[np.float64]) -> float:
        """Label loss of a network that knows how often each class is shown, and nothing of the images; shape (K,), sum 1.

        A run whose losses come back to it has collapsed.
        """
        ...

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A score for every image, shape (N,)."""
        ...

    def samples(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """What the child did on every image, each column of shape (N,): all that an objective may want to know later."""
        ...

    def estimate(self, scores: Scores) -> Estimate:
        """Mean score with its interval."""
        ...

    def compare(self, one: Scores, other: Scores) -> Comparison:
        """Paired comparison on the same images."""
        ...


class Classification:
    """One label an image; the score is 1 where the largest logit is the label's, so the mean is top1 (a fraction, 0..1)."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "top1"
    title: ClassVar[str] = "top-1 accuracy"
    unit: ClassVar[str] = "%"
    loss_title: ClassVar[str] = "cross entropy to the labels"
    own_images: ClassVar[bool] = False
    columns: ClassVar[Columns] = {"rank": "<u2", "predicted": "<u2", "loss": "<f2"}

    @classmethod
    def of(cls, std: tuple[float, ...]) -> Self:
        """Needs to know nothing of the images."""
        return cls()

    @staticmethod
    def show(value: float) -> str:
        """93.12%."""
        return f"{value:.2%}"

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """The labels, or the probabilities that they were mixed to."""
        return labels

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross entropy with label smoothing."""
        return losses.label_loss(outputs, targets, smoothing)

    def soft_targets(self, outputs: Tensor, distillation: Distillation = SOFT) -> Tensor:
        """Detached log probabilities."""
        return losses.log_probabilities(outputs, distillation.temperature)

    def student_loss(
        self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float, distillation: Distillation = SOFT
    ) -> Tensor:
        """From the cross entropy to labels to the divergence from the teacher."""
        return losses.student_loss(outputs, targets, soft, weight, distillation)

    def chance_loss(self, frequencies: NDArray[np.float64]) -> float:
        """The entropy of the classes: ln K where they are equally frequent."""
        shown = frequencies[frequencies > 0]
        return float(-(shown * np.log(shown)).sum())

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether each image is classified rightly, shape (N,), bool; of probabilities (mixed images) the likeliest class counts."""
        return outputs.argmax(-1) == (targets.argmax(-1) if targets.is_floating_point() else targets)

    def samples(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Each of shape (N,), of logits (N, K): `rank`, `predicted` and `loss`.

        `rank` (uint16) is the number of classes that the outputs put before the label's; of equal ones the first counts, as in
        argmax, and what is not finite comes last. 0 if and only if `predicted` (uint16), the class put first, is the label: a label
        whose own logit is not finite is never right. `loss` (float16) is the cross entropy to the targets in nats, at most 65504,
        which it also is where it is not a number. Raises `InputError` beyond `MOST_SAMPLED_CLASSES`.
        """
        classes = outputs.shape[-1]
        if classes > MOST_SAMPLED_CLASSES:
            raise InputError(
                f"samples tell {MOST_SAMPLED_CLASSES} classes apart, but the network has {classes}: choose a space of fewer"
            )
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        labels = (targets.argmax(-1) if targets.is_floating_point() else targets).unsqueeze(-1)
        usable = wide.isfinite()
        value = wide.masked_fill(~usable, -math.inf)
        own, own_usable = value.gather(-1, labels), usable.gather(-1, labels)
        place = torch.arange(classes, device=outputs.device)
        before = (value > own) | ((value == own) & (place < labels)) | (~own_usable & (place != labels))
        rank = before.sum(-1)
        first, label = value.argmax(-1), labels.squeeze(-1)
        first = torch.where(rank == 0, label, torch.where(first == label, (label + 1) % classes, first))
        most = torch.finfo(torch.float16).max
        loss = F.cross_entropy(wide, targets, reduction="none").nan_to_num(nan=most).clamp(max=most)
        return {"rank": rank.to(torch.uint16), "predicted": first.to(torch.uint16), "loss": loss.to(torch.float16)}

    def estimate(self, scores: Scores) -> Estimate:
        """top1 with its Wilson score interval (Wilson 1927), honest also near 0 and 1."""
        from scipy.stats import binomtest

        if not len(scores):
            raise InputError("top1 needs at least one image, but the split is empty: give more images")
        right = int(np.count_nonzero(scores))
        interval = binomtest(right, len(scores)).proportion_ci(method="wilson")
        return Estimate(right / len(scores), float(interval.low), float(interval.high), len(scores))

    def compare(self, one: Scores, other: Scores) -> Comparison:
        """Exact McNemar test on the images where they differ; Wald interval of the paired difference."""
        from scipy.stats import binomtest

        if one.shape != other.shape:
            raise ValueError(f"children are compared on the same images, but got {one.shape} and {other.shape}")
        if not len(one):
            raise InputError("children are compared on at least one image, but the split is empty: give more images")
        wins, losses_, images = int(np.sum(one & ~other)), int(np.sum(~one & other)), len(one)
        difference = (wins - losses_) / images
        error = 1.96 * math.sqrt(max(wins + losses_ - (wins - losses_) ** 2 / images, 0)) / images
        p_value = float(binomtest(wins, wins + losses_).pvalue) if wins + losses_ else 1.0
        return Comparison(difference, difference - error, difference + error, p_value)


WORST = 1e30
"""Mean squared error of an output that is not finite: -300 dB."""
MOST_PSNR_DB = 100.0
"""Score of an image that is exactly right: that of a mean squared error of 1e-10 (pixels in 0..1), where fp32 ends."""


@dataclass(frozen=True)
class Regression:
    """Image to image: the target is the child's normalised input itself. The score is the peak signal-to-noise ratio (PSNR) in dB.

    PSNR = 10 log10(1 / mean squared error), over all pixels (in 0..1) and channels of an image, of the network's output as it is,
    neither clipped nor rounded; at most `MOST_PSNR_DB`. Children of different resolutions are scored on different images.
    """

    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "psnr_db"
    title: ClassVar[str] = "PSNR"
    unit: ClassVar[str] = "dB"
    loss_title: ClassVar[str] = "mean squared error of normalised pixels"
    own_images: ClassVar[bool] = True
    columns: ClassVar[Columns] = {"psnr_db": "<f4"}

    std: tuple[float, ...] = (1.0,)
    """Standard deviation of the pixels (0..1) that images were divided by, a number a channel."""

    @classmethod
    def of(cls, std: tuple[float, ...]) -> Self:
        """Scores undo the normalisation."""
        return cls(tuple(std))

    @staticmethod
    def show(value: float) -> str:
        """23.41 dB."""
        return f"{value:.2f} dB"

    def targets(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images, shape (N, C, H, W)."""
        return images

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean squared error of normalised pixels; smoothing has no meaning here."""
        return losses.squared_error(outputs, targets)

    def soft_targets(self, outputs: Tensor, distillation: Distillation = SOFT) -> Tensor:
        """The largest child's images, detached and in fp32."""
        if distillation.kind != "soft" or distillation.temperature != 1:
            raise InputError(
                "distillation.kind and temperature are of class probabilities, but this task is regression: leave them out"
            )
        return outputs.detach().float()

    def student_loss(
        self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float, distillation: Distillation = SOFT
    ) -> Tensor:
        """Squared error to a blend of the target and the largest child's image, resized to the student's resolution."""
        return losses.squared_error(outputs, losses.blend(targets, soft, weight))

    def chance_loss(self, frequencies: NDArray[np.float64]) -> float:
        """That of the mean pixel: images are normalised to a variance of 1."""
        return 1.0

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """PSNR of each image in dB, shape (N,), fp32."""
        std = torch.tensor(self.std, dtype=torch.float64, device=outputs.device).view(1, -1, 1, 1)
        error = ((outputs.double() - targets.double()) * std).square().mean((1, 2, 3)).nan_to_num(nan=WORST, posinf=WORST)
        return (-10 * error.clamp_min(10 ** (-MOST_PSNR_DB / 10)).log10()).float()

    def samples(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """`psnr_db` is the score of each image, shape (N,), fp32."""
        return {"psnr_db": self.scores(outputs, targets)}

    def estimate(self, scores: Scores) -> Estimate:
        """Mean PSNR with Student's t interval. Raises `InputError` for fewer than two images."""
        mean, error = _mean_and_error(scores)
        reach = error * _t_quantile(len(scores))
        return Estimate(mean, mean - reach, mean + reach, len(scores))

    def compare(self, one: Scores, other: Scores) -> Comparison:
        """Paired t test, and its interval of the mean difference."""
        from scipy.stats import t

        if one.shape != other.shape:
            raise ValueError(f"children are compared on the same images, but got {one.shape} and {other.shape}")
        difference, error = _mean_and_error(one.astype(np.float64) - other)
        reach = error * _t_quantile(len(one))
        if error == 0:  # the same difference on every image
            return Comparison(difference, difference, difference, 1.0 if difference == 0 else 0.0)
        p_value = float(2 * t.sf(abs(difference) / error, len(one) - 1))
        return Comparison(difference, difference - reach, difference + reach, p_value)


def _mean_and_error(values: Scores) -> tuple[float, float]:
    """Mean and its standard error."""
    if len(values) < 2:
        raise InputError(f"a mean with its interval needs at least two images, but there are {len(values)}: give more images")
    exact = values.astype(np.float64)
    return float(exact.mean()), float(exact.std(ddof=1) / math.sqrt(len(exact)))


def _t_quantile(images: int) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, images - 1))


TASKS: dict[str, type[Task]] = {"classification": Classification, "regression": Regression}
"""Name -> task. A family says which is its own (`Family.task`); code may add its own here, as it may families."""


def task_named(name: str) -> type[Task]:
    """The task of that name. Raises `InputError` where there is none."""
    if name not in TASKS:
        raise InputError(f"task must be one of {sorted(TASKS)}, but got {name!r}: use the version or package that has it")
    return TASKS[name]
