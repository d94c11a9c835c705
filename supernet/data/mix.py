"""Mixing the images of a batch and their labels with them: a pure function of a seed, alike for any number of processes.

Axes: N images, K classes, C channels, H W space.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from supernet.data.augment import forked
from supernet.errors import InputError

MIX_STREAM = 7
"""Last word of the key of the random stream, so that no other has the same key."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019), as torchvision has them: every image with the one before it.

    `mixup` and `cutmix` are the alphas of the Beta distributions of the shares, 0 for none; where both are given, each has an equal
    chance. `probability`: of mixing at all. Raises `InputError` for numbers without a meaning.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if alpha != 0 and not 0.05 <= alpha < math.inf:  # torch's Beta distribution underflows below
                raise InputError(f"mix.{name} is 0 or at least 0.05, not {alpha}")
        if not 0 <= self.probability <= 1:
            raise InputError(f"mix.probability lies in 0 to 1, not {self.probability}")

    @property
    def on(self) -> bool:
        """Whether anything is ever mixed."""
        return self.probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    def __call__(self, images_nchw: Tensor, labels_n: Tensor, classes: int, seed: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Images, shape (N, C, H, W), and probabilities, fp32 (N, K); labels as they are, int64 (N,), where nothing is ever mixed.

        All images share one draw. uint8 images come back as fp32 in 0 to 255, since a mixture is no whole number; fp32 keeps its
        dtype. `seed` is the whole of the randomness; global generators stay as they are.
        """
        if not self.on:
            return images_nchw, labels_n
        images_nchw = images_nchw if images_nchw.is_floating_point() else images_nchw.float()
        rng = np.random.default_rng([*seed, MIX_STREAM])
        drawn, which, torch_seed = rng.random(), int(rng.integers(2)), int(rng.integers(2**63))
        if drawn >= self.probability:
            return images_nchw, F.one_hot(labels_n, classes).float()
        kinds = [(kind, alpha) for kind, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)) if alpha > 0]
        kind, alpha = kinds[which % len(kinds)]
        with forked(torch_seed):
            images_nchw, probabilities_nk = _transform(kind, alpha, classes)(images_nchw, labels_n)
        return images_nchw, probabilities_nk


def mix_groups(
    images_nchw: Tensor, labels_n: Tensor, classes: int, mix: Mix, seed: tuple[int, ...], group: int, first_group: int = 0
) -> tuple[Tensor, Tensor]:
    """Mix each `group` images in a row by themselves, with the seed (*seed, number of the group), from `first_group` on.

    So a process that holds the groups from `first_group` gets what one process for the whole batch would. The last group may be
    smaller. Shapes as `Mix` gives them. Raises `InputError` where there are no images.
    """
    if group < 1 or first_group < 0 or not len(images_nchw) == len(labels_n) > 0:
        given = f"groups of {group} from {first_group} of {len(images_nchw)} images with {len(labels_n)} labels"
        raise InputError(f"images are mixed in groups of at least 1, numbered from 0, a label to each, not {given}")
    if not mix.on:
        return images_nchw, labels_n
    mixed = []
    for number, start in enumerate(range(0, len(images_nchw), group), first_group):
        part = slice(start, start + group)
        mixed.append(mix(images_nchw[part], labels_n[part], classes, (*seed, number)))
    return torch.cat([images for images, _ in mixed]), torch.cat([probabilities for _, probabilities in mixed])


@lru_cache
def _transform(kind: str, alpha: float, classes: int) -> Any:
    from torchvision.transforms import v2

    return (v2.MixUp if kind == "mixup" else v2.CutMix)(alpha=alpha, num_classes=classes)
