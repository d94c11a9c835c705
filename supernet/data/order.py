"""Which images an epoch shows and in which order: drawn from (seed, epoch), with repeats or balanced classes where asked."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from supernet.errors import InputError

Indices = NDArray[np.int64]
Balance = Literal["none", "class", "sqrt"]
BALANCES: tuple[Balance, ...] = ("none", "class", "sqrt")


def epoch_order(
    indices: Indices, labels: Indices, rng: np.random.Generator, *, batches: int, batch_size: int, repeats: int, balance: Balance
) -> tuple[Indices, Indices]:  # fmt: skip
    """Draw an epoch: images and copies, both int64 (batches, batch_size).

    `labels` are those of the whole source. The copy of an image says how often it was shown before in this epoch, so that each can be
    changed in its own way. With `repeats` R (Hoffer et al. 2020, section 3) a batch is R times the same `batch_size` / R images,
    one after the other, so that contiguous slices of it hold different images.
    """
    distinct = batch_size // repeats
    drawn = (
        rng.permutation(indices) if balance == "none" else _balanced(indices, labels[indices], rng, batches * distinct, balance)
    )
    images = np.tile(drawn[: batches * distinct].reshape(batches, distinct), (1, repeats))
    once = balance == "none" and repeats == 1
    return images, np.zeros_like(images) if once else shown_before(images.ravel()).reshape(images.shape)


def _balanced(indices: Indices, labels: Indices, rng: np.random.Generator, count: int, balance: Balance) -> Indices:
    """Draw `count` images: as many of every class ("class"), or in proportion to the square root of its images ("sqrt").

    Within a class every image comes equally often, but for one.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    weights = np.ones(len(classes)) if balance == "class" else np.sqrt(sizes)
    pieces = []
    for label, wanted in zip(classes, _quotas(weights, count, rng), strict=True):
        own = indices[labels == label]
        rounds = -(-int(wanted) // len(own))
        pieces.append(rng.permuted(np.tile(own, (rounds, 1)), axis=1).ravel()[:wanted])
    drawn: Indices = rng.permutation(np.concatenate(pieces))
    return drawn


def _quotas(weights: NDArray[np.float64], count: int, rng: np.random.Generator) -> Indices:
    """Whole numbers in proportion to the weights, `count` in all; which classes get one more is drawn by what they lack."""
    exact = weights / weights.sum() * count
    quotas: Indices = np.floor(exact).astype(np.int64)
    short, lack = count - int(quotas.sum()), exact - np.floor(exact)
    if short:
        more = rng.choice(len(weights), short, replace=False, p=lack / lack.sum())
        quotas[more] += 1
    return quotas


def shown_before(images: Indices) -> Indices:
    """Count, for every place of a sequence, the equal numbers before it."""
    by_image = np.argsort(images, kind="stable")
    ordered = images[by_image]
    place = np.arange(len(images))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    before: Indices = np.empty_like(images)
    before[by_image] = place - np.maximum.accumulate(np.where(first, place, 0))
    return before


def batch_size_of(images: int, *, batch_size: int, repeats: int, ranks: int) -> int:
    """Images of a step: `batch_size`, or, of fewer images, the most that ranks and repeats divide. Raises InputError."""
    for name, number in (("ranks", ranks), ("repeats", repeats)):
        if number < 1:
            raise InputError(f"{name} is at least 1, not {number}")
        if batch_size % number:
            raise InputError(
                f"batch_size is the images of a step on all ranks, and {name} divides it, but {batch_size} is no multiple of {number}"
            )
    unit = int(np.lcm(ranks, repeats))
    size = min(batch_size, images) // unit * unit
    if size == 0:
        raise InputError(
            f"{images} images to train on make no batch of {ranks} ranks with {repeats} repeats: lower ranks or repeats"
        )
    return size
