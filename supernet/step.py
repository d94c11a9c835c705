"""One optimiser step of a supernet: the method of BigNAS on a screen.

The largest child learns from the task's targets (labels, or images) and teaches; the others learn from it on the same crops at
their own resolutions. Gradients are *summed* over the children (weight decay is applied once, by the optimizer), child by child,
so that peak memory is that of the largest child. Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from supernet.arch import Arch
from supernet.losses import SOFT, Distillation, resized
from supernet.model import Supernet
from supernet.norms import OF_BATCH, Statistics
from supernet.task import Task


@dataclass(frozen=True, slots=True)
class StepConfig:
    """What a step does beside the plain rule."""

    soft_weight: float = 1.0
    distillation: Distillation = SOFT
    label_smoothing: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    regularise_all: bool = False
    """Dropout and drop-path also for the students; else they are the largest child's alone."""
    mean: bool = False
    """Mean of the children's gradients, instead of their sum."""
    bf16: bool = False
    statistics: Statistics = OF_BATCH
    """What batch norm takes its statistics over."""
    micro_batch: int | None = None
    """Images that go through a child at once; None: all."""
    share: float = 1.0
    """Of the step's images, the fraction that these are: others are seen by other processes."""


@dataclass(frozen=True, slots=True)
class ChildResult:
    """How a child did on the batch: its own loss to the targets (never only the surrogate), and its mean score.

    Both are scalars on the device: reading them waits for it.
    """

    role: str
    loss: Tensor
    score: Tensor


class Resizer:
    """The batch at every resolution that is asked for, each made once: bicubic with antialiasing from the same crops."""

    def __init__(self, images_nchw: Tensor) -> None:
        self.images = {images_nchw.shape[-1]: images_nchw}
        self.largest = images_nchw.shape[-1]

    def at(self, resolution: int) -> Tensor:
        """The images at `resolution` pixels."""
        if resolution not in self.images:
            images = resized(self.images[self.largest], resolution)
            self.images[resolution] = images.contiguous(memory_format=torch.channels_last)
        return self.images[resolution]


def train_step(
    supernet: Supernet, children: Sequence[tuple[str, Arch]], images_nchw: Tensor, targets: Tensor, task: Task, config: StepConfig,
    *, crops: Resizer | None = None, child: Callable[..., Callable[[Tensor], Tensor]] | None = None,
) -> list[ChildResult]:  # fmt: skip
    """Add the gradients of one step to the supernet's parameters; the caller clears them before and steps after.

    `images_nchw` are normalised crops at the largest resolution; what each child should make of them and their `targets` (labels,
    shape (N,), or probabilities, shape (N, K)) says the task. `children` begin with the teacher (`sandwich`). `crops` are the
    images where they were resized before; `child` gives a child another way than `supernet.child` (compiled). Random draws
    (dropout) come from torch's generator: seed it with the step for a reproducible run.

    In micro-batches, each loss is weighted by its part of the images, so the gradient is that of the whole, save that batch norm
    sees the parts (`StepConfig.statistics` makes it see equal groups either way).
    """
    crops, child, results = crops or Resizer(images_nchw), child or supernet.child, []
    parts = _parts(len(images_nchw), config.micro_batch)
    scale = config.share / (len(children) if config.mean else 1)
    soft: list[Tensor] = []
    for position, (role, arch) in enumerate(children):
        images = crops.at(supernet.space.resolution(arch))
        regularised = position == 0 or config.regularise_all
        network = child(
            arch, dropout=config.dropout * regularised, drop_path=config.drop_path * regularised, statistics=config.statistics
        )
        losses, scores = [], []
        for number, part in enumerate(parts):
            own = task.targets(images[part], targets[part])
            with _precision(images, config.bf16):
                outputs = network(images[part])
                if position == 0:
                    loss = task.label_loss(outputs, own, config.label_smoothing)
                    soft.append(task.soft_targets(outputs, config.distillation))
                else:
                    loss = task.student_loss(outputs, own, soft[number], config.soft_weight, config.distillation)
            weight = len(own) / len(images)
            (loss * (weight * scale)).backward()  # type: ignore[no-untyped-call]
            losses.append(weight * task.label_loss(outputs.detach(), own))
            scores.append(weight * task.scores(outputs.detach(), own).float().mean())
        results.append(ChildResult(role, torch.stack(losses).sum(), torch.stack(scores).sum()))
    return results


def losses_without_gradients(
    supernet: Supernet,
    archs: Sequence[Arch],
    images_nchw: Tensor,
    targets: Tensor,
    task: Task,
    config: StepConfig,
    crops: Resizer,
) -> Tensor:
    """Loss of each arch on the batch to its own targets, shape (archs,), times the share of the images that these are."""
    found = []
    with torch.no_grad():
        for arch in archs:
            images, network = crops.at(supernet.space.resolution(arch)), supernet.child(arch, statistics=config.statistics)
            for part in _parts(len(images), config.micro_batch):
                with _precision(images, config.bf16):
                    loss = task.label_loss(network(images[part]), task.targets(images[part], targets[part]))
                found.append(loss * (len(targets[part]) / len(images) * config.share))
    return torch.stack(found).view(len(archs), -1).sum(1)


def _parts(images: int, micro_batch: int | None) -> list[slice]:
    size = micro_batch or images
    return [slice(start, start + size) for start in range(0, images, size)]


def _precision(images: Tensor, bf16: bool) -> AbstractContextManager[object]:
    """bf16 matrix work where asked for; batch norm and losses stay in fp32."""
    return torch.autocast(images.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def normalised(pixels_nchw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images, shape (N, C, H, W), as the network's fp32 input: (x / 255 - mean) / std, channels last in memory."""
    return ((pixels_nchw.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
