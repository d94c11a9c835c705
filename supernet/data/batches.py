"""Training batches that follow from (seed, step) alone, and the pixels that evaluation and statistics read.

Axes: N images, C channels, R resolution in pixels (squares).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from supernet.data.augment import Augment
from supernet.data.order import BALANCES, Balance, batch_size_of, epoch_order
from supernet.data.source import Source, Unreadable, evenly, over_images
from supernet.errors import InputError
from supernet.preprocess import Preprocessing

AUGMENT, ORDER, REPLACE = 1, 2, 6  # last words of the random streams' keys; not 0, for numpy takes [a] and [a, 0] for one key


class Batch(NamedTuple):
    """What a step trains on."""

    images: Tensor
    """uint8 (N, C, R, R)."""
    labels: Tensor
    """Class numbers, int64 (N,)."""
    unreadable: tuple[str, ...] = ()
    """Images that could not be read and that others of their class stand in for, "PLACE: REASON", each reported once."""


class _Made(NamedTuple):
    """A batch as a worker makes it."""

    images: Tensor
    labels: Tensor
    problems: tuple[tuple[int, str], ...]


class TrainingBatches(Dataset[Any]):
    """The batches of every step of a run: a pure function of `(seed, step)`.

    So a resume needs no state, and the number of workers changes nothing. An epoch is every image once, in a fresh order,
    less the last images that do not fill a batch; a batch is never larger than the split. `workers` are processes that
    decode ahead; 0 decodes in this one.

    `repeats`: so many differently augmented copies of an image in a batch (Hoffer et al. 2020); an epoch has the same number of
    steps and shows that part of the images. `balance`: classes come equally often ("class") or by the square root of their
    images ("sqrt"), small ones several times, large ones not whole. `rank` of `ranks` gets its contiguous slice of every batch:
    those of all ranks make up the batch of one process. `pin`: batches lie in pinned memory where there is a CUDA device.
    `skip_unreadable`: up to this fraction of the images may be unreadable; another image of the class stands in. 0: none may.
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
        repeats: int = 1,
        balance: Balance = "none",
        rank: int = 0,
        ranks: int = 1,
        pin: bool = False,
        skip_unreadable: float = 0.0,
    ) -> None:
        if batch_size < 1 or resolution < 1 or seed < 0 or workers < 0:
            given = f"batch_size {batch_size}, resolution {resolution}, seed {seed}, workers {workers}"
            raise InputError(f"batch_size and resolution are at least 1, seed and workers at least 0, not {given}")
        if len(indices) == 0:
            raise InputError(f"{source.name}: there are no images to train on")
        if balance not in BALANCES:
            raise InputError(f"balance is one of {', '.join(BALANCES)}, not {balance!r}")
        if not 0 <= skip_unreadable < 1:
            raise InputError(f"skip_unreadable is a fraction of the images, 0 or more and below 1, not {skip_unreadable}")
        self.source = source
        self.indices = indices
        self.batch_size = batch_size_of(len(indices), batch_size=batch_size, repeats=repeats, ranks=ranks)
        if not 0 <= rank < ranks:
            raise InputError(f"rank is 0 to {ranks - 1} of {ranks} ranks, not {rank}")
        self.resolution = resolution
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self.repeats, self.balance, self.rank, self.ranks, self.pin = repeats, balance, rank, ranks, pin
        self.skip_unreadable = skip_unreadable
        self.unreadable: dict[int, str] = {}
        """What was met so far, index to "PLACE: REASON"; never more than one beyond what `skip_unreadable` allows."""
        self._order: tuple[int, NDArray[np.int64], NDArray[np.int64]] = (
            -1,
            indices,
            indices,
        )  # of the epoch seen last; a cache

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the split, at least 1."""
        return len(self.indices) // self.batch_size

    def batch_indices(self, step: int) -> NDArray[np.int64]:
        """Give the source's indices of this rank's images of a step, int64 (N,)."""
        return self._rows(step)[0]

    def _rows(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This rank's images of a step and their copies."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, 0, ORDER])
            images, copies = epoch_order(
                self.indices, self.source.labels, rng, batches=self.steps_per_epoch, batch_size=self.batch_size,
                repeats=self.repeats, balance=self.balance,
            )  # fmt: skip
            self._order = (epoch, images, copies)
        share = self.batch_size // self.ranks
        own = slice(self.rank * share, (self.rank + 1) * share)
        return self._order[1][position, own], self._order[2][position, own]

    def __getitem__(self, step: int) -> _Made | str:
        """Make the batch of a step; what must stop the run gives the message (an exception would lose it in a worker)."""
        epoch, (indices, copies) = step // self.steps_per_epoch, self._rows(step)
        pixels_nhwc = np.empty((len(indices), self.resolution, self.resolution, self.source.channels), np.uint8)
        problems: dict[int, str] = {}
        for row, (index, copy) in enumerate(zip(indices.tolist(), copies.tolist(), strict=True)):
            rng = np.random.default_rng([self.seed, epoch, index, AUGMENT, *([copy] if copy else [])])
            try:
                pixels_nhwc[row] = self.augment(self._image(epoch, index, problems), self.resolution, rng)
            except InputError as error:
                return str(error)
        images_nchw = np.ascontiguousarray(pixels_nhwc.transpose(0, 3, 1, 2))
        return _Made(torch.from_numpy(images_nchw), torch.from_numpy(self.source.labels[indices]), tuple(problems.items()))

    def _image(self, epoch: int, index: int, problems: dict[int, str]) -> Image.Image:
        """Read an image, or, where that is allowed, another of its class in its place."""
        try:
            return self.source.image(index)
        except Unreadable as error:
            if self.skip_unreadable == 0:
                raise
            problems[index] = error.short
        alike = self.indices[self.source.labels[self.indices] == self.source.labels[index]]
        for other in np.random.default_rng([self.seed, epoch, index, REPLACE]).permutation(alike).tolist():
            if other not in problems:
                try:
                    return self.source.image(other)
                except Unreadable as error:
                    problems[other] = error.short
        raise InputError(f"no image of class {self.source.classes[self.source.labels[index]]!r} can be read: {problems[index]}")

    def batches(self, first_step: int, last_step: int) -> Iterator[Batch]:
        """Yield the batches of the steps `first_step` to `last_step - 1`.

        Raises InputError, naming the file, at the step that needs a file which cannot be read, or, with `skip_unreadable`, at the
        one that meets more of them than it allows.
        """
        loader: DataLoader[Any] = DataLoader(
            self,
            batch_size=None,  # an item is a whole batch
            sampler=range(first_step, last_step),
            num_workers=min(self.workers, _processors()),
            collate_fn=_as_it_is,
            pin_memory=self.pin and torch.cuda.is_available(),
            generator=torch.Generator(),  # or the loader would draw from, and so move, torch's global generator
        )
        for made in loader:
            if isinstance(made, str):
                raise InputError(made)
            images, labels, problems = made
            yield Batch(images, labels, self._news(problems))

    def _news(self, problems: tuple[tuple[int, str], ...]) -> tuple[str, ...]:
        """Count what could not be read, and give what was not met before."""
        news = [(index, told) for index, told in problems if index not in self.unreadable]
        self.unreadable.update(news)
        allowed = int(self.skip_unreadable * len(self.indices))
        if len(self.unreadable) > allowed:
            shown = "; ".join(list(self.unreadable.values())[-3:])
            raise InputError(
                f"{len(self.unreadable)} of {len(self.indices)} training images cannot be read, and skip_unreadable "
                f"{self.skip_unreadable:g} allows {allowed} ({shown}): repair or remove them, or raise skip_unreadable"
            )
        return tuple(told for _, told in news)


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
    source: Source, indices: NDArray[np.int64], limit: int = 2000, *, skip_unreadable: bool = False
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel, of pixels in 0..1 of at most `limit` images spread evenly; 4 digits.

    Where a channel does not vary, its deviation is given as 1, so that dividing by it is harmless. An image that cannot be read
    raises InputError, or is passed over if `skip_unreadable`.
    """

    def histogram(index: int) -> list[int]:
        try:
            return source.image(index).histogram()
        except Unreadable:
            if not skip_unreadable:
                raise
            return [0] * 256 * source.channels

    counts = np.zeros((source.channels, 256), np.int64)
    for found in over_images(source, evenly(indices, limit), histogram):
        counts += np.array(found, np.int64).reshape(source.channels, 256)
    if not counts.any():
        raise InputError(f"{source.name}: of {min(limit, len(indices))} training images none can be read: repair them")
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
