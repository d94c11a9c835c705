"""The rungs of a race: how many images a child is scored on, and by statistics of how many training images, before it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from supernet.errors import InputError
from supernet.evaluate import CALIBRATION_BATCH

FIRST = 64
"""Training images that calibrate on the first rung of several. Fewer shift a child's top1 by about 0.4 points, give or take 0.45
(`benchmarks/search_eval.py`), where 256 images tell it to 2.5."""


@dataclass(frozen=True, slots=True)
class Rung:
    """Reached by a child that is scored on the first `images` of a split. Both numbers count from the first image.

    The images that this rung adds are scored by statistics of the first `calibration_images` of the training images; those of
    lower rungs keep their scores. So an image is scored under the same conditions for every child.
    """

    images: int
    calibration_images: int
    precision: str = "fp32"
    """int8: weighted layers compute with numbers of 8 bits (`deploy.simulate`)."""


def rungs(
    images: int, calibration_images: int, *, first: int = 256, factor: int = 4, precision: str = "fp32"
) -> tuple[Rung, ...]:  # fmt: skip
    """Rungs of `first` images, then `factor` times as many each, up to all `images`; calibration grows alike.

    By whole batches, but on the first rung of several, which makes do with `FIRST` images.

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
    calibration = [min(calibration_images, count * CALIBRATION_BATCH) for count in counts]
    if most:
        calibration[0] = min(calibration[0], FIRST)
    return tuple(Rung(*each, precision) for each in zip(sizes, calibration, strict=True))


def calibration_spent(steps: Sequence[Rung], rung: int) -> int:
    """Training images that a child has run through when it is calibrated for a rung: whole batches go on from the rung below."""
    spent, known = 0, 0
    for step in steps[: rung + 1]:
        if step.calibration_images != known:
            spent += step.calibration_images - (known if known % CALIBRATION_BATCH == 0 else 0)
        known = step.calibration_images
    return spent
