"""A source of images divided into its splits, as a run uses it. The test split cannot be had here: `Run.test_images` counts it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from supernet.data.batches import images_at
from supernet.data.source import Source
from supernet.data.splits import Splits
from supernet.errors import InputError
from supernet.preprocess import Preprocessing

MOST_CACHED_BYTES = 2 * 2**30
"""Decoded images kept in memory, per split; beyond it they are decoded each time."""


@dataclass
class SplitImages:
    """The images of one split."""

    name: str
    source: Source
    indices: NDArray[np.int64]
    crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    _cache: dict[int, NDArray[np.uint8]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class numbers, shape (images,)."""
        return self.source.labels[self.indices]

    @property
    def identities(self) -> list[str]:
        """What each image is called in its source."""
        return [self.source.identity(int(index)) for index in self.indices]

    @property
    def files(self) -> list[Path | None]:
        """Where each image lies; None for sources that are arrays."""
        return [self.source.file(int(index)) for index in self.indices]

    def preprocessing(self, resolution: int) -> Preprocessing:
        """What a deployed child at `resolution` does to an image, and so what evaluation does."""
        return Preprocessing(resolution, self.crop, self.mean, self.std)

    def pixels(self, resolution: int, images: int | None = None) -> NDArray[np.uint8]:
        """The first `images` images (all by default) at `resolution` pixels, shape (images, H, W, C), decoded once."""
        count = len(self) if images is None else min(images, len(self))
        cached = self._cache.get(resolution)
        if cached is None or len(cached) < count:
            cached = images_at(self.source, self.indices[:count], self.preprocessing(resolution))
            if sum(kept.nbytes for kept in self._cache.values()) + cached.nbytes <= MOST_CACHED_BYTES:
                self._cache[resolution] = cached
        return cached[:count]


@dataclass(frozen=True)
class Dataset:
    """A divided source with the statistics of its training pixels."""

    source: Source
    splits: Splits
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    _made: dict[str, SplitImages] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> SplitImages:
        """The images of "train", "search_val" or "confirm". Raises `InputError` for "test"."""
        if name not in {"train", "search_val", "confirm"}:
            raise InputError(f"splits open to training and search are train, search_val and confirm, but got {name!r}: the test split "
                             "is read through Run.test_images, which counts the reads")  # fmt: skip
        if name not in self._made:
            self._made[name] = self._images(name)
        return self._made[name]

    def _images(self, name: str) -> SplitImages:
        indices = getattr(self.splits, name)
        return SplitImages(name, self.source, indices, self.crop, self.mean, self.std)  # shuffled: any prefix is a fair sample
