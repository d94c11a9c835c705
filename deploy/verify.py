"""Proof that what is shipped is what was found: supernet child == extracted child == ONNX Runtime, from real image files.

Axes: N images, K classes; outputs are logits (N, K) or images (N, C, H, W).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from deploy.predict import BATCH, Predictor, file_of
from supernet.arch import Arch
from supernet.data.batches import images_at
from supernet.data.dataset import SplitImages
from supernet.errors import InputError
from supernet.evaluate import Evaluator
from supernet.preprocess import open_image
from supernet.step import normalised
from supernet.task import Scores, Task

TOLERANCE = 1e-4
"""Largest difference of an output, relative to the largest (but at least to 1): rounding of fp32 through a deep network."""
CHILD_IMAGES = 64


class VerificationError(RuntimeError):
    """The exported model is not the child that was found. Nothing was written."""


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences of outputs, and agreement of decisions, between the forms of one child."""

    child_images: int
    child_difference: float
    """Largest absolute difference between the supernet's child and the extracted one, on batch statistics."""
    folded_difference: float
    """The same between the extracted child, calibrated, and itself with its batch norms folded."""
    onnx_images: int
    onnx_difference: float
    """The same between the extracted child, calibrated, and ONNX Runtime from image files."""
    largest_output: float
    agreement: float | None
    """Fraction of images with the same class; None where nothing is classified."""

    def as_dict(self) -> dict[str, Any]:
        """For the manifest; of a classifier with largest logit and agreement, else with largest output."""
        known = asdict(self)
        largest, agreement = known.pop("largest_output"), known.pop("agreement")
        known["relative_difference"] = self.onnx_difference / max(largest, 1e-30)
        return (
            {**known, "largest_output": largest}
            if agreement is None
            else {**known, "largest_logit": largest, "agreement": agreement}
        )


@dataclass(frozen=True, slots=True)
class FromFiles:
    """What a bundle makes of image files, beside what torch makes of the images."""

    classes: NDArray[np.int64] | None
    """The bundle's class for each image, shape (N,); None where nothing is classified."""
    scores: Scores
    """The task's score of the bundle's output for each image, shape (N,)."""
    difference: float
    largest: float
    agreement: float | None


def child_equals_extracted(evaluator: Evaluator, arch: Arch) -> tuple[int, float]:
    """Images and largest absolute difference of outputs; both networks normalise by the same batch.

    Computed on the CPU: the rounding of a GPU's fast formats (TF32) is larger than the differences sought.
    """
    supernet = evaluator.supernet
    if next(supernet.parameters()).device.type != "cpu":
        supernet = copy.deepcopy(supernet).cpu()
    pixels = evaluator.train.pixels(supernet.space.resolution(arch), CHILD_IMAGES)
    images = _as_evaluated(pixels, evaluator.train, torch.device("cpu"))
    with torch.no_grad():
        child, extracted = supernet.child(arch)(images), supernet.extract(arch).train()(images)
    difference = float((child - extracted).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(child.abs().max())):
        raise VerificationError(f"the extracted child differs from the supernet's by {difference:.3g} in an output")
    return len(images), difference


def folded_equals_extracted(folded: nn.Module, network: nn.Module, images: torch.Tensor) -> float:
    """Largest absolute difference of outputs on normalised images, (N, C, H, W). Raises `VerificationError` beyond rounding."""
    with torch.no_grad():
        expected, found = network(images), folded(images)
    difference = float((expected - found).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise VerificationError(f"the child with its batch norms folded differs from itself by {difference:.3g} in an output")
    return difference


def _as_evaluated(pixels_nhwc: NDArray[np.uint8], images: SplitImages, device: torch.device) -> torch.Tensor:
    """The input that evaluation makes of pixels, by the run's own statistics."""
    mean, std = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (images.mean, images.std))
    return normalised(torch.from_numpy(pixels_nhwc).to(device).permute(0, 3, 1, 2), mean, std)


def compare(expected: NDArray[np.float32], found: NDArray[np.float32]) -> tuple[float, float | None]:
    """Largest absolute difference of outputs, and of logits (N, K) the agreement of classes; raises beyond rounding.

    A class may differ only where rounding decides: the two best logits lie within the tolerance. What is raised is a
    `VerificationError`.
    """
    if not np.isfinite(expected).all():
        raise VerificationError("the child's own outputs are not finite numbers")
    scale = max(1.0, float(np.abs(expected).max()))
    difference = float(np.abs(expected - found).max())
    if not difference <= TOLERANCE * scale:
        raise VerificationError(
            f"ONNX Runtime differs from torch by {difference:.3g} in an output, where outputs reach {scale:.3g}"
        )
    if expected.ndim != 2:
        return difference, None
    ordered = np.sort(expected, axis=1)
    clear = ordered[:, -1] - ordered[:, -2] > 2 * TOLERANCE * scale
    same = expected.argmax(axis=1) == found.argmax(axis=1)
    if not same[clear].all():
        raise VerificationError(f"ONNX Runtime decides otherwise than torch on {int((~same[clear]).sum())} images")
    return difference, float(same.mean())


def files_of(images: SplitImages, folder: Path) -> list[Path]:
    """A file for every image: its own, or a PNG written under `folder` where the source is an array."""
    found = []
    for index, identity, file in zip(images.indices, images.identities, images.files, strict=True):
        path = file or file_of(identity, folder)
        if not path.exists() and file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{path.name}")
            images.source.image(int(index)).save(draft, "PNG")
            draft.replace(path)  # whole or not there
        found.append(path)
    return found


def onnx_equals_torch(
    predictor: Predictor, network: nn.Module, resolution: int, images: SplitImages, folder: Path, task: Task
) -> FromFiles:
    """Run image files through the bundle, and the images as evaluation reads them, at the child's `resolution`, through torch.

    So the manifest's preprocessing is proven as well. Arrays become files under `folder` (`files_of`).
    """
    classes, scores, differences, agreements, largest = [], [], [], [], 0.0
    files, device = files_of(images, folder), next(network.parameters()).device
    for start in range(0, len(files), BATCH):
        pixels = images_at(images.source, images.indices[start : start + BATCH], images.preprocessing(resolution))
        inputs = _as_evaluated(pixels, images, device)
        with torch.no_grad():
            expected = network(inputs).cpu().numpy()
        found = predictor.outputs(_opened(files[start : start + BATCH], predictor))
        difference, agreement = compare(expected, found)
        targets = task.targets(inputs.cpu(), torch.from_numpy(images.labels[start : start + BATCH]))
        scores.append(task.scores(torch.from_numpy(found), targets).numpy())
        differences.append(difference)
        if agreement is not None:
            classes.append(found.argmax(axis=1))
            agreements.append(agreement * len(found))
        largest = max(largest, float(np.abs(expected).max()))
    return FromFiles(
        np.concatenate(classes) if classes else None, np.concatenate(scores), max(differences), largest,
        sum(agreements) / len(files) if agreements else None,
    )  # fmt: skip


def _opened(files: Sequence[Path], predictor: Predictor) -> list[Image.Image]:
    try:
        return [open_image(file, predictor.preprocessing.channels) for file in files]
    except ValueError as error:
        raise InputError(
            f"{error}: repair the file; one that the run wrote under images/ is written again where it is missing"
        ) from error
