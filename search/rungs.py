"""The rungs of a race: how many images a child is scored on, and by statistics of how many training images, before it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from supernet.errors import InputError
from supernet.evaluate import CALIBRATION_BATCH


@dataclass(frozen=True, slots=True)
class Rung:
    """Reached by a child that is scored on the first `images` of a split. Both numbers count from the first image.

    The images that this rung adds are scored by statistics of the first `calibration_images` of the training images; those of
    lower rungs keep their scores. So an image is scored under the same conditions for every child.
    """

    images: int
    calibration_images: int


def rungs(images: int, calibration_images: int, *, first: int = 256, factor: int = 4) -> tuple[Rung, ...]:
    """Rungs of `first` images, then `factor` times as many each, up to all `images`; calibration grows alike, by whole batches.

    Raises `InputError` where there is nothing to score or to calibrate by, or the rungs do not grow.
    """
    if min(images, calibration_images) < 1 or first < 1 or factor < 2:
        raise InputError(
            "rungs need at least 1 image, 1 calibration image, a first rung of 1 image and a factor of 2, but got "
            f"{images}, {calibration_images}, {first} and {factor}: give more images or other rungs"
        )
    sizes = [min(first, images)]
    while sizes[-1] < images:
        grown = sizes[-1] * factor
        sizes.append(grown if grown * factor**0.5 <= images else images)  # no last step that adds next to nothing
    most = len(sizes) - 1
    batches = max(1, calibration_images // CALIBRATION_BATCH)
    counts = [max(1, round(batches / factor ** (most - step))) for step in range(most + 1)]
    return tuple(
        Rung(size, min(calibration_images, count * CALIBRATION_BATCH)) for size, count in zip(sizes, counts, strict=True)
    )
