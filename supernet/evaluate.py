"""How good a child is: extract it, calibrate the copy on training images, score every image of a split.

In a job of several processes the batches and images are divided among them, and every process gets all scores.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from supernet.arch import Arch
from supernet.calibrate import calibrate
from supernet.costs import arch_costs
from supernet.data.dataset import SplitImages
from supernet.device import fitting_threads
from supernet.distributed import ALONE, World
from supernet.model import Supernet
from supernet.samples import Samples, pack, unpack
from supernet.step import normalised
from supernet.task import Scores, Task

CALIBRATION_BATCH = 256


@dataclass(frozen=True)
class Evaluator:
    """Calibrates and scores children of a supernet.

    Images are prepared exactly as at deployment (`supernet.preprocess`), at each child's own resolution. In a job of several
    processes each has the same weights, and calls the same methods in the same order; the results are the same in all.
    """

    supernet: Supernet
    task: Task
    train: SplitImages
    calibration_images: int = 2048
    batch_size: int = 256
    world: World = ALONE
    _parts: dict[tuple[int, range], tuple[SplitImages, SplitImages]] = field(default_factory=dict, repr=False, compare=False)

    def calibrated(self, arch: Arch) -> nn.Sequential:
        """An extracted copy with statistics of its own, in evaluation mode."""
        network = self.supernet.extract(arch).to(memory_format=torch.channels_last)
        images = min(self.calibration_images, len(self.train))
        size = min(CALIBRATION_BATCH, images)
        own = self.world.share(images // max(1, size))  # whole batches: equal ones weigh the same
        pixels = self._pixels(self.train, range(own.start * size, own.stop * size), self.supernet.space.resolution(arch))
        with fitting_threads(self._largest_macs):
            return calibrate(network, self._batches(pixels, size), self.world)

    def scores(self, network: nn.Module, resolution: int, split: SplitImages) -> Scores:
        """The task's score of every image of `split`, shape (images,), in the split's order."""
        own = self._measured(network, resolution, split, lambda outputs, targets: {"": self.task.scores(outputs, targets)})
        if self.world.size == 1 and own is not None:
            return own[""]
        saved = io.BytesIO()
        np.save(saved, np.empty(0, bool) if own is None else own[""], allow_pickle=False)
        parts = [
            np.load(io.BytesIO(part), allow_pickle=False) for part, count in self._of_all(saved.getvalue(), len(split)) if count
        ]
        return np.concatenate(parts) if parts else np.empty(0, bool)

    def samples(self, network: nn.Module, resolution: int, split: SplitImages) -> Samples:
        """What the network does on every image of `split` (`Task.samples`), columns of shape (images,), in the split's order."""
        own = self._measured(network, resolution, split, self.task.samples)
        if self.world.size == 1 and own is not None:
            return own
        packed = b"" if own is None else pack(own, self.task.columns)
        parts = [unpack(part, count, self.task.columns) for part, count in self._of_all(packed, len(split)) if count]
        none = {name: np.empty(0, np.dtype(dtype).newbyteorder("=")) for name, dtype in self.task.columns.items()}
        return {name: np.concatenate([empty, *(part[name] for part in parts)]) for name, empty in none.items()}

    def evaluate(self, arch: Arch, split: SplitImages) -> Scores:
        """Calibrate and score one child."""
        return self.scores(self.calibrated(arch), self.supernet.space.resolution(arch), split)

    def prepared(self, pixels_nhwc: Tensor) -> Tensor:
        """uint8 pixels, shape (N, H, W, C), as the children's input: normalised, shape (N, C, H, W), where the weights are."""
        mean, std = (torch.tensor(value, device=self._device).view(1, -1, 1, 1) for value in (self.train.mean, self.train.std))
        weight = next(self.supernet.parameters())
        return normalised(pixels_nhwc.to(weight.device).permute(0, 3, 1, 2), mean, std).to(weight.dtype)

    def _measured(
        self, network: nn.Module, resolution: int, split: SplitImages, measure: Callable[[Tensor, Tensor], dict[str, Tensor]]
    ) -> dict[str, NDArray[Any]] | None:
        """What `measure` makes of outputs and targets, over this process's images of `split`; None where it has none."""
        own = self.world.share(len(split))
        pixels = self._pixels(split, own, resolution)
        labels = torch.from_numpy(split.labels[own.start : own.stop]).to(self._device)
        found = []
        with torch.no_grad(), fitting_threads(self._largest_macs):
            for position, images in enumerate(self._batches(pixels, self.batch_size)):
                start = position * self.batch_size
                targets = self.task.targets(images, labels[start : start + len(images)])
                found.append(measure(network(images), targets))
        return {name: torch.cat([part[name] for part in found]).cpu().numpy() for name in found[0]} if found else None

    def _of_all(self, packed: bytes, images: int) -> Iterator[tuple[bytes, int]]:
        """What every process gives, in the order of ranks, with its number of images."""
        for rank, part in enumerate(self.world.gather(packed)):
            yield part, len(World(rank, self.world.size).share(images))

    def _pixels(self, split: SplitImages, own: range, resolution: int) -> Tensor:
        """This process's images of `split`, shape (images, H, W, C); the others are not even read."""
        if not own:
            return torch.empty(0, 0, 0, 0, dtype=torch.uint8)
        if own.start == 0:
            return torch.from_numpy(split.pixels(resolution, own.stop))
        if (id(split), own) not in self._parts:
            part = replace(split, indices=split.indices[own.start : own.stop], _cache={})
            self._parts[id(split), own] = split, part
        return torch.from_numpy(self._parts[id(split), own][1].pixels(resolution))

    @property
    def _largest_macs(self) -> int:
        space = self.supernet.space
        return arch_costs(space, space.largest)["macs"]

    @property
    def _device(self) -> torch.device:
        return next(self.supernet.parameters()).device

    def _batches(self, pixels_nhwc: Tensor, size: int) -> Iterator[Tensor]:
        for part in torch.split(pixels_nhwc, max(1, size)) if len(pixels_nhwc) else ():
            yield self.prepared(part)
