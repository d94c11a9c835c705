"""Training batches that follow from (seed, step) alone, and the pixels that evaluation and statistics read.

Axes: N images, C channels, R resolution in pixels (squares).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from supernet.data.sources import Source, evenly, over_images
from supernet.errors import InputError
from supernet.preprocess import Preprocessing

ORDER, AUGMENT = 2, 1  # last words of the random streams' keys; not 0, for numpy takes [a] and [a, 0] for one key


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random changes of a training image; the defaults change nothing but the size.

    `min_area`: a crop of an area fraction drawn from [min_area, 1] and an aspect of 3/4 to 4/3, log-uniform (Szegedy 2015,
    section 6; as in torchvision); 1 keeps the square of the short side. `shift`: the image is first padded by its reflection,
    on every side by this fraction of the short side, so the crop may lie partly outside ("pad and crop", 0.125 for CIFAR).
    `rotate_degrees`: turned by up to so much either way, black outside. `flip`: probability of a mirror image.
    """

    min_area: float = 1.0
    flip: float = 0.0
    shift: float = 0.0
    rotate_degrees: float = 0.0

    def __post_init__(self) -> None:
        limits = {"min_area": (0.01, 1.0), "flip": (0.0, 1.0), "shift": (0.0, 0.5), "rotate_degrees": (0.0, 180.0)}
        for name in (field.name for field in fields(self)):
            low, high = limits[name]
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
        return np.asarray(small).reshape(resolution, resolution, -1)

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


class TrainingBatches(Dataset[Any]):
    """The batches of every step of a run: a pure function of `(seed, step)`.

    So a resume needs no state, and the number of workers changes nothing. An epoch is every image once, in a fresh order,
    less the last images that do not fill a batch; a batch is never larger than the split. `workers` are processes that
    decode ahead; 0 decodes in this one.
    """

    def __init__(
        self,
        source: Source,
        indices: NDArray[np.int64],
        *,
        batch_size: int,
        resolution: int,
        augment: Augment,
        seed: int,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or resolution < 1 or seed < 0 or workers < 0:
            given = f"batch_size {batch_size}, resolution {resolution}, seed {seed}, workers {workers}"
            raise InputError(f"batch_size and resolution are at least 1, seed and workers at least 0, not {given}")
        if len(indices) == 0:
            raise InputError(f"{source.name}: there are no images to train on")
        self.source = source
        self.indices = indices
        self.batch_size = min(batch_size, len(indices))
        self.resolution = resolution
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self._order: tuple[int, NDArray[np.int64]] = (-1, indices)  # of the epoch seen last; a cache

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the split, at least 1."""
        return len(self.indices) // self.batch_size

    def batch_indices(self, step: int) -> NDArray[np.int64]:
        """Give the source's indices of the images of a step, int64 (N,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch, 0, ORDER]).permutation(self.indices))
        return self._order[1][position * self.batch_size : (position + 1) * self.batch_size]

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | str:
        """Make the batch of a step; a file that cannot be read gives the message (an exception would lose it in a worker)."""
        epoch, indices = step // self.steps_per_epoch, self.batch_indices(step)
        pixels_nhwc = np.empty((len(indices), self.resolution, self.resolution, self.source.channels), np.uint8)
        for row, index in enumerate(indices.tolist()):
            rng = np.random.default_rng([self.seed, epoch, index, AUGMENT])
            try:
                pixels_nhwc[row] = self.augment(self.source.image(index), self.resolution, rng)
            except InputError as error:
                return str(error)
        images_nchw = np.ascontiguousarray(pixels_nhwc.transpose(0, 3, 1, 2))
        return torch.from_numpy(images_nchw), torch.from_numpy(self.source.labels[indices])

    def batches(self, first_step: int, last_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images uint8 (N, C, R, R) and labels int64 (N,) of the steps `first_step` to `last_step - 1`.

        Raises InputError, naming the file, at the step that needs a file which cannot be read.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch
            sampler=range(first_step, last_step),
            num_workers=min(self.workers, _processors()),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or the loader would draw from, and so move, torch's global generator
        )
        for batch in loader:
            if isinstance(batch, str):
                raise InputError(batch)
            yield batch


def images_at(source: Source, indices: NDArray[np.int64], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Read the images as deployment sees them before it normalises: uint8 (N, R, R, C)."""
    if preprocessing.channels != source.channels:
        raise InputError(f"{source.name} has {source.channels} channels, but the preprocessing is for {preprocessing.channels}")
    side = preprocessing.resolution
    pixels_nhwc = np.empty((len(indices), side, side, source.channels), np.uint8)
    pixels = over_images(source, indices, lambda index: preprocessing.pixels(source.image(index)))
    for row, image_pixels in enumerate(pixels):
        pixels_nhwc[row] = image_pixels
    return pixels_nhwc


def channel_statistics(
    source: Source, indices: NDArray[np.int64], limit: int = 2000
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels in 0..1 of at most `limit` images spread evenly; 4 digits.

    Where a channel does not vary, its deviation is given as 1, so that dividing by it is harmless.
    """
    counts = np.zeros((source.channels, 256), np.int64)
    for histogram in over_images(source, evenly(indices, limit), lambda index: source.image(index).histogram()):
        counts += np.array(histogram, np.int64).reshape(source.channels, 256)
    share = counts / counts.sum(axis=1, keepdims=True)
    value = np.arange(256) / 255
    mean = share @ value
    deviation = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
    return tuple(round(float(x), 4) for x in mean), tuple(round(float(x), 4) or 1.0 for x in deviation)


def _processors() -> int:
    """Count the processors that this process may use; more workers would only wait, and torch would warn."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_it_is(batch: Any) -> Any:
    return batch
