"""The gate of converted files: outputs and scores of a file against those of the fp32 model, on the same images of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from supernet.data.batches import images_at
from supernet.data.dataset import SplitImages
from supernet.samples import Samples
from supernet.task import Comparison, Task

BATCH = 64
MOST_BYTES = 512 << 20
"""Of decoded images that are kept."""
MOST_LOSS = {"classification": 0.005, "regression": 0.5}
"""Default of the accuracy gate by task: half a point of top1, half a dB."""

Outputs = NDArray[np.float32]


@dataclass(frozen=True)
class Outcome:
    """What one form of a child makes of the images of a split: outputs as fp32 gives them, and the task's scores, (N,)."""

    outputs: Outputs
    scores: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far one form of a child is from another, on `images` images of the split `split`.

    `difference` is the largest absolute difference of an output, `relative` that over the largest output; `agreement` the fraction
    of images with the same class (None where nothing is classified); `change` the score's, paired, with 95 % interval and p.
    """

    split: str
    images: int
    difference: float
    relative: float
    agreement: float | None
    score: float
    change: Comparison

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        change = self.change
        return {
            "split": self.split, "images": self.images, "difference": self.difference, "relative_difference": self.relative,
            **({} if self.agreement is None else {"agreement": self.agreement}), "score": self.score,
            "change": change.difference, "change_low": change.low, "change_high": change.high, "p_value": change.p_value,
        }  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Images of a split as a child of `resolution` reads them, and what they should give."""

    split: SplitImages
    resolution: int
    task: Task
    most: int | None = None
    """Only the first so many."""
    _kept: list[NDArray[np.uint8]] = field(default_factory=list, repr=False, compare=False)

    def pixels(self) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        """Pixels, (n, H, W, C), and labels, (n,), batch by batch; the first are decoded once, as many as there is room for."""
        split, count = self.split, min(len(self.split), self.most or len(self.split))
        prepared = split.preprocessing(self.resolution)
        for number, start in enumerate(range(0, count, BATCH)):
            stop = min(start + BATCH, count)
            if number < len(self._kept):
                found = self._kept[number]
            else:
                found = images_at(split.source, split.indices[start:stop], prepared)
                if number == len(self._kept) and sum(part.nbytes for part in (*self._kept, found)) <= MOST_BYTES:
                    self._kept.append(found)
            yield found, split.labels[start:stop]

    def outcome(self, run: Callable[[Outputs], Outputs]) -> Outcome:
        """Of a form that takes normalised images, (n, C, H, W)."""
        prepared = self.split.preprocessing(self.resolution)
        return self._outcome(lambda pixels: run(prepared.normalise(pixels)))

    def outcome_of_pixels(self, run: Callable[[NDArray[np.uint8]], Outputs]) -> Outcome:
        """Of a form that takes pixels, (n, H, W, C); its outputs must be those of the others."""
        return self._outcome(run)

    def samples(self, run: Callable[[Outputs], Outputs]) -> Samples:
        """What a form that takes normalised images does on every image (`Task.samples`), columns of shape (N,)."""
        prepared, found = self.split.preprocessing(self.resolution), list[dict[str, torch.Tensor]]()
        for pixels, labels in self.pixels():
            images = prepared.normalise(pixels)
            targets = self.task.targets(torch.from_numpy(images), torch.from_numpy(labels))
            found.append(self.task.samples(torch.from_numpy(run(images)), targets))
        return {name: torch.cat([part[name] for part in found]).numpy() for name in self.task.columns}

    def _outcome(self, run: Callable[[NDArray[np.uint8]], Outputs]) -> Outcome:
        prepared, outputs, scores = self.split.preprocessing(self.resolution), [], []
        for pixels, labels in self.pixels():
            found = run(pixels)
            targets = self.task.targets(torch.from_numpy(prepared.normalise(pixels)), torch.from_numpy(labels))
            scores.append(self.task.scores(torch.from_numpy(found), targets).numpy())
            outputs.append(found)
        return Outcome(np.concatenate(outputs), np.concatenate(scores))


def written(change: float, task: Task) -> str:
    """A change of the mean score in words, with its sign: points of a fraction, or the score's own unit."""
    return f"{100 * change:+.2f} points" if task.unit == "%" else f"{change:+.3g} {task.unit}"


def agreement(images: Images, expected: Outcome, found: Outcome) -> Agreement:
    """How far `found` is from `expected`."""
    scale = float(np.abs(expected.outputs).max())
    finite = np.isfinite(found.outputs).all()
    difference = float(np.abs(expected.outputs - found.outputs).max()) if finite else float("inf")
    same = (expected.outputs.argmax(1) == found.outputs.argmax(1)).mean() if expected.outputs.ndim == 2 else None
    return Agreement(
        images.split.name, len(found.outputs), difference, difference / max(scale, 1e-30), None if same is None else float(same),
        float(found.scores.mean(dtype=np.float64)), images.task.compare(found.scores, expected.scores),
    )  # fmt: skip
