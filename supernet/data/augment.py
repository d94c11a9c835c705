"""Random changes of a training image: a pure function of a numpy generator, so that workers, ranks and resumed runs agree.

Policies, jitter and erasing are torchvision's, which draw from torch's global generator: it is forked and seeded for them, so they
belong into one thread of a process. Axes: R resolution in pixels (squares), C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from supernet.errors import InputError

Policy = Literal["none", "auto", "auto-cifar", "rand", "trivial"]
GREY = 128
"""What is uncovered or erased becomes; near the mean of photos."""
LIMITS = {
    "min_area": (0.01, 1.0), "flip": (0.0, 1.0), "shift": (0.0, 0.5), "rotate_degrees": (0.0, 180.0), "magnitude": (0, 30),
    "operations": (1, 10), "erase": (0.0, 1.0), "jitter": (0.0, 1.0),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training image; the defaults change nothing but the size.

    `min_area`: a crop of an area fraction drawn from [min_area, 1] and an aspect of 3/4 to 4/3, log-uniform (Szegedy 2015,
    section 6; as in torchvision); 1 keeps the square of the short side. `shift`: the image is first padded by its reflection,
    on every side by this fraction of the short side, so the crop may lie partly outside ("pad and crop", 0.125 for CIFAR).
    `rotate_degrees`: turned by up to so much either way, black outside. `flip`: probability of a mirror image.

    Then, at the final size, as torchvision has them (transforms.v2), with grey where nothing is left: `policy`, AutoAugment's for
    ImageNet ("auto") or CIFAR-10 ("auto-cifar") (Cubuk et al. 2019), RandAugment ("rand", Cubuk et al. 2020) of so many `operations`
    at `magnitude` 0 to 30, or TrivialAugment ("trivial", Müller & Hutter 2021). `jitter`: brightness, contrast and saturation each
    times a factor of 1 - jitter to 1 + jitter. `erase`: probability that a rectangle of 2 to 33 % of the image becomes grey (random
    erasing, Zhong et al. 2020). Raises `InputError` for what is out of range.
    """

    min_area: float = 1.0
    flip: float = 0.0
    shift: float = 0.0
    rotate_degrees: float = 0.0
    policy: Policy = "none"
    magnitude: int = 9
    operations: int = 2
    erase: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise InputError(f"augment.policy is one of {list(get_args(Policy))}, not {self.policy!r}")
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"augment.{name} lies in {low:g} to {high:g}, not {getattr(self, name)}")

    def __call__(self, image: Image.Image, resolution: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Change an image in mode L or RGB: uint8 (R, R, C)."""
        if self.rotate_degrees:
            degrees = rng.uniform(-self.rotate_degrees, self.rotate_degrees)
            image = image.rotate(degrees, Image.Resampling.BICUBIC)
        width, height = self._crop_size(image, rng)
        image = self._padded(image)
        left = int(rng.integers(image.width - width + 1))
        top = int(rng.integers(image.height - height + 1))
        box = (left, top, left + width, top + height)
        small = image.resize((resolution, resolution), Image.Resampling.BICUBIC, box=box)
        if rng.random() < self.flip:
            small = small.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.policy == "none" and not self.erase and not self.jitter:
            return np.asarray(small).reshape(resolution, resolution, -1)
        with forked(int(rng.integers(2**63))):
            for transform in (_policy(self.policy, self.magnitude, self.operations), _jitter(self.jitter)):
                small = transform(small)
            pixels = np.array(small).reshape(resolution, resolution, -1)
            _eraser(self.erase)(torch.from_numpy(pixels).permute(2, 0, 1))  # in place
        return pixels

    def _crop_size(self, image: Image.Image, rng: np.random.Generator) -> tuple[int, int]:
        for _ in range(10 if self.min_area < 1 else 0):  # torchvision, too, gives up after ten crops that do not fit
            area = rng.uniform(self.min_area, 1) * image.width * image.height
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 1 <= width <= image.width and 1 <= height <= image.height:
                return width, height
        return min(image.size), min(image.size)

    def _padded(self, image: Image.Image) -> Image.Image:
        pad = round(self.shift * min(image.size))
        if pad == 0:
            return image
        pixels = np.asarray(image)
        return Image.fromarray(np.pad(pixels, [(pad, pad), (pad, pad), (0, 0)][: pixels.ndim], mode="reflect"))


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Torch's CPU generator seeded, and put back afterwards; those of other devices are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _unchanged(image: Any) -> Any:
    return image


@lru_cache
def _policy(policy: Policy, magnitude: int, operations: int) -> Any:
    if policy == "none":
        return _unchanged
    from torchvision.transforms import v2

    options = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": GREY}
    if policy == "rand":
        return v2.RandAugment(operations, magnitude, **options)
    if policy == "trivial":
        return v2.TrivialAugmentWide(**options)
    return v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET if policy == "auto" else v2.AutoAugmentPolicy.CIFAR10, **options)


@lru_cache
def _jitter(jitter: float) -> Any:
    if not jitter:
        return _unchanged
    from torchvision.transforms import v2

    return v2.ColorJitter(jitter, jitter, jitter)


@lru_cache
def _eraser(probability: float) -> Any:
    if not probability:
        return _unchanged
    from torchvision.transforms import v2

    return v2.RandomErasing(probability, value=GREY, inplace=True)
