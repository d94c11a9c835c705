"""How good a child is: extract it, calibrate the copy on training images, score every image of a split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supernet.arch import Arch
from supernet.calibrate import calibrate
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.device import fitting_threads
from supernet.model import Supernet
from supernet.step import normalised
from supernet.task import Scores, Task

CALIBRATION_BATCH = 256


@dataclass(frozen=True)
class Evaluator:
    """Calibrates and scores children of a supernet.

    Images are prepared exactly as at deployment (`supernet.preprocess`), at each child's own resolution.
    """

    supernet: Supernet
    task: Task
    train: SplitImages
    calibration_images: int = 2048
    batch_size: int = 256

    def calibrated(self, arch: Arch) -> nn.Sequential:
        """An extracted copy with statistics of its own, in evaluation mode."""
        network = self.supernet.extract(arch).to(memory_format=torch.channels_last)
        pixels = torch.from_numpy(self.train.pixels(self.supernet.space.resolution(arch), self.calibration_images))
        size = min(CALIBRATION_BATCH, len(pixels))
        whole = len(pixels) // size * size  # equal batches weigh the same
        with fitting_threads(self._largest_macs):
            return calibrate(network, self._batches(pixels[:whole], size))

    def scores(self, network: nn.Module, resolution: int, split: SplitImages) -> Scores:
        """The task's score of every image of `split`, shape (images,), in the split's order."""
        pixels, labels = torch.from_numpy(split.pixels(resolution)), torch.from_numpy(split.labels).to(self._device)
        found = []
        with torch.no_grad(), fitting_threads(self._largest_macs):
            for position, images in enumerate(self._batches(pixels, self.batch_size)):
                start = position * self.batch_size
                targets = self.task.targets(images, labels[start : start + len(images)])
                found.append(self.task.scores(network(images), targets))
        scores: Scores = torch.cat(found).cpu().numpy()
        return scores

    def evaluate(self, arch: Arch, split: SplitImages) -> Scores:
        """Calibrate and score one child."""
        return self.scores(self.calibrated(arch), self.supernet.space.resolution(arch), split)

    @property
    def _largest_macs(self) -> int:
        space = self.supernet.space
        return arch_costs(space, space.largest)["macs"]

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    def _batches(self, pixels_nhwc: Tensor, size: int) -> Iterator[Tensor]:
        mean, std = (torch.tensor(value, device=self._device).view(1, -1, 1, 1) for value in (self.train.mean, self.train.std))
        for part in torch.split(pixels_nhwc, size):
            yield normalised(part.to(self._device).permute(0, 3, 1, 2), mean, std)
