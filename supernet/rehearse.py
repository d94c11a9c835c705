"""What a run would cost, before it is begun: work and memory counted, time from a few steps that are really made."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from supernet import defaults
from supernet.model import Supernet
from supernet.optimizer import make_optimizer
from supernet.run import Run
from supernet.train import Progress, train

STEPS = 8
MEASURED = 8
"""Images on which activations are measured; they grow with the images."""
SECONDS = 30.0
"""Steps that are timed after the first one, which warms up; fewer where they take longer than this in all."""


@dataclass(frozen=True)
class Rehearsal:
    """What training would take. Bytes, multiply-accumulates, seconds."""

    steps: int
    images_per_step: int
    macs_per_step: int
    """Forward and backward of all children."""
    memory_bytes: dict[str, int]
    """By what it holds; "activations" are those of the largest child at the images that go through at once."""
    seconds_per_step: float
    """Median of the timed steps, with reading the images."""
    timed_steps: int

    @property
    def seconds(self) -> float:
        """Of the whole run, without the looks at held-out images and the checkpoints."""
        return self.steps * self.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "steps": self.steps, "images_per_step": self.images_per_step, "macs_per_step": self.macs_per_step,
            "memory_bytes": self.memory_bytes, "seconds_per_step": self.seconds_per_step, "timed_steps": self.timed_steps,
            "images_per_s": self.images_per_step / self.seconds_per_step, "seconds": self.seconds,
        }  # fmt: skip


class _Enough(Exception):
    pass


def rehearse(run: Run, *, device: str = "cpu", workers: int = 0) -> Rehearsal:
    """Train a few steps of `run`, which is not begun yet and is good for nothing else afterwards."""
    told: list[tuple[float, Progress]] = []

    def progress(now: Progress) -> None:
        told.append((time.perf_counter(), now))
        if len(told) > STEPS or (len(told) > 1 and told[-1][0] - told[0][0] > SECONDS):
            raise _Enough

    began = time.perf_counter()
    with contextlib.suppress(_Enough):
        train(run, device=device, workers=workers, progress=progress)
    moments = [moment for moment, _ in told]
    took = [later - earlier for earlier, later in itertools.pairwise(moments)] or [moments[0] - began]
    now = told[0][1]
    macs = round(defaults.training_macs(run.space, run.recipe.children) * now.images)
    return Rehearsal(now.steps, now.images, macs, memory(run, now.images, device), statistics.median(took), len(took))


def memory(run: Run, images: int, device: str = "cpu") -> dict[str, int]:
    """Bytes that training holds: weights, gradients, the optimizer's state, the moving average, activations and images."""
    recipe, space = run.recipe, run.space
    supernet = Supernet(space).to(device)
    weights = sum(parameter.nbytes for parameter in supernet.parameters())
    at_once = recipe.micro_batch or images
    some = min(at_once, MEASURED)
    pixels = torch.zeros(some, space.family.in_channels, space.largest_resolution, space.largest_resolution, device=device)
    child = supernet.child(space.largest, dropout=recipe.dropout, drop_path=recipe.drop_path)
    activations = _saved_bytes(supernet, child, pixels, recipe.precision == "bf16") * at_once // some
    optimizer = make_optimizer(supernet, recipe)
    for parameter in supernet.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {"weights": weights, "gradients": weights, "optimizer": sum(states), "average": weights if recipe.ema else 0,
            "activations": activations, "images": images * pixels[0].nbytes}  # fmt: skip


def _saved_bytes(supernet: Supernet, child: torch.nn.Module, pixels: Tensor, bf16: bool) -> int:
    """Bytes of what a forward pass keeps for the backward pass, each storage once, without the weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in supernet.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(value)  # or another tensor might take its place
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
    with hooks, torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=bf16):
        child(pixels)
    return sum(kept.values())
