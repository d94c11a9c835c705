"""What is learnt: losses, a score for each image, and how two children are compared. Nothing else knows which task it is.

Axes: N images, K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from supernet import losses
from supernet.errors import InputError

Scores = NDArray[Any]
"""A score for every image, shape (N,), larger is better."""


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
    """What a kind of learning has to bring. Regression would keep a float per image and compare by a paired t-test."""

    name: str
    metric: str

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Loss of the largest child; a scalar."""
        ...

    def soft_targets(self, outputs: Tensor) -> Tensor:
        """What the largest child's outputs teach the others, detached."""
        ...

    def student_loss(self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float) -> Tensor:
        """Loss of the other children; `weight` 0..1 leads from labels to soft targets."""
        ...

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """A score for every image, shape (N,)."""
        ...

    def pack(self, scores: Scores) -> bytes:
        """Scores as bytes for the store."""
        ...

    def unpack(self, packed: bytes, images: int) -> Scores:
        """Inverse of `pack`."""
        ...

    def estimate(self, scores: Scores) -> Estimate:
        """Mean score with its interval."""
        ...

    def compare(self, one: Scores, other: Scores) -> Comparison:
        """Paired comparison on the same images."""
        ...


class Classification:
    """One label an image; the score is 1 where the largest logit is the label's, so the mean is top1 (a fraction, 0..1)."""

    name = "classification"
    metric = "top1"

    def label_loss(self, outputs: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Cross entropy with label smoothing."""
        return losses.label_loss(outputs, targets, smoothing)

    def soft_targets(self, outputs: Tensor) -> Tensor:
        """Detached probabilities."""
        return losses.soft_targets(outputs)

    def student_loss(self, outputs: Tensor, targets: Tensor, soft: Tensor, weight: float) -> Tensor:
        """Cross entropy, from labels to soft targets."""
        return losses.mixed_loss(outputs, targets, soft, weight)

    def scores(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Whether each image is classified rightly, shape (N,), bool."""
        return outputs.argmax(-1) == targets

    def pack(self, scores: Scores) -> bytes:
        """A bit an image."""
        return np.packbits(scores.astype(bool)).tobytes()

    def unpack(self, packed: bytes, images: int) -> Scores:
        """Bits back to bools, shape (images,). Raises `ValueError` where the bytes are of another number of images."""
        if len(packed) != math.ceil(images / 8):
            raise ValueError(f"scores of {images} images take {math.ceil(images / 8)} bytes, but there are {len(packed)}")
        return np.unpackbits(np.frombuffer(packed, np.uint8), count=images).astype(bool)

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
        wins, losses_, images = int(np.sum(one & ~other)), int(np.sum(~one & other)), len(one)
        difference = (wins - losses_) / images
        error = 1.96 * math.sqrt(max(wins + losses_ - (wins - losses_) ** 2 / images, 0)) / images
        p_value = float(binomtest(wins, wins + losses_).pvalue) if wins + losses_ else 1.0
        return Comparison(difference, difference - error, difference + error, p_value)


TASKS: dict[str, type[Task]] = {"classification": Classification}
