"""One optimiser step of a supernet: the method of BigNAS on a screen.

The largest child learns from the task's targets (labels, or images) and teaches; the others learn from it on the same crops at
their own resolutions. Gradients are *summed* over the children (weight decay is applied once, by the optimizer), child by child,
so that peak memory is that of the largest child. Axes: N batch, C channels, H W space.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from supernet.arch import Arch
from supernet.losses import resized
from supernet.model import Supernet
from supernet.task import Task


@dataclass(frozen=True, slots=True)
class StepConfig:
    """What a step does beside the plain rule. Rates of regularisation hold for the largest child only."""

    soft_weight: float = 1.0
    label_smoothing: float = 0.0
    dropout: float = 0.0
    drop_path: float = 0.0
    bf16: bool = False


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
    supernet: Supernet,
    children: Sequence[tuple[str, Arch]],
    images_nchw: Tensor,
    labels: Tensor,
    task: Task,
    config: StepConfig,
) -> list[ChildResult]:
    """Add the gradients of one step to the supernet's parameters; the caller clears them before and steps after.

    `images_nchw` are normalised crops at the largest resolution; what each child should make of them and their `labels` says the
    task. `children` begin with the teacher (`sandwich`). Random draws
    (dropout) come from torch's generator: seed it with the step for a reproducible run.
    """
    crops, space, results = Resizer(images_nchw), supernet.space, []
    soft: Tensor | None = None
    for role, arch in children:
        images = crops.at(space.resolution(arch))
        targets = task.targets(images, labels)
        with _precision(images, config.bf16):
            if soft is None:
                outputs = supernet.child(arch, dropout=config.dropout, drop_path=config.drop_path)(images)
                loss = task.label_loss(outputs, targets, config.label_smoothing)
                soft = task.soft_targets(outputs)
            else:
                outputs = supernet.child(arch)(images)
                loss = task.student_loss(outputs, targets, soft, config.soft_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        results.append(_result(role, outputs.detach(), targets, task))
    return results


def _result(role: str, outputs: Tensor, targets: Tensor, task: Task) -> ChildResult:
    return ChildResult(role, task.label_loss(outputs, targets), task.scores(outputs, targets).float().mean())


def _precision(images: Tensor, bf16: bool) -> AbstractContextManager[object]:
    """bf16 matrix work where asked for; batch norm and losses stay in fp32."""
    return torch.autocast(images.device.type, dtype=torch.bfloat16) if bf16 else nullcontext()


def normalised(pixels_nchw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images, shape (N, C, H, W), as the network's fp32 input: (x / 255 - mean) / std, channels last in memory."""
    return ((pixels_nchw.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)
